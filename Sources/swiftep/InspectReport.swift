import SwiftEP

/// What was found in processes, as text: each rank's record, then whom everybody waits for, at the end where it is seen.
struct InspectReport {
  private let processes: [InspectedProcess]
  private let operationCount: Int

  init(_ processes: [InspectedProcess], operationCount: Int) {
    (self.processes, self.operationCount) = (processes, operationCount)
  }

  var text: String { (sections + [situations]).joined(separator: "\n\n") }

  private var sections: [String] {
    processes.flatMap { process in
      let count = process.ranks.count
      let title = "process \(process.process), \(process.state): \(count) \(count == 1 ? "rank" : "ranks")"
      return [title] + process.ranks.map { $0.description(operationCountMax: operationCount) }
    } + buffers.filter { $0.count > 1 }.map { "\(WaitMatrix($0).table)" }
  }

  private var situations: String {
    buffers.flatMap { ranks in ranks.map { "\($0.situation)" } }.joined(separator: "\n")
  }

  /// The ranks that belong together, in rank order.
  private var buffers: [[FlightRecord]] {
    struct Key: Hashable {
      let group: String
      let generation: Int
      let buffer: Int
      let rankCount: Int
    }
    let all = processes.flatMap(\.ranks)
    let groups = Dictionary(grouping: all) {
      Key(group: $0.group, generation: $0.generation, buffer: $0.buffer, rankCount: $0.rankCount)
    }
    return groups.sorted {
      ($0.key.group, $0.key.generation, $0.key.buffer) < ($1.key.group, $1.key.generation, $1.key.buffer)
    }
    .map { $0.value.sorted { $0.rank < $1.rank } }
  }
}
