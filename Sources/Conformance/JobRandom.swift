import SwiftEP

extension Job {
  /// A job that differs from others in everything that can differ, small enough to be checked in a blink.
  ///
  /// - Parameter ranks: how many; nil: that is random, too.
  package static func random(seed: UInt64, ranks: Int? = nil) -> Job {
    var random = SplitMix64(seed: seed, 7)
    let picked = random.pick([1, 2, 2, 3, 4, 5, 6, 7, 8])
    let rankCount = ranks ?? picked
    let topK = random.pick([1, 2, 2, 3, 4, 6, 8, 8, 9, 16, 32])
    let expertCount = max(topK, random.pick([1, 3, 8, 16, 33, 64]), random.chance(0.7) ? rankCount : 1)
    let hidden = random.pick([16, 32, 48, 80, 128, 144, 256, 272, 400, 528, 1040, 2048, 2880, 3584, 7168])
    var job = Job(
      rankCount: rankCount, tokensPerRank: [Int](repeating: 0, count: rankCount), hidden: hidden, topK: topK,
      expertCount: expertCount)
    job.seed = seed
    job.chooseFormats(&random)
    job.chooseRouting(&random)
    job.chooseTokens(&random)
    job.chooseCalls(&random)
    job.chooseMasks(&random)
    job.chooseEncoding(&random)
    return job
  }

  private mutating func chooseFormats(_ random: inout SplitMix64) {
    dtype = random.pick([.bf16, .bf16, .bf16, .fp16, .fp32, .fp8E4M3, .uint8])
    if dtype == .bf16 && random.chance(0.4) { quantization = random.pick(ScaleFormat.allCases) }
    if dtype == .fp8E4M3 {
      scales = random.pick(ScaleFormat.ofRows(.fp8E4M3))
      givenScaleOrder = random.pick(ScaleOrder.allCases)
    }
    if quantization == .nvfp4 {
      hidden = (hidden + 63) / 64 * 64
      globalScale = random.pick([1, 0.003, 0.7, 1344, 1e6])
    }
    sidecarByteCounts = (0..<random.pick([0, 0, 1, 2, 3])).map { _ in 4 * random.pick(1...20) }
    combineDType = random.pick([.bf16, .fp16, .fp32])
    if random.chance(0.5) && [.bf16, .fp16, .fp32].contains(receivedDType) { combineDType = receivedDType }
    if random.chance(0.2) { combineHidden = 8 * random.pick(1...60) }
    // Rows of 16 bytes times an odd number.
    if quantization == nil && dtype.byteCount == 2 && random.chance(0.3) { hidden += 8 }
    if dtype == .fp32 && random.chance(0.3) { hidden += 4 }
    if (combineHidden ?? hidden) * combineDType.byteCount % 16 != 0 { combineHidden = hidden / 16 * 16 + 8 }
  }

  private mutating func chooseRouting(_ random: inout SplitMix64) {
    usesTable = random.chance(0.15)
    indexDType = random.pick([.int32, .int64])
    isWeighted = random.chance(0.7)
    skew = random.pick([0, 0, 0.5, 1, 2])
    missingProbability = random.pick([0, 0, 0.1, 0.5, 1])
    if random.chance(0.4) {
      let rankCountInUse = random.pick(1...rankCount)
      expertOwners = (0..<expertCount).map { _ in random.pick(0...rankCountInUse - 1) }
    }
    if usesTable {
      isWeighted = false
    } else if random.chance(0.6) {
      layout = random.pick([.byExpert, .grouped])
    }
    if layout == .grouped && quantization != nil { scaleOrder = random.pick(ScaleOrder.allCases) }
    expertAlignment = random.pick([1, 1, 2, 8, 16, 128])
    zeroesPadding = random.chance(0.5)
  }

  /// As many tokens as keep all ranks' worst cases together below some megabytes.
  private mutating func chooseTokens(_ random: inout SplitMix64) {
    let byteCountMax = 24 << 20
    let rowsPerToken = layout == .bySource ? 1 : layout == .byExpert ? topK : expertCount
    let rowByteCount = 4 * max(hidden, combineHidden ?? hidden) + 64
    let perToken = rankCount * rankCount * rowsPerToken * rowByteCount
    let tokenCountMax = max(2, min(200, byteCountMax / perToken))
    tokensPerRank = (0..<rankCount).map { _ in random.chance(0.1) ? 0 : random.pick(0...tokenCountMax) }
    if random.chance(0.05) { tokensPerRank = [Int](repeating: 0, count: rankCount) }
  }

  private mutating func chooseCalls(_ random: inout SplitMix64) {
    sizing = random.chance(0.35) ? .worstCase : .exact
    if sizing == .exact && random.chance(0.3) && layout != .grouped {
      receivedTokensMax = random.pick(0...max(1, tokensPerRankMax))
    }
    workers = random.pick([1, 1, 2, 3])
    if random.chance(0.3) { workersPerCall = random.pick(1...workers) }
    cachedRepeats = random.pick([0, 1, 1, 2, 3])
    combines = CombineSource.allCases.shuffled(using: &random)
    biasCount = random.pick([0, 0, 1, 2])
    usesRowWeights = layout.hasRowPerExpert && random.chance(0.5)
    combinesTopKWeights = !usesTable && random.chance(0.5)
    givesOutput = random.chance(0.3)
    isAsynchronous = random.chance(0.4)
    if random.chance(0.5) { tokensPerStep = random.pick([1, 2, 5, 16, 40]) }
    if random.chance(0.5) && (sizing == .worstCase || layout == .grouped) {
      receivesLater = true
      return
    }
    if random.chance(0.4) { ranksOfWaitingStreams = Set((0..<rankCount).filter { _ in random.chance(0.7) }) }
  }

  private mutating func chooseMasks(_ random: inout SplitMix64) {
    if layout == .byExpert || tokensPerRankMax == 0 || !random.chance(0.3) { return }
    (tokensPerStep, receivedTokensMax, ranksOfWaitingStreams) = (nil, nil, [])
    masking = random.pick([.manual, .automatic])
    if masking == .automatic && random.chance(0.6) {
      masked = Set((0..<rankCount).filter { _ in random.chance(0.4) })
      masked.remove(random.pick(0...rankCount - 1))
    }
  }

  private mutating func chooseEncoding(_ random: inout SplitMix64) {
    // Coded rows are of the hidden size that the plan has memory for.
    if combineHidden == nil && combineDType == .bf16 && hidden % 128 == 0 && random.chance(0.5) {
      combineEncoding = .logFMT
    }
  }
}
