import SwiftEP

struct Command: Sendable {
  let name: String
  let summary: String
  /// What stands for the words that are no flags, in `--help`; nil: there are none.
  var operands: String?
  let flags: [Flag]
  /// Printed behind the flags in `--help`.
  var notes = ""
  let body: @Sendable (Arguments) throws -> Void

  var help: String {
    let rows = flags.map { flag in
      ["--\(flag.name)" + (flag.placeholder.map { " \($0)" } ?? ""), flag.help]
    }
    return """
      swiftep \(name): \(summary)

      usage: swiftep \(name)\(operands.map { " \($0)" } ?? "") [--FLAG VALUE]...

      \(alignedColumns(rows + [["--help", "print this"]], indentation: 2))
      \(notes.isEmpty ? "" : "\n\(notes)\n")
      \(ExitCode.help)

      """
  }
}

struct Flag: Sendable {
  let name: String
  /// What stands for the value in `--help`; nil: the flag takes none.
  let placeholder: String?
  let help: String

  init(_ name: String, _ placeholder: String? = nil, _ help: String) {
    self.name = name
    self.placeholder = placeholder
    self.help = help
  }
}

/// The flags of one command line: `--name value` or `--name=value`, each at most once; and the other words, where the
/// command takes any.
struct Arguments {
  private var values: [String: String] = [:]
  private(set) var operands: [String] = []

  init(parsing words: [String], flags: [Flag], takesOperands: Bool = false) throws(UsageError) {
    var rest = words[...]
    while let word = rest.popFirst() {
      if takesOperands && !word.hasPrefix("--") {
        operands.append(word)
        continue
      }
      guard word.hasPrefix("--") else { throw UsageError("argument", expected: "a flag (--name)", found: "'\(word)'") }
      let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let name = String(parts[0])
      guard let flag = flags.first(where: { $0.name == name }) else {
        let known = flags.map { "--\($0.name)" }.joined(separator: ", ")
        throw UsageError("flag", expected: "one of \(known)", found: "--\(name)")
      }
      if values[name] != nil { throw UsageError("--\(name)", expected: "the flag once", found: "it twice") }
      if let placeholder = flag.placeholder {
        let value = parts.count == 2 ? String(parts[1]) : rest.popFirst()
        guard let value, parts.count == 2 || !value.hasPrefix("--") else {
          throw UsageError("--\(name)", expected: "a value (\(placeholder))", found: value.map { "'\($0)'" } ?? "none")
        }
        values[name] = value
      } else {
        if parts.count == 2 { throw UsageError("--\(name)", expected: "no value", found: "'\(parts[1])'") }
        values[name] = ""
      }
    }
  }

  func has(_ name: String) -> Bool { values[name] != nil }

  func string(_ name: String) -> String? { values[name] }

  func integer(_ name: String, in range: ClosedRange<Int>) throws(UsageError) -> Int? {
    guard let text = values[name] else { return nil }
    guard let value = Int(text), range.contains(value) else {
      let expected = "an integer of \(range.lowerBound) to \(range.upperBound)"
      throw UsageError("--\(name)", expected: expected, found: "'\(text)'")
    }
    return value
  }

  func integer(_ name: String, in range: ClosedRange<Int>, default value: Int) throws(UsageError) -> Int {
    try integer(name, in: range) ?? value
  }

  func real(_ name: String, in range: ClosedRange<Double>, default value: Double) throws(UsageError) -> Double {
    guard let text = values[name] else { return value }
    guard let value = Double(text), range.contains(value) else {
      let expected = "a number of \(range.lowerBound) to \(range.upperBound)"
      throw UsageError("--\(name)", expected: expected, found: "'\(text)'")
    }
    return value
  }

  func seed(_ name: String, default value: UInt64) throws(UsageError) -> UInt64 {
    guard let text = values[name] else { return value }
    guard let value = UInt64(text) else {
      throw UsageError("--\(name)", expected: "an integer of 0 to \(UInt64.max)", found: "'\(text)'")
    }
    return value
  }

  func choice<Value: CaseIterable & RawRepresentable<String>>(
    _ name: String, _ type: Value.Type
  ) throws(UsageError) -> Value? {
    guard let text = values[name] else { return nil }
    guard let value = Value(rawValue: text) else {
      let known = Value.allCases.map(\.rawValue).joined(separator: ", ")
      throw UsageError("--\(name)", expected: "one of \(known)", found: "'\(text)'")
    }
    return value
  }
}

/// Rows of two cells, the second ones aligned; a newline in a second cell continues it on the next line.
func alignedColumns(_ rows: [[String]], indentation: Int) -> String {
  let width = rows.map { $0[0].count }.max() ?? 0
  let margin = String(repeating: " ", count: indentation)
  let hanging = "\n" + String(repeating: " ", count: indentation + width + 2)
  return rows.map { row in
    let first = row[0].padding(to: width)
    return margin + first + "  " + row[1].split(separator: "\n").joined(separator: hanging)
  }.joined(separator: "\n")
}
