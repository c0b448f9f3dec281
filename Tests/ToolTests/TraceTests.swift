import Foundation
import Testing

@testable import SwiftEP
@testable import swiftep

@Suite struct FlightLogTests {
  private func record(_ indices: ClosedRange<Int>) -> FlightRecord {
    FlightRecord(
      rank: 0, rankCount: 1, expertCount: 1, generation: 0, buffer: 0, group: "1", process: 1, processes: [1],
      timeoutNanoseconds: 1, readNanoseconds: UInt64(indices.upperBound),
      current: FlightRecord.Current(step: .idle, sinceNanoseconds: 1),
      operations: indices.map { index in
        FlightRecord.Operation(
          index: index, kind: .dispatch, outcome: .ok, spans: [], tokenCount: 0, rowsSent: 0, rowsReceived: 0,
          bytesSent: 0, bytesReceived: 0)
      }, longestWaits: [])
  }

  /// Every operation once, those before the log left out.
  @Test func overlappingRecords() {
    var log = FlightLog(after: record(1...5))
    #expect(log.record.operations.isEmpty)
    log.append(record(2...5))
    #expect(log.record.operations.isEmpty)
    for end in stride(from: 7, to: 200, by: 2) { log.append(record(max(1, end - 63)...end)) }
    #expect(log.record.operations.map(\.index) == Array(6...199))
    #expect(log.record.readNanoseconds == 199)
  }
}

@Suite(.serialized) struct TraceTests {
  /// More iterations than a flight recorder holds.
  static let iterationCount = 70
  static let words = [
    "bench", "--ranks", "3", "--tokens", "32", "--hidden", "128", "--iterations", "\(iterationCount)",
  ]

  private func nanoseconds(_ microseconds: Double?) -> Int { Int(((microseconds ?? .nan) * 1000).rounded()) }

  @Test func everyTimedOperationOfEveryRank() throws {
    let file = try TemporaryFile()
    let run = try Binary.run(Self.words + ["--trace", file.path])
    #expect(run.status == 0, "\(run.errors)")
    #expect(run.output.contains("longest wait of  for rank 0  for rank 1  for rank 2"))
    let trace = try JSONDecoder().decode(Trace.self, from: Data(contentsOf: URL(fileURLWithPath: file.path)))
    #expect(trace.displayTimeUnit == "ns" && trace.otherData.job.hasPrefix("3 ranks, 32 tokens each"))
    var longest = [[Int]](repeating: [0, 0, 0], count: 3)
    for rank in 0..<3 {
      let events = trace.traceEvents.filter { $0.pid == rank }
      #expect(events[0].ph == "M" && events[0].name == "process_name" && events[0].args?.name == "rank \(rank)")
      let complete = events.dropFirst()
      #expect(complete.allSatisfy { $0.ph == "X" && $0.tid == 0 })
      #expect(complete.count == 2 * Self.iterationCount * 6)
      checkOperations(Array(complete), rank: rank, longest: &longest[rank])
    }
    #expect(trace.traceEvents.compactMap(\.ts).min() == 0)
    // The longest waits are of the same operations: none is shorter than what the events say.
    let matrix = trace.otherData.longestWaitsMicroseconds
    #expect(matrix.count == 3)
    for (rank, row) in matrix.enumerated() {
      #expect(row.count == 3 && row[rank] == nil)
      for (peer, wait) in row.enumerated() {
        let seen = longest[rank][peer]
        #expect(seen == 0 || nanoseconds(wait) >= seen, "\(rank) for \(peer)")
      }
      // The longest of all has held its operation up.
      #expect(row.compactMap { $0.map(nanoseconds) }.max() ?? 0 == longest[rank].max())
    }
  }

  /// Operations one after another, dispatch and combine in turn, each filled by its steps without a gap.
  private func checkOperations(_ events: [Trace.Event], rank: Int, longest: inout [Int]) {
    var last = -1
    for first in stride(from: 0, to: events.count, by: 6) {
      let (operation, steps) = (events[first], events[first + 1..<first + 6])
      let isDispatch = first / 6 % 2 == 0
      #expect(operation.cat == "operation" && operation.name == (isDispatch ? "dispatch" : "combine"))
      #expect(operation.args?.result == "ok" && operation.args?.tokens == 32)
      // The oracle's round and one that is not counted came before.
      #expect(operation.args?.epoch == UInt64(5 + first / 6))
      #expect((operation.args?.rowsSent ?? 0) > 0 && (operation.args?.bytesReceived ?? 0) > 0)
      let (begin, end) = (nanoseconds(operation.ts), nanoseconds(operation.ts) + nanoseconds(operation.dur))
      #expect(begin > last)
      var now = begin
      for step in steps {
        #expect(step.cat == "step" && step.args?.epoch == operation.args?.epoch)
        #expect(nanoseconds(step.ts) == now && nanoseconds(step.dur) >= 0)
        now += nanoseconds(step.dur)
        if let peer = step.args?.peer {
          let wait = nanoseconds(step.args?.peerMicroseconds)
          #expect(peer != rank && wait > 0 && wait <= nanoseconds(step.dur))
          #expect(step.name.hasSuffix(" wait"))
          longest[peer] = max(longest[peer], wait)
        }
      }
      #expect(now == end)
      #expect(
        steps.map(\.name)
          == [isDispatch ? "lay out" : "stage", "exchange wait", "place", "deliver", "completion wait"])
      last = end
    }
  }

  /// With the report as JSON, too; and a disk that is full is an error, after the report.
  @Test func otherOutputs() throws {
    let file = try TemporaryFile()
    let words = ["bench", "--tokens", "16", "--hidden", "64", "--iterations", "1"]
    let run = try Binary.run(words + ["--json", "-", "--trace", file.path])
    #expect(run.status == 0)
    #expect(try JSONDecoder().decode(BenchReport.self, from: Data(run.output.utf8)).verified)
    let trace = try JSONDecoder().decode(Trace.self, from: Data(contentsOf: URL(fileURLWithPath: file.path)))
    #expect(trace.traceEvents.count == 2 * (1 + 2 * 6))
    // Of the one iteration that counts; the rounds before it had longer waits.
    #expect(trace.otherData.longestWaits.allSatisfy { [5, 6].contains($0.epoch) && $0.microseconds > 0 })
    let full = try Binary.run(words + ["--trace", "/dev/full"])
    #expect(full.status == 2 && full.output.contains("result hash"))
    #expect(full.errors == "swiftep: --trace /dev/full: expected a file that can be written, found one that cannot\n")
  }
}
