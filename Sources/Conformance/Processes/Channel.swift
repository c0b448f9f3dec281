import Arena
import CPlatform
import FoundationEssentials
import Glibc
import HostMachine

/// One end of a connection between a process and one that it has forked: whole messages, in order.
package final class Channel: Sendable {
  package struct Closed: Error {}
  package struct Late: Error {}

  let descriptor: Descriptor

  init(_ descriptor: Descriptor) { self.descriptor = descriptor }

  /// Both ends of a new connection.
  static func makePair() throws(SystemCallError) -> (Channel, Channel) {
    var ends: (Int32, Int32) = (-1, -1)
    try systemCall("socketpair") {
      withUnsafeMutableBytes(of: &ends) { bytes in
        swiftep_socket_pair(bytes.bindMemory(to: Int32.self).baseAddress!)
      }
    }
    return (Channel(Descriptor(owning: ends.0)), Channel(Descriptor(owning: ends.1)))
  }

  package func send(_ message: some Encodable) throws {
    let bytes = Array(try JSONEncoder().encode(message))
    var header = UInt32(bytes.count)
    try withUnsafeBytes(of: &header) { try write($0) }
    try bytes.withUnsafeBytes { try write($0) }
  }

  /// - Throws: `Closed` when the other end is gone, `Late` when `deadline` (`monotonicNow`) passes first.
  package func receive<Message: Decodable>(_ type: Message.Type, until deadline: UInt64) throws -> Message {
    var header = UInt32(0)
    try withUnsafeMutableBytes(of: &header) { try read($0, until: deadline) }
    var bytes = [UInt8](repeating: 0, count: Int(header))
    try bytes.withUnsafeMutableBytes { try read($0, until: deadline) }
    return try JSONDecoder().decode(type, from: Data(bytes))
  }

  /// Waits until one of `channels` has a message, or its end; nil when `deadline` passes first. Those that are nil are
  /// left out.
  package static func firstReady(_ channels: [Channel?], until deadline: UInt64) -> Int? {
    var polled = channels.map { pollfd(fd: $0?.descriptor.raw ?? -1, events: Int16(POLLIN), revents: 0) }
    while true {
      let now = monotonicNow()
      let milliseconds = deadline <= now ? 0 : min(1000, (deadline - now) / 1_000_000 + 1)
      if poll(&polled, nfds_t(polled.count), Int32(milliseconds)) > 0 {
        return polled.firstIndex { $0.revents != 0 }
      }
      if monotonicNow() >= deadline { return nil }
    }
  }

  private func write(_ bytes: UnsafeRawBufferPointer) throws {
    var rest = bytes
    while !rest.isEmpty {
      let count = Glibc.send(descriptor.raw, rest.baseAddress!, rest.count, Int32(MSG_NOSIGNAL))
      if count < 0 && errno == EINTR { continue }
      if count < 0 { throw Closed() }
      rest = UnsafeRawBufferPointer(rebasing: rest[count...])
    }
  }

  private func read(_ bytes: UnsafeMutableRawBufferPointer, until deadline: UInt64) throws {
    var rest = bytes
    while !rest.isEmpty {
      guard Self.firstReady([self], until: deadline) != nil else { throw Late() }
      let count = recv(descriptor.raw, rest.baseAddress!, rest.count, 0)
      if count < 0 && errno == EINTR { continue }
      if count <= 0 { throw Closed() }
      rest = UnsafeMutableRawBufferPointer(rebasing: rest[count...])
    }
  }
}
