import Arena
import CPlatform
import Glibc

/// What the processes of a job know and nobody else does.
package struct Token: Secret, Equatable {
  /// For a process's own children; not to be printed where others read it.
  package let text: String

  /// UTF-8 bytes. 16 are few enough to be chosen by hand; `random` has 64.
  package static let byteCounts = 16...1024

  /// - Parameters:
  ///   - text: white space around it does not count.
  ///   - source: where it comes from, for the error.
  package init(_ text: String, from source: String) throws(InputFault) {
    self.text = text.trimmed
    guard Self.byteCounts.contains(self.text.utf8.count) else {
      throw InputFault(
        source, expected: "a token of \(Self.byteCounts.lowerBound) to \(Self.byteCounts.upperBound) bytes",
        found: "one of \(self.text.utf8.count)")
    }
  }

  /// What a file says that only this user can read.
  package init(file path: String, from source: String) throws(InputFault) {
    // Not blocking: opening a pipe would wait for who writes to it.
    let raw = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard raw >= 0 else {
      throw InputFault(source, expected: "a file that can be read", found: "\(path): \(errorText(errno))")
    }
    let file = Descriptor(owning: raw)
    // All that follows is about the file that is open, whatever the path may name by now.
    var status = stat()
    guard fstat(file.raw, &status) == 0 else {
      throw InputFault(source, expected: "a file that can be read", found: "\(path): \(errorText(errno))")
    }
    guard status.st_mode & S_IFMT == S_IFREG else {
      throw InputFault(source, expected: "a regular file", found: "\(path), which is none")
    }
    guard status.st_uid == geteuid() else {
      throw InputFault(
        source, expected: "a file of this user, \(geteuid())", found: "\(path), which user \(status.st_uid) owns")
    }
    guard status.st_mode & 0o077 == 0 else {
      let mode = String(status.st_mode & 0o777, radix: 8)
      throw InputFault(
        source, expected: "a file that only its owner can read or write (mode 600)", found: "\(path), of mode \(mode)")
    }
    var bytes = [UInt8](repeating: 0, count: Self.byteCounts.upperBound + 65)
    let count = read(file.raw, &bytes, bytes.count)
    guard count >= 0 else {
      throw InputFault(source, expected: "a file that can be read", found: "\(path): \(errorText(errno))")
    }
    try self.init(String(decoding: bytes[..<count], as: UTF8.self), from: "\(source) \(path)")
  }

  /// 256 random bits, in hexadecimal.
  package static func random() throws(SystemCallError) -> Token {
    let bytes = try randomBytes(32)
    return Token(hexadecimal: bytes.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined())
  }

  private init(hexadecimal: String) { text = hexadecimal }

  package func key(for job: String) -> JobKey { JobKey(token: Array(text.utf8), job: job) }
}

func randomBytes(_ count: Int) throws(SystemCallError) -> [UInt8] {
  var bytes = [UInt8](repeating: 0, count: count)
  try systemCall("getrandom") { swiftep_random(&bytes, count) }
  return bytes
}

func errorText(_ code: Int32) -> String { String(cString: strerror(code)) }

extension String {
  /// Without white space at its ends.
  var trimmed: String {
    let rest = drop { $0.isWhitespace }
    return String(
      rest.prefix(rest.lastIndex { !$0.isWhitespace }.map { rest.distance(from: rest.startIndex, to: $0) + 1 } ?? 0))
  }
}
