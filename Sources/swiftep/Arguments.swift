import SwiftEP

struct Command: Sendable {
  let name: String
  let summary: String
  /// What stands for the words that are no flags, in `--help`; nil: there are none.
  var operands: String?
  let flags: [Flag]
  /// What stands for the words behind `--` in `--help`; nil: the command takes none.
  var trailing: String?
  /// Printed behind the flags in `--help`.
  var notes = ""
  let body: @Sendable (Arguments) throws -> Void

  var help: String {
    let rows = flags.map { flag in
      [flag.spelling + (flag.placeholder.map { " \($0)" } ?? ""), flag.help]
    }
    return """
      swiftep \(name): \(summary)

      usage: swiftep \(name)\(operands.map { " \($0)" } ?? "") [--FLAG VALUE]...\(trailing.map { " -- \($0)" } ?? "")

      \(alignedColumns(rows + [["--help", "print this"]], indentation: 2))
      \(notes.isEmpty ? "" : "\n\(notes)\n")
      \(ExitCode.help)

      """
  }
}

extension Flag {
  /// Of `bench` and `plan`.
  static let tokensPerStep = Flag(
    "tokens-per-step", "N",
    "by source: combine rows that do not lie in the arena in steps of so\nmany tokens of every rank (default: all at once)"
  )
}

extension Arguments {
  /// Of rows that do not lie in the arena.
  func stagingInSteps() throws -> ExpertBuffer.Staging? {
    try integer("tokens-per-step", in: 1...1 << 24).map { .steps(tokens: $0) }
  }
}

struct Flag: Sendable {
  /// One letter, or a word.
  let name: String
  /// What stands for the value in `--help`; nil: the flag takes none.
  let placeholder: String?
  let help: String

  init(_ name: String, _ placeholder: String? = nil, _ help: String) {
    self.name = name
    self.placeholder = placeholder
    self.help = help
  }

  /// As on a command line.
  var spelling: String { Self.spelling(of: name) }

  static func spelling(of name: String) -> String { (name.count == 1 ? "-" : "--") + name }
}

/// The flags of one command line: `--name value` or `--name=value`, each at most once; the other words, where the
/// command takes any; and what follows `--`.
struct Arguments {
  private var values: [String: String] = [:]
  private(set) var operands: [String] = []
  /// The words behind `--`; at least one where the command takes any.
  private(set) var trailing: [String] = []

  /// - Parameter trailing: what the words behind `--` are; nil: none are taken.
  init(
    parsing words: [String], flags: [Flag], takesOperands: Bool = false, trailing: String? = nil
  ) throws(UsageError) {
    var rest = words[...]
    while let word = rest.popFirst() {
      if takesOperands && !word.hasPrefix("--") && !flags.contains(where: { $0.spelling == word }) {
        operands.append(word)
        continue
      }
      if word == "--" && trailing != nil {
        self.trailing = Array(rest)
        break
      }
      guard word.hasPrefix("-") && word.count > 1 else {
        let expected = "a flag (--name)" + (trailing.map { ", or -- before \($0)" } ?? "")
        throw UsageError("argument", expected: expected, found: "'\(word)'")
      }
      let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      guard let flag = flags.first(where: { $0.spelling == parts[0] }) else {
        let known = flags.map(\.spelling).joined(separator: ", ")
        throw UsageError("flag", expected: "one of \(known)", found: String(parts[0]))
      }
      let (name, spelling) = (flag.name, flag.spelling)
      if values[name] != nil { throw UsageError(spelling, expected: "the flag once", found: "it twice") }
      if let placeholder = flag.placeholder {
        let value = parts.count == 2 ? String(parts[1]) : rest.popFirst()
        guard let value, parts.count == 2 || !value.hasPrefix("--") else {
          throw UsageError(spelling, expected: "a value (\(placeholder))", found: value.map { "'\($0)'" } ?? "none")
        }
        values[name] = value
      } else {
        if parts.count == 2 { throw UsageError(spelling, expected: "no value", found: "'\(parts[1])'") }
        values[name] = ""
      }
    }
    if let trailing, self.trailing.isEmpty {
      throw UsageError("argument", expected: "-- \(trailing)", found: "none")
    }
  }

  func has(_ name: String) -> Bool { values[name] != nil }

  func string(_ name: String) -> String? { values[name] }

  func integer(_ name: String, in range: ClosedRange<Int>) throws(UsageError) -> Int? {
    guard let text = values[name] else { return nil }
    guard let value = Int(text), range.contains(value) else {
      let expected = "an integer of \(range.lowerBound) to \(range.upperBound)"
      throw UsageError(Flag.spelling(of: name), expected: expected, found: "'\(text)'")
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
      throw UsageError(Flag.spelling(of: name), expected: expected, found: "'\(text)'")
    }
    return value
  }

  func seed(_ name: String, default value: UInt64) throws(UsageError) -> UInt64 {
    guard let text = values[name] else { return value }
    guard let value = UInt64(text) else {
      throw UsageError(Flag.spelling(of: name), expected: "an integer of 0 to \(UInt64.max)", found: "'\(text)'")
    }
    return value
  }

  func choice<Value: CaseIterable & RawRepresentable<String>>(
    _ name: String, _ type: Value.Type
  ) throws(UsageError) -> Value? {
    guard let text = values[name] else { return nil }
    guard let value = Value(rawValue: text) else {
      let known = Value.allCases.map(\.rawValue).joined(separator: ", ")
      throw UsageError(Flag.spelling(of: name), expected: "one of \(known)", found: "'\(text)'")
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
