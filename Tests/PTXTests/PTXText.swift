import Testing

/// A module of PTX, as far as its rules are checked: the instructions of each kernel, in the order of the text.
struct PTXText {
  let target: String
  /// By kernel; without predicates, labels and comments.
  let kernels: [String: [String]]
  /// Lines outside of kernels, and directives inside of them.
  let directives: [String]

  init(_ text: String) {
    var target = ""
    var kernels: [String: [String]] = [:]
    var directives: [String] = []
    var kernel: String?
    for line in text.utf8.split(separator: UInt8(ascii: "\n")) {
      var words = line.split { $0 == UInt8(ascii: " ") || $0 == UInt8(ascii: "\t") }.map { String(Substring($0)) }
      if words.first?.hasPrefix("@") == true { words.removeFirst() }
      guard let first = words.first, !first.hasPrefix("//"), first.utf8.last != UInt8(ascii: ":") else { continue }
      if first == ".target" { target = words[1] }
      if let place = words.firstIndex(of: ".entry") {
        let name = plainName(words[place + 1].prefix { $0 != "(" })
        kernel = name
        kernels[name] = []
      }
      if first.hasPrefix(".") || kernel == nil {
        directives.append(words.joined(separator: " "))
        continue
      }
      // Inline assembly may hold several instructions in braces.
      for part in words.joined(separator: " ").utf8.split(separator: UInt8(ascii: ";")) {
        let instruction = Substring(
          part.drop { $0 == UInt8(ascii: "{") || $0 == UInt8(ascii: " ") || $0 == UInt8(ascii: "}") })
        if instruction.isEmpty || instruction.utf8.first == UInt8(ascii: ".") { continue }
        kernels[kernel!]!.append(String(instruction))
      }
    }
    self.target = target
    self.kernels = kernels
    self.directives = directives
  }

  func count(_ prefix: String, in kernel: String) -> Int {
    kernels[kernel]!.count { $0.hasPrefix(prefix) }
  }
}

/// `dispatch` of `swiftep::dispatch()`, as C++ mangles it.
private func plainName(_ symbol: Substring) -> String {
  let name = symbol.dropFirst("_ZN7swiftep".count).drop(while: \.isNumber).dropLast("Ev".count)
  #expect(symbol == "_ZN7swiftep\(name.count)\(name)Ev", "\(symbol)")
  return String(name)
}
