import EPKernels

extension ExpertBuffer {
  /// How combines take rows that lie outside the arena.
  public enum Staging: Equatable, Sendable {
    /// The plan has no memory for them; the arena grows for those that come.
    case unplanned
    /// All are copied into the arena, then combined.
    case whole
    /// By source, and where ranks have more tokens than that, in steps: while the rows of so many tokens of every rank are
    /// combined, those of the next are copied. Takes memory for the rows of two steps. The rows of all ranks of a combine
    /// lie outside the arena then, or those of none, and no rank has more tokens than planned. Otherwise, and where rows
    /// travel coded (`JobShape.combineEncoding`), as `whole`.
    case steps(tokens: Int)
  }

  /// What a buffer for a job takes, to the byte, before anything is allocated.
  ///
  /// Bytes are of one rank; where ranks own different numbers of experts, of the rank that needs the most. Several
  /// results of different sizes, alive at once and given back in any order, can leave holes that none of the next ones
  /// fits: with exact sizing the arena then grows beyond the plan.
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
    public let staging: Staging
    public let masking: Masking
    /// Every part and what it takes.
    public let parts: [Part]
    /// Bytes of the memory that peers reach: control words, results, outputs and staging.
    public let arenaByteCount: Int64
    /// Bytes that the arena may take when routing overflows the plan.
    public let arenaByteCountMax: Int64

    /// - Parameters:
    ///   - shape: the job.
    ///   - resultCount: how many results are kept alive at the same time.
    ///   - receivedTokensMax: tokens that one rank receives at most; nil: all tokens of all ranks, which no routing
    ///     exceeds. When routing does exceed it, exact sizing grows the arena, and worst-case sizing fails on all
    ///     ranks. Nil for a grouped layout.
    ///   - workers: threads that one call uses.
    ///   - staging: how combines take rows that do not lie in the arena.
    ///   - masking: whether the buffer can go on without some of its ranks, of which there are at most 64 then. Rows go to
    ///     fixed slots: `tokensPerRankMax` rows for each source, by source or in each group of grouped ones; they cannot be by
    ///     expert otherwise, and are not combined in steps. `receivedTokensMax` is nil.
    ///   - arenaByteCountMax: how far the arena may grow; nil: eight times the plan, at
    ///     least 1 GiB; never beyond 1 TiB. Address space is reserved for it, memory is not.
    /// - Throws: `invalidArgument` with rank -1.
    public init(
      _ shape: JobShape, resultCount: Int = 1, receivedTokensMax: Int? = nil, workers: Int = 1,
      staging: Staging = .unplanned, masking: Masking = .none, arenaByteCountMax: Int64? = nil
    ) throws(EPError) {
      try shape.check()
      if masking != .none { try Self.checkMasks(shape, receivedTokensMax: receivedTokensMax, staging: staging) }
      guard (1...1 << 20).contains(resultCount) else {
        throw .invalidArgument(rank: -1, argument: "resultCount", expected: "1 to 1048576", found: "\(resultCount)")
      }
      guard (1...1024).contains(workers) else {
        throw .invalidArgument(rank: -1, argument: "workers", expected: "1 to 1024", found: "\(workers)")
      }
      if let receivedTokensMax, receivedTokensMax < 0 {
        throw .invalidArgument(
          rank: -1, argument: "receivedTokensMax", expected: "at least 0", found: "\(receivedTokensMax)")
      }
      if let receivedTokensMax, shape.layout == .grouped {
        throw .invalidArgument(
          rank: -1, argument: "receivedTokensMax", expected: "nil where groups have a fixed size",
          found: "\(receivedTokensMax)")
      }
      if case .steps(let tokenCount) = staging, !(1...1 << 24).contains(tokenCount) {
        throw .invalidArgument(rank: -1, argument: "staging", expected: "1 to 16777216 tokens", found: "\(tokenCount)")
      }
      self.shape = shape
      self.staging = staging
      self.masking = masking
      self.resultCount = resultCount
      let localExpertCount = shape.localExpertCounts.max() ?? 0
      rowsPerResult = shape.rowCountMax(localExpertCount: localExpertCount, tokenCountMax: receivedTokensMax)

      let control = ControlLayout(rankCount: Int32(shape.rankCount), expertCount: Int32(shape.expertCount))
      let combinedRowByteCount = Int64(shape.hidden * shape.combineDType.byteCount)
      let output = Self.combinedByteCount(
        rowCount: shape.tokensPerRankMax, rowByteCount: combinedRowByteCount,
        weightCount: shape.tokensPerRankMax * shape.topK)
      let result = roundUpToPages(shape.columns().byteCount(rowCapacity: Int64(rowsPerResult)))
      let steps = Self.steps(staging, of: shape.layout, shape)
      let stagedRowCount = steps.stepCount == 0 ? rowsPerResult : steps.stagedRowCount(rankCount: shape.rankCount)
      let staged =
        staging == .unplanned
        ? 0
        : Self.combinedByteCount(
          rowCount: stagedRowCount, rowByteCount: combinedRowByteCount, weightCount: rowsPerResult * shape.topK)
      let coded = roundUpToPages(shape.combineEncoding.recordByteCount(rowCount: rowsPerResult, hidden: shape.hidden))
      let limit = Self.arenaByteCountLimit
      guard result <= limit / Int64(resultCount), output <= limit / Int64(resultCount), staged <= limit, coded <= limit
      else {
        throw .invalidArgument(
          rank: -1, argument: "shape", expected: "an arena of at most \(limit) bytes",
          found: "\(resultCount) results of \(result) bytes and outputs of \(output), staging of \(staged + coded)")
      }
      let arena = [
        Part(name: "control", byteCount: control.byteCount),
        Part(name: "dispatch results", byteCount: Int64(resultCount) * result),
        Part(name: "combine outputs", byteCount: Int64(resultCount) * output),
        Part(name: "combine staging", byteCount: staged + coded),
      ]
      arenaByteCount = arena.reduce(0) { $0 + $1.byteCount }
      let wanted = arenaByteCountMax ?? max(8 * arenaByteCount, 1 << 30)
      self.arenaByteCountMax = max(arenaByteCount, min(wanted, Self.growthLimit))

      let handle = HandleLayout(
        chunks: Chunks(tokenCount: Int32(shape.tokensPerRankMax), chunkCount: Int32(workers)),
        rankCount: Int32(shape.rankCount), expertCount: Int32(shape.expertCount),
        localExpertCount: Int32(localExpertCount), topK: Int32(shape.topK), layout: shape.layout.kernelLayout,
        groupCapacity: Int32(shape.layout == .grouped ? shape.groupCapacity : 0),
        sourceCapacity: Int32(masking == .none ? 0 : shape.tokensPerRankMax))
      let givenScaleByteCount =
        shape.scales.map {
          $0.canBeGiven ? Int64(shape.tokensPerRankMax) * Int64($0.byteCount(hidden: shape.hidden)) : 0
        } ?? 0
      let operation = { (chunkCount: Int) in
        OperationLayout(
          rankCount: Int32(shape.rankCount), expertCount: Int32(shape.expertCount), chunkCount: Int32(chunkCount),
          stepCount: chunkCount == 0 ? steps.stepCount : 0, scaleByteCount: chunkCount == 0 ? 0 : givenScaleByteCount
        ).byteCount
      }
      let tables = TableOffsets(
        rankCount: shape.rankCount, expertCount: shape.expertCount, canMask: masking != .none)
      parts =
        arena + [
          Part(name: "handles", byteCount: Int64(resultCount) * handle.byteCount),
          Part(name: "operations", byteCount: Int64(resultCount) * (operation(workers) + operation(0))),
          Part(name: "tables", byteCount: tables.byteCount + NoticeOffsets(rankCount: shape.rankCount).byteCount),
        ]
    }

    private static func checkMasks(_ shape: JobShape, receivedTokensMax: Int?, staging: Staging) throws(EPError) {
      func require(_ holds: Bool, _ argument: String, _ expected: String, _ found: String) throws(EPError) {
        if holds { return }
        throw .invalidArgument(
          rank: -1, argument: argument, expected: "\(expected) where ranks can be masked", found: found)
      }
      let rankCountMax = RankView.maskedRankCountMax
      try require(shape.rankCount <= rankCountMax, "rankCount", "at most \(rankCountMax)", "\(shape.rankCount)")
      try require(shape.tokensPerRankMax > 0, "tokensPerRankMax", "at least 1", "0")
      try require(shape.layout != .byExpert, "layout", "bySource or grouped", "\(shape.layout)")
      try require(receivedTokensMax == nil, "receivedTokensMax", "nil", "\(receivedTokensMax ?? 0)")
      if case .steps = staging { try require(false, "staging", "unplanned or whole", "\(staging)") }
    }

    func steps(of layout: RowLayout) -> CombineSteps { Self.steps(staging, of: layout, shape) }

    private static func steps(_ staging: Staging, of layout: RowLayout, _ shape: JobShape) -> CombineSteps {
      guard case .steps(let tokensPerStep) = staging, layout == .bySource, shape.rankCount > 1,
        shape.tokensPerRankMax > tokensPerStep, shape.combineEncoding == .none
      else { return .none }
      return CombineSteps(tokenCount: Int32(shape.tokensPerRankMax), tokensPerStep: Int32(tokensPerStep))
    }

    /// Bytes of all parts.
    public var byteCount: Int64 { parts.reduce(0) { $0 + $1.byteCount } }

    /// With the page tables of a process that maps so many arenas: 8 bytes for each 4096.
    package func systemByteCount(mappedArenaCount: Int) -> Int64 {
      byteCount + Int64(mappedArenaCount) * arenaByteCount / 512
    }

    /// An arena's results, outputs and staging each; more than any host's memory, and far from overflowing anything.
    private static let arenaByteCountLimit: Int64 = 1 << 44
    /// Address space is not without end either.
    private static let growthLimit: Int64 = 1 << 40

    /// Rows, then top-k weights.
    private static func combinedByteCount(rowCount: Int, rowByteCount: Int64, weightCount: Int) -> Int64 {
      roundUpToPages(alignUp(Int64(rowCount) * rowByteCount, to: 128) + 4 * Int64(weightCount))
    }
  }
}

package func roundUpToPages(_ byteCount: Int64) -> Int64 { alignUp(byteCount, to: 4096) }
