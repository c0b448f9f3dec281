import Conformance
import Foundation
import SwiftEP
import Testing

extension ConformanceTests {
  /// One dimension of a job at a time, then pairs that meet in the protocol.
  @Suite struct MatrixTests {
    private func run(_ job: Job) throws { try check(job, on: fabric) }

    @Test(arguments: [8, 16, 24, 72, 128, 136, 2880, 3584, 7168, 8200], RowLayout.allCases)
    func hidden(_ hidden: Int, _ layout: RowLayout) throws {
      try run(
        Job(rankCount: 2, tokenCount: 7, hidden: hidden, topK: 3, expertCount: 5).with { $0.layout = layout })
    }

    @Test(arguments: [DType.bf16, .fp16, .fp32, .fp8E4M3, .uint8], RowLayout.allCases)
    func dtypes(_ dtype: DType, _ layout: RowLayout) throws {
      try run(
        smallJob().with {
          ($0.dtype, $0.layout) = (dtype, layout)
          $0.combineDType = [.fp16, .fp32].contains(dtype) ? dtype : .bf16
          if dtype == .fp8E4M3 { $0.scales = .float }
        })
    }

    @Test(arguments: ScaleFormat.ofRows(.fp8E4M3), [16, 128, 144, 640, 2880])
    func quantization(_ format: ScaleFormat, hidden: Int) throws {
      for layout in RowLayout.allCases {
        try run(
          smallJob().with {
            ($0.quantization, $0.hidden, $0.layout, $0.workers) = (format, hidden, layout, 2)
            ($0.expertAlignment, $0.zeroesPadding) = (4, true)
          })
      }
    }

    /// With scales that saturate, are as precise as they can be, or are zero.
    @Test(arguments: [Float(0x1p118), 1344, 1, 1e-3, 0x1p-118], [64, 192, 2880])
    func nvfp4(globalScale: Float, hidden: Int) throws {
      for layout in RowLayout.allCases {
        try run(
          smallJob().with {
            ($0.quantization, $0.globalScale, $0.hidden, $0.layout) = (.nvfp4, globalScale, hidden, layout)
            ($0.workers, $0.expertAlignment, $0.zeroesPadding) = (2, 4, true)
          })
      }
    }

    @Test(arguments: RowLayout.allCases, [false, true])
    func nvfp4OfTheWorstCase(_ layout: RowLayout, receivesLater: Bool) throws {
      try run(
        smallJob().with {
          ($0.quantization, $0.globalScale, $0.layout, $0.cachedRepeats) = (.nvfp4, 700, layout, 3)
          ($0.sizing, $0.receivesLater) = (.worstCase, receivesLater)
        })
    }

    @Test(arguments: ScaleFormat.allCases, [64, 640, 2880])
    func scalesInColumns(_ format: ScaleFormat, hidden: Int) throws {
      try run(
        smallJob().with {
          ($0.quantization, $0.hidden, $0.layout, $0.scaleOrder) = (format, hidden, .grouped, .columnMajor)
          ($0.workers, $0.tokensPerRank) = (2, [7, 0, 12])
        })
      try run(
        smallJob().with {
          ($0.quantization, $0.layout, $0.scaleOrder) = (format, .grouped, .columnMajor)
          $0.tokensPerRank = [0, 0, 0]
        })
    }

    @Test(arguments: ScaleFormat.ofRows(.fp8E4M3), RowLayout.allCases)
    func scalesGivenInColumns(_ format: ScaleFormat, _ layout: RowLayout) throws {
      // Rows of 1, 5, 23, 16 and 32 scales, or of a quarter of that: with whole vectors, or without.
      for (hidden, sizing) in [
        (64, Sizing.exact), (640, .worstCase), (2880, .exact), (2048, .worstCase), (4096, .exact),
      ] {
        try run(
          smallJob().with {
            ($0.dtype, $0.scales, $0.givenScaleOrder) = (.fp8E4M3, format, .columnMajor)
            ($0.layout, $0.sizing, $0.hidden, $0.cachedRepeats) = (layout, sizing, hidden, 2)
            ($0.workers, $0.tokensPerRank, $0.seed) = (2, [16, 0, 13], UInt64(hidden) / 64)
          })
      }
    }

    /// Those that are copied beside rows, and those that are not.
    @Test(arguments: [[8], [224, 8, 12], [260, 256], [264]], RowLayout.allCases)
    func sidecars(_ byteCounts: [Int], _ layout: RowLayout) throws {
      try run(
        smallJob().with {
          ($0.sidecarByteCounts, $0.layout, $0.workers, $0.hidden) = (byteCounts, layout, 2, 1040)
        })
      try run(
        smallJob().with {
          ($0.sidecarByteCounts, $0.layout, $0.quantization, $0.hidden) = (byteCounts, layout, .float, 128)
        })
    }

    /// Combines whose rows travel as LogFMT, from wherever they lie, in one call or two.
    @Test(arguments: RowLayout.allCases, [128, 640])
    func logFMT(_ layout: RowLayout, hidden: Int) throws {
      for receivesLater in [false, true] {
        try run(
          smallJob().with {
            ($0.layout, $0.hidden, $0.combineEncoding, $0.receivesLater) = (layout, hidden, .logFMT, receivesLater)
            ($0.sizing, $0.workers, $0.biasCount, $0.expertAlignment) = (.worstCase, 2, 1, 4)
            ($0.usesRowWeights, $0.combinesTopKWeights) = (layout.hasRowPerExpert, true)
          })
      }
      try run(
        smallJob().with {
          ($0.layout, $0.hidden, $0.combineEncoding, $0.tokensPerStep) = (layout, hidden, .logFMT, 5)
        })
    }

    /// Of values of a normal distribution: of one, and of all together, as a part of their root mean square.
    @Test func errorOfLogFMT() {
      var random = SplitMix64(seed: 1)
      let row = (0..<128 * 1000).map { _ in
        let (radius, angle) = (sqrt(-2 * log(1 - random.fraction())), 2 * Double.pi * random.fraction())
        return Float(bitPattern: Float(radius * cos(angle)).bitPattern & 0xffff_0000)
      }
      let errors = zip(row, logFMTRow(row)).map { Double($1) - Double($0) }
      let largest = zip(row, errors).map { $0 == 0 ? 0 : abs($1 / Double($0)) }.max()!
      let all = sqrt(errors.reduce(0) { $0 + $1 * $1 } / row.reduce(0) { $0 + Double($1) * Double($1) })
      #expect((0.005...0.011).contains(largest))
      #expect((0.002...0.004).contains(all))
    }

    @Test(arguments: ScaleFormat.ofRows(.fp8E4M3), [16, 528, 2880])
    func quantizedInput(_ format: ScaleFormat, hidden: Int) throws {
      try run(smallJob().with { ($0.dtype, $0.scales, $0.hidden) = (.fp8E4M3, format, hidden) })
    }

    @Test(arguments: [1, 2, 8, 128], [true, false])
    func alignment(_ alignment: Int, zeroesPadding: Bool) throws {
      for layout in RowLayout.allCases {
        try run(
          smallJob().with {
            ($0.layout, $0.expertAlignment, $0.zeroesPadding) = (layout, alignment, zeroesPadding)
            $0.sidecarByteCounts = [4, 12]
          })
      }
    }

    @Test(arguments: [1, 2, 3, 4, 8], [1, 2, 8, 32])
    func ranksAndTopK(rankCount: Int, topK: Int) throws {
      for layout in RowLayout.allCases {
        try run(
          Job(rankCount: rankCount, tokenCount: 9, hidden: 32, topK: topK, expertCount: max(40, topK)).with {
            ($0.layout, $0.indexDType, $0.combinesTopKWeights) = (layout, topK % 2 == 0 ? .int32 : .int64, true)
            $0.usesRowWeights = layout.hasRowPerExpert
          })
      }
    }

    @Test(arguments: [0.5, 1, 2, 4])
    func skew(_ skew: Double) throws {
      try run(
        Job(rankCount: 4, tokenCount: 40, hidden: 64, topK: 4, expertCount: 32).with {
          ($0.skew, $0.layout) = (skew, .byExpert)
        })
    }

    @Test(arguments: [[0, 0, 0], [5, 0, 0], [0, 0, 5], [0, 7, 1], [1, 1, 1], [100, 1, 3]], RowLayout.allCases)
    func tokenCounts(_ counts: [Int], _ layout: RowLayout) throws {
      for sizing in [Sizing.exact, .worstCase] {
        try run(smallJob().with { ($0.tokensPerRank, $0.layout, $0.sizing) = (counts, layout, sizing) })
      }
    }

    @Test(arguments: [1, 2, 3, 5], [1, 2, 7, 64])
    func workers(_ workers: Int, tokenCount: Int) throws {
      try run(
        Job(rankCount: 2, tokenCount: tokenCount, hidden: 4104, topK: 3, expertCount: 6).with {
          ($0.workers, $0.layout, $0.expertAlignment) = (workers, .byExpert, 4)
        })
      try run(
        Job(rankCount: 2, tokenCount: tokenCount, hidden: 4104, topK: 3, expertCount: 6).with {
          $0.workers = workers
        })
    }

    @Test(arguments: RowLayout.allCases, [[0, 0, 0, 0, 2, 2], [1, 1, 1, 1, 1, 1], [2, 0, 1, 0, 2, 0]])
    func expertOwners(_ layout: RowLayout, _ owners: [Int]) throws {
      for sizing in [Sizing.exact, .worstCase] {
        try run(smallJob().with { ($0.layout, $0.expertOwners, $0.sizing) = (layout, owners, sizing) })
      }
    }

    @Test(arguments: RowLayout.allCases, [Sizing.exact, .worstCase])
    func tokensWithoutExperts(_ layout: RowLayout, _ sizing: Sizing) throws {
      for probability in [0.5, 1] {
        try run(
          smallJob().with {
            ($0.layout, $0.sizing, $0.missingProbability) = (layout, sizing, probability)
            ($0.combinesTopKWeights, $0.biasCount) = (true, 1)
          })
      }
    }

    @Test(arguments: [1, 2, 3, 8])
    func tables(rankCount: Int) throws {
      for sizing in [Sizing.exact, .worstCase] {
        try run(
          smallJob(rankCount: rankCount).with {
            ($0.usesTable, $0.isWeighted, $0.sizing, $0.sidecarByteCounts) = (true, false, sizing, [8])
          })
      }
    }

    @Test(arguments: [DType.bf16, .fp16, .fp32], [0, 1, 2])
    func combines(_ dtype: DType, biasCount: Int) throws {
      for layout in RowLayout.allCases {
        try run(
          smallJob().with {
            ($0.layout, $0.combineDType, $0.dtype, $0.biasCount) = (layout, dtype, dtype, biasCount)
            ($0.combinesTopKWeights, $0.givesOutput) = (true, biasCount == 1)
            ($0.usesRowWeights, $0.hidden) = (layout.hasRowPerExpert, 104)
          })
      }
    }

    /// Rows outside the arena, in steps of few tokens: their memory is used again many times, or there is room for all.
    @Test(arguments: [1, 2, 3, 8], [1, 3, 16, 200])
    func combinesInSteps(rankCount: Int, tokensPerStep: Int) throws {
      for layout in RowLayout.allCases {
        try run(
          Job(
            rankCount: rankCount, tokensPerRank: (0..<rankCount).map { [90, 0, 41][$0 % 3] }, hidden: 64, topK: 3,
            expertCount: 12
          ).with {
            ($0.layout, $0.tokensPerStep, $0.workers, $0.combines) = (layout, tokensPerStep, 2, [.memory, .memory])
            ($0.combinesTopKWeights, $0.givesOutput, $0.biasCount) = (true, tokensPerStep == 3, 1)
            ($0.skew, $0.sizing) = (0.7, tokensPerStep == 1 ? .worstCase : .exact)
          })
      }
    }

    /// What is combined need not look like what was dispatched.
    @Test func otherRowsAreCombined() throws {
      try run(smallJob().with { ($0.combineHidden, $0.combineDType, $0.quantization) = (20, .fp32, .ue8m0) })
    }

    /// Launched in parts by some ranks or all, and whole by others.
    @Test(arguments: RowLayout.allCases, [Set(0..<3), [0], [1, 2]])
    func streamsWait(_ layout: RowLayout, ranks: Set<Int>) throws {
      for (sizing, isAsynchronous) in [(Sizing.exact, false), (.exact, true), (.worstCase, false), (.worstCase, true)] {
        try run(
          smallJob().with {
            ($0.layout, $0.sizing, $0.isAsynchronous, $0.cachedRepeats) = (layout, sizing, isAsynchronous, 2)
            ($0.ranksOfWaitingStreams, $0.workers, $0.combinesTopKWeights) = (ranks, 2, true)
          })
      }
    }

    @Test(arguments: RowLayout.allCases, [Sizing.exact, .worstCase])
    func asynchronousCalls(_ layout: RowLayout, _ sizing: Sizing) throws {
      try run(
        smallJob().with {
          ($0.layout, $0.sizing, $0.isAsynchronous, $0.cachedRepeats, $0.workers) = (layout, sizing, true, 4, 2)
        })
    }

    /// Rows so many that stores stream around the caches.
    @Test func manyBytes() throws {
      try run(
        Job(rankCount: 2, tokenCount: 300, hidden: 7168, topK: 8, expertCount: 8).with {
          ($0.combines, $0.cachedRepeats) = ([.memory], 0)
        })
    }
  }
}
