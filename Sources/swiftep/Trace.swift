import Foundation
import SwiftEP

/// Operations of all ranks in the format of Chrome's tracer, which Perfetto (https://ui.perfetto.dev) reads: a process
/// for each rank, an event for each operation, and in it one for each of its steps. Times are in microseconds since the
/// first event.
struct Trace: Codable {
  let traceEvents: [Event]
  let displayTimeUnit: String
  let otherData: OtherData

  struct Event: Codable, Equatable {
    let name: String
    /// Complete events are `X`, names of processes `M`.
    let ph: String
    var cat: String?
    var ts: Double?
    var dur: Double?
    let pid: Int
    var tid: Int?
    var args: Details?
  }

  struct Details: Codable, Equatable {
    /// A process's.
    var name: String?
    var epoch: UInt64?
    var result: String?
    var tokens: Int?
    var rowsSent: Int?
    var rowsReceived: Int?
    var bytesSent: Int64?
    var bytesReceived: Int64?
    /// The last peer to come, and how long it was waited for.
    var peer: Int?
    var peerMicroseconds: Double?
  }

  struct OtherData: Codable, Equatable {
    let job: String
    /// By the rank that waited, then by the rank that was waited for; null: never.
    let longestWaitsMicroseconds: [[Double?]]
    /// The same, with where they were.
    let longestWaits: [LongestWait]
  }

  struct LongestWait: Codable, Equatable {
    let rank: Int
    let peer: Int
    let microseconds: Double
    let step: FlightRecord.Step
    let epoch: UInt64
  }

  /// - Parameter records: of all ranks, in rank order.
  init(_ records: [FlightRecord], job: String) {
    let first = records.compactMap { $0.operations.first?.spans.first?.beginNanoseconds }.min() ?? 0
    traceEvents = records.flatMap { record in
      [Event(name: "process_name", ph: "M", pid: record.rank, args: Details(name: "rank \(record.rank)"))]
        + record.operations.flatMap { Self.events($0, rank: record.rank, first: first) }
    }
    displayTimeUnit = "ns"
    let waits = WaitMatrix(records).nanoseconds
    otherData = OtherData(
      job: job, longestWaitsMicroseconds: waits.map { row in row.map { $0.map { Double($0) / 1000 } } },
      longestWaits: records.flatMap { record in
        record.longestWaits.map { wait in
          LongestWait(
            rank: record.rank, peer: wait.peer, microseconds: Double(wait.nanoseconds) / 1000, step: wait.step,
            epoch: wait.epoch)
        }
      })
  }

  func json() throws -> Data { try JSONEncoder().encode(self) + Data("\n".utf8) }

  /// The operation, then its steps.
  private static func events(_ operation: FlightRecord.Operation, rank: Int, first: UInt64) -> [Event] {
    guard let begin = operation.spans.first?.beginNanoseconds, let end = operation.spans.last?.endNanoseconds else {
      return []
    }
    func event(_ name: String, _ category: String, _ begin: UInt64, _ end: UInt64, _ details: Details) -> Event {
      Event(
        name: name, ph: "X", cat: category, ts: Double(begin - first) / 1000, dur: Double(end - begin) / 1000,
        pid: rank,
        tid: 0, args: details)
    }
    let details = Details(
      epoch: operation.epoch, result: operation.result, tokens: operation.tokenCount, rowsSent: operation.rowsSent,
      rowsReceived: operation.rowsReceived, bytesSent: operation.bytesSent, bytesReceived: operation.bytesReceived)
    let whole = event(operation.kind.title, "operation", begin, end, details)
    return [whole]
      + operation.spans.map { span in
        var details = Details(epoch: operation.epoch)
        if let wait = operation.wait(in: span.step) {
          (details.peer, details.peerMicroseconds) = (wait.peer, Double(wait.nanoseconds) / 1000)
        }
        let name = span.step.title(in: operation.kind)
        return event(name, "step", span.beginNanoseconds, span.endNanoseconds ?? end, details)
      }
  }
}

extension FlightRecord.Operation {
  fileprivate func wait(in step: FlightRecord.Step) -> FlightRecord.Wait? {
    switch step {
    case .exchange: exchangeWait
    case .completion: completionWait
    default: nil
    }
  }
}

extension FlightRecord.Step {
  fileprivate func title(in kind: FlightRecord.Kind) -> String {
    switch self {
    case .prepare: kind == .combine ? "stage" : "lay out"
    case .exchange: "exchange wait"
    case .completion: "completion wait"
    default: rawValue
    }
  }
}
