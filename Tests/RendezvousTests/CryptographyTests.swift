import Testing

@testable import Rendezvous

@Suite struct CryptographyTests {
  static func bytes(_ text: String) -> [UInt8] { Array(text.utf8) }

  static func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
  }

  /// The examples that FIPS 180-4 refers to.
  @Test(arguments: [
    ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (
      "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
    (
      "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
      "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"
    ),
  ])
  func digests(_ text: String, _ expected: String) {
    #expect(Self.hexadecimal(SHA256.digest(of: Self.bytes(text))) == expected)
  }

  @Test func aMillionLetters() {
    let digest = SHA256.digest(of: [UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000))
    #expect(Self.hexadecimal(digest) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
  }

  /// However the bytes come, around every length at which padding changes.
  @Test(arguments: [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 121, 128])
  func piecewise(_ count: Int) {
    let whole = (0..<count).map { UInt8($0) }
    var hash = SHA256()
    for byte in whole { hash.update([byte]) }
    #expect(hash.finish() == SHA256.digest(of: whole))
  }

  /// RFC 4231, but for the case of a truncated code, which nobody uses here.
  @Test(arguments: [
    (
      [UInt8](repeating: 0x0b, count: 20), bytes("Hi There"),
      "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    ),
    (
      bytes("Jefe"), bytes("what do ya want for nothing?"),
      "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    ),
    (
      [UInt8](repeating: 0xaa, count: 20), [UInt8](repeating: 0xdd, count: 50),
      "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"
    ),
    (
      Array(1...25), [UInt8](repeating: 0xcd, count: 50),
      "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"
    ),
    (
      [UInt8](repeating: 0xaa, count: 131), bytes("Test Using Larger Than Block-Size Key - Hash Key First"),
      "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
    ),
    (
      [UInt8](repeating: 0xaa, count: 131),
      bytes(
        "This is a test using a larger than block-size key and a larger than block-size data. "
          + "The key needs to be hashed before being used by the HMAC algorithm."),
      "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"
    ),
  ])
  func codes(_ key: [UInt8], _ message: [UInt8], _ expected: String) {
    let key = HMACKey(key)
    let code = key.code(for: message)
    #expect(Self.hexadecimal(code) == expected)
    #expect(key.isCode(code, for: message))
    for index in code.indices {
      var wrong = code
      wrong[index] ^= 0x80
      #expect(!key.isCode(wrong, for: message))
    }
    #expect(!key.isCode(Array(code.dropLast()), for: message))
    #expect(!key.isCode([], for: message))
  }
}

@Suite struct ChannelTests {
  static func pair() -> (sender: SealedChannel, receiver: SealedChannel) {
    let channel = SealedChannel(keystream: HMACKey([1]), authentication: HMACKey([2]))
    return (channel, channel)
  }

  @Test(arguments: [0, 1, 31, 32, 33, 4096, 4097])
  func whatGoesInComesOut(_ count: Int) throws {
    var (sender, receiver) = Self.pair()
    var input = Input()
    let texts = (0..<3).map { index in [UInt8](repeating: UInt8(index), count: count) }
    let frames = texts.map { sender.seal($0) }
    #expect(Set(frames).count == 3)
    for byte in frames.joined() {
      input.append([byte])
    }
    for text in texts { #expect(try receiver.open(&input) == text) }
    #expect(try receiver.open(&input) == nil)
  }

  @Test func everyByteCounts() {
    var (sender, original) = Self.pair()
    let frame = sender.seal([1, 2, 3])
    for index in frame.indices {
      var receiver = original
      var changed = frame
      changed[index] ^= 1
      var input = Input()
      input.append(changed + [UInt8](repeating: 0, count: 300))
      #expect(throws: Malformed.self, "byte \(index)") { try receiver.open(&input) }
    }
    var input = Input()
    input.append(frame)
    #expect(throws: Never.self) { try original.open(&input) }
  }

  @Test func repeatedAndReorderedFrames() throws {
    var (sender, receiver) = Self.pair()
    let (first, second) = (sender.seal([1]), sender.seal([2]))
    var reordered = Input()
    reordered.append(second + first)
    var other = receiver
    #expect(throws: Malformed.self) { try other.open(&reordered) }
    var repeated = Input()
    repeated.append(first + first)
    #expect(try receiver.open(&repeated) == [1])
    #expect(throws: Malformed.self) { try receiver.open(&repeated) }
  }

  @Test func aFrameThatIsTooLong() {
    var (_, receiver) = Self.pair()
    var input = Input()
    input.append([0xff, 0xff])
    #expect(throws: Malformed.self) { try receiver.open(&input) }
  }
}

@Suite struct SecretTests {
  /// Nothing of it is in any text that Swift makes of a value.
  @Test func nothingPrintsASecret() throws {
    let text = "0123456789abcdef-the-token"
    let token = try Token(text, from: "a test")
    let key = token.key(for: "job")
    let client = Client(
      key: key, seat: Seat(room: "start", index: 1, of: 2), piece: Array("a piece".utf8), places: ["p"], now: .now,
      deadline: .now)
    let place = MeetingPlace(token: token)
    var texts: [String] = []
    for value in [token, key, client, place] as [Any] {
      var dumped = ""
      dump(value, to: &dumped)
      texts += ["\(value)", String(reflecting: value), String(describing: value), dumped]
      #expect(Mirror(reflecting: token).children.isEmpty)
    }
    let bytes = CryptographyTests.bytes(text).prefix(4).map { "\($0)" }.joined(separator: ", ")
    for line in texts { #expect(!line.contains("0123") && !line.contains(bytes) && !line.contains("SIMD")) }
    let error = #expect(throws: InputFault.self) { try Token("short-secret", from: "SWIFTEP_TOKEN") }
    #expect(error?.description == "SWIFTEP_TOKEN: expected a token of 16 to 1024 bytes, found one of 12")
  }
}
