import SwiftEP

/// What rows are, from the sender's tensor to the combined tokens.
enum RowType: String, CaseIterable, Sendable {
  case bf16, fp16, fp32
  /// BF16 rows that are quantized on the way; what comes back is BF16.
  case fp8, nvfp4
  /// Opaque bytes; what comes back is BF16.
  case uint8

  /// Of the rows that are given to dispatch.
  var inputDType: DType {
    switch self {
    case .bf16, .fp8, .nvfp4: .bf16
    case .fp16: .fp16
    case .fp32: .fp32
    case .uint8: .uint8
    }
  }

  /// Of the rows as they arrive.
  var dispatchedDType: DType { quantization?.rowDType ?? inputDType }

  /// Of the rows that combine sums.
  var combinedDType: DType { self == .uint8 ? .bf16 : inputDType }

  var quantization: ScaleFormat? { self == .fp8 ? .float : self == .nvfp4 ? .nvfp4 : nil }

  /// Whether combine sums the very rows that arrived.
  var combinesInPlace: Bool { dispatchedDType == combinedDType }
  /// What a plan needs for a combine's rows.
  var staging: ExpertBuffer.Staging { combinesInPlace ? .unplanned : .whole }
}

/// The job that the flags describe.
struct JobSpec: Equatable, Sendable {
  var rankCount: Int
  var tokensPerRank: Int
  var hidden: Int
  var topK: Int
  var expertCount: Int
  var rowType: RowType
  var layout: RowLayout
  var masking = ExpertBuffer.Masking.none
  var encoding = RowEncoding.none

  static let flags = [
    Flag("ranks", "N", "ranks (default 2)"),
    Flag("tokens", "N", "tokens of each rank (default 4096)"),
    Flag("hidden", "N", "elements of a row (default 7168)"),
    Flag("top-k", "N", "experts of a token (default 8)"),
    Flag("experts", "N", "experts of all ranks (default 256)"),
    Flag(
      "dtype", "TYPE",
      "bf16, fp16, fp32, uint8 (opaque), or fp8, nvfp4: BF16 rows, quantized\non the way; combine sums BF16 (default bf16)"
    ),
    Flag(
      "layout", "LAYOUT",
      "how received rows are ordered: source, expert, or grouped: by expert\nin groups of fixed size (default source)"
    ),
    Flag(
      "encoding", "KIND",
      "how combined rows travel: none (as they are) or logFMT, 10 bits a\nchannel, of BF16 (default none)"
    ),
    Flag(
      "masking", "KIND",
      "whether the ranks' buffers can go on without some of them: none,\nmanual or automatic; not by expert (default none)"
    ),
  ]

  init(_ arguments: Arguments) throws(UsageError) {
    rankCount = try arguments.integer("ranks", in: 1...256, default: 2)
    tokensPerRank = try arguments.integer("tokens", in: 1...(1 << 24), default: 4096)
    hidden = try arguments.integer("hidden", in: 1...(1 << 20), default: 7168)
    topK = try arguments.integer("top-k", in: 1...topKMax, default: 8)
    expertCount = try arguments.integer("experts", in: 1...(1 << 16), default: 256)
    rowType = try arguments.choice("dtype", RowType.self) ?? .bf16
    layout = try arguments.choice("layout", RowLayout.self) ?? .bySource
    encoding = try arguments.choice("encoding", RowEncoding.self) ?? .none
    masking = try arguments.choice("masking", ExpertBuffer.Masking.self) ?? .none
  }

  var shape: JobShape {
    JobShape(
      rankCount: rankCount, tokensPerRankMax: tokensPerRank, hidden: hidden, topK: topK, expertCount: expertCount,
      dtype: rowType.dispatchedDType, scales: rowType.quantization, layout: layout,
      combineDType: rowType.combinedDType, combineEncoding: encoding)
  }

  /// - Throws: `UsageError` in the flags' names where the job cannot be.
  func plan(
    resultCount: Int = 1, receivedTokensMax: Int? = nil, workers: Int = 1, staging: ExpertBuffer.Staging
  ) throws -> ExpertBuffer.Plan {
    if topK > expertCount {
      throw UsageError("--top-k", expected: "at most the number of experts, \(expertCount)", found: "\(topK)")
    }
    do {
      return try ExpertBuffer.Plan(
        shape, resultCount: resultCount, receivedTokensMax: receivedTokensMax, workers: workers,
        staging: staging, masking: masking)
    } catch {
      guard case .invalidArgument(_, let argument, let expected, let found) = error else { throw error }
      throw UsageError(Self.flagNames[argument] ?? argument, expected: expected, found: found)
    }
  }

  private static let flagNames = [
    "rankCount": "--ranks", "tokensPerRankMax": "--tokens", "hidden": "--hidden", "topK": "--top-k",
    "expertCount": "--experts", "dtype": "--dtype", "layout": "--layout", "resultCount": "--results",
    "receivedTokensMax": "--received-tokens-max", "staging": "--tokens-per-step",
    "combineEncoding": "--encoding",
  ]

  /// Rows that each source has room for; 0: as many as it sends.
  var sourceCapacity: Int { masking == .none ? 0 : tokensPerRank }

  /// As in "2 ranks, 4096 tokens each, hidden 7168, top-8 of 256 experts, bf16, by source".
  var summary: String { summary(tokens: "\(tokensPerRank)") }

  func summary(tokens: String) -> String {
    "\(rankCount) \(rankCount == 1 ? "rank" : "ranks"), \(tokens) tokens each, hidden \(hidden), "
      + "top-\(topK) of \(expertCount) experts, \(rowType.rawValue), "
      + (layout == .grouped ? "grouped" : "by \(layout.rawValue)")
      + (encoding == .none ? "" : ", combined as \(encoding.rawValue)")
      + (masking == .none ? "" : ", \(masking.rawValue) masks")
  }
}
