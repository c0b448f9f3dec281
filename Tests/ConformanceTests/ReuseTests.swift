import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// The same twice, many times, and several at once.
  @Suite struct ReuseTests {
    @Test(arguments: [RowLayout.bySource, .byExpert], [1, 2, 3])
    func bytesDependOnNothingButTheInput(_ layout: RowLayout, workers: Int) throws {
      let job = Job(rankCount: 3, tokenCount: 33, hidden: 2080, topK: 4, expertCount: 10).with {
        ($0.layout, $0.expertAlignment, $0.zeroesPadding, $0.quantization) = (layout, 4, true, .float)
      }
      let bytes = { @Sendable (workers: Int) throws in
        try onEachRank(try job.makePlan(), workers: workers) { buffer in
          let result = try job.dispatch(on: buffer)
          let given = job.makeExpertRows(rank: buffer.rank, rowCount: result.handle.rowCapacity, step: 0)
          return try result.bytes + [buffer.combine(given, with: result.handle).tokens.bytes]
        }
      }
      let first = try bytes(1)
      #expect(try bytes(workers) == first)
      #expect(try bytes(workers) == first)
    }

    @Test(arguments: RowLayout.allCases)
    func aHandleServesManyTimes(_ layout: RowLayout) throws {
      try check(smallJob().with { ($0.layout, $0.cachedRepeats) = (layout, 25) }, on: fabric)
    }

    /// Chunks of the handle come from the first call, whatever workers repeat it.
    @Test(arguments: [[3, 1, 2], [1, 3, 2]])
    func aHandleServesAnyWorkers(_ workers: [Int]) throws {
      let job = smallJob().with { $0.layout = .byExpert }
      try fabric.test(plan: job.makePlan(), workers: 3, timeout: .seconds(30)) { buffer in
        var options = job.dispatchOptions
        options.workers = workers[0]
        let first = try job.dispatch(on: buffer, options: options)
        for step in 1..<workers.count {
          options.workers = workers[step]
          let result = try job.dispatch(on: buffer, step: step, handle: first.handle, options: options)
          var expected = job.makeOracle(step: step).dispatched(to: buffer.rank)
          (expected.indices, expected.weights) = (nil, nil)
          let text = difference(result, from: expected, comparingPaddingRows: false)
          try require(text == nil, text!)
        }
      }
    }

    /// Each sizing on the other's handle: the repeat's handle fits the repeat's rows, and both can be combined.
    @Test(arguments: RowLayout.allCases, [Sizing.exact, .worstCase])
    func aHandleServesEitherSizing(_ layout: RowLayout, _ sizing: Sizing) throws {
      let job = smallJob().with { ($0.layout, $0.sizing) = (layout, sizing) }
      let other = job.with { $0.sizing = sizing == .exact ? .worstCase : .exact }
      try fabric.test(plan: job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        let oracle = job.makeOracle(step: 1)
        let first = try job.dispatch(on: buffer)
        let second = try other.dispatch(on: buffer, step: 1, handle: first.handle)
        var expected = oracle.dispatched(to: buffer.rank)
        (expected.indices, expected.weights) = (nil, nil)
        let text = difference(second, from: expected, comparingPaddingRows: false)
        try require(text == nil, text!)
        let rows = (0..<job.rankCount).map { rank in
          try! Tensor(
            copying: oracle.dispatched(to: rank).rows, shape: [oracle.dispatched(to: rank).rowCount * 2 * job.hidden],
            .uint8)
        }.enumerated().map { rank, bytes in
          Tensor(
            dtype: .bf16, shape: [bytes.shape[0] / 2 / job.hidden, job.hidden], storage: bytes.storage, byteOffset: 0)
        }
        let sums = oracle.combined(at: buffer.rank, rows: rows, rowWeights: nil, biases: [])
        let combined = try buffer.combine(second.rows, with: second.handle)
        let wrong = difference(combined.tokens, from: sums, named: "tokens")
        try require(wrong == nil, wrong!)
      }
    }

    @Test func combiningTwiceGivesTheSame() throws {
      let job = smallJob()
      let both = try onEachRank(try job.makePlan()) { buffer in
        let result = try job.dispatch(on: buffer)
        let first = try buffer.combine(result.rows, with: result.handle).tokens
        let second = try buffer.combine(result.rows, with: result.handle).tokens
        return [first.bytes, second.bytes]
      }
      for tokens in both { #expect(tokens[0] == tokens[1]) }
    }

    @Test func memoryComesBack() throws {
      let job = smallJob().with { $0.layout = .byExpert }
      let growth = try onEachRank(try job.makePlan()) { buffer in
        var sizes: [Int64] = []
        for step in 0..<200 {
          let result = try job.dispatch(on: buffer, step: step % 3)
          _ = try buffer.combine(result.rows, with: result.handle)
          if step == 0 || step == 199 { sizes.append(buffer.arenaByteCount) }
        }
        return sizes
      }
      for sizes in growth { #expect(sizes[0] == sizes[1]) }
    }

    /// Several results at once keep their bytes, whichever go first, and all their memory comes back.
    @Test(arguments: UInt64(1)...4)
    func resultsLiveInAnyOrder(seed: UInt64) throws {
      let job = smallJob().with { $0.layout = .byExpert }
      let sizes = try onEachRank(try job.makePlan()) { buffer in
        var random = SplitMix64(seed: seed, buffer.rank)
        let expected = (0..<4).map { job.makeOracle(step: $0).dispatched(to: buffer.rank) }
        var alive: [(step: Int, result: DispatchResult)] = []
        var sizes: [Int64] = []
        for round in 0..<40 {
          alive.append((round % 4, try job.dispatch(on: buffer, step: round % 4)))
          while alive.count > random.pick(2...6) { alive.remove(at: random.pick(0...alive.count - 1)) }
          for (step, result) in alive {
            let text = difference(result, from: expected[step], comparingPaddingRows: false)
            try require(text == nil, "round \(round): \(text!)")
          }
          if round == 20 || round == 39 { sizes.append(buffer.arenaByteCount) }
        }
        return sizes
      }
      // Seven results are the most, of at most twice the expected rows each; the plan holds one.
      for size in sizes { #expect(size[1] <= size[0] + size[0] / 2) }
    }

    /// Rows handed to combine, its sums and a dispatch's rows lie apart.
    @Test func neighboursKeepTheirBytes() throws {
      let job = smallJob()
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let result = try job.dispatch(on: buffer)
        let inputs = try (0..<3).map { _ in try buffer.combineInput(for: result.handle, hidden: 24, dtype: .bf16) }
        for (index, input) in inputs.enumerated() {
          _ = input.withUnsafeMutableBytes { $0.initializeMemory(as: UInt8.self, repeating: UInt8(index + 1)) }
        }
        let before = result.bytes
        let sums = try buffer.combine(inputs[1], with: result.handle).tokens
        let other = try job.dispatch(on: buffer, step: 1)
        try require(result.bytes == before, "the first result has changed")
        for (index, input) in inputs.enumerated() {
          try require(input.bytes.allSatisfy { $0 == UInt8(index + 1) }, "input \(index) has changed")
        }
        withExtendedLifetime((sums, other)) {}
      }
    }
  }
}
