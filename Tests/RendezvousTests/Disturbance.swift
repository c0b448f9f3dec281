import Arena
import CPlatform
import Glibc

@testable import Rendezvous

/// A TCP connection that does as it likes.
struct RawConnection {
  let descriptor: Descriptor

  /// Nil where nobody listens.
  init?(to address: SocketAddress) {
    let raw = address.withPointer { swiftep_connect_tcp($0, $1) }
    if raw < 0 { return nil }
    descriptor = Descriptor(owning: raw)
    var polled = [pollfd(fd: raw, events: Int16(POLLOUT), revents: 0)]
    poll(&polled, 1, 1000)
    if swiftep_connection_error(raw) != 0 { return nil }
  }

  func send(_ bytes: [UInt8]) { _ = swiftep_send(descriptor.raw, bytes, bytes.count, -1) }

  /// What comes within a second.
  func receive() -> [UInt8] {
    var polled = [pollfd(fd: descriptor.raw, events: Int16(POLLIN), revents: 0)]
    poll(&polled, 1, 1000)
    return StreamSocket(descriptor).receive() ?? []
  }

  /// The other end's next write fails.
  func reset() {
    var option = linger(l_onoff: 1, l_linger: 0)
    setsockopt(descriptor.raw, SOL_SOCKET, SO_LINGER, &option, socklen_t(MemoryLayout<linger>.size))
  }
}

/// Somebody else's listener, which never says anything.
struct SilentListener {
  let descriptor: Descriptor

  init?(at address: SocketAddress) {
    let raw = address.withPointer { swiftep_listen_tcp($0, $1) }
    if raw < 0 { return nil }
    descriptor = Descriptor(owning: raw)
  }
}

/// Where a place without an address listens first.
func firstPort(of token: Token, _ index: Int = 0) -> UInt16 { token.key(for: "").ports(count: index + 1)[index] }
