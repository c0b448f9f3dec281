import SwiftEP

/// One rank's operations over a longer time than its flight recorder holds. To be fed before 64 more have begun.
struct FlightLog: Sendable {
  /// The last record, with the operations of all.
  private(set) var record: FlightRecord
  private var lastIndex: Int

  /// Of what comes after `record`.
  init(after record: FlightRecord) {
    self.record = record
    lastIndex = record.operations.last?.index ?? 0
    self.record.operations = []
  }

  mutating func append(_ later: FlightRecord) {
    let operations = record.operations + later.operations.filter { $0.index > lastIndex }
    record = later
    record.operations = operations
    lastIndex = operations.last?.index ?? lastIndex
  }
}
