import Foundation
import Testing

@testable import swiftep

/// A npy file with the given header and data.
func npyFile(_ header: String, _ data: [UInt8], version: UInt8 = 1, magic: String = "NUMPY") -> Data {
  let text = Array((header + "\n").utf8)
  let lengthByteCount = version == 1 ? 2 : 4
  let length = (0..<lengthByteCount).map { UInt8(truncatingIfNeeded: text.count >> (8 * $0)) }
  let prefix: [UInt8] = [0x93] + Array(magic.utf8) + [version, 0]
  return Data(prefix + length + text + data)
}

func npyFile<Element>(_ descr: String, _ shape: [Int], _ values: [Element]) -> Data {
  let sizes = shape.map { "\($0), " }.joined()
  let bytes = values.withUnsafeBytes { Array($0) }
  return npyFile("{'descr': '\(descr)', 'fortran_order': False, 'shape': (\(sizes)), }", bytes)
}

@Suite struct NPYFileTests {
  @Test(arguments: [UInt8(1), 2])
  func versions(_ version: UInt8) throws {
    let header = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }   "
    let file = try NPYFile(npyFile(header, [UInt8](0..<24), version: version), subject: "f")
    #expect(file.element == "i4")
    #expect(file.shape == [2, 3])
    #expect(Array(file.bytes) == Array(0..<24))
  }

  @Test(arguments: [
    ("{'shape':(5,),'fortran_order':False,'descr':\"|u1\"}", [5]),
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (), }", []),
    ("{ 'descr' : '|u1' , 'fortran_order' : False , 'shape' : (0, 4) }", [0, 4]),
  ])
  func otherWritings(_ header: String, _ shape: [Int]) throws {
    let byteCount = shape.reduce(1, *)
    let file = try NPYFile(npyFile(header, [UInt8](repeating: 1, count: byteCount)), subject: "f")
    #expect(file.shape == shape)
  }

  static let good = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }"

  static func changed(_ part: String, _ replacement: String) -> Data {
    npyFile(good.replacingOccurrences(of: part, with: replacement), [])
  }

  static let malformedFiles: [(Data, String)] = [
    (npyFile(good, [UInt8](repeating: 0, count: 23)), "expected 24 bytes of data for i4 [2, 3], found 23 bytes"),
    (npyFile(good, [UInt8](repeating: 0, count: 25)), "expected 24 bytes of data for i4 [2, 3], found 25 bytes"),
    (npyFile(good, [], version: 3), "expected npy version 1 or 2, found version 3"),
    (Data(), "expected a npy file (\\x93NUMPY…), found 0 bytes of something else"),
    (npyFile(good, [], magic: "NUMPI"), "expected a npy file (\\x93NUMPY…), found"),
    (npyFile(good, []).prefix(40), "expected a header of"),
    (npyFile(good, [], version: 2).prefix(11), "expected at least 12 bytes, found 11 bytes"),
    (changed("False", "True"), "expected rows in C order, found fortran order"),
    (changed("<i4", ">i4"), "expected dtype <f2, <f4, <u2, |u1, <i4, <i8, found '>i4'"),
    (changed("<i4", "<f8"), "expected dtype"),
    (changed("'<i4'", "[('a', '<i4')]"), "expected a quoted string at byte 10 of the header, found '[('a', '<i4''"),
    (changed("(2, 3)", "(2, x)"), "expected a size at byte"),
    (changed("(2, 3)", "(2, -3)"), "expected a size at byte"),
    (changed("(2, 3)", "(4611686018427387904, 8)"), "expected a shape that memory can hold"),
    (changed("False", "Maybe"), "expected True or False at byte"),
    (changed(", 'shape': (2, 3)", ""), "expected descr, fortran_order and shape in the header, found not all of them"),
    (changed("fortran_order", "order"), "expected descr, fortran_order and shape, found 'order'"),
    (npyFile("{'descr': '<i4", []), "expected a closing quote at byte"),
    (npyFile("{'descr'", []), "expected ':' at byte"),
    (npyFile("", []), "expected '{' at byte 1 of the header, found its end"),
  ]

  @Test(arguments: malformedFiles)
  func malformed(_ file: Data, _ sentence: String) {
    let error = #expect(throws: UsageError.self) { try NPYFile(file, subject: "f") }
    #expect(error?.description.hasPrefix("f: \(sentence)") == true, "\(error.map { "\($0)" } ?? "no error")")
  }

  @Test func everyTruncationIsRefused() {
    let whole = npyFile("<i8", [2, 2], [Int64](repeating: 3, count: 4))
    for byteCount in 0..<whole.count {
      #expect(throws: UsageError.self) { try NPYFile(whole.prefix(byteCount), subject: "f") }
    }
  }
}
