import Conformance
import Foundation
import SwiftEP

/// Experts of one token, the best first, with weights that sum to one.
struct GateChoice: Equatable {
  var experts: [Int64]
  var weights: [Float]

  /// The `topK` best by score; among equals the lower expert. Weights are the softmax of the scores over the chosen,
  /// which is the softmax over all, renormalised.
  init(scores: [Double], topK: Int) {
    var best: [Int] = []
    for (expert, score) in scores.enumerated() {
      if best.count == topK && score <= scores[best[topK - 1]] { continue }
      if best.count == topK { best.removeLast() }
      var place = best.count
      while place > 0 && scores[best[place - 1]] < score { place -= 1 }
      best.insert(expert, at: place)
    }
    let exponentials = best.map { exp(scores[$0] - scores[best[0]]) }
    let sum = exponentials.reduce(0, +)
    experts = best.map { Int64($0) }
    weights = exponentials.map { Float($0 / sum) }
  }

  /// Recorded experts, whose weights nobody recorded: equal ones.
  init(experts: [Int64]) {
    self.experts = experts
    let count = experts.count { $0 >= 0 }
    weights = experts.map { $0 < 0 ? 0 : 1 / Float(count) }
  }
}

/// Routing without rows: expert popularity follows Zipf's law, `rank^-skew`, over experts in seeded order.
struct RandomGate {
  private let seed: UInt64
  private let topK: Int
  private let logPopularity: [Double]

  init(expertCount: Int, topK: Int, skew: Double, seed: UInt64) {
    self.seed = seed
    self.topK = topK
    var random = SplitMix64(seed: seed, Stream.popularity.rawValue)
    var values = (1...expertCount).map { -skew * log(Double($0)) }
    values.shuffle(using: &random)
    logPopularity = values
  }

  /// Draws without replacement: the top k of log-popularity plus Gumbel noise.
  func route(token: Int) -> GateChoice {
    var random = SplitMix64(seed: seed, Stream.routing.rawValue, token)
    let scores = logPopularity.map { $0 - log(-log(max(0x1p-54, random.fraction()))) }
    return GateChoice(scores: scores, topK: topK)
  }
}

/// A seeded linear gate over some channels of a token's row: softmax, top k.
struct LinearGate {
  let channelCount: Int
  private let topK: Int
  /// `[experts, channels]`.
  private let matrix: [[Float]]

  init(hidden: Int, expertCount: Int, topK: Int, seed: UInt64) {
    self.topK = topK
    let channelCount = min(64, hidden)
    self.channelCount = channelCount
    var random = SplitMix64(seed: seed, Stream.gate.rawValue)
    let scale = 4 / Float(channelCount).squareRoot()
    matrix = (0..<expertCount).map { _ in (0..<channelCount).map { _ in scale * Float(2 * random.fraction() - 1) } }
  }

  func route(row: UnsafeRawBufferPointer, dtype: DType) -> GateChoice {
    let channels = (0..<channelCount).map { dtype.channel($0, ofRow: row) }
    let scores = matrix.map { weights in Double(zip(weights, channels).reduce(0) { $0 + $1.0 * $1.1 }) }
    return GateChoice(scores: scores, topK: topK)
  }
}

/// The streams of random numbers that a workload draws from.
enum Stream: Int {
  case rows, routing, popularity, gate
}

extension DType {
  func channel(_ index: Int, ofRow row: UnsafeRawBufferPointer) -> Float {
    switch self {
    case .bf16: Float(bitPattern: UInt32(row.load(fromByteOffset: 2 * index, as: UInt16.self)) << 16)
    case .fp16: Float(row.load(fromByteOffset: 2 * index, as: Float16.self))
    case .fp32: row.load(fromByteOffset: 4 * index, as: Float.self)
    default: Float(row[index]) / 128 - 1
    }
  }
}
