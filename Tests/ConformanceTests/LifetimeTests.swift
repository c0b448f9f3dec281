import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// Memory comes back when the last use of it is over, and no later.
  @Suite struct LifetimeTests {
    /// An arena that may not grow, filled by one result and one output, serves any number of them in turn.
    @Test(arguments: [(1, 1), (1, 2), (2, 1), (2, 2)], [Sizing.exact, .worstCase])
    func droppedResultsAreGivenBack(_ ranksAndWorkers: (Int, Int), _ sizing: Sizing) throws {
      let (rankCount, workers) = ranksAndWorkers
      let job = smallJob(rankCount: rankCount)
      let plan = try ExpertBuffer.Plan(job.shape, workers: workers, arenaByteCountMax: 0)
      try fabric.test(plan: plan, workers: workers, timeout: .seconds(30)) { buffer in
        let tokens = job.makeTokens(rank: buffer.rank)
        var options = DispatchOptions()
        options.sizing = sizing
        for round in 0..<100 {
          options.isAsynchronous = round % 2 == 1
          let result = try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
          try result.event.wait()
          _ = try buffer.combine(result.rows, with: result.handle)
        }
        try require(buffer.arenaByteCount == plan.arenaByteCount, "the arena grew")
      }
    }

    /// Events, handles and outputs that are kept do not keep results.
    @Test func eventsKeepNoMemory() throws {
      let job = smallJob(rankCount: 2)
      let plan = try ExpertBuffer.Plan(job.shape, arenaByteCountMax: 0)
      try fabric.test(plan: plan, workers: 1, timeout: .seconds(30)) { buffer in
        let tokens = job.makeTokens(rank: buffer.rank)
        var events: [Event] = []
        for _ in 0..<20 {
          let result = try buffer.dispatch(tokens.x, to: tokens.routing)
          let combined = try buffer.combine(result.rows, with: result.handle)
          events += [result.event, combined.event]
        }
        for event in events { try event.wait() }
      }
    }

    /// An event whose operation failed is complete: what waits for it goes on, and its buffer too.
    @Test func failedEventsOfAnotherBuffer() throws {
      let job = smallJob(rankCount: 2)
      let plan = try job.makePlan()
      let communicators = try Communicator.threads(rankCount: 2)
      try inParallel(2) { rank in
        let first = try TestBuffer(communicators[rank], plan: plan, workers: 1, timeout: .seconds(20))
        let second = try TestBuffer(communicators[rank], plan: plan, workers: 1, timeout: .seconds(20))
        let tokens = job.makeTokens(rank: rank)
        var cells = [Int64](repeating: -1, count: 32)
        if rank == 1 { cells[0] = 999 }
        let wrong = Routing.topK(indices: try Tensor(copying: cells, shape: [16, 2], .int64))
        var options = DispatchOptions()
        (options.sizing, options.isAsynchronous) = (.worstCase, true)
        let failed = try first.dispatch(tokens.x, to: wrong, options: options)
        var later = DispatchOptions()
        later.after = [failed.event]
        let result = try second.dispatch(tokens.x, to: tokens.routing, options: later)
        let found = difference(result, from: job.makeOracle().dispatched(to: rank), comparingPaddingRows: false)
        try require(found == nil, found ?? "")
        #expect(throws: EPError.self) { try failed.event.wait() }
      }
    }
  }

  /// Arguments at the ends of what their types hold.
  @Suite struct ExtremeArgumentTests {
    @Test func longTimeouts() throws {
      let job = smallJob(rankCount: 2)
      for timeout in [Duration.seconds(Int64.max), .seconds(18_446_744_073), .nanoseconds(-1)] {
        if timeout < .zero { continue }
        let rows = try onEachRank(try job.makePlan(), timeout: timeout) { buffer in
          let tokens = job.makeTokens(rank: buffer.rank)
          return try buffer.dispatch(tokens.x, to: tokens.routing).rows.shape[0]
        }
        #expect(rows.count == 2)
      }
    }

    @Test func arenasWithoutBound() throws {
      let plan = try ExpertBuffer.Plan(smallJob(rankCount: 1).shape, arenaByteCountMax: .max)
      #expect(plan.arenaByteCountMax == 1 << 40)
      _ = try onEachRank(plan) { $0.arenaByteCount }
    }

    @Test func plansThatNothingHolds() throws {
      let shape = JobShape(rankCount: 8, tokensPerRankMax: 1 << 24, hidden: 1 << 20, topK: 8, expertCount: 64)
      #expect(throws: EPError.self) { try ExpertBuffer.Plan(shape, resultCount: 1 << 20) }
    }

    @Test func tensorsThatNothingHolds() throws {
      #expect(throws: EPError.self) { try Tensor(zeros: [0, Int.max], .bf16) }
      #expect(throws: EPError.self) { try Tensor(zeros: [-1], .bf16) }
      #expect(throws: EPError.self) { try Tensor(zeros: [1 << 60], .uint8) }
    }

    @Test func rowsTooLong() throws {
      let errors = try onEachRank(try smallJob(rankCount: 2).makePlan()) { buffer in
        let x = try Tensor(zeros: [0, (1 << 30) - 8], .bf16)
        let indices = try Tensor(zeros: [0, 2], .int64)
        do {
          _ = try buffer.dispatch(x, to: .topK(indices: indices))
          return nil as EPError?
        } catch {
          return error as? EPError
        }
      }
      #expect(errors[0] != nil && errors[0] == errors[1])
    }

    @Test func scalesOfDifferentTypes() throws {
      let errors = try onEachRank(try smallJob(rankCount: 2).makePlan()) { buffer in
        let x = try Tensor(zeros: [4, 128], .fp8E4M3)
        let scales = try Tensor(zeros: [4, 1], buffer.rank == 0 ? .fp32 : .int32)
        let indices = try Tensor(copying: [Int64](repeating: -1, count: 4), shape: [4, 1], .int64)
        do {
          _ = try buffer.dispatch(x, scales: scales, to: .topK(indices: indices))
          return nil as EPError?
        } catch {
          return error as? EPError
        }
      }
      let expected = EPError.ranksDisagree(
        about: "a row of scales", rank: 1, expected: "4 bytes of fp32", found: "4 bytes of int32")
      #expect(errors == [expected, expected])
    }

    @Test func outputsOverRows() throws {
      let job = smallJob(rankCount: 1)
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let tokens = job.makeTokens(rank: 0)
        let result = try buffer.dispatch(tokens.x, to: tokens.routing)
        var options = CombineOptions()
        options.output = result.rows
        do {
          _ = try buffer.combine(result.rows, with: result.handle, options: options)
          return nil as EPError?
        } catch {
          return error as? EPError
        }
      }
      #expect(
        errors == [
          .invalidArgument(
            rank: 0, argument: "output", expected: "memory apart from that of the rows",
            found: "memory that overlaps it")
        ])
    }
  }
}
