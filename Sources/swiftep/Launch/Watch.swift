import Arena
import CPlatform
import HostMachine

/// Waits for everything that a launcher may have to do something about.
final class Watch {
  enum Source: Equatable {
    case signals, output, errors, terminal, input
    case rank(Int)
    case stream(Int)
  }

  private let file: OpenFile
  private var watched: Set<Int32> = []
  private var keys = [UInt64](repeating: 0, count: 64)
  /// The last wait may not have returned all that was ready.
  private(set) var mayHaveMore = false

  init() throws(SystemCallError) { file = try OpenFile("epoll_create") { swiftep_make_watch() } }

  func add(_ descriptor: Int32, _ source: Source, forWriting: Bool = false) throws(SystemCallError) {
    try systemCall("epoll_ctl") { swiftep_watch(file.raw, descriptor, forWriting, source.key) }
    watched.insert(descriptor)
  }

  func remove(_ descriptor: Int32) {
    if watched.remove(descriptor) != nil { _ = swiftep_unwatch(file.raw, descriptor) }
  }

  /// Files that are always ready cannot be watched, and need not be.
  func set(_ descriptor: Int32, _ source: Source, isWatched: Bool, forWriting: Bool = false) {
    if isWatched == watched.contains(descriptor) { return }
    if isWatched { try? add(descriptor, source, forWriting: forWriting) } else { remove(descriptor) }
  }

  /// What is ready, in the order in which it became so; nothing when the deadline has passed, or earlier.
  func wait(until deadline: UInt64?) -> [Source] {
    var milliseconds: Int32 = -1
    if let deadline {
      let now = monotonicNow()
      milliseconds = deadline <= now ? 0 : Int32(min((deadline - now) / 1_000_000 + 1, 60_000))
    }
    let count = Int(swiftep_await_ready(file.raw, &keys, Int32(keys.count), milliseconds))
    mayHaveMore = count == keys.count
    return keys.prefix(max(0, count)).map { Source(key: $0) }
  }
}

extension Watch.Source {
  fileprivate var key: UInt64 {
    switch self {
    case .signals: 0
    case .output: 1
    case .errors: 2
    case .terminal: 3
    case .input: 4
    case .rank(let index): 1 << 32 | UInt64(index)
    case .stream(let index): 2 << 32 | UInt64(index)
    }
  }

  fileprivate init(key: UInt64) {
    let index = Int(key & 0xffff_ffff)
    switch key >> 32 {
    case 1: self = .rank(index)
    case 2: self = .stream(index)
    default: self = [.signals, .output, .errors, .terminal, .input][index]
    }
  }
}
