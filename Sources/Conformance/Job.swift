import SwiftEP

/// Everything that a conformance run does, as a value: what the ranks hold, what they send, and which calls they make.
package struct Job: Codable, Equatable, Sendable {
  // MARK: Shape
  package var rankCount: Int
  package var tokensPerRank: [Int]
  package var hidden: Int
  package var topK: Int
  package var expertCount: Int
  package var expertOwners: [Int]?
  package var dtype: DType = .bf16
  /// Of rows that are FP8 already when they are sent.
  package var scales: ScaleFormat?
  package var quantization: ScaleFormat?
  package var globalScale: Float = 1
  package var scaleOrder: ScaleOrder = .rowMajor
  package var givenScaleOrder: ScaleOrder = .rowMajor
  package var sidecarByteCounts: [Int] = []
  package var layout: RowLayout = .bySource
  package var expertAlignment = 1
  package var zeroesPadding = false
  package var sizing: Sizing = .exact
  package var indexDType: DType = .int64
  package var isWeighted = true

  // MARK: Routing
  /// Route by table rather than by top-k.
  package var usesTable = false
  /// Zipf exponent of the experts' popularity; 0: all alike.
  package var skew = 0.0
  /// Of a top-k slot to be -1.
  package var missingProbability = 0.0

  // MARK: Calls
  /// Threads that each rank's buffer has.
  package var workers = 1
  /// Workers that each call uses; nil: all.
  package var workersPerCall: Int?
  /// Dispatches with the first one's handle, each with rows of its own.
  package var cachedRepeats = 1
  package var combines: [CombineSource] = CombineSource.allCases
  package var combineDType: DType = .bf16
  package var combineEncoding = RowEncoding.none
  /// Elements of a row that combine sums; nil: `hidden`.
  package var combineHidden: Int?
  package var biasCount = 0
  /// By expert: weigh rows as they are summed.
  package var usesRowWeights = false
  /// Bring top-k weights back with the rows.
  package var combinesTopKWeights = false
  /// Give combine the memory for its sums.
  package var givesOutput = false
  /// Queue the calls, then wait.
  package var isAsynchronous = false
  /// Send first, and receive by a call of its own: dispatches of worst-case size, and combines.
  package var receivesLater = false
  /// Of combines of rows outside the arena; nil: all at once.
  package var tokensPerStep: Int?
  /// Ranks whose streams wait for peers, rather than their workers.
  package var ranksOfWaitingStreams: Set<Int> = []

  // MARK: Masks
  package var masking = ExpertBuffer.Masking.none
  /// By the lowest rank that is not, from the beginning.
  package var masked: Set<Int> = []

  // MARK: Memory and time
  package var receivedTokensMax: Int?
  package var timeout: Duration = .seconds(30)
  package var seed: UInt64 = 1

  package init(rankCount: Int, tokensPerRank: [Int], hidden: Int, topK: Int, expertCount: Int) {
    precondition(tokensPerRank.count == rankCount)
    self.rankCount = rankCount
    self.tokensPerRank = tokensPerRank
    self.hidden = hidden
    self.topK = topK
    self.expertCount = expertCount
  }

  /// As many tokens on every rank.
  package init(rankCount: Int, tokenCount: Int, hidden: Int, topK: Int, expertCount: Int) {
    self.init(
      rankCount: rankCount, tokensPerRank: [Int](repeating: tokenCount, count: rankCount), hidden: hidden,
      topK: topK, expertCount: expertCount)
  }
}

/// Where the rows lie that a rank gives to combine.
package enum CombineSource: String, CaseIterable, Codable, Sendable {
  /// Arena memory from `combineInput`.
  case input
  /// The rows that dispatch returned, written over. Left out where they cannot be summed.
  case result
  /// Ordinary memory.
  case memory
}

extension Job {
  package var owners: [Int] { expertOwners ?? contiguousOwners(expertCount: expertCount, rankCount: rankCount) }

  package var tokensPerRankMax: Int { tokensPerRank.max() ?? 0 }

  /// How rows arrive.
  package var receivedDType: DType { quantization?.rowDType ?? dtype }

  package var shape: JobShape {
    JobShape(
      rankCount: rankCount, tokensPerRankMax: tokensPerRankMax, hidden: hidden, topK: usesTable ? 0 : topK,
      expertCount: expertCount, expertOwners: expertOwners, dtype: receivedDType, scales: quantization ?? scales,
      sidecarByteCounts: sidecarByteCounts, layout: layout, expertAlignment: expertAlignment,
      combineDType: combineDType, combineEncoding: combineEncoding, indexByteCount: indexDType.byteCount)
  }

  package func makePlan() throws(EPError) -> ExpertBuffer.Plan {
    let roomy = try ExpertBuffer.Plan(shape, resultCount: 2 + cachedRepeats, staging: .whole)
    let staging: ExpertBuffer.Staging =
      !combines.contains(.memory) ? .unplanned : tokensPerStep.map { .steps(tokens: $0) } ?? .whole
    return try ExpertBuffer.Plan(
      shape, receivedTokensMax: receivedTokensMax, staging: staging, masking: masking,
      arenaByteCountMax: roomy.arenaByteCountMax)
  }

  package func waiting(ofRank rank: Int) -> Waiting { ranksOfWaitingStreams.contains(rank) ? .stream : .workers }

  package func dispatchOptions(ofRank rank: Int) -> DispatchOptions {
    var options = dispatchOptions
    options.waiting = waiting(ofRank: rank)
    return options
  }

  package var dispatchOptions: DispatchOptions {
    var options = DispatchOptions()
    options.layout = layout
    options.expertAlignment = expertAlignment
    options.zeroesPadding = zeroesPadding
    options.sizing = sizing
    options.quantization = quantization
    options.globalScale = globalScale
    options.scaleOrder = scaleOrder
    options.givenScaleOrder = givenScaleOrder
    options.workers = workersPerCall
    options.isAsynchronous = isAsynchronous
    options.receivesLater = receivesLater
    return options
  }
}

extension Job: CustomStringConvertible {
  package var description: String {
    var parts = [
      "seed \(seed)", "ranks \(rankCount)", "tokens \(tokensPerRank)", "hidden \(hidden)",
      usesTable ? "table" : "top-\(topK)", "experts \(expertCount)", "dtype \(dtype)", "layout \(layout)",
      "alignment \(expertAlignment)", "sizing \(sizing)", "indices \(indexDType)", "skew \(skew)",
      "missing \(missingProbability)", "workers \(workers)",
    ]
    if let expertOwners { parts.append("owners \(expertOwners)") }
    if let scales { parts.append("scales \(scales) \(givenScaleOrder)") }
    if let quantization { parts.append("quantization \(quantization) \(scaleOrder)") }
    if globalScale != 1 { parts.append("global scale \(globalScale)") }
    if !sidecarByteCounts.isEmpty { parts.append("sidecars \(sidecarByteCounts)") }
    if zeroesPadding { parts.append("zeroes padding") }
    if isWeighted { parts.append("weighted") }
    if let workersPerCall { parts.append("workers per call \(workersPerCall)") }
    parts.append("cached \(cachedRepeats)")
    parts.append("combines \(combines.map(\.rawValue)) \(combineDType) x \(combineHidden ?? hidden)")
    if combineEncoding != .none { parts.append("as \(combineEncoding)") }
    if biasCount > 0 { parts.append("biases \(biasCount)") }
    if usesRowWeights { parts.append("row weights") }
    if combinesTopKWeights { parts.append("combines weights") }
    if givesOutput { parts.append("gives output") }
    if isAsynchronous { parts.append("asynchronous") }
    if receivesLater { parts.append("receives later") }
    if let tokensPerStep { parts.append("\(tokensPerStep) tokens a step") }
    if !ranksOfWaitingStreams.isEmpty { parts.append("streams of \(ranksOfWaitingStreams.sorted()) wait") }
    if masking != .none { parts.append("\(masking) masks of \(masked.sorted())") }
    if let receivedTokensMax { parts.append("received tokens at most \(receivedTokensMax)") }
    return parts.joined(separator: ", ")
  }
}

/// A run whose result is not what the oracle says, or that ended in an error.
package struct ConformanceFailure: Error, Codable, CustomStringConvertible {
  package let job: Job
  /// -1 where no single rank is known.
  package let rank: Int
  /// The call, and which of its kind.
  package let step: String
  package let what: String

  package init(job: Job, rank: Int, step: String, what: String) {
    self.job = job
    self.rank = rank
    self.step = step
    self.what = what
  }

  package var description: String { "rank \(rank), \(step): \(what) [\(job)]" }
}
