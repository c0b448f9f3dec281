import SwiftEP

/// The longest waits of the ranks of one buffer: who has waited for whom, and how long.
struct WaitMatrix {
  let ranks: [Int]
  /// By the rank that waited, as in `ranks`; then by the rank that was waited for. Nil: never.
  let nanoseconds: [[UInt64?]]

  /// - Parameter records: of one buffer, in rank order.
  init(_ records: [FlightRecord]) {
    ranks = records.map(\.rank)
    nanoseconds = records.map { record in
      var row = [UInt64?](repeating: nil, count: record.rankCount)
      for wait in record.longestWaits { row[wait.peer] = wait.nanoseconds }
      return row
    }
  }

  var table: TextTable {
    var table = TextTable(["longest wait of"] + (nanoseconds.first ?? []).indices.map { "for rank \($0)" })
    for (rank, row) in zip(ranks, nanoseconds) {
      table.append(["rank \(rank)"] + row.map { $0.map(durationText) ?? "-" })
    }
    return table
  }
}
