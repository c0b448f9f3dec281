/// A part of a file, as bytes: these files are read while memory is taken, and characters would cost more than the files.
package struct Word: Equatable, ExpressibleByStringLiteral, Sendable {
  package let bytes: ArraySlice<UInt8>

  package init(_ bytes: ArraySlice<UInt8>) { self.bytes = bytes }
  package init(_ text: String) { bytes = Array(text.utf8)[...] }
  package init(stringLiteral text: StaticString) {
    bytes = Array(UnsafeBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount))[...]
  }

  package static func == (first: Word, second: StaticString) -> Bool {
    first.bytes.elementsEqual(UnsafeBufferPointer(start: second.utf8Start, count: second.utf8CodeUnitCount))
  }

  package var text: String { String(decoding: bytes, as: UTF8.self) }
  package var integer: Int64? { Int64(text) }

  package func hasPrefix(_ text: String) -> Bool { bytes.starts(with: text.utf8) }

  /// Empty words between two separators count, unless the separator is a blank.
  package func split(separator: Unicode.Scalar, maxSplits: Int = .max) -> [Word] {
    bytes.split(separator: UInt8(ascii: separator), maxSplits: maxSplits, omittingEmptySubsequences: separator == " ")
      .map { Word($0) }
  }
}
