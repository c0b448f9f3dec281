import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// What compares results with the oracle's finds each kind of wrong result.
  @Suite struct DifferenceTests {
    enum Part: String, CaseIterable, Sendable {
      case rows, scales, sidecars, origins, topKIndices, topKWeights, rowCount, tokensPerSource, tokensPerPair,
        tokensPerExpert

      func tensor(of result: DispatchResult) -> Tensor {
        switch self {
        case .rows: result.rows
        case .scales: result.scales!
        case .sidecars: result.sidecars[0]
        case .origins: result.origins
        case .topKIndices: result.topKIndices!
        case .topKWeights: result.topKWeights!
        case .rowCount: result.rowCount
        case .tokensPerSource: result.tokensPerSource
        case .tokensPerPair: result.tokensPerPair
        case .tokensPerExpert: result.tokensPerExpert
        }
      }
    }

    @Test(arguments: Part.allCases, [RowLayout.bySource, .byExpert])
    func aChangedByteIsNamed(_ part: Part, _ layout: RowLayout) throws {
      var job = smallJob()
      (job.layout, job.quantization, job.sidecarByteCounts, job.isWeighted) = (layout, .float, [8], true)
      (job.dtype, job.hidden) = (.bf16, 256)
      let wanted = job
      let tokens = (0..<wanted.rankCount).map { wanted.makeTokens(rank: $0) }
      let oracle = wanted.makeOracle()
      try fabric.test(plan: try wanted.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        let rank = buffer.rank
        var options = DispatchOptions()
        (options.layout, options.quantization) = (layout, wanted.quantization)
        options.expertAlignment = wanted.expertAlignment
        let result = try buffer.dispatch(
          tokens[rank].x, sidecars: tokens[rank].sidecars, to: tokens[rank].routing, options: options)
        let expected = oracle.dispatched(to: rank)
        let before = difference(result, from: expected, comparingPaddingRows: false)
        try require(before == nil, "before: \(before ?? "")")
        part.tensor(of: result).withUnsafeMutableBytes { $0[0] ^= 1 }
        let found = difference(result, from: expected, comparingPaddingRows: false)
        try require(found?.contains(part.rawValue) == true, "\(part): \(found ?? "nothing")")
      }
    }

    @Test func sumsAreCompared() throws {
      let tensor = try Tensor(copying: [1, 2, 3, 4] as [Float], shape: [2, 2], .fp32)
      #expect(difference(tensor, from: tensor.bytes, named: "sums") == nil)
      var wrong = tensor.bytes
      wrong[9] ^= 4
      #expect(difference(tensor, from: wrong, named: "sums")?.contains("sums: row 1") == true)
      #expect(difference(tensor, from: Array(wrong.dropLast()), named: "sums") != nil)
    }

    /// Ranks that cannot be had make `verify` fail with the job.
    @Test func verifyReportsItsJob() {
      struct NoRanks: Fabric {
        func values<Value: Codable & Sendable>(
          rankCount: Int, timeout: Duration, _ body: @escaping @Sendable (Communicator) throws -> Value
        ) throws -> [Value] { throw EPError.bufferClosed }
      }
      let failure = #expect(throws: ConformanceFailure.self) {
        _ = try verify(seconds: 5, seed: 77, on: NoRanks()) { _, _ in }
      }
      #expect(failure?.job.seed == 77)
    }

    /// Contiguous and equal, the first ranks having one more.
    @Test func expertsWithoutAMap() throws {
      let shape = JobShape(rankCount: 3, tokensPerRankMax: 1, hidden: 8, topK: 1, expertCount: 7)
      #expect(shape.owners == [0, 0, 0, 1, 1, 2, 2])
      #expect(contiguousOwners(expertCount: 7, rankCount: 3) == [0, 0, 0, 1, 1, 2, 2])
      #expect(contiguousOwners(expertCount: 2, rankCount: 3) == [0, 1])
    }
  }
}
