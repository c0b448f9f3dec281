import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// Operations recorded once and run many times.
  @Suite struct GraphTests {
    private static let job = smallJob().with { ($0.sizing, $0.isAsynchronous) = (.worstCase, true) }

    private static var combineOptions: CombineOptions {
      var options = CombineOptions()
      options.isAsynchronous = true
      return options
    }

    /// What a call that is not recorded sums, for each of several steps.
    private static func sums(_ job: Job, _ steps: Range<Int>, on buffer: TestBuffer) throws -> [[UInt8]] {
      try steps.map { step in
        let dispatched = try job.dispatch(on: buffer, step: step)
        let combined = try buffer.combine(dispatched.rows, with: dispatched.handle, options: combineOptions)
        try combined.event.wait()
        return combined.tokens.bytes
      }
    }

    /// Recorded once, run a thousand times with other tokens and other routing each time.
    @Test(arguments: RowLayout.allCases, [1, 2])
    func routingChangesFromRunToRun(_ layout: RowLayout, workers: Int) throws {
      let job = Self.job.with { ($0.layout, $0.workers) = (layout, workers) }
      try checkReplays(job, count: 1000, on: fabric)
      try checkReplays(job.with { $0.ranksOfWaitingStreams = [0, 2] }, count: 200, on: fabric)
      try checkReplays(job.with { $0.receivesLater = true }, count: 200, on: fabric)
    }

    /// With a global scale that the graph keeps.
    @Test(arguments: RowLayout.allCases)
    func nvfp4(_ layout: RowLayout) throws {
      let job = Self.job.with { ($0.layout, $0.quantization, $0.globalScale) = (layout, .nvfp4, 1344) }
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let inputs = try GraphInputs(job.makeTokens(rank: buffer.rank), on: buffer.buffer)
        let (graph, result) = try buffer.record { () throws(EPError) in
          try buffer.buffer.dispatch(inputs.x, to: inputs.routing, options: job.dispatchOptions)
        }
        for step in (0..<3).map({ job.reseeded($0) }) {
          inputs.set(step.makeTokens(rank: buffer.rank))
          try graph.launch().wait()
          let expected = step.makeOracle().dispatched(to: buffer.rank)
          let text = difference(result, from: expected, comparingPaddingRows: false)
          try require(text == nil, text ?? "")
        }
      }
    }

    /// Several graphs and plain calls take turns on one buffer; launches are queued without waiting.
    @Test func graphsShareABuffer() throws {
      let job = Self.job
      try fabric.test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        let sums = try Self.sums(job, 0..<3, on: buffer)
        let recorded = try (0..<3).map { step in
          try GraphInputs(job.makeTokens(rank: buffer.rank, step: step), on: buffer.buffer)
            .record(job.dispatchOptions, Self.combineOptions, on: buffer.buffer)
        }
        for run in 0..<50 {
          let order = run % 2 == 0 ? [0, 1, 2] : [2, 0, 1]
          var last: Event?
          for step in order { last = try recorded[step].graph.launch() }
          if run % 10 == 0 { try job.checkDispatch(on: buffer, step: 1) }
          try last!.wait()
          for (step, next) in recorded.enumerated() {
            try next.result.1.event.wait()
            try require(next.result.1.tokens.bytes == sums[step], "run \(run), graph \(step): other sums")
          }
        }
      }
    }

    /// A wait for a launch is for that one, whatever is launched before the wait's turn comes.
    @Test func waitsAreForTheirOwnLaunch() throws {
      let job = Self.job
      let (first, second) = (try Communicator.threads(rankCount: 3), try Communicator.threads(rankCount: 3))
      let plan = try job.makePlan()
      try inParallel(3) { rank in
        let a = try TestBuffer(first[rank], plan: plan, workers: 1, timeout: .seconds(30))
        let b = try TestBuffer(second[rank], plan: plan, workers: 1, timeout: .seconds(30))
        let inputs = try GraphInputs(job.makeTokens(rank: rank), on: a.buffer)
        let (graph, result) = try inputs.record(job.dispatchOptions, Self.combineOptions, on: a.buffer)
        let gate = Event()
        var options = job.dispatchOptions
        let launched = try graph.launch()
        // The graph's own event, and one of its operations'.
        options.after = [gate, launched, result.0.event]
        let behind = try job.dispatch(on: b, options: options).event
        options.after = [behind]
        let last = try job.dispatch(on: a, options: options).event
        let again = try graph.launch()
        gate.signal()
        for event in [launched, behind, last, again] { try event.wait() }
        a.close()
        b.close()
      }
    }

    /// What cannot be recorded is refused here and now, and nothing of it is left.
    @Test func whatCannotBeRecorded() throws {
      let job = Self.job
      let names = try onEachRank(try job.makePlan()) { buffer in
        let tokens = job.makeTokens(rank: buffer.rank)
        var refused: [String] = []
        func expectRefusal(_ body: () throws(EPError) -> Void) throws {
          let error = try thrown { () throws(EPError) in _ = try buffer.record(body) }
          guard case .invalidArgument(buffer.rank, let argument, _, _) = error else {
            throw Mismatch(description: "\(error)")
          }
          refused.append(argument)
        }
        func dispatch(_ change: (inout DispatchOptions) -> Void) throws(EPError) {
          var options = job.dispatchOptions
          change(&options)
          _ = try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
        }
        try expectRefusal { () throws(EPError) in }
        try expectRefusal { () throws(EPError) in try dispatch { $0.sizing = .exact } }
        try expectRefusal { () throws(EPError) in try dispatch { $0.isAsynchronous = false } }
        try expectRefusal { () throws(EPError) in try dispatch { $0.after = [Event()] } }
        try expectRefusal { () throws(EPError) in try dispatch { $0.expertAlignment = 0 } }
        try expectRefusal { () throws(EPError) in
          _ = try buffer.record { () throws(EPError) in }
        }
        let inputs = try GraphInputs(tokens, on: buffer.buffer)
        let (graph, _) = try inputs.record(job.dispatchOptions, Self.combineOptions, on: buffer.buffer)
        try expectRefusal { () throws(EPError) in try graph.launch() }
        try job.checkDispatch(on: buffer)
        return refused
      }
      let expected = ["body", "sizing", "isAsynchronous", "after[0]", "expertAlignment", "body", "body"]
      #expect(names == [[String]](repeating: expected, count: job.rankCount))
    }

    /// Bad input in one run is an error of that run, on all ranks.
    @Test func aRunMayFail() throws {
      let job = Self.job
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let tokens = job.makeTokens(rank: buffer.rank)
        let inputs = try GraphInputs(tokens, on: buffer.buffer)
        let sums = try Self.sums(job, 0..<1, on: buffer)
        let (graph, (_, combined)) = try inputs.record(job.dispatchOptions, Self.combineOptions, on: buffer.buffer)
        if buffer.rank == 1 {
          inputs.indices.copyBeginning(from: try Tensor(copying: [77 as Int64], shape: [1], .int64))
        }
        let error = try thrown { () throws(EPError) in try graph.launch().wait() }
        inputs.set(tokens)
        try graph.launch().wait()
        try require(combined.tokens.bytes == sums[0], "other sums after a run that failed")
        buffer.close()
        let closed = try thrown { () throws(EPError) in _ = try graph.launch() }
        try require(closed == .bufferClosed, "\(closed)")
        return error
      }
      let expected = EPError.invalidArgument(
        rank: 1, argument: "indices[0, 0]", expected: "-1 or an expert of 0..<6", found: "77")
      #expect(errors == [EPError](repeating: expected, count: job.rankCount))
    }
  }
}

/// As `error(of:)`, where that name is taken.
private func thrown(by call: () throws(EPError) -> Void) throws -> EPError { try error(of: call) }
