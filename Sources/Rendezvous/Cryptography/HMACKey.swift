/// A key of HMAC-SHA-256 (RFC 2104).
struct HMACKey: Secret {
  private var inner = SHA256()
  private var outer = SHA256()

  init(_ key: [UInt8]) {
    var padded = key.count > SHA256.blockByteCount ? SHA256.digest(of: key) : key
    padded += repeatElement(0, count: SHA256.blockByteCount - padded.count)
    inner.update(padded.map { $0 ^ 0x36 })
    outer.update(padded.map { $0 ^ 0x5c })
  }

  /// 32 bytes that only who has the key can compute.
  func code(for message: [UInt8]) -> [UInt8] {
    var (hash, final) = (inner, outer)
    hash.update(message)
    final.update(hash.finish())
    return final.finish()
  }

  /// Takes equally long whatever `code` is, so that nobody finds the right one byte by byte.
  func isCode(_ code: [UInt8], for message: [UInt8]) -> Bool {
    let expected = self.code(for: message)
    guard code.count == expected.count else { return false }
    return zip(code, expected).reduce(0 as UInt8) { $0 | ($1.0 ^ $1.1) } == 0
  }
}
