import Foundation
import SwiftEP

let inspectCommand = Command(
  name: "inspect", summary: "what the ranks in running processes are doing, and whom they wait for",
  operands: "PID...",
  flags: [
    Flag("operations", "N", "the last N operations of each rank, at most 64 (default 8)"),
    Flag("json", nil, "print all that there is, as JSON"),
    Flag("watch", "SECONDS", "again every so many seconds, until the processes have ended"),
  ],
  notes: """
    Reads the flight recorders in the processes' memory. They need not cooperate and are not disturbed: they may be
    busy, hung or stopped. It takes the same user, or root.
    """,
  body: { arguments in
    let settings = try InspectSettings(arguments)
    try settings.print(try settings.inspect(settings.processes))
    guard let interval = settings.interval else { return }
    while true {
      usleep(UInt32(interval * 1e6))
      let running = settings.processes.filter { ProcessState(of: $0) != nil }
      // One that ends just now is no error.
      let found = running.compactMap { try? InspectedProcess(of: $0) }
      if found.isEmpty { return }
      try settings.print(found)
    }
  })

struct InspectSettings {
  let processes: [Int32]
  let operationCount: Int
  let isJSON: Bool
  /// Seconds.
  let interval: Double?

  init(_ arguments: Arguments) throws(UsageError) {
    operationCount = try arguments.integer("operations", in: 0...64, default: 8)
    isJSON = arguments.has("json")
    interval = arguments.has("watch") ? try arguments.real("watch", in: 0.01...3600, default: 1) : nil
    var processes: [Int32] = []
    for word in arguments.operands {
      guard let process = Int32(word), process > 0 else {
        throw UsageError("PID", expected: "the number of a process", found: "'\(word)'")
      }
      if !processes.contains(process) { processes.append(process) }
    }
    if processes.isEmpty { throw UsageError("PID", expected: "the number of a process", found: "none") }
    self.processes = processes
  }

  /// What can be found is printed, whatever cannot.
  ///
  /// - Throws: `UsageError`: why a process cannot be inspected.
  func inspect(_ processes: [Int32]) throws -> [InspectedProcess] {
    var found: [InspectedProcess] = []
    var failure: (any Error)?
    for process in processes {
      do {
        found.append(try InspectedProcess(of: process))
      } catch {
        failure = failure ?? error
      }
    }
    if let failure {
      if !found.isEmpty { try print(found) }
      throw failure
    }
    return found
  }

  func print(_ found: [InspectedProcess]) throws {
    if !isJSON {
      return try printDocument(Data((InspectReport(found, operationCount: operationCount).text + "\n").utf8))
    }
    let encoder = JSONEncoder()
    // While it is watched, a line each.
    encoder.outputFormatting = interval == nil ? [.prettyPrinted, .sortedKeys] : .sortedKeys
    try printDocument(try encoder.encode(found) + Data("\n".utf8))
  }
}

/// One process, and its ranks as they were at one moment.
struct InspectedProcess: Codable, Equatable {
  let process: Int32
  let state: ProcessState
  let ranks: [FlightRecord]

  init(of process: Int32) throws {
    self.process = process
    do throws(EPError) {
      ranks = try FlightRecord.records(ofProcess: process)
    } catch {
      guard case .invalidArgument(_, let argument, let expected, let found) = error else { throw error }
      throw UsageError(argument, expected: expected, found: found)
    }
    state = ProcessState(of: process) ?? .ended
    if ranks.isEmpty {
      throw UsageError("process \(process)", expected: "one with an ExpertBuffer", found: "none in it (it is \(state))")
    }
  }
}

enum ProcessState: String, Codable {
  case running, sleeping, stopped, ended

  /// Nil where there is no such process.
  init?(of process: Int32) {
    guard let text = try? String(contentsOfFile: "/proc/\(process)/stat", encoding: .utf8),
      let letter = text.split(separator: ")").last?.split(separator: " ").first
    else { return nil }
    switch letter {
    case "T", "t": self = .stopped
    case "Z", "X": self = .ended
    case "R": self = .running
    default: self = .sleeping
    }
  }
}
