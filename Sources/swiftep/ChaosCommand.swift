import Conformance
import Foundation
import SwiftEP

let chaosCommand = Command(
  name: "chaos", summary: "ranks that are killed, stopped and starved at random moments: the others must go on",
  flags: [
    Flag("faults", "N", "how many (default 100)"),
    Flag("ranks", "N", "processes (default 5)"),
    Flag("seed", "S", "of faults and moments; the moments' effects still differ from run to run (default 1)"),
  ],
  notes: """
    Every rank is a process that dispatches and combines without end, each result checked. After a fault all others
    must report the missing rank, an innocent one never; form a new group, often with newcomers; and work again.
    """,
  body: { arguments in
    let settings = ChaosSettings(
      rankCount: try arguments.integer("ranks", in: 3...64, default: 5),
      faultCount: try arguments.integer("faults", in: 1...1_000_000, default: 100),
      seed: try arguments.seed("seed", default: 1))
    // Buffers are lost here on purpose.
    setenv("SWIFTEP_FLIGHT_RECORDER", "off", 0)
    let status = StatusLine()
    try printNow("seed \(settings.seed)")
    do {
      var chaos = Chaos(settings)
      let summary = try chaos.run { status.show("chaos: \($0) faults") }
      status.clear()
      print(summary.table())
    } catch let failure as ChaosFailure {
      status.clear()
      throw CheckFailure(what: failure.description)
    }
  })

extension ChaosSummary {
  func table() -> String {
    var table = TextTable(["fault", "then", "times", "until all work again: median ms", "max ms"])
    for row in rows.sorted(by: { ($0.fault.rawValue, $1.joined ? 1 : 0) < ($1.fault.rawValue, $0.joined ? 1 : 0) }) {
      table.append([
        row.fault.rawValue, row.joined ? "joined by others" : "shrunk", "\(row.times.count)",
        (row.times.median / 1e6).rounded(toPlaces: 1), (Double(row.times.max() ?? 0) / 1e6).rounded(toPlaces: 1),
      ])
    }
    return "\(table)\n\n\(faultCount) faults survived"
  }
}
