import Arena
import CPlatform
import Glibc

/// A connected TCP socket that never blocks, with what is to be sent over it.
struct StreamSocket {
  let descriptor: Descriptor
  private var output: [UInt8] = []

  init(_ descriptor: Descriptor) { self.descriptor = descriptor }

  var hasOutput: Bool { !output.isEmpty }

  mutating func enqueue(_ bytes: [UInt8]) { output += bytes }

  enum Progress {
    case done, blocked, ended
  }

  /// Sends what is queued, as far as the system takes it.
  mutating func flush() -> Progress {
    var sentCount = 0
    defer { output.removeFirst(sentCount) }
    while sentCount < output.count {
      let count = output[sentCount...].withUnsafeBytes { swiftep_send(descriptor.raw, $0.baseAddress!, $0.count, -1) }
      if count >= 0 {
        sentCount += count
      } else if errno == EAGAIN || errno == ENOBUFS {
        return .blocked
      } else if errno != EINTR {
        return .ended
      }
    }
    return .done
  }

  /// What has come, at most 64 KiB; nil when the connection has ended.
  func receive() -> [UInt8]? {
    while true {
      var (attachment, isCut): (Int32, Bool) = (-1, false)
      var (count, code) = (0, 0 as Int32)
      let bytes = [UInt8](unsafeUninitializedCapacity: 1 << 16) { buffer, initializedCount in
        count = swiftep_receive(descriptor.raw, buffer.baseAddress!, buffer.count, &attachment, &isCut)
        code = errno
        initializedCount = max(0, count)
      }
      if count > 0 { return bytes }
      if count < 0 && code == EINTR { continue }
      return count < 0 && code == EAGAIN ? [] : nil
    }
  }
}
