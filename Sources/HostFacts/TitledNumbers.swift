/// A file of lines such as `MemFree:  123 kB` or `inactive_file 4096`.
package struct TitledNumbers: Sendable {
  private let bytes: [UInt8]

  package init(_ bytes: [UInt8]) { self.bytes = bytes }

  package init?(_ files: FileTree, _ path: String) {
    guard let bytes = files.bytes(path) else { return nil }
    self.init(bytes)
  }

  /// The number behind the title, which is the whole of what stands before a blank; 1024 times that where it is in kB.
  package subscript(title: String) -> Int64? {
    var rest = bytes[...]
    while !rest.isEmpty {
      let line = rest.prefix { $0 != UInt8(ascii: "\n") }
      rest = rest.dropFirst(line.count + 1)
      guard line.starts(with: title.utf8) else { continue }
      let rest = line.dropFirst(title.utf8.count)
      guard let first = rest.first, first == 32 || first == 9 else { continue }
      let words = rest.split { $0 == 32 || $0 == 9 }
      guard let number = words.first.flatMap({ Int64(String(decoding: $0, as: UTF8.self)) }) else { return nil }
      let isInKilobytes = words.count > 1 && words[1].elementsEqual("kB".utf8)
      return isInKilobytes ? number.multipliedReportingOverflow(by: 1024).partialValue : number
    }
    return nil
  }
}
