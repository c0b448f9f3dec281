import Conformance
import SwiftEP

/// The tokens of all ranks, and where they go.
struct Workload: Sendable {
  let tokens: [RankTokens]
  /// Each rank's weights, `[tokens, topK]`.
  let weights: [Tensor]
  /// Rows that rank `source` sends to rank `destination`: `[source][destination]`.
  let sentRowCounts: [[Int]]

  /// - Parameters:
  ///   - tokenCount: tokens of all ranks; they are divided over the ranks in order, the sizes differing by one at most.
  ///   - fillRow: writes a token's row.
  ///   - route: a token's experts.
  init(
    _ job: JobSpec, tokenCount: Int, fillRow: (_ token: Int, _ row: UnsafeMutableRawBufferPointer) -> Void,
    route: (_ token: Int) -> GateChoice
  ) throws(EPError) {
    let owners = job.shape.owners
    var tokens: [RankTokens] = []
    var weights: [Tensor] = []
    var sentRowCounts: [[Int]] = []
    for rank in 0..<job.rankCount {
      let share = tokenCount * rank / job.rankCount..<tokenCount * (rank + 1) / job.rankCount
      let x = try Tensor(zeros: [share.count, job.hidden], job.rowType.inputDType)
      x.withUnsafeMutableBytes { bytes in
        let rowByteCount = job.hidden * x.dtype.byteCount
        for (index, token) in share.enumerated() {
          fillRow(
            token, UnsafeMutableRawBufferPointer(rebasing: bytes[index * rowByteCount..<(index + 1) * rowByteCount]))
        }
      }
      let choices = share.map(route)
      let shape = [share.count, job.topK]
      let indices = try Tensor(copying: choices.flatMap(\.experts), shape: shape, .int64)
      weights.append(try Tensor(copying: choices.flatMap(\.weights), shape: shape, .fp32))
      tokens.append(RankTokens(x: x, routing: .topK(indices: indices, weights: weights[rank])))
      sentRowCounts.append(Self.countRows(choices, owners: owners, job))
    }
    self.tokens = tokens
    self.weights = weights
    self.sentRowCounts = sentRowCounts
  }

  private static func countRows(_ choices: [GateChoice], owners: [Int32], _ job: JobSpec) -> [Int] {
    var counts = [Int](repeating: 0, count: job.rankCount)
    for choice in choices {
      let ranks = choice.experts.filter { $0 >= 0 }.map { Int(owners[Int($0)]) }
      for rank in job.layout == .bySource ? Array(Set(ranks)) : ranks { counts[rank] += 1 }
    }
    return counts
  }

  var receivedRowCounts: [Int] {
    sentRowCounts[0].indices.map { destination in sentRowCounts.reduce(0) { $0 + $1[destination] } }
  }

  /// Tokens of the rank that has the most.
  var tokensPerRankMax: Int { tokens.map { $0.x.shape[0] }.max() ?? 0 }
}

extension Workload {
  /// Random rows to random experts.
  static func random(_ job: JobSpec, skew: Double, seed: UInt64) throws(EPError) -> Workload {
    let gate = RandomGate(expertCount: job.expertCount, topK: job.topK, skew: skew, seed: seed)
    return try Workload(
      job, tokenCount: job.rankCount * job.tokensPerRank,
      fillRow: { fillRandomRow($1, job.rowType.inputDType, seed: seed, token: $0) }, route: gate.route)
  }
}

/// Finite numbers of both signs, of magnitude 2^-7 to 2 (FP16: 2^-3 to 2); bytes: any.
func fillRandomRow(_ row: UnsafeMutableRawBufferPointer, _ dtype: DType, seed: UInt64, token: Int) {
  var random = SplitMix64(seed: seed, Stream.rows.rawValue, token)
  // Keeps sign, mantissa and the lowest bits of the exponent, and adds the smallest exponent.
  let (kept, added): (UInt64, UInt64)
  switch dtype {
  case .bf16: (kept, added) = (0x83ff_83ff_83ff_83ff, 0x3c00_3c00_3c00_3c00)
  case .fp16: (kept, added) = (0x8fff_8fff_8fff_8fff, 0x3000_3000_3000_3000)
  case .fp32: (kept, added) = (0x83ff_ffff_83ff_ffff, 0x3c00_0000_3c00_0000)
  default: (kept, added) = (.max, 0)
  }
  var offset = 0
  while offset < row.count {
    // Rows are multiples of 16 bytes.
    row.storeBytes(of: random.next() & kept &+ added, toByteOffset: offset, as: UInt64.self)
    offset += 8
  }
}
