/// How two that have connected prove to each other that they know the token, without telling it.
///
///     client: "SwEPcall" | version: 1 | nonce: 32
///     server: "SwEPhost" | version: 1 | nonce: 32
///     client: index: 4 | count: 4 | room: 1 + n | proof: 32
///     server: proof: 32, and from then on frames of a `SealedChannel` in both directions
///
/// A proof is a keyed hash over the version, the role of who proves, both nonces and the seat. The server proves nothing
/// to who has not proven first. Numbers are big-endian; lengths in bytes.
struct Handshake {
  let clientNonce: Nonce
  let serverNonce: Nonce
  /// The client's.
  let seat: Seat

  static let version: UInt8 = 1
  static let greetingByteCount = 8 + 1 + Nonce.byteCount

  enum Role: UInt8 {
    case client = 1
    case server = 2

    var magic: [UInt8] { Array((self == .client ? "SwEPcall" : "SwEPhost").utf8) }
  }

  /// The first message of each side.
  struct Greeting {
    let version: UInt8
    let nonce: Nonce

    static func bytes(of role: Role, _ nonce: Nonce) -> [UInt8] { role.magic + [Handshake.version] + nonce.bytes }

    /// Nil when more bytes have to come first.
    init?(of role: Role, from input: inout Input) throws(Malformed) {
      try input.check(prefix: role.magic)
      guard let bytes = input.take(Handshake.greetingByteCount) else { return nil }
      version = bytes[role.magic.count]
      nonce = Nonce(Array(bytes.suffix(Nonce.byteCount)))
    }
  }

  /// What the client claims, and its proof of it; nil when more bytes have to come first.
  static func readClaim(from input: inout Input) throws(Malformed) -> (seat: Seat, proof: [UInt8])? {
    guard let head = input.peek(9).map(Array.init) else { return nil }
    let roomByteCount = Int(head[8])
    guard (1...Seat.roomByteCountMax).contains(roomByteCount) else { throw Malformed() }
    guard let bytes = input.take(9 + roomByteCount + SHA256.digestByteCount) else { return nil }
    guard let room = String(validating: bytes[9..<9 + roomByteCount], as: UTF8.self) else { throw Malformed() }
    let seat = Seat.claimed(
      room: room, index: UInt32(bigEndian: head[..<4]), count: UInt32(bigEndian: head[4..<8]))
    return (seat, bytes.suffix(SHA256.digestByteCount))
  }

  var transcript: [UInt8] { [Self.version] + clientNonce.bytes + serverNonce.bytes + seat.bytes }
}

/// A number that is used once, chosen at random.
package struct Nonce: Equatable, Sendable {
  package static let byteCount = 32
  let bytes: [UInt8]

  package init(_ bytes: [UInt8]) {
    precondition(bytes.count == Self.byteCount)
    self.bytes = bytes
  }
}
