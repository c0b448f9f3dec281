import EPKernels

/// The shape of a job: what a buffer has to hold.
public struct JobShape: Equatable, Sendable {
  public var rankCount: Int
  /// The most tokens that a rank passes to one dispatch. More are possible with exact sizing; the arena grows then.
  public var tokensPerRankMax: Int
  /// Channels of a row.
  public var hidden: Int
  /// Experts of one token, at most; 0 when routing is by table alone.
  public var topK: Int
  public var expertCount: Int
  /// The rank of each expert, `[expertCount]`; nil: contiguous and equal, the first ranks having one more where they
  /// cannot be equal.
  public var expertOwners: [Int]?
  /// The element type of rows as they arrive.
  public var dtype: DType
  /// Scales that arrive with FP8 or NVFP4 rows.
  public var scales: ScaleFormat?
  /// Bytes per token of each sidecar array.
  public var sidecarByteCounts: [Int]
  public var layout: RowLayout
  /// By expert: every group of rows begins at a multiple of this.
  public var expertAlignment: Int
  /// The element type of the rows that combine sums.
  public var combineDType: DType
  /// How combined rows travel: the plan has memory for that.
  public var combineEncoding: RowEncoding
  /// Bytes of one top-k index, 4 or 8.
  public var indexByteCount: Int

  public init(
    rankCount: Int, tokensPerRankMax: Int, hidden: Int, topK: Int, expertCount: Int, expertOwners: [Int]? = nil,
    dtype: DType = .bf16, scales: ScaleFormat? = nil, sidecarByteCounts: [Int] = [], layout: RowLayout = .bySource,
    expertAlignment: Int = 1, combineDType: DType = .bf16, combineEncoding: RowEncoding = .none, indexByteCount: Int = 8
  ) {
    self.rankCount = rankCount
    self.tokensPerRankMax = tokensPerRankMax
    self.hidden = hidden
    self.topK = topK
    self.expertCount = expertCount
    self.expertOwners = expertOwners
    self.dtype = dtype
    self.scales = scales
    self.sidecarByteCounts = sidecarByteCounts
    self.layout = layout
    self.expertAlignment = expertAlignment
    self.combineDType = combineDType
    self.combineEncoding = combineEncoding
    self.indexByteCount = indexByteCount
  }
}

/// How received rows are ordered.
public enum RowLayout: String, CaseIterable, Codable, Sendable {
  /// One row a token, by source rank, then token.
  case bySource = "source"
  /// One row per token and expert, grouped by local expert; inside a group by source rank, then token.
  case byExpert = "expert"
  /// The same with a group of fixed size for each local expert, `[local experts, ranks x tokensPerRankMax, ...]`, whatever
  /// the routing; in a group the rows that have come first, behind them whatever lay there. Always of worst-case size, so
  /// that nobody waits for counts.
  case grouped

  /// One row per token and expert.
  package var hasRowPerExpert: Bool { self != .bySource }

  package var kernelLayout: EPKernels.RowLayout { hasRowPerExpert ? .byExpert : .bySource }

  /// As it travels in headers and faults.
  var code: Int64 { Int64(Self.allCases.firstIndex(of: self)!) }

  init?(code: Int64) {
    guard let layout = Self.allCases.first(where: { $0.code == code }) else { return nil }
    self = layout
  }
}

/// How the scales of FP8 rows are stored, one for each 128 channels (the last block of a row may be shorter); or that rows are
/// NVFP4.
public enum ScaleFormat: String, CaseIterable, Codable, Sendable {
  /// Float `[rows, ceil(hidden / 128)]`.
  case float
  /// Powers of two as biased 8-bit exponents, packed by four: Int32 `[rows, ceil(hidden / 512)]`, the lowest byte
  /// first.
  case ue8m0
  /// As `float`; where rows are quantized on the way, each is rounded up to a power of two.
  case powerOfTwo
  /// Those of NVFP4, which rows become on the way: E2M1 (`DType.fp4E2M1x2`), in blocks of 16 channels with an E4M3 scale each,
  /// fp8E4M3 `[rows, hidden / 16]`; `hidden` is a multiple of 64. A channel is its element times its block's scale, divided
  /// by the global scale g (`DispatchOptions.globalScale`); see NVIDIA, "Introducing NVFP4 for Efficient and Accurate
  /// Low-Precision Inference".
  ///
  /// A block's scale is amax / 6 * g, its elements are x * (g / scale), in Float, each then rounded to nearest even; what is
  /// greater than 448, or 6, becomes that. Elements keep their channels' signs, zeros too. Where the scale is 0, all elements
  /// are. A block with an infinity or NaN has the scale NaN and elements of 6.
  case nvfp4

  /// Bytes of one row's scales.
  package func byteCount(hidden: Int) -> Int {
    if self == .nvfp4 { return hidden / 16 }
    let blockCount = (hidden + Int(channelsPerScale) - 1) / Int(channelsPerScale)
    return self == .ue8m0 ? (blockCount + 3) / 4 * 4 : 4 * blockCount
  }

  /// Whether callers have rows with such scales already, instead of letting a dispatch make them.
  package var canBeGiven: Bool { self != .nvfp4 }

  package var dtype: DType { self == .nvfp4 ? .fp8E4M3 : self == .ue8m0 ? .int32 : .fp32 }

  /// Of the rows that they scale.
  package var rowDType: DType { self == .nvfp4 ? .fp4E2M1x2 : .fp8E4M3 }

  package static func ofRows(_ dtype: DType) -> [ScaleFormat] { allCases.filter { $0.rowDType == dtype } }

  /// What the channels of rows that become such are a multiple of.
  package var channelStep: Int { self == .nvfp4 ? Int(nvfp4Step) : 16 }
}

/// How scales lie in memory: those of grouped rows, and those that a dispatch is given (`DispatchOptions.givenScaleOrder`).
public enum ScaleOrder: String, CaseIterable, Codable, Sendable {
  /// `[local experts, rows of a group, scales]`.
  case rowMajor
  /// `[local experts, scales, rows of a group]`, as a grouped GEMM loads them. Its tensor maps (TMA) want rows of a group to
  /// be a multiple of 4. NVFP4's are kept in fours, `[local experts, hidden / 64, rows of a group, 4]`.
  case columnMajor
}

/// The most top-k experts of one token.
package let topKMax = 32

extension JobShape {
  /// The rank of each expert.
  package var owners: [Int32] {
    if let expertOwners { return expertOwners.map { Int32($0) } }
    let (share, rest) = expertCount.quotientAndRemainder(dividingBy: rankCount)
    return (0..<rankCount).flatMap { rank in
      [Int32](repeating: Int32(rank), count: share + (rank < rest ? 1 : 0))
    }
  }

  /// Experts on each rank.
  package var localExpertCounts: [Int] {
    owners.reduce(into: [Int](repeating: 0, count: rankCount)) { counts, owner in counts[Int(owner)] += 1 }
  }

  /// Rows of each expert, grouped; one where no rank has tokens.
  package var groupCapacity: Int { max(1, rankCount * tokensPerRankMax) }

  /// Rows that a rank with `localExpertCount` experts receives at most when it receives `tokenCountMax` tokens; nil:
  /// all tokens of all ranks.
  package func rowCountMax(localExpertCount: Int, tokenCountMax: Int? = nil) -> Int {
    let tokenCount = min(tokenCountMax ?? .max, rankCount * tokensPerRankMax)
    if layout == .bySource { return tokenCount }
    if layout == .grouped { return localExpertCount * groupCapacity }
    return tokenCount * min(topK, localExpertCount) + localExpertCount * (expertAlignment - 1)
  }

  private var rowByteCount: Int { hidden * dtype.byteCount / dtype.channelsPerElement }

  /// The columns of a dispatch's result, weights included.
  package func columns() -> Columns {
    Columns(
      rowByteCount: rowByteCount, scaleByteCount: scales?.byteCount(hidden: hidden) ?? 0,
      sidecarByteCounts: sidecarByteCounts, slotCount: layout == .bySource ? topK : min(1, topK),
      indexByteCount: indexByteCount, isWeighted: true)
  }

  package func check() throws(EPError) {
    // The upper bounds keep every product below from overflowing.
    try require(rankCount >= 1, "rankCount", "at least 1", rankCount)
    try require(rankCount <= 1 << 16, "rankCount", "at most 65536", rankCount)
    try require(tokensPerRankMax >= 0, "tokensPerRankMax", "at least 0", tokensPerRankMax)
    try require(tokensPerRankMax <= 1 << 24, "tokensPerRankMax", "at most 16777216", tokensPerRankMax)
    try require(hidden >= 1, "hidden", "at least 1", hidden)
    try require(hidden <= 1 << 28, "hidden", "at most 268435456", hidden)
    let channelStep = ScaleFormat.nvfp4.channelStep
    try require(
      dtype != .fp4E2M1x2 || hidden % channelStep == 0, "hidden", "a multiple of \(channelStep) with NVFP4 rows", hidden
    )
    try require(
      rowByteCount % 16 == 0, "hidden", "rows of a multiple of 16 bytes", "\(hidden) x \(dtype) = \(rowByteCount) bytes"
    )
    try require(dtype != .int32 && dtype != .int64, "dtype", "bf16, fp16, fp32, fp8E4M3, fp4E2M1x2 or uint8", dtype)
    try require(expertCount >= 0, "expertCount", "at least 0", expertCount)
    try require(expertCount <= 1 << 20, "expertCount", "at most 1048576", expertCount)
    try require((0...topKMax).contains(topK), "topK", "0 to \(topKMax)", topK)
    try require(topK <= expertCount, "topK", "at most expertCount (\(expertCount))", topK)
    let formats = ScaleFormat.ofRows(dtype).map { "\($0) or " }.joined()
    try require(
      scales == nil || scales?.rowDType == dtype, "scales", "\(formats)none with rows of \(dtype)",
      scales.map { "\($0)" } ?? "none")
    try require(sidecarByteCounts.count <= Columns.sidecarCountMax, "sidecarByteCounts", "at most 3", sidecarByteCounts)
    for byteCount in sidecarByteCounts {
      try require(byteCount > 0 && byteCount % 4 == 0, "sidecarByteCounts", "positive multiples of 4", byteCount)
      try require(byteCount <= 1 << 28, "sidecarByteCounts", "at most 268435456", byteCount)
    }
    try require(expertAlignment >= 1, "expertAlignment", "at least 1", expertAlignment)
    try require(expertAlignment <= 1 << 20, "expertAlignment", "at most 1048576", expertAlignment)
    try require(layout == .bySource || topK > 0, "layout", "bySource where topK is 0", layout)
    try require([.bf16, .fp16, .fp32].contains(combineDType), "combineDType", "bf16, fp16 or fp32", combineDType)
    try require(
      combineEncoding == .none || (combineDType == .bf16 && hidden % Int(LogFMT.channelsPerBlock) == 0),
      "combineEncoding",
      "none, but for bf16 rows of a multiple of 128 channels", "\(combineEncoding) of \(hidden) x \(combineDType)")
    try require(indexByteCount == 4 || indexByteCount == 8, "indexByteCount", "4 or 8", indexByteCount)
    if let expertOwners {
      try require(expertOwners.count == expertCount, "expertOwners", "\(expertCount) ranks", expertOwners.count)
      for owner in expertOwners {
        try require((0..<rankCount).contains(owner), "expertOwners", "ranks of 0..<\(rankCount)", owner)
      }
    }
    let rows = rowCountMax(localExpertCount: localExpertCounts.max() ?? 0)
    try require(
      rows < Int(Int32.max) / max(1, max(topK, 4)), "tokensPerRankMax", "fewer rows than an Int32 counts", rows)
  }

  private func require(_ holds: Bool, _ argument: String, _ expected: String, _ found: Any) throws(EPError) {
    if holds { return }
    throw .invalidArgument(rank: -1, argument: argument, expected: expected, found: "\(found)")
  }
}

extension Columns {
  /// - Parameter slotCount: top-k experts that a received row carries; 0 when it carries none.
  package init(
    rowByteCount: Int, scaleByteCount: Int, sidecarByteCounts: [Int], slotCount: Int, indexByteCount: Int,
    isWeighted: Bool
  ) {
    self.init()
    self[Columns.rows] = Int32(rowByteCount)
    self[Columns.scales] = Int32(scaleByteCount)
    for (index, byteCount) in sidecarByteCounts.enumerated() {
      self[Columns.sidecars + Int32(index)] = Int32(byteCount)
    }
    self[Columns.origins] = 8
    self[Columns.indices] = Int32(slotCount * indexByteCount)
    self[Columns.weights] = isWeighted ? Int32(slotCount * 4) : 0
  }
}
