import Foundation

/// An array as numpy saves it (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html): versions 1 and
/// 2, little-endian, row-major.
struct NPYFile {
  /// As numpy writes it, without the byte order: `f4`, `i8`, ….
  let element: String
  let shape: [Int]
  let bytes: Data

  static func read(_ path: String, flag: String) throws(UsageError) -> NPYFile {
    let subject = "--\(flag) \(path)"
    return try NPYFile(try readFile(path, flag: flag), subject: subject)
  }

  init(_ file: Data, subject: String) throws(UsageError) {
    let magic = Data([0x93] + Array("NUMPY".utf8))
    guard file.count >= 10, file.prefix(6) == magic else {
      throw UsageError(subject, expected: "a npy file (\\x93NUMPY…)", found: "\(file.count) bytes of something else")
    }
    let file = Data(file)  // Indices from 0.
    let version = file[6]
    guard version == 1 || version == 2 else {
      throw UsageError(subject, expected: "npy version 1 or 2", found: "version \(version)")
    }
    let lengthByteCount = version == 1 ? 2 : 4
    let headerStart = 8 + lengthByteCount
    guard file.count >= headerStart else {
      throw UsageError(subject, expected: "at least \(headerStart) bytes", found: "\(file.count) bytes")
    }
    let headerByteCount = file[8..<headerStart].reversed().reduce(0) { $0 << 8 | Int($1) }
    let dataStart = headerStart + headerByteCount
    guard file.count >= dataStart else {
      throw UsageError(subject, expected: "a header of \(headerByteCount) bytes", found: "\(file.count - headerStart)")
    }
    var header = NPYHeader(Array(file[headerStart..<dataStart]), subject: subject)
    try header.parse()
    (element, shape) = try header.checked()
    var byteCount = Int(element.dropFirst())!
    for size in shape {
      let (product, overflows) = byteCount.multipliedReportingOverflow(by: size)
      if overflows { throw UsageError(subject, expected: "a shape that memory can hold", found: "\(shape)") }
      byteCount = product
    }
    guard file.count - dataStart == byteCount else {
      throw UsageError(
        subject, expected: "\(byteCount) bytes of data for \(element) \(shape)",
        found: "\(file.count - dataStart) bytes")
    }
    bytes = file[dataStart...]
  }
}

/// A file's bytes; a path that cannot be read is a usage error.
func readFile(_ path: String, flag: String) throws(UsageError) -> Data {
  do {
    return try Data(contentsOf: URL(fileURLWithPath: path), options: .mappedIfSafe)
  } catch {
    let reason = FileManager.default.fileExists(atPath: path) ? "something else" : "no such file"
    throw UsageError("--\(flag) \(path)", expected: "a regular file that can be read", found: reason)
  }
}

/// The header, a Python dictionary literal: `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
private struct NPYHeader {
  private let text: [UInt8]
  private let subject: String
  private var position = 0
  private var descr: String?
  private var isFortranOrder: Bool?
  private var shape: [Int]?

  init(_ text: [UInt8], subject: String) {
    self.text = text
    self.subject = subject
  }

  mutating func parse() throws(UsageError) {
    try expect("{")
    while !consume("}") {
      let key = try string()
      try expect(":")
      switch key {
      case "descr": descr = try string()
      case "fortran_order": isFortranOrder = try boolean()
      case "shape": shape = try tuple()
      default: throw UsageError(subject, expected: "descr, fortran_order and shape", found: "'\(key)'")
      }
      if !consume(",") {
        try expect("}")
        return
      }
    }
  }

  func checked() throws(UsageError) -> (element: String, shape: [Int]) {
    guard let descr, let isFortranOrder, let shape else {
      throw UsageError(subject, expected: "descr, fortran_order and shape in the header", found: "not all of them")
    }
    if isFortranOrder { throw UsageError(subject, expected: "rows in C order", found: "fortran order") }
    let known = ["<f2", "<f4", "<u2", "|u1", "<i4", "<i8"]
    guard known.contains(descr) else {
      throw UsageError(subject, expected: "dtype \(known.joined(separator: ", "))", found: "'\(descr)'")
    }
    return (String(descr.dropFirst()), shape)
  }

  private mutating func skipSpace() {
    while position < text.count, [0x20, 0x0a, 0x09, 0x0d].contains(text[position]) { position += 1 }
  }

  private mutating func consume(_ character: Character) -> Bool {
    skipSpace()
    guard position < text.count, text[position] == character.asciiValue else { return false }
    position += 1
    return true
  }

  private mutating func expect(_ character: Character) throws(UsageError) {
    if !consume(character) { throw malformed("'\(character)'") }
  }

  private mutating func string() throws(UsageError) -> String {
    let quote: UInt8
    if consume("'") { quote = 0x27 } else if consume("\"") { quote = 0x22 } else { throw malformed("a quoted string") }
    guard let end = text[position...].firstIndex(of: quote) else { throw malformed("a closing quote") }
    defer { position = end + 1 }
    return String(decoding: text[position..<end], as: UTF8.self)
  }

  private mutating func word() -> String {
    skipSpace()
    let rest = text[position...].prefix { UInt8(ascii: "0")...UInt8(ascii: "z") ~= $0 && $0 != UInt8(ascii: ":") }
    position = rest.endIndex
    return String(decoding: rest, as: UTF8.self)
  }

  private mutating func boolean() throws(UsageError) -> Bool {
    switch word() {
    case "True": return true
    case "False": return false
    default: throw malformed("True or False")
    }
  }

  private mutating func tuple() throws(UsageError) -> [Int] {
    try expect("(")
    var sizes: [Int] = []
    while !consume(")") {
      guard let size = Int(word()), size >= 0 else { throw malformed("a size") }
      sizes.append(size)
      if !consume(",") {
        try expect(")")
        break
      }
    }
    return sizes
  }

  private func malformed(_ expected: String) -> UsageError {
    let found = text[min(position, text.count)...].prefix(12)
    return UsageError(
      subject, expected: "\(expected) at byte \(position) of the header",
      found: found.isEmpty ? "its end" : "'\(String(decoding: found, as: UTF8.self))'")
  }
}
