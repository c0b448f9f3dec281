import Glibc

/// Where several writers' lines go out, in order and whole, by a descriptor that may block and that others use too. It is
/// never waited for here: what it does not take is kept.
final class Outlet {
  let descriptor: Int32
  private var pending: [UInt8] = []
  private var writtenCount = 0
  /// Nobody reads any more.
  private(set) var isBroken = false

  /// What a pipe with any room takes without blocking.
  private static let portionByteCount = 4096
  private static let pendingByteCountMax = 1 << 20

  init(_ descriptor: Int32) { self.descriptor = descriptor }

  var isEmpty: Bool { writtenCount == pending.count }
  /// Whether its writers have to wait.
  var isFull: Bool { pending.count - writtenCount > Self.pendingByteCountMax }

  func add(_ bytes: [UInt8]) {
    if isBroken { return }
    pending += bytes
    flush()
  }

  func flush() {
    while !isEmpty && isReady {
      let count = pending[writtenCount...].prefix(Self.portionByteCount).withUnsafeBytes {
        write(descriptor, $0.baseAddress, $0.count)
      }
      if count < 0 && (errno == EINTR || errno == EAGAIN) { continue }
      if count < 0 { isBroken = true }
      writtenCount = isBroken ? pending.count : writtenCount + count
    }
    if isEmpty || writtenCount > Self.pendingByteCountMax {
      pending.removeFirst(writtenCount)
      writtenCount = 0
    }
  }

  private var isReady: Bool {
    var entry = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
    return poll(&entry, 1, 0) == 1
  }
}
