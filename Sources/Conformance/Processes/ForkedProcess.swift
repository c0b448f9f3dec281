import Arena
import CPlatform
import Glibc
import HostMachine

/// A child of this process that runs a closure on a copy of its memory. It is killed and reaped when the last reference
/// to this is gone, and dies with the thread that made it.
///
/// Of this process's threads the child has the calling one only: what the closure uses must not rely on another, nor
/// on a lock that another may hold now. A process without other threads is safe; one whose others wait is, too.
package final class ForkedProcess: Sendable {
  /// How a process has ended.
  package enum End: Equatable, Sendable, CustomStringConvertible {
    case exit(code: Int32)
    case signal(Int32)

    package var description: String {
      switch self {
      case .exit(let code): "exit code \(code)"
      case .signal(let signal): "signal \(signal)"
      }
    }
  }

  package let id: pid_t
  package let channel: Channel
  private let end = Guarded<End?>(nil)

  /// - Parameter body: what the child does; its exit code.
  package init(_ body: @escaping (Channel) -> Int32) throws(SystemCallError) {
    let (ours, theirs) = try Channel.makePair()
    // The child closes everything that is guarded from forks, its own end too, but for a copy.
    let copy = try systemCall("dup") { swiftep_duplicate(theirs.descriptor.raw) }
    let child = Child { body(Channel(Descriptor(owning: copy))) }
    id = swiftep_fork(
      { Unmanaged<Child>.fromOpaque($0!).takeUnretainedValue().body() }, Unmanaged.passUnretained(child).toOpaque())
    let code = errno
    close(copy)
    channel = ours
    if id < 0 { throw SystemCallError(call: "fork", code: code) }
  }

  private final class Child {
    let body: () -> Int32
    init(_ body: @escaping () -> Int32) { self.body = body }
  }

  deinit {
    if id > 0 && end.withLock({ $0 == nil }) {
      kill(SIGKILL)
      _ = wait(until: .max)
    }
  }

  package func kill(_ signal: Int32) { end.withLock { if $0 == nil { _ = Glibc.kill(id, signal) } } }

  /// Waits for the process to end; nil when `deadline` (`monotonicNow`) passes first.
  package func wait(until deadline: UInt64) -> End? {
    while true {
      let found = end.withLock { end in
        var status: Int32 = 0
        if end == nil, waitpid(id, &status, WNOHANG) == id {
          end = status & 0x7f == 0 ? .exit(code: status >> 8 & 0xff) : .signal(status & 0x7f)
        }
        return end
      }
      if found != nil || monotonicNow() >= deadline { return found }
      usleep(500)
    }
  }
}
