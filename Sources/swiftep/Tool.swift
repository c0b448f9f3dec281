import Foundation
import SwiftEP

@main
struct Tool {
  static let commands = [
    benchCommand, verifyCommand, planCommand, launchCommand, tokenCommand, doctorCommand, inspectCommand, chaosCommand,
  ]

  static func main() {
    exit(run(Array(CommandLine.arguments.dropFirst())).rawValue)
  }

  /// Runs one command line; what went wrong is said on stderr.
  static func run(_ words: [String]) -> ExitCode {
    do {
      try runCommand(words)
      return .success
    } catch {
      printError("swiftep: \(error)")
      return ExitCode(error)
    }
  }

  private static func runCommand(_ words: [String]) throws {
    let names = commands.map(\.name).joined(separator: ", ")
    guard let name = words.first else {
      throw UsageError("command", expected: "one of \(names) (see swiftep --help)", found: "none")
    }
    if name == "--help" { return print(help, terminator: "") }
    guard let command = commands.first(where: { $0.name == name }) else {
      throw UsageError("command", expected: "one of \(names)", found: "'\(name)'")
    }
    let rest = Array(words.dropFirst())
    if rest.prefix(while: { $0 != "--" }).contains("--help") { return print(command.help, terminator: "") }
    try command.body(
      try Arguments(
        parsing: rest, flags: command.flags, takesOperands: command.operands != nil, trailing: command.trailing))
  }

  static var help: String {
    let rows = commands.map { [$0.name, $0.summary] }
    return """
      swiftep: expert-parallel dispatch and combine

      usage: swiftep COMMAND [--FLAG VALUE]...

      \(alignedColumns(rows, indentation: 2))

      swiftep COMMAND --help says more about each.

      \(ExitCode.help)

      """
  }
}

struct ExitCode: Equatable, Sendable {
  let rawValue: Int32

  static let success = ExitCode(rawValue: 0)
  static let checkFailed = ExitCode(rawValue: 1)
  static let usage = ExitCode(rawValue: 2)
  static let runtime = ExitCode(rawValue: 3)

  private init(rawValue: Int32) { self.rawValue = rawValue }

  init(_ error: any Error) {
    switch error {
    case is UsageError: self = .usage
    case is CheckFailure: self = .checkFailed
    case let failure as RankFailure: self.init(rawValue: failure.end.code)
    case let error as ProgramError: self.init(rawValue: error.code)
    default: self = .runtime
    }
  }

  static let help = """
    exit codes:
      0  success
      1  a check failed: a result was wrong
      2  the command line, or a file that it names, cannot be used
      3  an error at run time
    """
}

/// A flag or a file that cannot be used.
struct UsageError: Error, Equatable, CustomStringConvertible {
  let subject: String
  let expected: String
  let found: String

  init(_ subject: String, expected: String, found: String) {
    self.subject = subject
    self.expected = expected
    self.found = found
  }

  var description: String { "\(subject): expected \(expected), found \(found)" }
}

/// A result that is not what it should be.
struct CheckFailure: Error, CustomStringConvertible {
  let what: String
  var description: String { "check failed: \(what)" }
}

func printError(_ line: String) {
  try? FileHandle.standardError.write(contentsOf: Data((line + "\n").utf8))
}
