import Conformance
import Glibc
import HostMachine
import SwiftEP
import Testing

extension ConformanceTests {
  /// Buffers that go on without some of their ranks.
  @Suite struct MaskTests {
    private static let layouts: [SwiftEP.RowLayout] = [.bySource, .grouped]

    private static func makeJob(_ layout: SwiftEP.RowLayout = .bySource, rankCount: Int = 4) -> Job {
      Job(
        rankCount: rankCount, tokensPerRank: [16, 9, 12, 16, 3, 7].prefix(rankCount) + [], hidden: 64, topK: 3,
        expertCount: 9
      )
      .with { ($0.layout, $0.masking) = (layout, .automatic) }
    }

    /// What is wrong with the result of `dispatch`, if these are masked.
    private static func fault(of result: DispatchResult, _ job: Job, step: Int, rank: Int, masked: Set<Int>) -> String?
    {
      let expected = job.with { $0.masked = masked }.makeOracle(step: step).dispatched(to: rank)
      return difference(result, from: expected, comparingPaddingRows: false)
    }

    private static func fault(of sums: Tensor, _ job: Job, step: Int, rank: Int, masked: Set<Int>) -> String? {
      let oracle = job.with { $0.masked = masked }.makeOracle(step: step)
      let rows = (0..<job.rankCount).map { job.makeExpertRows(rank: $0, rowCount: oracle.rowCounts[$0], step: step) }
      return difference(
        sums, from: oracle.combined(at: rank, rows: rows, rowWeights: nil, biases: []), named: "sums")
    }

    private static func combine(
      _ result: DispatchResult, _ job: Job, step: Int, _ buffer: ExpertBuffer,
      options: CombineOptions = CombineOptions()
    ) throws -> CombineResult {
      let rows = try buffer.combineInput(for: result.handle, hidden: job.hidden, dtype: .bf16)
      let given = job.makeExpertRows(rank: buffer.rank, rowCount: job.makeOracle().rowCounts[buffer.rank], step: step)
      rows.copyBeginning(from: given)
      return try buffer.combine(rows, with: result.handle, options: options)
    }

    /// A dispatch, then a combine of it, both right without these.
    private static func checkRound(_ job: Job, step: Int, on buffer: TestBuffer, masked: Set<Int>) throws {
      let result = try job.dispatch(on: buffer, step: step)
      let text = fault(of: result, job, step: step, rank: buffer.rank, masked: masked)
      try require(text == nil, "round \(step) without \(masked.sorted()): \(text ?? "")")
      let sums = try combine(result, job, step: step, buffer.buffer).tokens
      let sumText = fault(of: sums, job, step: step, rank: buffer.rank, masked: masked)
      try require(sumText == nil, "round \(step) without \(masked.sorted()): \(sumText ?? "")")
    }

    /// Everything that a job can do, without some ranks from the beginning.
    @Test(arguments: layouts, [[], [0], [3], [1, 2], [0, 2, 3]])
    func masksFromTheBeginning(_ layout: SwiftEP.RowLayout, _ masked: [Int]) throws {
      var job = Self.makeJob(layout)
      job.masked = Set(masked)
      (job.quantization, job.sidecarByteCounts, job.combinesTopKWeights) = (.float, [8], true)
      (job.biasCount, job.usesRowWeights, job.cachedRepeats) = (1, layout == .grouped, 2)
      for workers in [1, 2] {
        job.workers = workers
        for receivesLater in [false, true] {
          job.receivesLater = receivesLater
          job.seed += 1
          try check(job, on: fabric)
        }
      }
      // By table.
      if layout == .bySource {
        (job.usesTable, job.isWeighted, job.combinesTopKWeights) = (true, false, false)
        try check(job, on: fabric)
      }
    }

    /// One rank masks another in the midst of calls: from that call on, all go on without it.
    @Test(arguments: layouts) func maskedByOneRank(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout).with { $0.masking = .manual }
      let errors = try onEachRank(try job.makePlan()) { buffer -> EPError? in
        for step in 0..<12 {
          if step == 5 && buffer.rank == 3 { try buffer.buffer.mask([1]) }
          if buffer.rank == 1 && step == 5 {
            let first = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, step: step) }
            let later = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, step: step) }
            try require(first == later, "\(first), then \(later)")
            // Not to be found closed before the others have found it masked.
            usleep(300_000)
            return first
          }
          try Self.checkRound(job, step: step, on: buffer, masked: step < 5 ? [] : [1])
          let found = try buffer.maskedRanks
          try require(found == (step < 5 ? [] : [1]), "masked: \(found)")
        }
        return nil
      }
      guard case .rankMasked(rank: 1, by: _) = errors[1] else {
        Issue.record("\(String(describing: errors[1]))")
        return
      }
    }

    /// One rank masks another that is silent: the others, which wait for it already, need not wait till its time is over.
    @Test(arguments: layouts) func silentAndMaskedByOne(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout).with { $0.masking = .manual }
      _ = try onEachRank(try job.makePlan(), timeout: .seconds(5)) { buffer in
        if buffer.rank == 1 {
          usleep(2_000_000)
          return true
        }
        if buffer.rank == 3 {
          usleep(200_000)
          try buffer.buffer.mask([1])
        }
        let begin = monotonicNow()
        for step in 0..<3 { try Self.checkRound(job, step: step, on: buffer, masked: [1]) }
        try require(monotonicNow() - begin < 2_000_000_000, "waited for the silent rank")
        return true
      }
    }

    /// Ranks fall silent, one after the other, and come back: the rest is right at any time.
    @Test(arguments: layouts) func silentRanksReturn(_ layout: SwiftEP.RowLayout) throws {
      let timeout = Duration.milliseconds(600)
      let job = Self.makeJob(layout)
      _ = try onEachRank(try job.makePlan(), timeout: timeout) { buffer in
        for step in 0..<3 { try Self.checkRound(job, step: step, on: buffer, masked: []) }
        if buffer.rank == 2 {
          usleep(2_000_000)
          let late = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
          guard case .rankMasked(rank: 2, by: _) = late else { throw Mismatch(description: "\(late)") }
        } else {
          let begin = monotonicNow()
          for step in 3..<8 { try Self.checkRound(job, step: step, on: buffer, masked: [2]) }
          // Once for all of them.
          let elapsed = monotonicNow() - begin
          try require(elapsed < 4 * timeout.nanoseconds, "waited for \(elapsed / 1_000_000) ms")
          let masked = try buffer.maskedRanks
          try require(masked == [2], "masked: \(masked)")
        }
        try Self.takeBack([2], buffer)
        for step in 8..<11 { try Self.checkRound(job, step: step, on: buffer, masked: []) }
        // Another, for which the one that has returned waits, too.
        if buffer.rank == 0 {
          usleep(2_000_000)
        } else {
          for step in 11..<13 { try Self.checkRound(job, step: step, on: buffer, masked: [0]) }
        }
        try Self.takeBack([0], buffer)
        for step in 13..<16 { try Self.checkRound(job, step: step, on: buffer, masked: []) }
        return true
      }
    }

    /// A handle from before is of no use when a rank has returned, also inside of a graph; the graph's own are.
    @Test func handlesOfBefore() throws {
      let job = Self.makeJob().with { $0.isAsynchronous = true }
      let errors = try onEachRank(of: threadFabric, try job.makePlan()) { buffer in
        let handle = try job.dispatch(on: buffer).handle
        let tokens = try job.makeTokens(rank: buffer.rank, step: 0).reachable(from: buffer.buffer)
        let (cached, _) = try buffer.record { () throws(EPError) in
          try buffer.buffer.dispatch(tokens.x, to: .cached(handle), options: job.dispatchOptions)
        }
        let (whole, result) = try buffer.record { () throws(EPError) in
          let result = try buffer.buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
          _ = try buffer.buffer.dispatch(tokens.x, to: .cached(result.handle), options: job.dispatchOptions)
          return result
        }
        if buffer.rank == 2 {
          _ = try error { () throws(EPError) in try job.dispatch(on: buffer).event.wait() }
        } else {
          try buffer.buffer.mask([2])
          try job.dispatch(on: buffer).event.wait()
        }
        try Self.takeBack([2], buffer)
        let errors = [
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer, handle: handle) },
          try error { () throws(EPError) in try cached.launch() },
        ]
        try whole.launch().wait()
        let text = Self.fault(of: result, job, step: 0, rank: buffer.rank, masked: [])
        try require(text == nil, "\(text ?? "")")
        return errors
      }
      for (rank, errors) in errors.enumerated() {
        #expect(
          errors == [
            .invalidArgument(
              rank: 0, argument: "handle", expected: "one of a dispatch since masked ranks have returned",
              found: "one of an earlier dispatch"),
            .invalidArgument(
              rank: rank, argument: "launch",
              expected: "a graph whose handles are of dispatches since masked ranks have returned",
              found: "one of an earlier dispatch"),
          ])
      }
    }

    /// Where one does not take part, nothing changes: the others go on without the masked rank, and take it back later.
    @Test(arguments: layouts) func oneDoesNotTakeBack(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout)
      let timeout = Duration.milliseconds(500)
      let failedCount = Guarded(0)
      let errors = try onEachRank(of: threadFabric, try job.makePlan(), timeout: timeout) { buffer -> EPError? in
        if buffer.rank == 3 {
          _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        } else {
          try buffer.buffer.mask([3])
          try Self.checkRound(job, step: 0, on: buffer, masked: [3])
        }
        var failure: EPError?
        if buffer.rank != 2 { failure = try error { () throws(EPError) in try buffer.buffer.unmask([3]) } }
        failedCount.withLock { $0 += 1 }
        let deadline = monotonicNow() + 20_000_000_000
        while failedCount.withLock({ $0 }) < 4 && monotonicNow() < deadline { usleep(1000) }
        if buffer.rank != 3 {
          for step in 1..<3 { try Self.checkRound(job, step: step, on: buffer, masked: [3]) }
          let masked = try buffer.maskedRanks
          try require(masked == [3], "masked: \(masked)")
        }
        try Self.takeBack([3], buffer)
        for step in 3..<5 { try Self.checkRound(job, step: step, on: buffer, masked: []) }
        return failure
      }
      let missing = EPError.rankMissing(rank: 2, step: .regrouping, because: .silent(timeout))
      #expect(errors == [missing, missing, nil, missing])
    }

    /// Tries again until all have come.
    private static func takeBack(_ ranks: [Int], _ buffer: TestBuffer) throws {
      for _ in 0..<50 {
        do {
          try buffer.buffer.unmask(ranks)
          let masked = try buffer.maskedRanks
          return try require(masked == [], "masked: \(masked)")
        } catch EPError.rankMissing(_, .regrouping, _) {}
      }
      throw Mismatch(description: "they never came all")
    }

    /// Buffers that are closed, by one rank after the other, before each kind of call.
    @Test(arguments: layouts) func departedRanks(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout, rankCount: 6)
      _ = try onEachRank(try job.makePlan()) { buffer in
        var masked: Set<Int> = []
        for step in 0..<10 {
          if step == 2 && buffer.rank == 1 { return true }
          if step >= 2 { masked.insert(1) }
          let result = try job.dispatch(on: buffer, step: step)
          let text = Self.fault(of: result, job, step: step, rank: buffer.rank, masked: masked)
          try require(text == nil, "round \(step): \(text ?? "")")
          // Between a dispatch and its combine.
          if step == 4 && buffer.rank == 5 { return true }
          if step >= 4 { masked.insert(5) }
          let sums = try Self.combine(result, job, step: step, buffer.buffer).tokens
          let sumText = Self.fault(of: sums, job, step: step, rank: buffer.rank, masked: masked)
          try require(sumText == nil, "round \(step): \(sumText ?? "")")
          // And between that and a dispatch by its handle, whose tokens are others.
          if step == 6 && buffer.rank == 0 { return true }
          if step >= 6 { masked.insert(0) }
          let cached = try job.dispatch(on: buffer, step: step, handle: result.handle)
          var expected = job.with { $0.masked = masked }.makeOracle(step: step).dispatched(to: buffer.rank)
          (expected.indices, expected.weights) = (nil, nil)
          let cachedText = difference(cached, from: expected, comparingPaddingRows: false)
          try require(cachedText == nil, "cached, round \(step): \(cachedText ?? "")")
          let found = try buffer.maskedRanks
          try require(found == masked.sorted(), "round \(step): masked \(found)")
        }
        return true
      }
    }

    /// Two that depart at once are missed at once.
    @Test func twoDepart() throws {
      let job = Self.makeJob()
      _ = try onEachRank(try job.makePlan(), timeout: .seconds(30)) { buffer in
        try Self.checkRound(job, step: 0, on: buffer, masked: [])
        if buffer.rank % 2 == 1 { return true }
        // Both are known to have departed by now.
        usleep(200_000)
        let begin = monotonicNow()
        for step in 1..<4 { try Self.checkRound(job, step: step, on: buffer, masked: [1, 3]) }
        try require(monotonicNow() - begin < 10_000_000_000, "waited for one of them")
        return true
      }
    }

    /// A masked rank receives what it has sent, and learns so, before it returns; old news of that do not count any more.
    @Test func masksAndReceiving() throws {
      let job = Self.makeJob().with { $0.receivesLater = true }
      let plain = Self.makeJob()
      let plan = try ExpertBuffer.Plan(job.shape, resultCount: 4, masking: .manual)
      _ = try onEachRank(plan, timeout: .seconds(30)) { buffer in
        let sent = try job.dispatch(on: buffer)
        if buffer.rank == 1 {
          var options = plain.dispatchOptions
          (options.sizing, options.isAsynchronous) = (.worstCase, true)
          let second = try plain.dispatch(on: buffer, step: 1, options: options)
          while !second.event.isComplete { usleep(1000) }
          let third = try error { () throws(EPError) in _ = try plain.dispatch(on: buffer, step: 1) }
          guard case .rankMasked(rank: 1, by: _) = third else { throw Mismatch(description: "\(third)") }
          let found = try error { () throws(EPError) in try sent.receive() }
          guard case .rankMasked(rank: 1, by: _) = found else { throw Mismatch(description: "\(found)") }
          try Self.takeBack([1], buffer)
          let old = try error { () throws(EPError) in try second.event.wait() }
          guard case .rankMasked(rank: 1, by: _) = old else { throw Mismatch(description: "\(old)") }
        } else {
          try buffer.buffer.mask([1])
          try Self.checkRound(plain, step: 1, on: buffer, masked: [1])
          try sent.receive()
          try Self.takeBack([1], buffer)
        }
        try Self.checkRound(plain, step: 2, on: buffer, masked: [])
        return true
      }
    }

    /// A rank that departs between the halves of a dispatch, behind another call that has missed it: what it has sent does not
    /// count, wherever it got to.
    @Test(arguments: layouts) func departedBetweenHalves(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout).with { $0.receivesLater = true }
      let plain = Self.makeJob(layout)
      _ = try onEachRank(try ExpertBuffer.Plan(job.shape, resultCount: 4, masking: .automatic)) { buffer in
        let result = try job.dispatch(on: buffer)
        if buffer.rank == 1 {
          try result.receive()
          return true
        }
        try Self.checkRound(plain, step: 1, on: buffer, masked: [1])
        try result.receive()
        let text = Self.fault(of: result, job, step: 0, rank: buffer.rank, masked: [1])
        try require(text == nil, "\(text ?? "")")
        var options = CombineOptions()
        options.receivesLater = true
        let combined = try Self.combine(result, job, step: 0, buffer.buffer, options: options)
        try Self.checkRound(plain, step: 2, on: buffer, masked: [1])
        try combined.receive()
        let sumText = Self.fault(of: combined.tokens, job, step: 0, rank: buffer.rank, masked: [1])
        try require(sumText == nil, "\(sumText ?? "")")
        return true
      }
    }

    /// A graph's operations go on, too.
    @Test(arguments: layouts) func graphs(_ layout: SwiftEP.RowLayout) throws {
      let job = Self.makeJob(layout).with { $0.isAsynchronous = true }
      _ = try onEachRank(of: threadFabric, try job.makePlan()) { buffer in
        let tokens = try job.makeTokens(rank: buffer.rank, step: 0).reachable(from: buffer.buffer)
        var combineOptions = CombineOptions()
        combineOptions.isAsynchronous = true
        let (graph, results) = try buffer.record { () throws(EPError) -> (DispatchResult, CombineResult, Tensor) in
          let result = try buffer.buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
          let rows = try buffer.combineInput(for: result.handle, hidden: job.hidden, dtype: .bf16)
          return (result, try buffer.combine(rows, with: result.handle, options: combineOptions), rows)
        }
        let rowCount = job.makeOracle().rowCounts[buffer.rank]
        results.2.copyBeginning(from: job.makeExpertRows(rank: buffer.rank, rowCount: rowCount, step: 0))
        for run in 0..<8 {
          if run == 3 && buffer.rank == 2 { return true }
          try graph.launch().wait()
          let masked: Set<Int> = run < 3 ? [] : [2]
          let text = Self.fault(of: results.0, job, step: 0, rank: buffer.rank, masked: masked)
          try require(text == nil, "run \(run): \(text ?? "")")
          let sumText = Self.fault(of: results.1.tokens, job, step: 0, rank: buffer.rank, masked: masked)
          try require(sumText == nil, "run \(run): \(sumText ?? "")")
        }
        return true
      }
    }

    /// Processes end at any moment, in the midst of their calls, one or two of them: whatever the others return was right with
    /// each of them, or without.
    @Test(.enabled(if: fabric is ProcessFabric && !isOnGPU), arguments: layouts, [[2], [1, 4]])
    func processesEnd(_ layout: SwiftEP.RowLayout, _ ending: [Int]) throws {
      let rankCount = 3 + ending.count
      let job = Self.makeJob(layout, rankCount: rankCount)
      for seed in 0..<6 {
        _ = try processValues(rankCount, patience: .seconds(60)) { rank, gather in
          let communicator = try Communicator.processes(
            rank: rank, rankCount: rankCount, timeout: .seconds(30), allGather: gather)
          let buffer = TestBuffer(
            try ExpertBuffer(communicator, plan: try job.makePlan(), workers: 2, timeout: .seconds(30)))
          if ending.contains(rank) {
            let thread = startThread {
              for step in 0... where (try? Self.checkRound(job, step: step, on: buffer, masked: [])) == nil { return }
            }
            try require(thread != nil, "no thread")
            var random = SplitMix64(seed: UInt64(seed), rank)
            usleep(UInt32(random.pick(1...60_000)))
            return true
          }
          var masked: Set<Int> = []
          func check(_ step: Int, _ fault: (Set<Int>) -> String?) throws {
            // One that is gone does not come back.
            let candidates = [masked] + ending.map { masked.union([$0]) } + [Set(ending)]
            let faults = candidates.map(fault)
            guard let index = faults.firstIndex(of: nil) else {
              let texts = zip(candidates, faults).map { "without \($0.sorted()): \($1 ?? "")" }
              throw Mismatch(description: "round \(step): \(texts.joined(separator: "; "))")
            }
            masked = candidates[index]
          }
          for step in 0..<50 {
            let result = try job.dispatch(on: buffer, step: step)
            try check(step) { Self.fault(of: result, job, step: step, rank: rank, masked: $0) }
            let sums = try Self.combine(result, job, step: step, buffer.buffer).tokens
            try check(step) { Self.fault(of: sums, job, step: step, rank: rank, masked: $0) }
          }
          let found = try buffer.maskedRanks
          // They may have been missed behind their last rows.
          try require(masked.isSubset(of: found) && Set(found).isSubset(of: ending), "masked: \(found), not \(masked)")
          // Not to be missed by one that is slower.
          usleep(100_000)
          return true
        }
      }
    }

    /// Two that mask each other: at least the later one is told; the third goes on.
    @Test func twoMaskEachOther() throws {
      let job = Self.makeJob(rankCount: 3).with { $0.masking = .manual }
      for seed in 0..<20 {
        let told = try onEachRank(try job.makePlan()) { buffer -> [Int] in
          if buffer.rank < 2 {
            try buffer.buffer.mask([1 - buffer.rank])
            if seed % 2 == 1 { usleep(UInt32(buffer.rank * seed * 20)) }
            defer { usleep(50_000) }
            do {
              try Self.checkRound(job, step: 0, on: buffer, masked: [1 - buffer.rank])
            } catch EPError.rankMasked(rank: buffer.rank, by: _) {
              return [buffer.rank]
            }
            return []
          }
          let result = try job.dispatch(on: buffer)
          let masked = Set(try buffer.maskedRanks)
          let text = Self.fault(of: result, job, step: 0, rank: 2, masked: masked)
          try require(text == nil, "without \(masked.sorted()): \(text ?? "")")
          _ = try? Self.combine(result, job, step: 0, buffer.buffer)
          return try buffer.maskedRanks
        }
        #expect(!told[2].isEmpty && Set(told[0] + told[1]).isSubset(of: told[2]), "\(told)")
      }
    }

    /// A rank that is masked by hand, though it is there, in a buffer that masks nobody by itself; then one is missing.
    @Test func manualMasks() throws {
      let job = Self.makeJob().with { $0.masking = .manual }
      let timeout = Duration.milliseconds(300)
      let errors = try onEachRank(try job.makePlan(), timeout: timeout) { buffer -> EPError? in
        if buffer.rank == 3 {
          usleep(900_000)
          return nil
        }
        try buffer.buffer.mask([3])
        for step in 0..<3 { try Self.checkRound(job, step: step, on: buffer, masked: [3]) }
        if buffer.rank == 1 {
          usleep(600_000)
          return nil
        }
        return try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
      }
      let missing = EPError.rankMissing(rank: 1, step: .exchange, because: .silent(timeout))
      #expect(errors == [missing, nil, missing, nil])
    }

    @Test func wrongCalls() throws {
      let job = Self.makeJob().with { $0.masking = .manual }
      func invalid(_ rank: Int, _ argument: String, _ expected: String, _ found: String) -> EPError {
        .invalidArgument(rank: rank, argument: argument, expected: expected, found: found)
      }
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let rank = buffer.rank
        var errors = try [[rank], [0, 1, 2, 3], [4], [-1]].map { ranks in
          try error { () throws(EPError) in try buffer.buffer.mask(ranks) }
        }
        errors.append(try error { () throws(EPError) in try buffer.buffer.unmask([7]) })
        var options = job.dispatchOptions
        options.waiting = .stream
        errors.append(try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) })
        (options.waiting, options.layout) = (.workers, .byExpert)
        errors.append(try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) })
        // None of that was in the way.
        try Self.checkRound(job, step: 0, on: buffer, masked: [])
        return errors
      }
      for (rank, errors) in errors.enumerated() {
        #expect(
          errors == [
            invalid(rank, "ranks", "ranks other than the caller's own", "\(rank)"),
            invalid(rank, "ranks", "a mask that leaves somebody", "\(rank)"),
            invalid(rank, "ranks", "ranks of 0..<4", "4"), invalid(rank, "ranks", "ranks of 0..<4", "-1"),
            invalid(rank, "ranks", "ranks of 0..<4", "7"),
            invalid(rank, "waiting", "workers where ranks can be masked", "stream"),
            invalid(0, "layout", "bySource or grouped where ranks can be masked", "byExpert"),
          ])
      }
    }

    @Test func withoutMasks() throws {
      let job = smallJob(rankCount: 2)
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let masked = try buffer.maskedRanks
        try require(masked == [], "masked: \(masked)")
        return [
          try error { () throws(EPError) in try buffer.buffer.mask([1 - buffer.rank]) },
          try error { () throws(EPError) in try buffer.buffer.unmask([]) },
        ]
      }
      for (rank, errors) in errors.enumerated() {
        let expected = EPError.invalidArgument(
          rank: rank, argument: "plan.masking", expected: "manual or automatic", found: "none")
        #expect(errors == [expected, expected])
      }
    }

    @Test func plansThatCannotBe() throws {
      func found(_ change: (inout JobShape) -> Void, receivedTokensMax: Int? = nil, steps: Int? = nil) throws -> EPError
      {
        var shape = Self.makeJob().shape
        change(&shape)
        return try error { () throws(EPError) in
          _ = try ExpertBuffer.Plan(
            shape, receivedTokensMax: receivedTokensMax, staging: steps.map { .steps(tokens: $0) } ?? .unplanned,
            masking: .manual)
        }
      }
      func invalid(_ argument: String, _ expected: String, _ found: String) -> EPError {
        .invalidArgument(
          rank: -1, argument: argument, expected: "\(expected) where ranks can be masked", found: found)
      }
      #expect(try found { $0.rankCount = 65 } == invalid("rankCount", "at most 64", "65"))
      #expect(try found { $0.tokensPerRankMax = 0 } == invalid("tokensPerRankMax", "at least 1", "0"))
      #expect(try found { $0.layout = .byExpert } == invalid("layout", "bySource or grouped", "byExpert"))
      #expect(try found({ _ in }, receivedTokensMax: 5) == invalid("receivedTokensMax", "nil", "5"))
      #expect(
        try found({ _ in }, steps: 4) == invalid("staging", "unplanned or whole", "steps(tokens: 4)"))
    }

    /// All ranks have the same, or none has a buffer.
    @Test func differentMasking() throws {
      let job = Self.makeJob(rankCount: 2)
      let errors = try fabric.values(rankCount: 2, timeout: .seconds(30)) { communicator in
        let masking: ExpertBuffer.Masking = communicator.rank == 0 ? .manual : .automatic
        let plan = try job.with { $0.masking = masking }.makePlan()
        return try error { () throws(EPError) in _ = try TestBuffer(communicator, plan: plan) }
      }
      let expected = EPError.ranksDisagree(about: "masking", rank: 1, expected: "manual", found: "automatic")
      #expect(errors == [expected, expected])
    }
  }
}
