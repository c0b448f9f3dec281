import Testing

/// A module of PTX, as far as its rules are checked: the instructions of each kernel, in the order of the text.
struct PTXText {
  let target: String
  /// By kernel; without predicates, labels and comments.
  let kernels: [String: [String]]
  /// By kernel and label, the number of the instruction behind it.
  let labels: [String: [String: Int]]
  /// By kernel, the numbers of instructions that a predicate may skip.
  let conditional: [String: Set<Int>]
  /// Lines outside of kernels, and directives inside of them.
  let directives: [String]

  init(_ text: String) {
    var target = ""
    var kernels: [String: [String]] = [:]
    var labels: [String: [String: Int]] = [:]
    var conditional: [String: Set<Int>] = [:]
    var directives: [String] = []
    var kernel: String?
    for line in text.utf8.split(separator: UInt8(ascii: "\n")) {
      var words = line.split { $0 == UInt8(ascii: " ") || $0 == UInt8(ascii: "\t") }.map { String(Substring($0)) }
      let isConditional = words.first?.hasPrefix("@") == true
      if isConditional { words.removeFirst() }
      guard let first = words.first, !first.hasPrefix("//") else { continue }
      if first.utf8.last == UInt8(ascii: ":") {
        if let kernel { labels[kernel]![String(first.dropLast())] = kernels[kernel]!.count }
        continue
      }
      if first == ".target" { target = words[1] }
      if let place = words.firstIndex(of: ".entry") {
        let name = plainName(words[place + 1].prefix { $0 != "(" })
        kernel = name
        (kernels[name], labels[name], conditional[name]) = ([], [:], [])
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
        if isConditional { conditional[kernel!]!.insert(kernels[kernel!]!.count) }
        kernels[kernel!]!.append(String(instruction))
      }
    }
    self.target = target
    self.kernels = kernels
    self.labels = labels
    self.conditional = conditional
    self.directives = directives
  }

  /// Whether a kernel can come from one instruction to another that `isEnd`, and not past one that `isStop`. Jumps by a
  /// table are not followed.
  func canCome(
    from start: Int, in kernel: String, to isEnd: (String) -> Bool, past isStop: (String) -> Bool
  ) -> Bool {
    let (instructions, labels, conditional) = (kernels[kernel]!, labels[kernel]!, conditional[kernel]!)
    var (open, seen) = ([start], Set([start]))
    while let index = open.popLast() {
      let instruction = instructions[index]
      if isEnd(instruction) { return true }
      if isStop(instruction) { continue }
      var next: [Int] = []
      let isJump = instruction.hasPrefix("br")
      if isJump, let label = instruction.split(separator: " ").last, let target = labels[String(label)] {
        next.append(target)
      }
      if !isJump && instruction != "ret" || conditional.contains(index) { next.append(index + 1) }
      open += next.filter { $0 < instructions.count && seen.insert($0).inserted }
    }
    return false
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
