/// What has come over a connection and is not yet a whole message.
struct Input: Secret {
  private var bytes: [UInt8] = []
  private var consumedCount = 0

  var count: Int { bytes.count - consumedCount }

  mutating func append(_ more: [UInt8]) {
    bytes.removeFirst(consumedCount)
    consumedCount = 0
    bytes += more
  }

  func peek(_ count: Int) -> ArraySlice<UInt8>? { self.count < count ? nil : bytes[consumedCount...].prefix(count) }

  /// Nil when fewer bytes have come.
  mutating func take(_ count: Int) -> [UInt8]? {
    guard let slice = peek(count) else { return nil }
    consumedCount += count
    return Array(slice)
  }

  /// Throws as soon as it is certain that what comes does not begin with `expected`.
  func check(prefix expected: [UInt8]) throws(Malformed) {
    let first = bytes[consumedCount...].prefix(expected.count)
    guard first.elementsEqual(expected.prefix(first.count)) else { throw Malformed() }
  }
}

/// Bytes that are not what the protocol has at this place.
struct Malformed: Error {}
