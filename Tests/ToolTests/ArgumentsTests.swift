import Testing

@testable import swiftep

@Suite struct ArgumentsTests {
  static let flags = [
    Flag("count", "N", "a number"), Flag("layout", "LAYOUT", "a choice"), Flag("staged", nil, "a switch"),
  ]

  func parse(_ words: String...) throws -> Arguments { try Arguments(parsing: words, flags: Self.flags) }

  enum Choice: String, CaseIterable { case source, expert }

  @Test func valuesAndSwitches() throws {
    let arguments = try parse("--count", "7", "--staged", "--layout=expert")
    #expect(try arguments.integer("count", in: 0...10) == 7)
    #expect(try arguments.choice("layout", Choice.self) == .expert)
    #expect(arguments.has("staged"))
    #expect(try parse().integer("count", in: 0...10, default: 3) == 3)
    #expect(try parse("--count", "-2").integer("count", in: -5...5) == -2)
    #expect(try parse("--count", "0.5").real("count", in: 0...1, default: 0) == 0.5)
    #expect(try parse("--count", "18446744073709551615").seed("count", default: 1) == .max)
  }

  @Test func otherWords() throws {
    let arguments = try Arguments(
      parsing: ["12", "--staged", "-3", "--count", "7", "x"], flags: Self.flags, takesOperands: true)
    #expect(arguments.operands == ["12", "-3", "x"])
    #expect(try arguments.integer("count", in: 0...10) == 7)
    #expect(try parse("--staged").operands.isEmpty)
  }

  @Test(arguments: [
    (["count"], "argument: expected a flag (--name), found 'count'"),
    (["--bogus", "1"], "flag: expected one of --count, --layout, --staged, found --bogus"),
    (["--count"], "--count: expected a value (N), found none"),
    (["--count", "--staged"], "--count: expected a value (N), found '--staged'"),
    (["--staged=1"], "--staged: expected no value, found '1'"),
    (["--count", "1", "--count", "2"], "--count: expected the flag once, found it twice"),
  ])
  func badLines(_ words: [String], _ sentence: String) {
    let error = #expect(throws: UsageError.self) { try Arguments(parsing: words, flags: Self.flags) }
    #expect(error?.description == sentence)
  }

  @Test(arguments: ["0", "11", "x", "1.5", "", "99999999999999999999"])
  func badIntegers(_ text: String) throws {
    let arguments = try parse("--count=\(text)")
    let error = #expect(throws: UsageError.self) { try arguments.integer("count", in: 1...10) }
    #expect(error?.description == "--count: expected an integer of 1 to 10, found '\(text)'")
  }

  @Test(arguments: ["nan", "inf", "-0.1", "two"])
  func badReals(_ text: String) throws {
    let arguments = try parse("--count=\(text)")
    #expect(throws: UsageError.self) { try arguments.real("count", in: 0...1, default: 0) }
  }

  @Test func badChoicesAndSeeds() throws {
    let arguments = try parse("--count", "-1", "--layout", "diagonal")
    let error = #expect(throws: UsageError.self) { try arguments.choice("layout", Choice.self) }
    #expect(error?.description == "--layout: expected one of source, expert, found 'diagonal'")
    #expect(throws: UsageError.self) { try arguments.seed("count", default: 1) }
  }

  @Test func trailingWords() throws {
    let flags = Self.flags + [Flag("n", "N", "a letter")]
    let arguments = try Arguments(
      parsing: ["-n", "3", "--staged", "--", "a", "--staged", "-n"], flags: flags, trailing: "WORD")
    #expect(try arguments.integer("n", in: 0...5) == 3)
    #expect(arguments.trailing == ["a", "--staged", "-n"])
    #expect(throws: UsageError("-n", expected: "an integer of 4 to 5", found: "'3'")) {
      try arguments.integer("n", in: 4...5)
    }
    let missing = UsageError("argument", expected: "-- WORD", found: "none")
    for words in [[], ["--"], ["-n", "3"]] {
      #expect(throws: missing) { try Arguments(parsing: words, flags: flags, trailing: "WORD") }
    }
    #expect(throws: UsageError.self) { try Arguments(parsing: ["-", "--", "a"], flags: flags, trailing: "WORD") }
    #expect(throws: UsageError.self) { try Arguments(parsing: ["--"], flags: flags) }
  }

  @Test(arguments: Tool.commands.map(\.name))
  func helpNamesEveryFlag(_ name: String) throws {
    let command = try #require(Tool.commands.first { $0.name == name })
    for flag in command.flags { #expect(command.help.contains("  \(flag.spelling)")) }
    #expect(command.help.contains("exit codes"))
    #expect(Tool.help.contains(name))
    #expect(command.help.split(separator: "\n").allSatisfy { $0.count <= 120 })
  }
}
