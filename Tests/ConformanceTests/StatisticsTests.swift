import Conformance
import Glibc
import SwiftEP
import Testing

extension ConformanceTests {
  /// What calls add to a caller's counters, and what they refuse to add to.
  @Suite struct StatisticsTests {
    @Test(arguments: RowLayout.allCases, [Sizing.exact, .worstCase])
    func tokensOfExperts(_ layout: RowLayout, _ sizing: Sizing) throws {
      let job = smallJob().with { ($0.layout, $0.sizing, $0.expertAlignment) = (layout, sizing, 4) }
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let statistics = try buffer.buffer.makeTensor(zeros: [2], .int32)
        statistics.copyBeginning(from: try Tensor(copying: [5, 1000] as [Int32], shape: [2], .int32))
        var options = job.dispatchOptions
        options.expertStatistics = statistics
        for _ in 0..<3 {
          let result = try job.dispatch(on: buffer, options: options)
          _ = try job.dispatch(on: buffer, step: 1, handle: result.handle, options: options)
        }
        let counts = job.makeOracle().dispatched(to: buffer.rank).unalignedTokensPerExpert
        let expected = [5 + 3 * Int32(counts[0]), 1000 + 3 * Int32(counts[1])]
        let found = try statistics.elements(Int32.self)
        try require(found == expected, "expected \(expected), found \(found)")
      }
    }

    /// A dispatch that has to be exchanged twice, since the arena must grow first, counts once.
    @Test func tokensOfADispatchThatOverflows() throws {
      let job = Job(rankCount: 3, tokenCount: 200, hidden: 512, topK: 2, expertCount: 6).with {
        $0.expertOwners = [1, 1, 1, 1, 1, 1]
      }
      let plan = try ExpertBuffer.Plan(job.shape, receivedTokensMax: 1)
      try fabric.test(plan: plan, workers: 1, timeout: .seconds(30)) { buffer in
        var options = job.dispatchOptions
        let statistics = try buffer.buffer.makeTensor(zeros: [buffer.rank == 1 ? 6 : 0], .int32)
        options.expertStatistics = statistics
        let result = try job.dispatch(on: buffer, options: options)
        let hasGrown = buffer.arenaByteCount > plan.arenaByteCount
        try require(hasGrown == (buffer.rank == 1), "the arena has \(buffer.arenaByteCount) bytes")
        let counts = try result.unalignedTokensPerExpert.elements(Int32.self)
        let found = try statistics.elements(Int32.self)
        try require(found == counts, "expected \(counts), found \(found)")
      }
    }

    /// Whoever is late is waited for longest, this rank itself not at all.
    @Test func waitsForRanks() throws {
      let job = smallJob(rankCount: 4)
      let waits = try onEachRank(try job.makePlan()) { buffer in
        let (first, second) = (
          try buffer.buffer.makeTensor(zeros: [4], .int64), try buffer.buffer.makeTensor(zeros: [4], .int64)
        )
        // Everybody is there.
        var options = job.dispatchOptions
        _ = try job.dispatch(on: buffer)
        options.waitStatistics = first
        if buffer.rank == 2 { usleep(100_000) }
        let result = try job.dispatch(on: buffer, options: options)
        var combineOptions = CombineOptions()
        combineOptions.waitStatistics = second
        if buffer.rank == 1 { usleep(100_000) }
        _ = try buffer.combine(result.rows, with: result.handle, options: combineOptions)
        return [try first.elements(Int64.self), try second.elements(Int64.self)]
      }
      for (step, late) in [(0, 2), (1, 1)] {
        for rank in 0..<4 where rank != late {
          let found = waits[rank][step]
          #expect(found[late] > 20_000_000 && found[late] == found.max(), "rank \(rank), step \(step): \(found)")
          #expect(found[rank] == 0)
        }
      }
    }

    @Test func tensorsThatCannotCount() throws {
      func expectError(_ argument: String, _ expected: String, _ found: String, _ tensor: Tensor) throws {
        let job = smallJob()
        let isOfExperts = argument.hasPrefix("expert")
        let errors = try onEachRank(try job.makePlan()) { buffer in
          var options = job.dispatchOptions
          if buffer.rank == 1 {
            let reachable = try buffer.buffer.reachable(tensor)
            if isOfExperts { options.expertStatistics = reachable } else { options.waitStatistics = reachable }
          }
          return try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) }
        }
        let wanted = EPError.invalidArgument(rank: 1, argument: argument, expected: expected, found: found)
        #expect(errors == [wanted, wanted, wanted])
      }
      try expectError("expertStatistics.shape[0]", "2", "6", try Tensor(zeros: [6], .int32))
      try expectError("expertStatistics", "int32", "int64", try Tensor(zeros: [2], .int64))
      try expectError("waitStatistics.shape[0]", "3", "2", try Tensor(zeros: [2], .int64))
      try expectError("waitStatistics", "int64", "int32", try Tensor(zeros: [3], .int32))
    }
  }
}
