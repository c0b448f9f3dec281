/// What the token becomes in one job: whoever has another token or belongs to another job has another key.
///
/// It is used for several purposes; the first byte of what is hashed keeps them apart.
package struct JobKey: Secret {
  private let key: HMACKey

  package init(token: [UInt8], job: String) {
    key = HMACKey(HMACKey(token).code(for: Array("SwiftEP rendezvous \(Handshake.version) \(job)".utf8)))
  }

  // MARK: Proofs

  func proof(of role: Handshake.Role, in handshake: Handshake) -> [UInt8] {
    key.code(for: [role.rawValue] + handshake.transcript)
  }

  func isProof(_ proof: [UInt8], of role: Handshake.Role, in handshake: Handshake) -> Bool {
    key.isCode(proof, for: [role.rawValue] + handshake.transcript)
  }

  // MARK: Channels

  private static let keystreamPurpose: UInt8 = 16
  private static let authenticationPurpose: UInt8 = 32

  /// What `role` sends after the handshake.
  func channel(from role: Handshake.Role, after handshake: Handshake) -> SealedChannel {
    func subkey(_ purpose: UInt8) -> HMACKey {
      HMACKey(key.code(for: [purpose + role.rawValue] + handshake.transcript))
    }
    return SealedChannel(keystream: subkey(Self.keystreamPurpose), authentication: subkey(Self.authenticationPurpose))
  }

  // MARK: Ports

  private static let portPurpose: UInt8 = 64
  /// Above what services are assigned, below what the system gives to connections by default.
  private static let ports: Range<UInt16> = 12288..<32768

  /// Where to meet when nobody says: the same for all of the job, and known to nobody else beforehand.
  package func ports(count: Int) -> [UInt16] {
    (0..<UInt32(count)).map { index in
      let number = UInt64(bigEndian: key.code(for: [Self.portPurpose] + index.bigEndianBytes).prefix(8))
      return Self.ports.lowerBound + UInt16(number % UInt64(Self.ports.count))
    }
  }
}
