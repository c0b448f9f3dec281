/// Cuts what a rank writes into lines that begin with its number.
struct LineTagger {
  private let tag: [UInt8]
  /// The beginning of a line whose end has not come yet.
  private var line: [UInt8] = []

  /// Where a line is cut that has no end: it has to be kept until it is whole.
  static let lineByteCountMax = 1 << 20

  init(rank: Int) { tag = Array("[\(rank)] ".utf8) }

  /// The lines that are whole now.
  mutating func tagged(_ bytes: ArraySlice<UInt8>) -> [UInt8] {
    var output: [UInt8] = []
    var unread = bytes
    while let end = unread.firstIndex(of: UInt8(ascii: "\n")) {
      line += unread[..<end]
      endLine(&output)
      unread = unread[(end + 1)...]
    }
    line += unread
    if line.count >= Self.lineByteCountMax { endLine(&output) }
    return output
  }

  /// What is left when no more comes.
  mutating func rest() -> [UInt8] {
    var output: [UInt8] = []
    if !line.isEmpty { endLine(&output) }
    return output
  }

  private mutating func endLine(_ output: inout [UInt8]) {
    output += tag
    output += line
    output.append(UInt8(ascii: "\n"))
    line.removeAll(keepingCapacity: true)
  }
}
