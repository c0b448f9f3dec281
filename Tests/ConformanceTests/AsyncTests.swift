import Conformance
import Glibc
import SwiftEP
import Testing

extension ConformanceTests {
  /// Calls that return before their work is done.
  @Suite struct AsyncTests {
    private static let job = smallJob().with { ($0.sizing, $0.isAsynchronous) = (.worstCase, true) }

    /// Rows that are written after the call, before the event, are the ones that travel.
    @Test(arguments: RowLayout.allCases, [1, 2])
    func rowsMayComeLater(_ layout: RowLayout, workers: Int) throws {
      let job = Self.job.with { $0.layout = layout }
      try fabric.test(plan: job.makePlan(), workers: workers, timeout: .seconds(30)) { buffer in
        let tokens = job.makeTokens(rank: buffer.rank)
        let x = try buffer.makeTensor(zeros: tokens.x.shape, tokens.x.dtype)
        let ready = Event()
        var options = job.dispatchOptions
        options.after = [ready]
        let result = try buffer.dispatch(x, to: tokens.routing, options: options)
        usleep(20_000)
        try require(!result.event.isComplete && !ready.isComplete, "complete before its rows were ready")
        x.copyBeginning(from: tokens.x)
        ready.signal()
        try result.event.wait()
        try require(result.event.isComplete && ready.isComplete, "not complete after a wait")
        let expected = job.makeOracle().dispatched(to: buffer.rank)
        let text = difference(result, from: expected, comparingPaddingRows: false)
        try require(text == nil, text!)
      }
    }

    /// Dispatches and combines queued behind one event, in one go; each takes its rows from the one before.
    @Test(arguments: RowLayout.allCases)
    func chainsAreQueued(_ layout: RowLayout) throws {
      let job = Self.job.with { ($0.layout, $0.dtype, $0.combineDType) = (layout, .fp32, .fp32) }
      let sequential = try chain(job.with { $0.isAsynchronous = false })
      #expect(try chain(job) == sequential)
    }

    private func chain(_ job: Job) throws -> [[UInt8]] {
      try onEachRank(try job.makePlan(), workers: 2) { buffer in
        let gate = Event()
        var options = job.dispatchOptions
        if job.isAsynchronous { options.after = [gate] }
        var combineOptions = CombineOptions()
        combineOptions.isAsynchronous = job.isAsynchronous
        let tokens = job.makeTokens(rank: buffer.rank)
        var result = try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
        options.after = []
        var combined = try buffer.combine(result.rows, with: result.handle, options: combineOptions)
        for _ in 0..<3 {
          result = try buffer.dispatch(combined.tokens, to: .cached(result.handle), options: options)
          combined = try buffer.combine(result.rows, with: result.handle, options: combineOptions)
        }
        if job.isAsynchronous {
          try require(!combined.event.isComplete, "complete before the first could begin")
          gate.signal()
        }
        try combined.event.wait()
        return combined.tokens.bytes
      }
    }

    /// Results that are dropped before their events keep nothing, and break nothing.
    @Test func resultsMayBeDropped() throws {
      let job = Self.job
      let sizes = try onEachRank(try job.makePlan()) { buffer in
        for round in 0..<30 {
          let event = try job.dispatch(on: buffer, step: round % 3).event
          if round % 4 == 0 { try event.wait() }
        }
        let last = try job.dispatch(on: buffer)
        try last.event.wait()
        let expected = job.makeOracle().dispatched(to: buffer.rank)
        let text = difference(last, from: expected, comparingPaddingRows: false)
        try require(text == nil, text!)
        return buffer.arenaByteCount
      }
      // At most four are alive at a time.
      let plan = try job.makePlan()
      for size in sizes { #expect(size <= 6 * plan.arenaByteCount) }
    }

    /// Another buffer's operation is an event like any other.
    @Test func buffersWaitForEachOther() throws {
      let job = Self.job
      let plan = try job.makePlan()
      let (first, second) = (try Communicator.threads(rankCount: 3), try Communicator.threads(rankCount: 3))
      try inParallel(3) { rank in
        let producer = try TestBuffer(first[rank], plan: plan, workers: 1, timeout: .seconds(30))
        let consumer = try TestBuffer(second[rank], plan: plan, workers: 1, timeout: .seconds(30))
        let gate = Event()
        var options = job.dispatchOptions
        options.after = [gate]
        let produced = try job.dispatch(on: producer, options: options)
        var combineOptions = CombineOptions()
        combineOptions.isAsynchronous = true
        let summed = try producer.combine(produced.rows, with: produced.handle, options: combineOptions)
        options.after = [summed.event]
        let routing = job.makeTokens(rank: rank).routing
        let consumed = try consumer.dispatch(summed.tokens, to: routing, options: options)
        gate.signal()
        try consumed.event.wait()
        let sums = try valuesOfSums(job)
        let oracle = Oracle(
          job,
          tokens: (0..<3).map { source in
            RankTokens(
              x: try! Tensor(copying: sums[source], shape: [sums[source].count], .uint8).viewed(
                as: .bf16, hidden: job.hidden),
              routing: job.makeTokens(rank: source).routing)
          })
        let text = difference(consumed, from: oracle.dispatched(to: rank), comparingPaddingRows: false)
        try require(text == nil, text!)
        consumer.close()
        producer.close()
      }
    }

    /// What a combine of dispatched rows gives each rank.
    private func valuesOfSums(_ job: Job) throws -> [[UInt8]] {
      let oracle = job.makeOracle()
      let rows = (0..<job.rankCount).map { rank in
        let bytes = oracle.dispatched(to: rank).rows
        return try! Tensor(copying: bytes, shape: [bytes.count], .uint8).viewed(as: job.dtype, hidden: job.hidden)
      }
      return (0..<job.rankCount).map { oracle.combined(at: $0, rows: rows, rowWeights: nil, biases: []) }
    }

    /// Errors of calls that have returned come with their events; the buffer goes on.
    @Test func errorsComeWithEvents() throws {
      let job = Self.job
      let errors = try onEachRank(try job.makePlan()) { buffer in
        var tokens = job.makeTokens(rank: buffer.rank)
        if buffer.rank == 1 {
          tokens.routing = .topK(
            indices: try! Tensor(copying: [Int64](repeating: 77, count: 32), shape: [16, 2], .int64),
            weights: try! Tensor(zeros: [16, 2], .fp32))
        }
        let result = try buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
        let error = try error { () throws(EPError) in try result.event.wait() }
        try job.checkDispatch(on: buffer)
        return error
      }
      let expected = EPError.invalidArgument(
        rank: 1, argument: "indices[0, 0]", expected: "-1 or an expert of 0..<6", found: "77")
      #expect(errors == [expected, expected, expected])
    }

    /// What is queued behind a dispatch that fails uses a handle that was never filled: an error too, not wild rows.
    @Test(arguments: RowLayout.allCases, [Sizing.exact, .worstCase])
    func whatFollowsAFailureFails(_ layout: RowLayout, _ sizing: Sizing) throws {
      let job = Self.job.with { $0.layout = layout }
      let errors = try onEachRank(try job.makePlan()) { buffer in
        var tokens = job.makeTokens(rank: buffer.rank)
        if buffer.rank == 1 {
          tokens.routing = .topK(
            indices: try! Tensor(copying: [Int64](repeating: 77, count: 32), shape: [16, 2], .int64),
            weights: try! Tensor(zeros: [16, 2], .fp32))
        }
        let result = try buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
        var options = CombineOptions()
        options.isAsynchronous = true
        let combined = try buffer.combine(result.rows, with: result.handle, options: options)
        let repeated = try error { () throws(EPError) in
          var options = job.dispatchOptions
          options.sizing = sizing
          try job.dispatch(on: buffer, handle: result.handle, options: options).event.wait()
        }
        let errors = [
          try error { () throws(EPError) in try result.event.wait() },
          try error { () throws(EPError) in try combined.event.wait() }, repeated,
        ]
        try job.checkDispatch(on: buffer)
        return errors
      }
      #expect(errors[1] == errors[0] && errors[2] == errors[0])
      let unfilled = EPError.invalidArgument(
        rank: 0, argument: "handle", expected: "one of a dispatch that succeeded",
        found: "one of a dispatch that failed")
      #expect(errors[0][1...] == [unfilled, unfilled])
    }

    /// Closing finishes what is queued.
    @Test func closingFinishesTheQueue() throws {
      let job = Self.job
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let results = try (0..<5).map { try job.dispatch(on: buffer, step: $0) }
        buffer.close()
        for (step, result) in results.enumerated() {
          try require(result.event.isComplete, "dispatch \(step) is not complete")
          let expected = job.makeOracle(step: step).dispatched(to: buffer.rank)
          let text = difference(result, from: expected, comparingPaddingRows: false)
          try require(text == nil, text!)
        }
      }
    }
  }
}

extension Tensor {
  /// The same bytes as rows of `hidden` elements.
  func viewed(as dtype: DType, hidden: Int) -> Tensor {
    Tensor(
      dtype: dtype, shape: [byteCount / dtype.byteCount / hidden, hidden], storage: storage, byteOffset: byteOffset)
  }
}
