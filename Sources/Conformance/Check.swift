import SwiftEP

/// Runs the job on all ranks of the fabric and compares every byte that comes back with the oracle's.
///
/// - Throws: `ConformanceFailure` for a difference, `EPError` where a call failed.
package func check(_ job: Job, on fabric: some Fabric) throws {
  let script = Script(job)
  try fabric.run(plan: job.makePlan(), workers: job.workers, timeout: job.timeout) { buffer in
    try script.run(on: buffer)
  }
}

/// Random jobs until the time is over; returns how many passed. `report` is called after each, with their number.
///
/// - Parameters:
///   - ranks: of each job; nil: that is random.
///   - allCall: ranks wait for each other's launches, so that none is masked.
/// - Throws: `ConformanceFailure`, which carries the job and its seed.
package func verify(
  seconds: Double, seed: UInt64, ranks: Int? = nil, allCall: Bool = false, on fabric: some Fabric,
  report: (Job, Int) -> Void
) throws -> Int {
  let clock = ContinuousClock()
  let end = clock.now + .seconds(seconds)
  var passed = 0
  while clock.now < end {
    var job = Job.random(seed: seed &+ UInt64(passed), ranks: ranks)
    if allCall { job.masked = [] }
    do {
      try check(job, on: fabric)
    } catch let error as EPError {
      throw ConformanceFailure(job: job, rank: -1, step: "a call", what: "\(error)")
    }
    passed += 1
    report(job, passed)
  }
  return passed
}

/// The calls of a job, with every rank's inputs and the oracle for each.
struct Script: Sendable {
  let job: Job
  /// One for each dispatch: the first, then the cached ones.
  let oracles: [Oracle]
  /// By combine, then rank: the rows that experts return.
  let expertRows: [[Tensor]]
  let topKWeights: [[Tensor]]
  let combines: [CombineSource]

  init(_ job: Job) {
    self.job = job
    oracles = (0...job.cachedRepeats).map { step in
      Oracle(job, tokens: (0..<job.rankCount).map { job.makeTokens(rank: $0, step: step) })
    }
    let canSumResult = job.receivedDType == job.combineDType && (job.combineHidden ?? job.hidden) == job.hidden
    combines = job.combines.filter { $0 != .result || canSumResult }
    let rowCounts = oracles[0].origins.map(\.count)
    expertRows = combines.indices.map { step in
      rowCounts.enumerated().map { job.makeExpertRows(rank: $0, rowCount: $1, step: step) }
    }
    topKWeights = combines.indices.map { step in
      rowCounts.enumerated().compactMap { job.makeTopKWeights(rank: $0, rowCount: $1, step: step) }
    }
  }

  func run(on buffer: ExpertBuffer) throws {
    let rank = buffer.rank
    if job.masked.contains(rank) { return try findMasked(buffer) }
    if !job.masked.isEmpty && !(0..<rank).contains(where: { !job.masked.contains($0) }) {
      try buffer.mask(job.masked.sorted())
    }
    try soilMemory(of: buffer)
    let first = try dispatch(0, on: buffer, handle: nil)
    try receive(first)
    try compare(first, step: 0, rank: rank)

    var repeats: [DispatchResult] = []
    for step in oracles.indices.dropFirst() {
      let result = try dispatch(step, on: buffer, handle: first.handle)
      if job.isAsynchronous || job.receivesLater {
        repeats.append(result)
      } else {
        try compare(result, step: step, rank: rank)
      }
    }
    // In another order on every rank.
    for index in repeats.indices.map({ ($0 + rank) % repeats.count }) {
      try receive(repeats[index])
      try compare(repeats[index], step: index + 1, rank: rank)
    }
    // A result keeps its bytes while others come and go.
    try compare(first, step: 0, rank: rank)

    for step in combines.indices { try combine(step, on: buffer, first) }
    let masked = try buffer.maskedRanks
    if masked != job.masked.sorted() { try require("\(masked)", rank: rank, "maskedRanks") }
  }

  /// A masked rank that calls learns it; another, nobody waits for.
  private func findMasked(_ buffer: ExpertBuffer) throws {
    if (job.seed + UInt64(buffer.rank)) % 2 == 0 { return }
    do {
      let result = try dispatch(0, on: buffer, handle: nil)
      try receive(result)
      try require("no error", rank: buffer.rank, "dispatch of a masked rank")
    } catch EPError.rankMasked(rank: buffer.rank, by: _) {
      // As it should be.
    }
  }

  /// Leaves memory as a buffer has it that has lived for a while: nothing may rely on zeros there.
  private func soilMemory(of buffer: ExpertBuffer) throws {
    let result = try dispatch(0, on: buffer, handle: nil)
    try receive(result)
    let tensors =
      [result.rows, result.scales, result.origins, result.topKIndices, result.topKWeights] + result.sidecars
    for tensor in tensors {
      tensor?.withUnsafeMutableBytes { _ = $0.initializeMemory(as: UInt8.self, repeating: 0xa5) }
    }
  }

  private func receive(_ result: DispatchResult) throws {
    if job.receivesLater { try result.receive() }
    try result.event.wait()
  }

  private func dispatch(_ step: Int, on buffer: ExpertBuffer, handle: DispatchHandle?) throws -> DispatchResult {
    let tokens = try oracles[step].tokens[buffer.rank].reachable(from: buffer)
    return try buffer.dispatch(
      tokens.x, scales: tokens.scaleColumns ?? tokens.scales, sidecars: tokens.sidecars,
      to: handle.map { .cached($0) } ?? tokens.routing,
      options: job.dispatchOptions(ofRank: buffer.rank))
  }

  private func compare(_ result: DispatchResult, step: Int, rank: Int) throws {
    var expected = oracles[step].dispatched(to: rank)
    // Top-k indices and weights do not travel again.
    if step > 0 { (expected.indices, expected.weights) = (nil, nil) }
    let text = difference(result, from: expected, comparingPaddingRows: job.zeroesPadding)
    try require(text, rank: rank, step == 0 ? "dispatch" : "cached dispatch \(step)")
  }

  private func combine(_ step: Int, on buffer: ExpertBuffer, _ dispatched: DispatchResult) throws {
    let (rank, handle) = (buffer.rank, dispatched.handle)
    let source = combines[step]
    let hidden = job.combineHidden ?? job.hidden
    let given = expertRows[step][rank]
    let rows: Tensor
    switch source {
    case .input: rows = try buffer.combineInput(for: handle, hidden: hidden, dtype: job.combineDType)
    case .result: rows = dispatched.rows
    case .memory: rows = try buffer.makeTensor(zeros: handle.rowShape + [hidden], job.combineDType)
    }
    rows.copyBeginning(from: given)

    var options = CombineOptions()
    let rowWeights = job.makeRowWeights(rank: rank, step: step)
    let biases = job.makeBiases(rank: rank, step: step)
    options.rowWeights = try rowWeights.map { try buffer.reachable($0) }
    options.biases = try biases.map { try buffer.reachable($0) }
    if job.combinesTopKWeights {
      let width = job.layout == .bySource ? job.topK : 1
      let weights = try buffer.makeTensor(zeros: handle.rowShape + [width], .fp32)
      weights.copyBeginning(from: topKWeights[step][rank])
      options.topKWeights = weights
    }
    if job.givesOutput {
      options.output = try buffer.makeTensor(zeros: [job.tokensPerRank[rank], hidden], job.combineDType)
    }
    options.encoding = job.combineEncoding
    options.workers = job.workersPerCall
    options.waiting = job.waiting(ofRank: rank)
    options.isAsynchronous = job.isAsynchronous
    let isInSteps = source == .memory && job.tokensPerStep != nil && job.combineEncoding == .none
    options.receivesLater = job.receivesLater && !isInSteps
    let result = try buffer.combine(rows, with: handle, options: options)
    if options.receivesLater { try result.receive() }
    if job.isAsynchronous { try result.event.wait() }

    let name = "combine from \(source)"
    let sums = oracles[0].combined(
      at: rank, rows: expertRows[step], encoding: job.combineEncoding, rowWeights: rowWeights, biases: biases)
    try require(difference(result.tokens, from: sums, named: "tokens"), rank: rank, name)
    guard job.combinesTopKWeights else { return }
    guard let found = result.topKWeights else { return try require("topKWeights: none", rank: rank, name) }
    let weights = oracles[0].combinedWeights(at: rank, topKWeights: topKWeights[step])
    let bytes = weights.withUnsafeBytes { Array($0) }
    try require(difference(found, from: bytes, named: "topKWeights"), rank: rank, name)
  }

  private func require(_ difference: String?, rank: Int, _ step: String) throws {
    if let difference { throw ConformanceFailure(job: job, rank: rank, step: step, what: difference) }
  }
}

extension Tensor {
  /// Copies all of `other`, which is not larger, to the first bytes.
  package func copyBeginning(from other: Tensor) {
    withUnsafeMutableBytes { to in other.withUnsafeBytes { to.copyMemory(from: $0) } }
  }
}
