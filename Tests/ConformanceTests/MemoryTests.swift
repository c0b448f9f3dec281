import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// Routing that overflows the plan.
  @Suite struct MemoryTests {
    /// Everyone's tokens go to rank 1.
    private static func crowd(_ layout: RowLayout, _ sizing: Sizing = .exact) -> Job {
      Job(rankCount: 3, tokenCount: 200, hidden: 512, topK: 2, expertCount: 6).with {
        ($0.layout, $0.sizing, $0.expertOwners) = (layout, sizing, [1, 1, 1, 1, 1, 1])
      }
    }

    @Test(arguments: [RowLayout.bySource, .byExpert])
    func theArenaGrows(_ layout: RowLayout) throws {
      let job = Self.crowd(layout)
      let plan = try ExpertBuffer.Plan(job.shape, receivedTokensMax: 1)
      let sizes = try onEachRank(plan) { buffer in
        for step in 0..<2 { try job.checkDispatch(on: buffer, step: step) }
        return buffer.arenaByteCount
      }
      #expect(sizes[1] > plan.arenaByteCount)
      try check(job.with { $0.receivedTokensMax = 1 }, on: fabric)
    }

    /// What does not fit is the same error on all ranks; what fits still goes.
    @Test(arguments: [RowLayout.bySource, .byExpert], [Sizing.exact, .worstCase])
    func aFullArenaIsAnError(_ layout: RowLayout, _ sizing: Sizing) throws {
      let job = Self.crowd(layout, sizing)
      let small = job.with { $0.tokensPerRank = [4, 0, 4] }
      let plan = try ExpertBuffer.Plan(job.shape, receivedTokensMax: 100, arenaByteCountMax: 0)
      let errors = try onEachRank(plan) { buffer in
        try small.checkDispatch(on: buffer)
        let errors = try (0..<2).map { step in
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer, step: step) }
        }
        try small.checkDispatch(on: buffer, step: 1)
        try require(buffer.arenaByteCount == plan.arenaByteCount, "the arena has grown")
        return errors
      }
      #expect(errors[1] == errors[0] && errors[2] == errors[0])
      for error in errors[0] {
        guard case .outOfMemory(rank: 1, let needed, let available) = error else {
          Issue.record("\(error)")
          continue
        }
        #expect(needed > available)
      }
    }

    /// Fewer rows than a page are too many, where the plan says so.
    @Test func aFewRowsTooMany() throws {
      let job = Job(rankCount: 2, tokenCount: 4, hidden: 128, topK: 1, expertCount: 2).with {
        ($0.sizing, $0.expertOwners) = (.worstCase, [0, 0])
      }
      let plan = try ExpertBuffer.Plan(job.shape, receivedTokensMax: 7)
      let errors = try onEachRank(plan) { buffer in
        try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
      }
      #expect(errors[0] == errors[1])
      guard case .outOfMemory(rank: 0, let needed, let available) = errors[0] else {
        Issue.record("\(errors[0])")
        return
      }
      #expect(needed > available)
    }

    /// The handle of a dispatch that overflowed has no rows to combine.
    @Test func anOverflowLeavesNoHandle() throws {
      let job = Self.crowd(.bySource, .worstCase).with { $0.isAsynchronous = true }
      let plan = try ExpertBuffer.Plan(job.shape, receivedTokensMax: 100, arenaByteCountMax: 0)
      let errors = try onEachRank(plan) { buffer in
        let result = try job.dispatch(on: buffer)
        return try error { () throws(EPError) in _ = try buffer.combine(result.rows, with: result.handle) }
      }
      let expected = EPError.invalidArgument(
        rank: 0, argument: "handle", expected: "one of a dispatch that succeeded",
        found: "one of a dispatch that failed")
      #expect(errors == [expected, expected, expected])
    }

    private static func combineTooMuch(_ job: Job, on buffer: TestBuffer) throws -> EPError {
      let handle = try job.dispatch(on: buffer).handle
      if buffer.rank == 1 {
        let local = try error { () throws(EPError) in
          _ = try buffer.combineInput(for: handle, hidden: 1 << 20, dtype: .fp32)
        }
        try require(local.isOutOfMemory, "\(local)")
      }
      return try error { () throws(EPError) in
        _ = try buffer.combine(try! Tensor(zeros: [handle.rowCapacity, 8192], .fp32), with: handle)
      }
    }

    /// Memory for combine's input, its staged rows and its sums has the same limit.
    @Test func combineIsLimitedToo() throws {
      let job = Self.crowd(.bySource)
      let plan = try ExpertBuffer.Plan(job.shape, arenaByteCountMax: 0)
      let errors = try onEachRank(plan) { buffer in
        let error = try Self.combineTooMuch(job, on: buffer)
        try job.checkDispatch(on: buffer, step: 1)
        return error
      }
      #expect(errors[1] == errors[0] && errors[2] == errors[0])
      guard case .outOfMemory(_, let needed, let available) = errors[0] else {
        Issue.record("\(errors[0])")
        return
      }
      #expect(needed > available)
    }
  }
}

extension EPError {
  fileprivate var isOutOfMemory: Bool {
    if case .outOfMemory = self { return true }
    return false
  }
}
