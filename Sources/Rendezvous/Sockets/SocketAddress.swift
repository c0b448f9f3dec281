import Glibc

/// Where a TCP socket listens.
struct SocketAddress: Equatable, Sendable, CustomStringConvertible {
  private let storage: [UInt8]
  /// In numbers.
  let description: String

  /// - Parameter bytes: a `sockaddr`, as long as its family has it.
  init(_ bytes: UnsafeRawBufferPointer) {
    storage = Array(bytes)
    var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
    var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
    let status = bytes.withMemoryRebound(to: sockaddr.self) { address in
      getnameinfo(
        address.baseAddress!, socklen_t(bytes.count), &host, socklen_t(host.count), &port, socklen_t(port.count),
        NI_NUMERICHOST | NI_NUMERICSERV)
    }
    let (hostText, portText) = (Self.text(host), Self.text(port))
    description =
      status != 0 ? "an address" : hostText.contains(":") ? "[\(hostText)]:\(portText)" : "\(hostText):\(portText)"
  }

  private static func text(_ characters: [CChar]) -> String {
    String(decoding: characters.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  static func loopback(port: UInt16) -> SocketAddress {
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
    return withUnsafeBytes(of: address) { SocketAddress($0) }
  }

  static func loopback6(port: UInt16) -> SocketAddress {
    var address = sockaddr_in6()
    address.sin6_family = sa_family_t(AF_INET6)
    address.sin6_port = port.bigEndian
    address.sin6_addr = in6addr_loopback
    return withUnsafeBytes(of: address) { SocketAddress($0) }
  }

  func withPointer<Result>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Result) -> Result {
    // SAFETY: the copy is aligned for every family, and outlives the call.
    var aligned = sockaddr_storage()
    withUnsafeMutableBytes(of: &aligned) { $0.copyBytes(from: storage) }
    return withUnsafePointer(to: &aligned) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(storage.count)) }
    }
  }
}
