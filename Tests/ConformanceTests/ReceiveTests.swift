import Conformance
import Glibc
import SwiftEP
import Testing

extension ConformanceTests {
  /// Calls that send, and receive later.
  @Suite struct ReceiveTests {
    private static let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]

    private static func makeJob(_ layout: RowLayout = .bySource) -> Job {
      smallJob().with { ($0.layout, $0.sizing, $0.receivesLater) = (layout, .worstCase, true) }
    }

    private static func makePlan(_ job: Job) throws -> ExpertBuffer.Plan {
      try ExpertBuffer.Plan(job.shape, resultCount: 9, workers: 2, staging: .whole)
    }

    private static var combineOptions: CombineOptions {
      var options = CombineOptions()
      options.receivesLater = true
      return options
    }

    private static func expectSent(_ result: DispatchResult) throws {
      try require(!result.event.isComplete, "complete before it is received")
    }

    private static func compare(_ result: DispatchResult, _ job: Job, step: Int, _ buffer: TestBuffer) throws {
      let expected = job.makeOracle(step: step).dispatched(to: buffer.rank)
      let text = difference(result, from: expected, comparingPaddingRows: false)
      try require(text == nil, "step \(step): \(text ?? "")")
    }

    private static func compare(_ sums: Tensor, _ job: Job, step: Int, _ buffer: TestBuffer) throws {
      let oracle = job.makeOracle(step: step)
      let rows = (0..<3).map { rank in
        let origins = oracle.dispatched(to: rank)
        return job.makeExpertRows(rank: rank, rowCount: origins.rowCount, step: step)
      }
      let expected = oracle.combined(at: buffer.rank, rows: rows, rowWeights: nil, biases: [])
      let text = difference(sums, from: expected, named: "sums")
      try require(text == nil, "step \(step): \(text ?? "")")
    }

    /// Three of each kind under way; dispatches are received in another order on every rank.
    @Test(arguments: RowLayout.allCases, orders)
    func everyOrder(_ layout: RowLayout, _ order: [Int]) throws {
      let job = Self.makeJob(layout)
      try fabric.test(plan: try Self.makePlan(job), workers: 2, timeout: .seconds(30)) { buffer in
        for isAsynchronous in [false, true] {
          var options = job.dispatchOptions
          var combineOptions = Self.combineOptions
          (options.isAsynchronous, combineOptions.isAsynchronous) = (isAsynchronous, isAsynchronous)
          let results = try (0..<3).map { try job.dispatch(on: buffer, step: $0, options: options) }
          for result in results { try Self.expectSent(result) }
          for index in order.map({ ($0 + buffer.rank) % 3 }) {
            try results[index].receive()
            try results[index].event.wait()
            try Self.compare(results[index], job, step: index, buffer)
          }
          let sums = try results.enumerated().map { step, result in
            let rowCount = job.makeOracle(step: step).dispatched(to: buffer.rank).rowCount
            let rows = try buffer.combineInput(for: result.handle, hidden: job.hidden, dtype: .bf16)
            rows.copyBeginning(from: job.makeExpertRows(rank: buffer.rank, rowCount: rowCount, step: step))
            return try buffer.buffer.combine(rows, with: result.handle, options: combineOptions)
          }
          // Dispatches go on in between.
          let fourth = try job.dispatch(on: buffer, step: 3, options: options)
          for index in order {
            try sums[index].receive()
            try sums[index].event.wait()
            try Self.compare(sums[index].tokens, job, step: index, buffer)
          }
          try fourth.receive()
          try fourth.event.wait()
          try Self.compare(fourth, job, step: 3, buffer)
        }
      }
    }

    /// As many exchanges as may be under way; the next is refused without a word to the peers, and can be made again.
    @Test func tooManyCallsInBetween() throws {
      let job = Self.makeJob()
      let plain = job.with { $0.receivesLater = false }
      let errors = try onEachRank(try Self.makePlan(job)) { buffer in
        let first = try job.dispatch(on: buffer)
        for step in 1...6 { try plain.checkDispatch(on: buffer, step: step) }
        let refused = try error { () throws(EPError) in _ = try plain.dispatch(on: buffer, step: 7) }
        try first.receive()
        try Self.compare(first, job, step: 0, buffer)
        try plain.checkDispatch(on: buffer, step: 7)
        return refused
      }
      for (rank, error) in errors.enumerated() {
        #expect(
          error
            == .invalidArgument(
              rank: rank, argument: "receive", expected: "a call for each result, before 7 others are begun",
              found: "none"))
      }
    }

    @Test func wrongCalls() throws {
      let job = Self.makeJob()
      func invalid(_ rank: Int, _ argument: String, _ expected: String, _ found: String) -> EPError {
        .invalidArgument(rank: rank, argument: argument, expected: expected, found: found)
      }
      let errors = try onEachRank(try Self.makePlan(job)) { buffer in
        func fails(_ body: () throws(EPError) -> Void) throws -> EPError {
          try error { () throws(EPError) in try body() }
        }
        let result = try job.dispatch(on: buffer)
        let graph = try error { () throws(EPError) in
          _ = try buffer.buffer.record { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        }
        let exact = job.with { ($0.sizing, $0.receivesLater) = (.exact, false) }
        let streams = job.with { ($0.ranksOfWaitingStreams, $0.receivesLater) = ([0, 1, 2], false) }
        var after = job.dispatchOptions
        (after.after, after.receivesLater) = ([result.event], false)
        var errors = [
          graph,
          try fails { () throws(EPError) in _ = try exact.dispatch(on: buffer) },
          try fails { () throws(EPError) in
            _ = try streams.dispatch(on: buffer, options: streams.dispatchOptions(ofRank: buffer.rank))
          },
          try fails { () throws(EPError) in try result.event.wait() },
          try fails { () throws(EPError) in _ = try buffer.combine(result.rows, with: result.handle) },
          try fails { () throws(EPError) in _ = try job.dispatch(on: buffer, options: after) },
        ]
        try result.receive()
        errors.append(try fails { () throws(EPError) in try result.receive() })
        let plain = try exact.dispatch(on: buffer)
        errors.append(try fails { () throws(EPError) in try plain.receive() })
        try Self.compare(result, job, step: 0, buffer)
        return errors
      }
      let state = "while results are to be received"
      for rank in 0..<3 {
        #expect(
          errors[rank] == [
            invalid(rank, "body", "no results that are still to be received", "1"),
            invalid(rank, "sizing", "worstCase \(state)", "exact"),
            invalid(rank, "waiting", "workers \(state)", "stream"),
            invalid(-1, "event", "one of a result that has been received", "one that has not"),
            invalid(0, "handle", "one of a call that has been received", "one that is still to be received"),
            invalid(0, "after", "one of a call that has been received", "one that is still to be received"),
            invalid(rank, "receive", "one call for each result", "another"),
            invalid(-1, "receive", "a result of a call with receivesLater", "one without"),
          ])
      }
    }

    /// What one rank gets wrong, all learn when they receive; then they go on.
    @Test func faultsAreReceived() throws {
      let job = Self.makeJob()
      let errors = try onEachRank(try Self.makePlan(job)) { buffer in
        var tokens = job.makeTokens(rank: buffer.rank)
        if buffer.rank == 1 {
          tokens.routing = .topK(
            indices: try Tensor(copying: [Int64](repeating: 77, count: 32), shape: [16, 2], .int64),
            weights: try Tensor(zeros: [16, 2], .fp32))
        }
        let result = try buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
        let other = try job.dispatch(on: buffer, step: 1)
        let error = try error { () throws(EPError) in try result.receive() }
        try other.receive()
        try Self.compare(other, job, step: 1, buffer)
        return error
      }
      let expected = EPError.invalidArgument(
        rank: 1, argument: "indices[0, 0]", expected: "-1 or an expert of 0..<6", found: "77")
      #expect(errors == [expected, expected, expected])
    }

    /// The same of a combine, with a dispatch before all receive.
    @Test func faultsOfACombineAreReceived() throws {
      let job = Self.makeJob()
      let errors = try onEachRank(try Self.makePlan(job)) { buffer in
        let result = try job.dispatch(on: buffer)
        try result.receive()
        var options = Self.combineOptions
        if buffer.rank == 1 { options.biases = [try Tensor(zeros: [16, 63], .bf16)] }
        let combined = try buffer.combine(result.rows, with: result.handle, options: options)
        let other = try job.dispatch(on: buffer, step: 1)
        let error = try error { () throws(EPError) in try combined.receive() }
        try other.receive()
        try Self.compare(other, job, step: 1, buffer)
        return error
      }
      let expected = EPError.invalidArgument(rank: 1, argument: "biases.shape[1]", expected: "64", found: "63")
      #expect(errors == [expected, expected, expected])
    }

    /// Steps have halves of their own.
    @Test func combinesInSteps() throws {
      let job = Self.makeJob()
      let plan = try ExpertBuffer.Plan(job.shape, resultCount: 4, workers: 2, staging: .steps(tokens: 4))
      let errors = try onEachRank(plan) { buffer in
        let result = try job.dispatch(on: buffer)
        try result.receive()
        let rows = try buffer.buffer.makeTensor(zeros: result.rows.shape, .bf16)
        let combined = try buffer.combine(rows, with: result.handle, options: Self.combineOptions)
        return try error { () throws(EPError) in try combined.receive() }
      }
      let expected = EPError.invalidArgument(
        rank: 0, argument: "rows", expected: "rows in the arena, where others are combined in steps", found: "others")
      #expect(errors == [expected, expected, expected])
    }

    /// What has been received is not held by its result: a plan for one result serves many, one after the other.
    @Test func receivedResultsHoldNothingElse() throws {
      let job = Self.makeJob()
      let plan = try ExpertBuffer.Plan(job.shape, workers: 2, staging: .whole)
      let sizes = try onEachRank(plan) { buffer in
        var kept: [CombineResult] = []
        for step in 0..<4 {
          let result = try job.dispatch(on: buffer, step: step)
          try result.receive()
          let rows = try buffer.buffer.makeTensor(zeros: result.rows.shape, .bf16)
          var options = Self.combineOptions
          options.output = try buffer.buffer.makeTensor(zeros: [16, 64], .bf16)
          let combined = try buffer.combine(rows, with: result.handle, options: options)
          try combined.receive()
          kept.append(combined)
        }
        try require(kept.count == 4, "kept")
        return buffer.arenaByteCount
      }
      #expect(sizes == [Int64](repeating: plan.arenaByteCount, count: 3))
    }

    /// A combine ends where all have read its rows.
    @Test func aRankThatNeverReceives() throws {
      let job = Self.makeJob()
      let found = try onEachRank(try Self.makePlan(job), timeout: .milliseconds(500)) { buffer in
        let result = try job.dispatch(on: buffer)
        try result.receive()
        let combined = try buffer.combine(result.rows, with: result.handle, options: Self.combineOptions)
        if buffer.rank == 2 { return EPError.bufferClosed }
        return try error { () throws(EPError) in try combined.receive() }
      }
      for rank in 0..<2 {
        guard case .rankMissing(2, .completion, _) = found[rank] else {
          Issue.record("\(found[rank])")
          continue
        }
      }
    }

    /// Who sends learns of a rank that is missing, and all others do, though nobody receives.
    @Test func aRankThatNeverSends() throws {
      let job = Self.makeJob()
      let found = try onEachRank(try Self.makePlan(job), timeout: .milliseconds(500)) { buffer in
        if buffer.rank == 2 { return EPError.bufferClosed }
        var options = job.dispatchOptions
        options.isAsynchronous = true
        let result = try job.dispatch(on: buffer, options: options)
        usleep(2_000_000)
        try Self.expectSent(result)
        return try error { () throws(EPError) in _ = try job.dispatch(on: buffer, step: 1, options: options) }
      }
      for rank in 0..<2 {
        guard case .bufferLost(cause: .rankMissing(2, .exchange, _)) = found[rank] else {
          Issue.record("\(found[rank])")
          continue
        }
      }
    }

    @Test(arguments: [RowLayout.bySource, .grouped]) func graphs(_ layout: RowLayout) throws {
      let job = Self.makeJob(layout)
      try fabric.test(plan: try Self.makePlan(job), workers: 2, timeout: .seconds(30)) { buffer in
        let inputs = try (0..<2).map { try GraphInputs(job.makeTokens(rank: buffer.rank, step: $0), on: buffer.buffer) }
        var options = job.dispatchOptions
        var combineOptions = Self.combineOptions
        (options.isAsynchronous, combineOptions.isAsynchronous) = (true, true)
        let recorded = try buffer.buffer.record { () throws(EPError) in
          let first = try buffer.buffer.dispatch(inputs[0].x, to: inputs[0].routing, options: options)
          let second = try buffer.buffer.dispatch(inputs[1].x, to: inputs[1].routing, options: options)
          try first.receive()
          let sums = try buffer.buffer.combine(first.rows, with: first.handle, options: combineOptions)
          try second.receive()
          try sums.receive()
          return (first, second, sums)
        }
        let (first, second, sums) = recorded.result
        for run in 0..<20 {
          let jobs = [job.reseeded(run), job.reseeded(run + 1)]
          for (input, job) in zip(inputs, jobs) { input.set(job.makeTokens(rank: buffer.rank)) }
          try recorded.graph.launch().wait()
          try Self.compare(first, jobs[0], step: 0, buffer)
          try Self.compare(second, jobs[1], step: 0, buffer)
          let oracle = jobs[0].makeOracle()
          let rows = (0..<3).map { rank in
            let bytes = oracle.dispatched(to: rank).rows
            return try! Tensor(copying: bytes, shape: [bytes.count], .uint8).viewed(as: .bf16, hidden: job.hidden)
          }
          let expected = oracle.combined(at: buffer.rank, rows: rows, rowWeights: nil, biases: [])
          let text = difference(sums.tokens, from: expected, named: "sums")
          try require(text == nil, "run \(run): \(text ?? "")")
        }
        let unreceived = try error { () throws(EPError) in
          _ = try buffer.buffer.record { () throws(EPError) in
            _ = try buffer.buffer.dispatch(inputs[0].x, to: inputs[0].routing, options: options)
          }
        }
        let expected = EPError.invalidArgument(
          rank: buffer.rank, argument: "body", expected: "no results that are still to be received", found: "1")
        try require(unreceived == expected, "\(unreceived)")
        try recorded.graph.launch().wait()
      }
    }
  }
}
