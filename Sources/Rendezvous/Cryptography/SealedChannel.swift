/// One direction of a connection between two that know the token: what goes through comes out in order, unchanged, and
/// unread by others, or not at all.
///
/// Encrypt-then-MAC: the plain text is combined with a keystream, HMAC in counter mode; the code is over the number of
/// the frame, its length and the cipher text. Both keys are of this direction of this connection only, so the
/// numbers begin at 0 and no keystream is used twice.
///
///     length of the text: 2 bytes | cipher text | code: 32 bytes
struct SealedChannel: Secret {
  private let keystream: HMACKey
  private let authentication: HMACKey
  private var frameIndex: UInt64 = 0

  /// The longest text of a frame.
  static let textByteCountMax = 1 + Message.partByteCountMax
  static let frameByteCountMax = 2 + textByteCountMax + SHA256.digestByteCount

  init(keystream: HMACKey, authentication: HMACKey) {
    self.keystream = keystream
    self.authentication = authentication
  }

  /// The next frame. `text` has at most `textByteCountMax` bytes.
  mutating func seal(_ text: [UInt8]) -> [UInt8] {
    precondition(text.count <= Self.textByteCountMax)
    let length = UInt16(text.count).bigEndianBytes
    let cipherText = combine(text)
    let code = authentication.code(for: frameIndex.bigEndianBytes + length + cipherText)
    frameIndex += 1
    return length + cipherText + code
  }

  /// The text of the next frame; nil when more bytes have to come first.
  mutating func open(_ input: inout Input) throws(Malformed) -> [UInt8]? {
    guard let length = input.peek(2) else { return nil }
    let count = Int(UInt16(bigEndian: length))
    guard count <= Self.textByteCountMax else { throw Malformed() }
    guard let frame = input.take(2 + count + SHA256.digestByteCount) else { return nil }
    let (sealed, code) = (frame.dropLast(SHA256.digestByteCount), frame.suffix(SHA256.digestByteCount))
    guard authentication.isCode(Array(code), for: frameIndex.bigEndianBytes + sealed) else { throw Malformed() }
    defer { frameIndex += 1 }
    return combine(Array(sealed.dropFirst(2)))
  }

  private func combine(_ text: [UInt8]) -> [UInt8] {
    var result = text
    for first in stride(from: 0, to: text.count, by: SHA256.digestByteCount) {
      let block = keystream.code(for: frameIndex.bigEndianBytes + UInt32(first).bigEndianBytes)
      for index in first..<min(first + block.count, text.count) { result[index] ^= block[index - first] }
    }
    return result
  }
}
