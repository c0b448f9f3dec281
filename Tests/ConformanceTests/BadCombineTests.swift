import Conformance
import HostMachine
import Testing

@testable import SwiftEP

extension ConformanceTests {
  /// As `BadInputTests`, for combine, for handles of other buffers, for closed buffers and for what cannot be set up.
  @Suite struct BadCombineTests {
    /// Rank 1 of three gives combine wrong rows or options.
    private func expectSameError(
      in job: Job = smallJob(), _ argument: String, _ expected: String, _ found: String,
      _ wrong: @escaping @Sendable (inout Tensor, inout CombineOptions) -> Void
    ) throws {
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let result = try job.dispatch(on: buffer)
        var rows = result.rows
        var options = CombineOptions()
        if buffer.rank == 1 { wrong(&rows, &options) }
        let error = try error { () throws(EPError) in
          _ = try buffer.combine(rows, with: result.handle, options: options)
        }
        _ = try buffer.combine(result.rows, with: result.handle)
        return error
      }
      let expected = EPError.invalidArgument(rank: 1, argument: argument, expected: expected, found: found)
      #expect(errors == [EPError](repeating: expected, count: job.rankCount))
    }

    @Test func rows() throws {
      try expectSameError("rows", "2 dimensions", "1") { rows, _ in rows = try! Tensor(zeros: [64], .bf16) }
      try expectSameError("rows", "bf16 or fp16 or fp32", "uint8") { rows, _ in
        rows = try! Tensor(zeros: [rows.shape[0], 128], .uint8)
      }
      try expectSameError("rows", "rows of a positive multiple of 16 bytes, at most 2^30", "2 bytes") { rows, _ in
        rows = try! Tensor(zeros: [rows.shape[0], 1], .bf16)
      }
    }

    @Test func encoding() throws {
      try expectSameError("rows", "rows of a positive multiple of 256 bytes, at most 2^30", "128 bytes") {
        $1.encoding = .logFMT
      }
      try expectSameError("rows", "bf16", "fp32") { rows, options in
        rows = try! Tensor(zeros: [rows.shape[0], 128], .fp32)
        options.encoding = .logFMT
      }
    }

    @Test(arguments: [-1, 1])
    func rowCounts(_ excess: Int) throws {
      let job = smallJob()
      let rowCount = job.makeOracle().dispatched(to: 1).rowCount
      try expectSameError("rows.shape[0]", "\(rowCount)", "\(rowCount + excess)") { rows, _ in
        rows = try! Tensor(zeros: [rows.shape[0] + excess, 64], .bf16)
      }
    }

    @Test func options() throws {
      let rowCount = smallJob().makeOracle().dispatched(to: 1).rowCount
      try expectSameError("topKWeights.shape[1]", "2", "1") {
        $1.topKWeights = try! Tensor(zeros: [$0.shape[0], 1], .fp32)
      }
      try expectSameError("topKWeights.shape[0]", "\(rowCount)", "0") {
        $1.topKWeights = try! Tensor(zeros: [0, 2], .fp32)
      }
      try expectSameError("topKWeights", "fp32", "bf16") {
        $1.topKWeights = try! Tensor(zeros: [$0.shape[0], 2], .bf16)
      }
      try expectSameError("handle", "byExpert", "bySource") { $1.rowWeights = try! Tensor(zeros: [16, 2], .fp32) }
      try expectSameError("biases", "at most 2", "3") {
        $1.biases = [Tensor](repeating: try! Tensor(zeros: [16, 64], .bf16), count: 3)
      }
      try expectSameError("biases.shape[0]", "16", "15") { $1.biases = [try! Tensor(zeros: [15, 64], .bf16)] }
      try expectSameError("biases", "bf16", "fp32") { $1.biases = [try! Tensor(zeros: [16, 64], .fp32)] }
      try expectSameError("output.shape[1]", "64", "32") { $1.output = try! Tensor(zeros: [16, 32], .bf16) }
      try expectSameError("output", "bf16", "fp16") { $1.output = try! Tensor(zeros: [16, 64], .fp16) }
      try expectSameError("workers", "at least 1", "0") { $1.workers = 0 }
      let byExpert = smallJob().with { $0.layout = .byExpert }
      try expectSameError(in: byExpert, "rowWeights.shape[1]", "2", "1") {
        $1.rowWeights = try! Tensor(zeros: [16, 1], .fp32)
      }
      let table = smallJob().with { ($0.usesTable, $0.isWeighted) = (true, false) }
      try expectSameError(in: table, "topKWeights", "none", "a tensor") {
        $1.topKWeights = try! Tensor(zeros: [$0.shape[0], 1], .fp32)
      }
    }

    @Test func ranksDisagree() throws {
      let job = smallJob()
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let handle = try job.dispatch(on: buffer).handle
        let isOdd = buffer.rank == 2
        let narrow = try! Tensor(zeros: [handle.rowCapacity, isOdd ? 32 : 64], .bf16)
        let other = try! Tensor(zeros: [handle.rowCapacity, 64], isOdd ? .fp16 : .bf16)
        var options = CombineOptions()
        if isOdd { options.topKWeights = try! Tensor(zeros: [handle.rowCapacity, 2], .fp32) }
        var coded = CombineOptions()
        if isOdd { coded.encoding = .logFMT }
        return [
          try error { () throws(EPError) in _ = try buffer.combine(narrow, with: handle) },
          try error { () throws(EPError) in _ = try buffer.combine(other, with: handle) },
          try error { () throws(EPError) in
            _ = try buffer.combine(try! Tensor(zeros: [handle.rowCapacity, 64], .bf16), with: handle, options: options)
          },
          try error { () throws(EPError) in
            let wide = try! Tensor(zeros: [handle.rowCapacity, 128], .bf16)
            _ = try buffer.combine(wide, with: handle, options: coded)
          },
        ]
      }
      let expected: [EPError] = [
        .ranksDisagree(about: "hidden", rank: 2, expected: "64", found: "32"),
        .ranksDisagree(about: "the rows' dtype", rank: 2, expected: "bf16", found: "fp16"),
        .ranksDisagree(about: "whether weights are given", rank: 2, expected: "none", found: "weights"),
        .ranksDisagree(about: "how combined rows travel", rank: 2, expected: "none", found: "logFMT"),
      ]
      #expect(errors == [expected, expected, expected])
    }

    /// Where rows are combined in steps, those of all ranks are; the buffer goes on.
    @Test func someRowsInTheArena() throws {
      let job = smallJob().with { ($0.tokensPerStep, $0.combines) = (2, [.memory]) }
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let result = try job.dispatch(on: buffer)
        let ordinary = try! Tensor(zeros: result.rows.shape, .bf16)
        let error = try error { () throws(EPError) in
          _ = try buffer.combine(buffer.rank == 1 ? result.rows : ordinary, with: result.handle)
        }
        _ = try buffer.combine(ordinary, with: result.handle)
        return error
      }
      let expected = EPError.ranksDisagree(
        about: "how rows outside the arena are combined", rank: 1, expected: "in steps of 2 tokens",
        found: "not in steps")
      #expect(errors == [expected, expected, expected])
    }

    /// In an arena that cannot grow, rows of a few steps find room where those of all would not.
    @Test func stepsTakeWhatThePlanSays() throws {
      let job = smallJob().with { ($0.sizing, $0.hidden) = (.worstCase, 2048) }
      let plans = try [ExpertBuffer.Staging.steps(tokens: 2), .whole].map { staging throws(EPError) in
        try ExpertBuffer.Plan(job.shape, staging: staging, arenaByteCountMax: 0)
      }
      #expect(plans[0].arenaByteCountMax == plans[0].arenaByteCount)
      #expect(plans[0].arenaByteCount < plans[1].arenaByteCount)
      let sums = try plans.map { plan in
        try onEachRank(plan) { buffer in
          let result = try job.dispatch(on: buffer)
          let ordinary = try! Tensor(zeros: result.rows.shape, .bf16)
          ordinary.copyBeginning(from: result.rows)
          return try buffer.combine(ordinary, with: result.handle).tokens.withUnsafeBytes { Array($0) }
        }
      }
      #expect(sums[0] == sums[1] && sums[0].contains { $0.contains { $0 != 0 } })
    }

    /// In an arena that cannot grow, coded rows find room only if the plan has counted them.
    @Test(arguments: [false, true])
    func codedRowsTakeWhatThePlanSays(inPlace: Bool) throws {
      let job = smallJob().with { ($0.sizing, $0.hidden, $0.combineEncoding) = (.worstCase, 2048, .logFMT) }
      var shapes = [job.shape, job.shape]
      shapes[1].combineEncoding = .none
      let errors = try shapes.map { shape in
        let plan = try ExpertBuffer.Plan(shape, staging: inPlace ? .unplanned : .whole, arenaByteCountMax: 0)
        return try onEachRank(plan) { buffer in
          let result = try job.dispatch(on: buffer)
          let ordinary = try! Tensor(zeros: result.rows.shape, .bf16)
          var options = CombineOptions()
          options.encoding = .logFMT
          do throws(EPError) {
            _ = try buffer.combine(inPlace ? result.rows : ordinary, with: result.handle, options: options)
            return EPError?.none
          } catch {
            return error
          }
        }
      }
      #expect(errors[0] == [nil, nil, nil])
      for error in errors[1] {
        guard case .outOfMemory = error else {
          Issue.record("\(String(describing: error))")
          continue
        }
      }
    }

    /// Exact sizing takes more tokens than were planned; steps are for those that were.
    @Test func moreTokensThanTheStepsOfThePlan() throws {
      let job = smallJob()
      var shape = job.shape
      shape.tokensPerRankMax = 5
      let plan = try ExpertBuffer.Plan(shape, staging: .steps(tokens: 2), arenaByteCountMax: 64 << 20)
      let errors = try onEachRank(plan) { buffer in
        let result = try job.dispatch(on: buffer)
        let ordinary = try! Tensor(zeros: result.rows.shape, .bf16)
        let error = try error { () throws(EPError) in _ = try buffer.combine(ordinary, with: result.handle) }
        _ = try buffer.combine(result.rows, with: result.handle)
        return error
      }
      let expected = EPError.invalidArgument(rank: 0, argument: "handleTokens", expected: "at most 5", found: "16")
      #expect(errors == [expected, expected, expected])
    }

    @Test func aHandleOfAnotherBufferIsRefused() throws {
      let job = smallJob()
      let plan = try job.makePlan()
      let kept = Guarded<[Int: DispatchHandle]>([:])
      // Of ranks in one process: a handle does not travel.
      try threadFabric.test(plan: plan, workers: 1, timeout: .seconds(30)) { buffer in
        let handle = try job.dispatch(on: buffer).handle
        kept.withLock { $0[buffer.rank] = handle }
      }
      let handles = kept.withLock { $0 }
      let errors = try onEachRank(plan) { buffer in
        let handle = handles[buffer.rank]!
        let rows = try! Tensor(zeros: [handle.rowCapacity, 64], .bf16)
        let errors = [
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer, handle: handle) },
          try error { () throws(EPError) in _ = try buffer.combine(rows, with: handle) },
        ]
        let local = try error { () throws(EPError) in
          _ = try buffer.combineInput(for: handle, hidden: 64, dtype: .bf16)
        }
        try require(local == Self.foreign(buffer.rank), "\(local)")
        try job.checkDispatch(on: buffer)
        return errors
      }
      for error in errors.flatMap({ $0 }) { #expect(error == Self.foreign(0)) }
    }

    /// A new buffer may lie where an old one lay; a handle still tells them apart.
    @Test func aHandleOutlivesItsBuffer() throws {
      let job = smallJob(rankCount: 1)
      let plan = try job.makePlan()
      let kept = Guarded<DispatchHandle?>(nil)
      for _ in 0..<30 {
        try threadFabric.test(plan: plan, workers: 1, timeout: .seconds(30)) { buffer in
          if let old = kept.withLock({ $0 }) {
            let error = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, handle: old) }
            try require(error == Self.foreign(0), "\(error)")
          }
          let handle = try job.dispatch(on: buffer).handle
          kept.withLock { $0 = handle }
        }
      }
    }

    private static func foreign(_ rank: Int) -> EPError {
      .invalidArgument(
        rank: rank, argument: "handle", expected: "a handle of this buffer", found: "one of another buffer")
    }

    @Test func aClosedBufferRefusesCalls() throws {
      let job = smallJob()
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let result = try job.dispatch(on: buffer)
        let bytes = result.bytes
        buffer.close()
        buffer.close()
        let errors = [
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer) },
          try error { () throws(EPError) in _ = try buffer.combine(result.rows, with: result.handle) },
          try error { () throws(EPError) in
            _ = try buffer.combineInput(for: result.handle, hidden: 8, dtype: .bf16)
          },
        ]
        try require(errors == [.bufferClosed, .bufferClosed, .bufferClosed], "\(errors)")
        try require(result.bytes == bytes && result.event.isComplete, "a result did not outlive its buffer")
      }
    }

    // MARK: Setup

    @Test func buffersThatCannotBeMade() throws {
      #expect(throws: EPError.invalidArgument(rank: -1, argument: "rankCount", expected: "at least 1", found: "0")) {
        _ = try Communicator.threads(rankCount: 0)
      }
      let plan = try smallJob().makePlan()
      let most = try threadFabric.machine(ofRank: 0).workerCountMax()
      for workers in [0, most + 1] {
        let expected = EPError.invalidArgument(
          rank: 1, argument: "workers", expected: "1 to \(most)", found: "\(workers)")
        #expect(
          try setupErrors(plans: [plan, plan, plan], workers: [1, workers, 1]) == [expected, expected, expected])
      }
      let narrow = try smallJob().with { $0.hidden = 32 }.makePlan()
      let disagreement = EPError.ranksDisagree(about: "hidden", rank: 2, expected: "64", found: "32")
      #expect(
        try setupErrors(plans: [plan, plan, narrow], workers: [1, 1, 1])
          == [disagreement, disagreement, disagreement])
      let forTwo = try smallJob(rankCount: 2).makePlan()
      let mistaken = EPError.invalidArgument(rank: 0, argument: "plan.shape.rankCount", expected: "3", found: "2")
      #expect(try setupErrors(plans: [forTwo, plan, plan], workers: [1, 1, 1]) == [mistaken, mistaken, mistaken])
    }

    private func setupErrors(plans: [ExpertBuffer.Plan], workers: [Int]) throws -> [EPError?] {
      let communicators = try Communicator.threads(rankCount: plans.count)
      return try valuesInParallel(plans.count) { rank in
        try error { () throws(EPError) in
          _ = try TestBuffer(communicators[rank], plan: plans[rank], workers: workers[rank])
        }
      }
    }

    @Test func aRankThatNeverMakesItsBuffer() throws {
      let plan = try smallJob().makePlan()
      let communicators = try Communicator.threads(rankCount: 3)
      let errors = try valuesInParallel(2) { rank in
        try error { () throws(EPError) in
          _ = try TestBuffer(communicators[rank], plan: plan, workers: 1, timeout: .milliseconds(200))
        }
      }
      let expected = EPError.rankMissing(rank: 2, step: .setup, because: .silent(.milliseconds(200)))
      #expect(errors == [expected, expected])
    }
  }
}
