import Conformance
import Foundation
import Glibc
import HostMachine
import SwiftEP
import Testing

extension ConformanceTests {
  /// What ranks note of their operations, read through their buffers.
  @Suite struct FlightRecordTests {
    // MARK: Contents

    /// Dispatch, cached dispatch and combine: counts, epochs and steps, whatever the workers.
    @Test(arguments: RowLayout.allCases, [1, 3])
    func whatOperationsDid(_ layout: RowLayout, _ workers: Int) throws {
      let job = smallJob().with { ($0.layout, $0.expertAlignment, $0.tokensPerRank) = (layout, 4, [16, 0, 7]) }
      let begin = monotonicNow()
      let records = try onEachRank(try job.makePlan(), workers: workers) { buffer in
        try require(buffer.flightRecord.operations.isEmpty, "operations before the first")
        let result = try job.dispatch(on: buffer)
        _ = try job.dispatch(on: buffer, step: 1, handle: result.handle)
        _ = try buffer.combine(result.rows, with: result.handle)
        return buffer.flightRecord
      }
      let end = monotonicNow()
      let counts = Self.rowCounts(of: job)
      for (rank, record) in records.enumerated() {
        #expect(record.rank == rank && record.rankCount == 3 && record.expertCount == 6)
        #expect(record.timeoutNanoseconds == 30_000_000_000)
        #expect((record.process == Int(getpid())) != (fabric is ProcessFabric))
        #expect(Set(record.processes).count == (fabric is ProcessFabric ? 3 : 1))
        #expect(record.processes[rank] == record.process)
        #expect(record.group == records[0].group && record.generation == 0 && record.buffer == 0)
        #expect(record.current.step == .idle)
        #expect(record.operations.map(\.kind) == [.dispatch, .cachedDispatch, .combine])
        #expect(record.operations.map(\.epoch) == [1, 2, 3] && record.operations.map(\.index) == [1, 2, 3])
        var last = begin
        for operation in record.operations {
          #expect(operation.outcome == .ok && operation.culprit == nil)
          #expect(operation.tokenCount == job.tokensPerRank[rank])
          #expect(operation.spans.map(\.step) == [.prepare, .exchange, .place, .deliver, .completion])
          for span in operation.spans {
            #expect(span.beginNanoseconds >= last && span.endNanoseconds! >= span.beginNanoseconds)
            last = span.endNanoseconds!
          }
        }
        #expect(last <= end && record.current.sinceNanoseconds == last)
        // Rows of 128 bytes, with an index (and weight) for each slot and two origins.
        let slots = layout == .bySource ? 2 : 1
        let dispatchBytes = 128 + 8 + slots * (8 + 4)
        let (sent, received) = (counts.sent[rank], counts.received[rank])
        #expect(record.operations.map(\.rowsSent) == [sent, sent, received])
        #expect(record.operations.map(\.rowsReceived) == [received, received, sent])
        #expect(record.operations[0].bytesSent == Int64(sent * dispatchBytes))
        #expect(record.operations[0].bytesReceived == Int64(received * dispatchBytes))
        // A cached dispatch brings no indices.
        #expect(record.operations[1].bytesReceived == Int64(received * (128 + 8)))
        #expect(record.operations[2].bytesReceived == Int64(sent * 128))
        #expect(record.operations[2].bytesSent == Int64(received * 128))
      }
    }

    /// As the oracle has it: rows that each rank sends, and receives, padding aside.
    private static func rowCounts(of job: Job) -> (sent: [Int], received: [Int]) {
      let oracle = job.makeOracle()
      var (sent, received) = ([Int](repeating: 0, count: job.rankCount), [Int](repeating: 0, count: job.rankCount))
      for rank in 0..<job.rankCount {
        let origins = oracle.dispatched(to: rank).origins
        for row in 0..<origins.count / 2 where origins[2 * row] >= 0 {
          sent[Int(origins[2 * row])] += 1
          received[rank] += 1
        }
      }
      return (sent, received)
    }

    @Test func oneRankWaitsForNobody() throws {
      let job = smallJob(rankCount: 1)
      let records = try onEachRank(try job.makePlan()) { buffer in
        _ = try job.dispatch(on: buffer)
        return buffer.flightRecord
      }
      #expect(records[0].operations.count == 1 && records[0].operations[0].exchangeWait == nil)
      #expect(records[0].longestWaits == [] && records[0].operations[0].rowsSent == 16)
    }

    @Test func onlyTheLastSixtyFour() throws {
      let job = smallJob(rankCount: 2)
      let records = try onEachRank(try job.makePlan()) { buffer in
        let result = try job.dispatch(on: buffer)
        for _ in 0..<70 { _ = try buffer.combine(result.rows, with: result.handle) }
        return buffer.flightRecord
      }
      for record in records {
        #expect(record.operations.map(\.index) == Array(8...71))
        #expect(record.operations.map(\.epoch) == (8...71).map { UInt64($0) })
      }
    }

    /// Two buffers of one group have its number in common, those of another group have another.
    @Test func buffersAreToldApart() throws {
      let plan = try smallJob(rankCount: 2).makePlan()
      let groups = [try Communicator.threads(rankCount: 2), try Communicator.threads(rankCount: 2)]
      let records = try valuesInParallel(4) { index in
        let communicator = groups[index / 2][index % 2]
        let buffers = try (0..<2).map { _ in try TestBuffer(communicator, plan: plan, workers: 1) }
        return buffers.map(\.flightRecord)
      }
      for (index, pair) in records.enumerated() {
        #expect(pair.map(\.rank) == [index % 2, index % 2] && pair.map(\.buffer) == [0, 1])
        #expect(Set(pair.map(\.group)) == [records[index / 2 * 2][0].group])
      }
      #expect(records[0][0].group != records[2][0].group)
    }

    // MARK: Errors

    @Test func errorsOfAllRanks() throws {
      let job = smallJob(rankCount: 2)
      let records = try onEachRank(try job.makePlan()) { buffer in
        let narrow = job.with { $0.topK = 1 }
        _ = try error { () throws(EPError) in
          _ = try (buffer.rank == 1 ? narrow : job).dispatch(on: buffer)
        }
        let tokens = job.makeTokens(rank: buffer.rank, step: 0)
        _ = try error { () throws(EPError) in
          _ = try buffer.dispatch(
            tokens.x, scales: buffer.rank == 0 ? tokens.x : nil, sidecars: tokens.sidecars, to: tokens.routing)
        }
        _ = try job.dispatch(on: buffer)
        return buffer.flightRecord
      }
      for record in records {
        #expect(record.operations.map(\.outcome) == [.disagreement, .inputFault, .ok])
        #expect(record.operations.map(\.culprit) == [1, 0, nil])
        #expect(record.operations.map { $0.spans.last!.step } == [.completion, .completion, .completion])
        #expect(record.operations[0].rowsSent == 0 && record.operations[2].rowsSent > 0)
      }
    }

    /// What does not fit is tried again: two records, both true.
    @Test func overflows() throws {
      let job = Job(rankCount: 2, tokenCount: 200, hidden: 512, topK: 2, expertCount: 6).with {
        $0.expertOwners = [1, 1, 1, 1, 1, 1]
      }
      let records = try onEachRank(try ExpertBuffer.Plan(job.shape, receivedTokensMax: 1)) { buffer in
        _ = try job.dispatch(on: buffer)
        return buffer.flightRecord
      }
      for record in records {
        #expect(record.operations.map(\.outcome) == [.overflow, .ok] && record.operations.map(\.epoch) == [1, 2])
        #expect(record.operations[0].culprit == 1 && record.operations.map(\.rowsSent) == [200, 200])
        #expect(record.operations.map { $0.spans.contains { $0.step == .deliver } } == [false, true])
      }
    }

    /// The record outlives the buffer that was lost, and later calls leave it as it is.
    @Test func aMissingRank() throws {
      let job = smallJob()
      let records = try onEachRank(try job.makePlan(), timeout: .milliseconds(300)) { buffer -> FlightRecord in
        let result = try job.dispatch(on: buffer)
        if buffer.rank == 2 {
          usleep(600_000)
          return buffer.flightRecord
        }
        _ = try error { () throws(EPError) in _ = try buffer.combine(result.rows, with: result.handle) }
        _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        buffer.close()
        return buffer.flightRecord
      }
      #expect(records[2].operations.map(\.outcome) == [.ok])
      for record in records[..<2] {
        #expect(record.operations.count == 2)
        let last = record.operations[1]
        // Who gives up first is gone for the other.
        let other = 1 - record.rank
        #expect(
          last.outcome == .timeout && last.culprit == 2
            || last.outcome == .departed && [2, other].contains(last.culprit))
        #expect(last.kind == .combine && last.epoch == 2 && last.spans.map(\.step) == [.prepare, .exchange])
        #expect(last.exchangeWait?.peer == last.culprit && last.exchangeWait!.nanoseconds > 100_000_000)
        let wait = record.longestWaits.first { $0.peer == last.culprit }!
        #expect(wait.nanoseconds == last.exchangeWait!.nanoseconds && wait.step == .exchange && wait.epoch == 2)
        #expect(record.current.step == .idle)
      }
      #expect(records[..<2].contains { $0.operations[1].outcome == .timeout })
    }

    /// Rows that were never ready.
    @Test(.disabled(if: isOnGPU, "the host makes these waits, and does not write to a GPU's record"))
    func anInputThatNeverComes() throws {
      let job = smallJob(rankCount: 2)
      let records = try onEachRank(try job.makePlan(), timeout: .milliseconds(300)) { buffer in
        var options = job.dispatchOptions
        if buffer.rank == 1 { options.after = [Event(), Event()] }
        _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) }
        return buffer.flightRecord
      }
      let last = records[1].operations.last!
      #expect(records[1].operations.count == 1 && last.outcome == .timeout && last.culprit == 1)
      #expect(last.spans.map(\.step) == [.input] && last.epoch == nil)
      #expect(last.spans[0].endNanoseconds! - last.spans[0].beginNanoseconds >= 300_000_000)
    }

    // MARK: While it happens

    /// Buffers of all ranks, for a rank that looks at the others.
    private final class Board: Sendable {
      private let buffers = Guarded<[Int: TestBuffer]>([:])

      func put(_ buffer: TestBuffer) { buffers.withLock { $0[buffer.rank] = buffer } }
      func record(of rank: Int) -> FlightRecord? { buffers.withLock { $0[rank] }?.flightRecord }

      /// Looks until `condition` holds of all these ranks' records.
      func wait(for ranks: [Int], _ condition: (FlightRecord) -> Bool) throws {
        let deadline = monotonicNow() + 20_000_000_000
        while true {
          let records = ranks.compactMap { record(of: $0) }
          if records.count == ranks.count && records.allSatisfy(condition) { return }
          try require(monotonicNow() < deadline, "still \(records.map(\.situation))")
          usleep(500)
        }
      }
    }

    /// A rank that does not call: the others wait for it, and say so; then how long they did.
    @Test(arguments: [0, 1, 2])
    func whoIsWaitedFor(late: Int) throws {
      let job = smallJob()
      let board = Board()
      let pause: UInt64 = 30_000_000
      let records = try onEachRank(of: threadFabric, try job.makePlan()) { buffer in
        board.put(buffer)
        let others = [0, 1, 2].filter { $0 != late }
        let result = try job.dispatch(on: buffer)
        if buffer.rank == late {
          try board.wait(for: others) { record in
            record.current.step == .exchange && record.current.peer == late && record.current.operation == .combine
              && record.current.epoch == 2 && record.operations.last?.outcome == .underWay
          }
          let situation = board.record(of: others[0])!.situation
          try require(
            situation.hasPrefix("rank \(others[0]) has waited ")
              && situation.hasSuffix("for rank \(late) in exchange of combine, epoch 2"), situation)
          let begin = monotonicNow()
          while monotonicNow() < begin + pause { usleep(1000) }
        }
        _ = try buffer.combine(result.rows, with: result.handle)
        return buffer.flightRecord
      }
      for record in records where record.rank != late {
        let wait = record.operations[1].exchangeWait!
        #expect(record.operations[1].outcome == .ok && wait.peer == late && wait.nanoseconds >= pause)
        let span = record.operations[1].spans.first { $0.step == .exchange }!
        #expect(wait.nanoseconds <= span.endNanoseconds! - span.beginNanoseconds)
        #expect(record.longestWaits.first { $0.peer == late }!.nanoseconds >= pause)
      }
    }

    @Test(.disabled(if: isOnGPU, "the host makes these waits, and does not write to a GPU's record"))
    func whatIsWaitedFor() throws {
      let job = smallJob(rankCount: 2)
      let board = Board()
      try threadFabric.test(plan: try job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        board.put(buffer)
        var options = job.dispatchOptions
        (options.isAsynchronous, options.sizing) = (true, .worstCase)
        let event = Event()
        if buffer.rank == 1 { options.after = [event] }
        let result = try job.dispatch(on: buffer, options: options)
        if buffer.rank == 1 {
          try board.wait(for: [1]) { $0.current.step == .input && $0.current.operation == .dispatch }
          event.signal()
        }
        try result.event.wait()
        let steps = buffer.flightRecord.operations[0].spans.map(\.step)
        let all: [FlightRecord.Step] = [.prepare, .exchange, .place, .deliver, .completion]
        try require(steps == (buffer.rank == 1 ? [.input] : []) + all, "\(steps)")
      }
    }

    /// Readers on other threads, all the time.
    @Test func readersWhileOperationsRun() throws {
      let job = smallJob(rankCount: 2)
      let board = Board()
      let isDone = Guarded(false)
      let faults = Guarded<[String]>([])
      let reader = startThread {
        while !isDone.withLock({ $0 }) {
          for rank in 0..<2 {
            guard let record = board.record(of: rank) else { continue }
            let isRight = record.operations.allSatisfy { operation in
              let times = operation.spans.flatMap { [$0.beginNanoseconds, $0.endNanoseconds ?? .max] }
              return times == times.sorted() && !times.isEmpty
                && [nil, UInt64(operation.index)].contains(operation.epoch)
                && (operation.outcome == .ok) == (operation.spans.last?.endNanoseconds != nil)
                && [0, 16].contains(operation.tokenCount)
            }
            if !isRight { faults.withLock { $0.append("\(record)") } }
          }
        }
      }!
      defer {
        isDone.withLock { $0 = true }
        pthread_join(reader, nil)
        #expect(faults.withLock { $0 } == [])
      }
      try threadFabric.test(plan: try job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        board.put(buffer)
        for step in 0..<200 {
          let result = try job.dispatch(on: buffer, step: step % 3)
          _ = try buffer.combine(result.rows, with: result.handle)
        }
      }
    }

    // MARK: Printing

    /// Loses a buffer: rank 1 is silent. For a process of its own.
    private static func loseABuffer() throws {
      let job = smallJob(rankCount: 2)
      try threadFabric.test(plan: try job.makePlan(), workers: 1, timeout: .milliseconds(200)) { buffer in
        for step in 0..<3 { _ = try job.dispatch(on: buffer, step: step) }
        if buffer.rank == 1 {
          usleep(500_000)
          return
        }
        _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        // The second time, nothing new is to be said.
        _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
      }
    }

    /// As a program has it where nobody says otherwise; tests turn it off when they are first asked for their fabric.
    private static func printLosses() {
      _ = threadFabric
      unsetenv("SWIFTEP_FLIGHT_RECORDER")
    }

    @Test func aLossIsPrinted() async throws {
      let result = await #expect(processExitsWith: .success, observing: [\.standardErrorContent]) {
        ConformanceTests.FlightRecordTests.printLosses()
        try ConformanceTests.FlightRecordTests.loseABuffer()
      }
      let text = String(decoding: try #require(result).standardErrorContent, as: UTF8.self)
      let lines = text.split(separator: "\n").map(String.init)
      let first = try #require(
        lines.firstIndex { $0.hasPrefix("swiftep: rank 0 of 2 has lost its buffer: ") }, "\(text)")
      #expect(lines[first].hasSuffix("rank 1 did not reach step 'exchange': it was silent for 0.2 seconds"))
      #expect(lines[first + 1].hasPrefix("rank 0: dispatch, epoch 4, exchange: waited 2"))
      #expect(lines[first + 1].hasSuffix(" ms for rank 1"))
      #expect(lines[first + 2] == "the last 4 operations:")
      #expect(lines[first + 8].contains("timeout of rank 1"), "\(text)")
      #expect(lines[first + 9].hasPrefix("the longest waits: 2"))
      #expect(lines.count { $0.contains("has lost its buffer") } == 1)
    }

    @Test func unlessTheEnvironmentSaysNo() async throws {
      let result = await #expect(processExitsWith: .success, observing: [\.standardErrorContent]) {
        setenv("SWIFTEP_FLIGHT_RECORDER", "off", 1)
        try ConformanceTests.FlightRecordTests.loseABuffer()
      }
      #expect(!String(decoding: try #require(result).standardErrorContent, as: UTF8.self).contains("lost its buffer"))
    }

    /// That peers close their buffers is no misfortune.
    @Test func closingIsNotPrinted() async throws {
      let result = await #expect(processExitsWith: .success, observing: [\.standardErrorContent]) {
        ConformanceTests.FlightRecordTests.printLosses()
        let job = smallJob(rankCount: 2)
        try threadFabric.test(plan: try job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
          if buffer.rank == 1 { return buffer.close() }
          _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        }
      }
      #expect(!String(decoding: try #require(result).standardErrorContent, as: UTF8.self).contains("lost its buffer"))
    }
  }
}
