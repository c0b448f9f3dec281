import SwiftEP

/// Records a dispatch and the combine of what it brings, twice, and runs the two graphs in turn, `count` times in all, on
/// one buffer: each time with other tokens and other routing, and compared with the oracle.
///
/// - Parameter job: with weighted top-k routing; its sizing and its way to wait are those of graphs.
/// - Throws: `ConformanceFailure`, `EPError`.
package func checkReplays(_ job: Job, count: Int, on fabric: any Fabric) throws {
  var job = job
  (job.sizing, job.isAsynchronous) = (.worstCase, true)
  let checked = job
  try fabric.run(plan: job.makePlan(), workers: job.workers, timeout: job.timeout) { buffer in
    try Replays(checked, buffer).run(count)
  }
}

/// One rank's part.
private struct Replays {
  let job: Job
  let buffer: ExpertBuffer
  /// What each of a few steps sends, what must arrive, and what calls that are not recorded sum.
  let tokens: [RankTokens]
  let expected: [ExpectedDispatch]
  let sums: [[UInt8]]

  init(_ job: Job, _ buffer: ExpertBuffer) throws {
    (self.job, self.buffer) = (job, buffer)
    let steps = (0..<5).map { job.reseeded($0) }
    tokens = steps.map { $0.makeTokens(rank: buffer.rank) }
    expected = steps.map { step in
      Oracle(step, tokens: (0..<step.rankCount).map { step.makeTokens(rank: $0) }).dispatched(to: buffer.rank)
    }
    sums = try tokens.map { tokens in
      let tokens = try tokens.reachable(from: buffer)
      var options = job.dispatchOptions
      options.receivesLater = false
      let dispatched = try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
      let combined = try buffer.combine(dispatched.rows, with: dispatched.handle, options: Self.combineOptions)
      try combined.event.wait()
      return combined.tokens.withUnsafeBytes { Array($0) }
    }
  }

  private static var combineOptions: CombineOptions {
    var options = CombineOptions()
    options.isAsynchronous = true
    return options
  }

  func run(_ count: Int) throws {
    let inputs = [try GraphInputs(tokens[0], on: buffer), try GraphInputs(tokens[0], on: buffer)]
    var combineOptions = Self.combineOptions
    combineOptions.waiting = job.waiting(ofRank: buffer.rank)
    combineOptions.receivesLater = job.receivesLater
    let recorded = try inputs.map {
      try $0.record(job.dispatchOptions(ofRank: buffer.rank), combineOptions, on: buffer)
    }
    for run in 0..<count {
      let (step, turn) = (run % tokens.count, run % 2)
      inputs[turn].set(tokens[step])
      try recorded[turn].graph.launch().wait()
      let (dispatched, combined) = recorded[turn].result
      try require(difference(dispatched, from: expected[step], comparingPaddingRows: false), run)
      try require(difference(combined.tokens, from: sums[step], named: "tokens"), run)
    }
  }

  private func require(_ difference: String?, _ run: Int) throws {
    if let difference {
      throw ConformanceFailure(job: job, rank: buffer.rank, step: "run \(run) of a graph", what: difference)
    }
  }
}

/// Tensors that a graph's dispatch is given, whose contents change from run to run.
package struct GraphInputs {
  package let x: Tensor
  package let indices: Tensor
  package let weights: Tensor

  /// - Parameter tokens: with weighted top-k routing.
  package init(_ tokens: RankTokens, on buffer: ExpertBuffer) throws(EPError) {
    guard case .topK(let indices, let weights?) = tokens.routing else {
      preconditionFailure("no weighted top-k routing")
    }
    x = try buffer.makeTensor(zeros: tokens.x.shape, tokens.x.dtype)
    self.indices = try buffer.makeTensor(zeros: indices.shape, indices.dtype)
    self.weights = try buffer.makeTensor(zeros: weights.shape, weights.dtype)
    set(tokens)
  }

  package var routing: Routing { .topK(indices: indices, weights: weights) }

  /// Of the same shape.
  package func set(_ tokens: RankTokens) {
    guard case .topK(let indices, let weights?) = tokens.routing else {
      preconditionFailure("no weighted top-k routing")
    }
    x.copyBeginning(from: tokens.x)
    self.indices.copyBeginning(from: indices)
    self.weights.copyBeginning(from: weights)
  }

  /// A dispatch of them, and the combine of what it brings; received, where the options say so.
  package func record(
    _ options: DispatchOptions, _ combineOptions: CombineOptions, on buffer: ExpertBuffer
  ) throws(EPError) -> (graph: OperationGraph, result: (DispatchResult, CombineResult)) {
    try buffer.record { () throws(EPError) in
      let dispatched = try buffer.dispatch(x, to: routing, options: options)
      if options.receivesLater { try dispatched.receive() }
      let combined = try buffer.combine(dispatched.rows, with: dispatched.handle, options: combineOptions)
      if combineOptions.receivesLater { try combined.receive() }
      return (dispatched, combined)
    }
  }
}
