import CPlatform
import Glibc

/// An open file, socket or memory file, closed when the last reference to it is gone. A forked child does not have it.
package final class Descriptor: Sendable {
  package let raw: Int32
  private let isGuarded: Bool

  /// Takes over an open descriptor.
  package init(owning raw: Int32) {
    self.raw = raw
    isGuarded = swiftep_guard_from_forks(raw) == 0
  }

  /// - Parameter call: the system call that `body` makes, for the error.
  package convenience init(_ call: String, _ body: () -> Int32) throws(SystemCallError) {
    self.init(owning: try systemCall(call, body))
  }

  deinit {
    if isGuarded { swiftep_close_guarded(raw) } else { close(raw) }
  }
}

/// A system call that failed.
package struct SystemCallError: Error, Equatable {
  package let call: String
  package let code: Int32

  package init(call: String, code: Int32) {
    self.call = call
    self.code = code
  }
}

/// What the call returns; again as long as it is interrupted, an error where it returns -1.
@discardableResult
package func systemCall(_ name: String, _ body: () -> Int32) throws(SystemCallError) -> Int32 {
  while true {
    let result = body()
    if result != -1 { return result }
    if errno != EINTR { throw SystemCallError(call: name, code: errno) }
  }
}
