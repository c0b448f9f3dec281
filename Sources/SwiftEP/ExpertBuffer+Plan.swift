import EPKernels

extension ExpertBuffer {
  /// What a buffer for a job takes, to the byte, before anything is allocated.
  ///
  /// Bytes are of one rank; where ranks own different numbers of experts, of the rank that needs the most.
  public struct Plan: Equatable, Sendable {
    public struct Part: Equatable, Sendable {
      public let name: String
      public let byteCount: Int64
    }

    public let shape: JobShape
    /// Dispatch results, and combined outputs, that are alive at the same time.
    public let resultCount: Int
    /// Rows that one dispatch result holds.
    public let rowsPerResult: Int
    /// Every part and what it takes.
    public let parts: [Part]
    /// Bytes that the arena may take when routing overflows the plan.
    public let arenaByteCountMax: Int64

    /// - Parameters:
    ///   - shape: the job.
    ///   - resultCount: how many results are kept alive at the same time.
    ///   - receivedTokensMax: tokens that one rank receives at most; nil: all tokens of all ranks, which no routing
    ///     exceeds. When routing does exceed it, exact sizing grows the arena, and worst-case sizing fails on all
    ///     ranks.
    ///   - stagesCombine: plan for combining rows that do not lie in the arena.
    ///   - arenaByteCountMax: how far the arena may grow; nil: eight times the plan, at
    ///     least 1 GiB. Address space is reserved for it, memory is not.
    /// - Throws: `invalidArgument` with rank -1.
    public init(
      _ shape: JobShape, resultCount: Int = 1, receivedTokensMax: Int? = nil, stagesCombine: Bool = false,
      arenaByteCountMax: Int64? = nil
    ) throws(EPError) {
      try shape.check()
      guard (1...1 << 20).contains(resultCount) else {
        throw .invalidArgument(rank: -1, argument: "resultCount", expected: "1 to 1048576", found: "\(resultCount)")
      }
      if let receivedTokensMax, receivedTokensMax < 0 {
        throw .invalidArgument(
          rank: -1, argument: "receivedTokensMax", expected: "at least 0", found: "\(receivedTokensMax)")
      }
      self.shape = shape
      self.resultCount = resultCount
      let rowsPerResult = shape.rowCountMax(
        localExpertCount: shape.localExpertCounts.max() ?? 0, tokenCountMax: receivedTokensMax)
      self.rowsPerResult = rowsPerResult

      let control = ControlLayout(rankCount: Int32(shape.rankCount), expertCount: Int32(shape.expertCount))
      let combinedRowByteCount = Int64(shape.hidden * shape.combineDType.byteCount)
      let outputByteCount = Self.combinedByteCount(
        tokenCount: shape.tokensPerRankMax, rowByteCount: combinedRowByteCount, topK: shape.topK)
      let results = roundUpToPages(shape.columns().byteCount(rowCapacity: Int64(rowsPerResult)))
      var parts = [
        Part(name: "control", byteCount: control.byteCount),
        Part(name: "dispatch results", byteCount: Int64(resultCount) * results),
        Part(name: "combine outputs", byteCount: Int64(resultCount) * outputByteCount),
      ]
      if stagesCombine {
        let rows = Self.combinedByteCount(
          tokenCount: rowsPerResult, rowByteCount: combinedRowByteCount, topK: shape.topK)
        parts.append(Part(name: "combine staging", byteCount: rows))
      }
      let handle = HandleLayout(
        chunks: Chunks(tokenCount: Int32(shape.tokensPerRankMax), chunkCount: 1), rankCount: Int32(shape.rankCount),
        expertCount: Int32(shape.expertCount), localExpertCount: Int32(shape.expertCount), topK: Int32(shape.topK),
        layout: shape.layout.kernelLayout)
      parts.append(Part(name: "handles", byteCount: Int64(resultCount) * handle.byteCount))
      self.parts = parts
      let arena = parts.dropLast().reduce(0) { $0 + $1.byteCount }
      self.arenaByteCountMax = max(arena, arenaByteCountMax ?? max(8 * arena, 1 << 30))
    }

    /// Bytes of all parts.
    public var byteCount: Int64 { parts.reduce(0) { $0 + $1.byteCount } }

    /// Bytes of the parts that peers reach, and of what is allocated beside them: everything but the handles.
    public var arenaByteCount: Int64 { parts.dropLast().reduce(0) { $0 + $1.byteCount } }

    /// Rows, then top-k weights.
    package static func combinedByteCount(tokenCount: Int, rowByteCount: Int64, topK: Int) -> Int64 {
      roundUpToPages(alignUp(Int64(tokenCount) * rowByteCount, to: 128) + Int64(tokenCount) * Int64(topK) * 4)
    }
  }
}

package func roundUpToPages(_ byteCount: Int64) -> Int64 { alignUp(byteCount, to: 4096) }

extension RowLayout {
  package var kernelLayout: EPKernels.RowLayout { self == .bySource ? .bySource : .byExpert }
}
