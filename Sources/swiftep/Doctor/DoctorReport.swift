import Foundation

/// What was looked at, and which way a job would take.
struct DoctorReport: Codable, Equatable {
  struct Way: Codable, Equatable {
    let path: JobPath
    let isPossible: Bool
    let why: String
  }

  let job: String
  let checks: [Check]
  /// The way that a job takes which is started now, as this process was.
  let path: JobPath
  /// Whether that way is possible.
  let isPossible: Bool
  let ways: [Way]

  init(_ doctor: Doctor) {
    job = doctor.job.summary
    checks = doctor.checks()
    path = doctor.launcher == nil ? .threads : .processes
    ways = JobPath.allCases.map { [checks] in Self.way($0, doctor, checks) }
    isPossible = ways.first { [path] in $0.path == path }!.isPossible
  }

  private static func way(_ path: JobPath, _ doctor: Doctor, _ checks: [Check]) -> Way {
    let obstacles = checks.filter { $0.blocks.contains(path) }.map(\.name)
    if !obstacles.isEmpty {
      return Way(path: path, isPossible: false, why: "not possible: see \(obstacles.joined(separator: ", "))")
    }
    switch path {
    case .threads:
      let why = doctor.launcher == nil ? "no launcher has started this process" : "where a program asks for them"
      return Way(path: path, isPossible: true, why: why)
    case .processes:
      let why =
        doctor.launcher.map { "started by \($0)" } ?? "with swiftep launch -n \(doctor.job.rankCount) -- PROGRAM"
      return Way(path: path, isPossible: true, why: why)
    case .gpu:
      if doctor.gpuCount == 0 {
        return Way(path: path, isPossible: false, why: "not used: there is none that works")
      }
      return Way(
        path: path, isPossible: true, why: "where a program asks for one, of sm_80 or later, for threads or processes")
    }
  }

  /// Names of what makes jobs impossible.
  var obstacles: [String] { checks.filter { $0.blocks.contains(path) }.map(\.name) }

  func json() throws -> Data {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    return try encoder.encode(self) + Data("\n".utf8)
  }

  func table() -> String {
    let titles = ["state", "check", "found", "needed"]
    let rows = [titles] + checks.map { [$0.state.rawValue, $0.name, $0.found, $0.needed] }
    let widths = titles.indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    var lines: [String] = []
    for (index, row) in rows.enumerated() {
      let cells = zip(row, widths).map { $0.padding(to: $1) }
      lines.append(cells.joined(separator: "  ").trimmingCharacters(in: .whitespaces))
      if index == 0 { lines.append(String(repeating: "-", count: widths.reduce(6, +))) }
      if index > 0 && !checks[index - 1].remedy.isEmpty {
        lines.append(String(repeating: " ", count: widths[0] + 2) + "-> " + checks[index - 1].remedy)
      }
    }
    let taken = ways.first { $0.path == path }!
    let others = ways.filter { $0.path != path }.map { ["or \($0.path.title):", $0.why] }
    return lines.joined(separator: "\n") + "\n\n"
      + alignedColumns([["a job takes \(taken.path.title):", taken.why]] + others, indentation: 0)
  }
}
