import CPlatform
import Glibc

/// What a rank writes to its stdout or stderr, on its way to the launcher's.
final class TaggedStream {
  let rank: Int
  let outlet: Outlet
  /// Nil when no more comes.
  private(set) var pipe: OpenFile?
  private var tagger: LineTagger

  private static let portionByteCount = 1 << 16

  init(rank: Int, _ pipe: OpenFile, to outlet: Outlet) {
    (self.rank, self.pipe, self.outlet) = (rank, pipe, outlet)
    tagger = LineTagger(rank: rank)
  }

  /// Takes a portion of what has come.
  func read() { _ = take(atMost: Self.portionByteCount) }

  /// Takes what is in the pipe now, and no more: somebody may have the other end for as long as they like.
  func drain() {
    var left: Int32 = 0
    if let pipe { _ = swiftep_available_byte_count(pipe.raw, &left) }
    while left > 0 {
      let count = take(atMost: Int(left))
      if count == 0 { break }
      left -= Int32(count)
    }
  }

  func finish() {
    drain()
    end()
  }

  private func take(atMost byteCount: Int) -> Int {
    guard let pipe else { return 0 }
    var bytes = [UInt8](repeating: 0, count: min(byteCount, Self.portionByteCount))
    let count = Glibc.read(pipe.raw, &bytes, bytes.count)
    if count < 0 && (errno == EAGAIN || errno == EINTR) { return 0 }
    if count <= 0 {
      end()
      return 0
    }
    outlet.add(tagger.tagged(bytes[..<count]))
    return count
  }

  private func end() {
    outlet.add(tagger.rest())
    pipe = nil
  }
}
