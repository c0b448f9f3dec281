import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// The gradient of dispatch is combine, and the reverse: a small mixture of experts, forward and backward through the
  /// library, against finite differences of the same mixture written densely.
  @Suite struct GradientTests {
    /// Expert `e` multiplies channel `c` by `factor(e, c)`; the loss is the sum of `g * output`.
    private struct Mixture: Sendable {
      let job: Job
      /// By rank: x `[tokens, hidden]`, top-k experts and weights `[tokens, topK]`, and `g`, the loss's gradient by
      /// output.
      let x: [[Float]]
      let experts: [[Int]]
      let weights: [[Float]]
      let lossGradients: [[Float]]

      init(_ job: Job) {
        self.job = job
        var random = SplitMix64(seed: job.seed, 100)
        let routings = (0..<job.rankCount).map { job.makeTokens(rank: $0).routing }
        experts = routings.map { routing in
          guard case .topK(let indices, _) = routing else { preconditionFailure("routed by top-k") }
          return try! indices.elements(Int.self)
        }
        func values(_ counts: [Int]) -> [[Float]] {
          counts.map { count in (0..<count).map { _ in Float(random.fraction()) * 2 - 1 } }
        }
        let rowCounts = job.tokensPerRank.map { $0 * job.hidden }
        x = values(rowCounts)
        weights = values(experts.map(\.count))
        lossGradients = values(rowCounts)
      }

      func factor(_ expert: Int, _ channel: Int) -> Float { Float(expert + 1) / 4 + Float(channel % 5) / 8 }

      /// The loss of one rank's token, in Double.
      func loss(rank: Int, token: Int, x: [Double], weights: [Double]) -> Double {
        var loss = 0.0
        for slot in 0..<job.topK {
          let expert = experts[rank][token * job.topK + slot]
          if expert < 0 { continue }
          for channel in 0..<job.hidden {
            let gradient = Double(lossGradients[rank][token * job.hidden + channel])
            loss += weights[slot] * Double(factor(expert, channel)) * x[channel] * gradient
          }
        }
        return loss
      }

      /// Gradients of a token's loss by its x and by its weights, from central differences: exact for a bilinear loss,
      /// up to rounding.
      func differences(rank: Int, token: Int) -> (x: [Double], weights: [Double]) {
        let x = self.x[rank][token * job.hidden..<(token + 1) * job.hidden].map { Double($0) }
        let weights = self.weights[rank][token * job.topK..<(token + 1) * job.topK].map { Double($0) }
        let byX = x.indices.map { channel in
          let losses = [0.5, -0.5].map { step in
            var moved = x
            moved[channel] += step
            return loss(rank: rank, token: token, x: moved, weights: weights)
          }
          return losses[0] - losses[1]
        }
        let byWeights = weights.indices.map { slot in
          let losses = [0.5, -0.5].map { step in
            var moved = weights
            moved[slot] += step
            return loss(rank: rank, token: token, x: x, weights: moved)
          }
          return losses[0] - losses[1]
        }
        return (byX, byWeights)
      }
    }

    /// One rank's gradients, and its outputs.
    fileprivate struct Gradients: Codable, Sendable {
      let output: [Float]
      let x: [Float]
      let weights: [Float]
    }

    @Test(arguments: RowLayout.allCases, [UInt64(1), 2])
    func backwardOfTheMixture(_ layout: RowLayout, seed: UInt64) throws {
      let job = Job(rankCount: 3, tokenCount: 5, hidden: 12, topK: 3, expertCount: 7).with {
        ($0.layout, $0.dtype, $0.combineDType, $0.seed) = (layout, .fp32, .fp32, seed)
        ($0.missingProbability, $0.expertAlignment, $0.tokensPerRank) = (0.2, layout == .byExpert ? 4 : 1, [5, 0, 3])
      }
      let mixture = Mixture(job)
      let found = try onEachRank(try job.makePlan()) { buffer in
        layout == .bySource ? try Self.bySource(mixture, buffer) : try Self.byExpert(mixture, buffer)
      }
      for rank in 0..<job.rankCount {
        for token in 0..<job.tokensPerRank[rank] {
          let (byX, byWeights) = mixture.differences(rank: rank, token: token)
          for channel in 0..<job.hidden {
            let gradient = Double(found[rank].x[token * job.hidden + channel])
            #expect(abs(gradient - byX[channel]) < 1e-4, "rank \(rank), token \(token), channel \(channel)")
          }
          for slot in 0..<job.topK {
            let gradient = Double(found[rank].weights[token * job.topK + slot])
            #expect(abs(gradient - byWeights[slot]) < 1e-4, "rank \(rank), token \(token), slot \(slot)")
          }
          // The loss is linear in x, so its gradient by x gives back its value; and so does the output.
          let x = mixture.x[rank][token * job.hidden..<(token + 1) * job.hidden].map { Double($0) }
          let value = zip(x, byX).reduce(0) { $0 + $1.0 * $1.1 }
          let output = (0..<job.hidden).reduce(0.0) { sum, channel in
            let index = token * job.hidden + channel
            return sum + Double(found[rank].output[index] * mixture.lossGradients[rank][index])
          }
          #expect(abs(value - output) < 1e-4)
        }
      }
    }

    private static func inputs(_ mixture: Mixture, _ buffer: TestBuffer) -> (x: Tensor, g: Tensor, routing: Routing) {
      let (job, rank) = (mixture.job, buffer.rank)
      let shape = [job.tokensPerRank[rank], job.hidden]
      let slots = [job.tokensPerRank[rank], job.topK]
      return (
        try! Tensor(copying: mixture.x[rank], shape: shape, .fp32),
        try! Tensor(copying: mixture.lossGradients[rank], shape: shape, .fp32),
        .topK(
          indices: try! Tensor(copying: mixture.experts[rank], shape: slots, .int64),
          weights: try! Tensor(copying: mixture.weights[rank], shape: slots, .fp32))
      )
    }

    private static func globalExperts(_ buffer: TestBuffer, _ mixture: Mixture) -> [Int] {
      mixture.job.owners.indices.filter { mixture.job.owners[$0] == buffer.rank }
    }

    /// Weights are applied at the experts; their gradients travel back beside the rows'.
    private static func bySource(_ mixture: Mixture, _ buffer: TestBuffer) throws -> Gradients {
      let (job, experts) = (mixture.job, globalExperts(buffer, mixture))
      let (x, g, routing) = inputs(mixture, buffer)
      let forward = try buffer.dispatch(x, to: routing, options: job.dispatchOptions)
      let rows = try! forward.rows.elements(Float.self)
      let locals = try! forward.topKIndices!.elements(Int.self)
      let weights = try! forward.topKWeights!.elements(Float.self)
      let gradient = try buffer.dispatch(g, to: .cached(forward.handle), options: job.dispatchOptions)
      let rowGradients = try! gradient.rows.elements(Float.self)

      var outputs = [Float](repeating: 0, count: rows.count)
      var byRows = outputs
      var byWeights = [Float](repeating: 0, count: weights.count)
      for cell in locals.indices where locals[cell] >= 0 {
        for channel in 0..<job.hidden {
          let index = cell / job.topK * job.hidden + channel
          let factor = mixture.factor(experts[locals[cell]], channel)
          outputs[index] += weights[cell] * factor * rows[index]
          byRows[index] += weights[cell] * factor * rowGradients[index]
          byWeights[cell] += factor * rows[index] * rowGradients[index]
        }
      }
      let shape = forward.rows.shape
      let output = try buffer.combine(try! Tensor(copying: outputs, shape: shape, .fp32), with: forward.handle)
      var options = CombineOptions()
      options.topKWeights = try! Tensor(copying: byWeights, shape: [shape[0], job.topK], .fp32)
      let backward = try buffer.combine(
        try! Tensor(copying: byRows, shape: shape, .fp32), with: forward.handle, options: options)
      return Gradients(
        output: try! output.tokens.elements(Float.self), x: try! backward.tokens.elements(Float.self),
        weights: try! backward.topKWeights!.elements(Float.self))
    }

    /// Weights are applied as rows are summed; backward they are applied at the experts.
    private static func byExpert(_ mixture: Mixture, _ buffer: TestBuffer) throws -> Gradients {
      let (job, experts) = (mixture.job, globalExperts(buffer, mixture))
      let (x, g, routing) = inputs(mixture, buffer)
      guard case .topK(_, let rowWeights) = routing else { preconditionFailure("routed by top-k") }
      let forward = try buffer.dispatch(x, to: routing, options: job.dispatchOptions)
      let rows = try! forward.rows.elements(Float.self)
      let locals = try! forward.topKIndices!.elements(Int.self)
      let weights = try! forward.topKWeights!.elements(Float.self)
      let gradient = try buffer.dispatch(g, to: .cached(forward.handle), options: job.dispatchOptions)
      let rowGradients = try! gradient.rows.elements(Float.self)

      var outputs = [Float](repeating: 0, count: rows.count)
      var byRows = outputs
      var byWeights = [Float](repeating: 0, count: weights.count)
      let counts = try! forward.unalignedTokensPerExpert.elements(Int32.self)
      let groupSize = job.layout == .grouped ? forward.rows.shape[1] : 0
      let hasCome = { (row: Int) in
        groupSize == 0 ? locals[row] >= 0 : row % groupSize < Int(counts[row / groupSize])
      }
      for row in locals.indices where hasCome(row) {
        for channel in 0..<job.hidden {
          let index = row * job.hidden + channel
          let factor = mixture.factor(experts[locals[row]], channel)
          outputs[index] = factor * rows[index]
          byRows[index] = weights[row] * factor * rowGradients[index]
          byWeights[row] += outputs[index] * rowGradients[index]
        }
      }
      let shape = forward.rows.shape
      var options = CombineOptions()
      options.rowWeights = rowWeights
      let output = try buffer.combine(
        try! Tensor(copying: outputs, shape: shape, .fp32), with: forward.handle, options: options)
      options.rowWeights = nil
      options.topKWeights = try! Tensor(copying: byWeights, shape: shape.dropLast() + [1], .fp32)
      let backward = try buffer.combine(
        try! Tensor(copying: byRows, shape: shape, .fp32), with: forward.handle, options: options)
      return Gradients(
        output: try! output.tokens.elements(Float.self), x: try! backward.tokens.elements(Float.self),
        weights: try! backward.topKWeights!.elements(Float.self))
    }
  }
}
