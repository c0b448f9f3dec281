import SwiftEP

/// Benches of few tokens each.
struct LatencyReport: Codable, Equatable {
  /// In the order of their tokens.
  var sizes: [BenchReport]

  /// Powers of two, and the last.
  static func tokenCounts(upTo last: Int) -> [Int] {
    var counts: [Int] = []
    var count = 1
    while count < last {
      counts.append(count)
      count *= 2
    }
    return counts + [last]
  }

  var table: TextTable {
    var table = TextTable(["tokens", "operation", "p50 us", "p99 us", "max us", "floor us", "x floor"])
    for size in sizes {
      for operation in size.operations {
        table.append([
          "\(size.tokens)", operation.name, operation.medianMicroseconds.rounded(toPlaces: 1),
          operation.p99Microseconds.rounded(toPlaces: 1), operation.maxMicroseconds.rounded(toPlaces: 1),
          operation.floorMicroseconds.rounded(toPlaces: 1), operation.floorRatio.rounded(toPlaces: 2),
        ])
      }
    }
    return table
  }
}
