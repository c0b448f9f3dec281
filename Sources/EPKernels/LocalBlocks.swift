/// Memory of one rank that no peer touches, whatever lay there before: one block for each handle, and one for each
/// operation.

/// How tokens are cut into chunks that workers number on their own.
@frozen public struct Chunks {
  public var tokenCount: Int32
  public var chunkCount: Int32
  public var tokensPerChunk: Int32
  /// A token divided by that is the upper bits of its product with `factor`, from bit `shift` on: a GPU has no division. By
  /// Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
  @usableFromInline var factor: UInt32
  @usableFromInline var shift: Int32

  @inlinable public init(tokenCount: Int32, chunkCount: Int32) {
    self.tokenCount = tokenCount
    self.chunkCount = chunkCount
    tokensPerChunk = max(1, (tokenCount &+ chunkCount &- 1) / chunkCount)
    shift = 63 &- Int32(truncatingIfNeeded: (tokensPerChunk &- 1).leadingZeroBitCount)
    let divisor = UInt64(truncatingIfNeeded: tokensPerChunk)
    factor = UInt32(truncatingIfNeeded: ((1 &<< UInt64(truncatingIfNeeded: shift)) &+ divisor &- 1) / divisor)
  }

  @inlinable public func tokens(of chunk: Int32) -> Range<Int32> {
    let first = min(tokenCount, chunk &* tokensPerChunk)
    let end = min(tokenCount, first &+ tokensPerChunk)
    return Range(uncheckedBounds: (first, end))
  }

  @inlinable public func chunk(ofToken token: Int32) -> Int32 {
    let product = UInt64(UInt32(bitPattern: token)) &* UInt64(factor)
    return Int32(truncatingIfNeeded: product &>> UInt64(truncatingIfNeeded: shift))
  }
}

/// A handle's block: everything that repeats a dispatch or undoes it.
///
/// A token has `slotCount` slots: one for each rank (by source) or one for each of its top-k experts (by expert). A
/// *key* is what is numbered: a rank or an expert. Row of slot = `firstRow[key] + base[chunk][key] + slotIndex[token][slot]`.
@frozen public struct HandleLayout {
  public var chunks: Chunks
  public var rankCount: Int32
  public var expertCount: Int32
  public var localExpertCount: Int32
  public var topK: Int32
  public var layout: RowLayout
  /// By expert: rows that each expert's group has room for; 0: groups lie one behind the other.
  public var groupCapacity: Int32
  /// Rows that each source has room for, among a rank's or, by expert, a group's; 0: sources' rows lie one behind the other.
  public var sourceCapacity: Int32

  // Offsets of what lies in the block, in this order.

  /// Int32 `[rankCount]`: rows at each rank.
  public var totals: Int64
  /// Int32 `[rankCount]`: tokens from each source.
  public var tokensPerSource: Int64
  /// Int32 `[rankCount, rankCount]`: tokens from each rank, by source, to each rank.
  public var tokensPerPair: Int64
  /// Int32 `[localExpertCount]`: tokens of each local expert.
  public var tokensPerExpert: Int64
  /// Int32 `[localExpertCount]`: the same, each rounded up to the expert alignment.
  public var alignedTokensPerExpert: Int64
  /// Int32 `[localExpertCount, rankCount + 1]`, by expert only: where each source's rows begin in a group, and where the
  /// last one's end. Where sources have a capacity, `sourceCounts`.
  public var sourceOffsets: Int64
  /// Int32 `[keyCount]`: this rank's first row; behind it lie `bases`.
  public var firstRows: Int64
  /// Int32 `[tokenCount, slotCount]`, -1 for a slot without destination.
  public var slotIndices: Int64
  /// Int32 `[tokenCount, slotCount]`: the experts, by expert only.
  public var slotKeys: Int64
  public var byteCount: Int64

  @inlinable public init(
    chunks: Chunks, rankCount: Int32, expertCount: Int32, localExpertCount: Int32, topK: Int32, layout: RowLayout,
    groupCapacity: Int32 = 0, sourceCapacity: Int32 = 0
  ) {
    self.chunks = chunks
    self.rankCount = rankCount
    self.expertCount = expertCount
    self.localExpertCount = localExpertCount
    self.topK = topK
    self.layout = layout
    self.groupCapacity = groupCapacity
    self.sourceCapacity = sourceCapacity
    let slotCount = layout == .bySource ? rankCount : topK
    let keyCount = layout == .bySource ? rankCount : expertCount
    let slotTableByteCount = Self.tableByteCount(chunks.tokenCount, slotCount)
    totals = 64
    tokensPerSource = totals &+ Self.tableByteCount(rankCount, 1)
    tokensPerPair = tokensPerSource &+ Self.tableByteCount(rankCount, 1)
    tokensPerExpert = tokensPerPair &+ Self.tableByteCount(rankCount, rankCount)
    alignedTokensPerExpert = tokensPerExpert &+ Self.tableByteCount(localExpertCount, 1)
    sourceOffsets = alignedTokensPerExpert &+ Self.tableByteCount(localExpertCount, 1)
    let isBySourceAlone = layout == .bySource && sourceCapacity == 0
    firstRows = sourceOffsets &+ (isBySourceAlone ? 0 : Self.tableByteCount(localExpertCount, rankCount &+ 1))
    slotIndices = firstRows &+ Self.tableByteCount(chunks.chunkCount &+ 1, keyCount)
    slotKeys = slotIndices &+ slotTableByteCount
    byteCount = layout == .bySource ? slotKeys : slotKeys &+ slotTableByteCount
  }

  /// Bytes of an Int32 table `[rowCount, columnCount]`, in whole cache lines.
  @inlinable static func tableByteCount(_ rowCount: Int32, _ columnCount: Int32) -> Int64 {
    alignUp(4 &* Int64(rowCount) &* Int64(columnCount), to: 64)
  }

  @inlinable public var slotCount: Int32 { layout == .bySource ? rankCount : topK }
  @inlinable public var keyCount: Int32 { layout == .bySource ? rankCount : expertCount }
  /// Whether rows between groups are marked.
  @inlinable var hasPadding: Bool { layout == .byExpert && groupCapacity == 0 }

  /// Int32 `[chunkCount, keyCount]`: rows of this rank's chunks before.
  @inlinable public var bases: Int64 { firstRows &+ 4 &* Int64(keyCount) }
  /// Int32 `[localExpertCount, rankCount]`, where sources have a capacity: each source's tokens of each local expert.
  @inlinable public var sourceCounts: Int64 { sourceOffsets }
  /// UInt64: the epoch of the exchange that made this handle, the same on all ranks.
  @inlinable public var epoch: Int64 { 0 }
  /// Int64: rows that this rank sends.
  @inlinable public var sentRows: Int64 { 8 }
  /// Int32 `[1]`: rows that this rank received, padding included.
  @inlinable public var rowCount: Int64 { 16 }
  /// Int64: the same, without padding.
  @inlinable public var receivedRows: Int64 { 24 }
  /// UInt64, one bit a rank: those that rows have no place at, since they are masked.
  @inlinable var leftOut: Int64 { 32 }
}

/// A row's place at its destination.
@frozen public struct Place {
  /// One of the ranks also where there is no row.
  public var rank: Int32
  /// -1: this slot has no destination.
  public var row: Int32

  @inlinable public init(rank: Int32, row: Int32) {
    self.rank = rank
    self.row = row
  }

  @inlinable public static var none: Place { Place(rank: 0, row: -1) }
  @inlinable public var isNone: Bool { row < 0 }
}

/// A handle's block and its layout: where every row of a dispatch went.
@frozen public struct HandleView {
  public var block: Address
  public var layout: HandleLayout

  @inlinable public init(block: Address, layout: HandleLayout) {
    self.block = block
    self.layout = layout
  }

  @inlinable func at(_ offset: Int64) -> Address { block.advanced(byBytes: offset) }

  /// Which dispatch it is of; 0: of none, or of one that has failed.
  @inlinable var epoch: Int64 { at(layout.epoch).load(Int64.self, at: 0) }
  /// The same, -1 where an operation does not go by it: as `exchange` takes it, loaded when a launch begins, needed later.
  @inlinable func epoch(isUsed: Bool) -> Int64 { isUsed ? epoch : -1 }

  /// By source: the rows at this rank of its own tokens, those of the first `rowCount`.
  @inlinable func ownRows(_ view: RankView, below rowCount: Int32) -> Range<Int32> {
    let first = max(0, min(rowCount, at(layout.firstRows).load(Int32.self, at: view.rank)))
    let count = max(0, min(rowCount &- first, at(layout.tokensPerSource).load(Int32.self, at: view.rank)))
    return Range(uncheckedBounds: (first, first &+ count))
  }

  /// Rows that this rank has received lie in so many runs, in each without a gap; not where groups are padded.
  @inlinable var runCount: Int32 {
    let groupCount = layout.groupCapacity == 0 ? 1 : layout.localExpertCount
    return layout.sourceCapacity == 0 ? groupCount : groupCount &* layout.rankCount
  }

  @inlinable func run(_ index: Int32, _ view: RankView) -> Range<Int32> {
    var (first, count) = (Int32(0), Int32(0))
    if layout.sourceCapacity != 0 {
      first = index &* layout.sourceCapacity
      let counts = layout.layout == .bySource ? layout.tokensPerSource : layout.sourceCounts
      count = at(counts).load(Int32.self, at: index)
    } else if layout.groupCapacity != 0 {
      first = index &* layout.groupCapacity
      count = at(layout.tokensPerExpert).load(Int32.self, at: index)
    } else {
      count = total(atRank: view.rank)
    }
    return Range(uncheckedBounds: (first, first &+ count))
  }

  @inlinable public func total(atRank rank: Int32) -> Int32 { at(layout.totals).load(Int32.self, at: rank) }

  @inlinable public func place(token: Int32, slot: Int32, _ view: RankView) -> Place {
    #if CHECKED
      guard view.check(.token, token, below: layout.chunks.tokenCount) else { return .none }
    #endif
    let cell = token &* layout.slotCount &+ slot
    let index = at(layout.slotIndices).load(Int32.self, at: cell)
    // What follows is looked up whether there is a row or not: a branch would wait for it.
    var key = slot
    if layout.layout == .byExpert {
      let expert = at(layout.slotKeys).load(Int32.self, at: cell)
      key = index < 0 ? 0 : expert
    }
    #if CHECKED
      guard view.check(.key, key, below: layout.keyCount) else { return .none }
    #endif
    let chunk = layout.chunks.chunk(ofToken: token)
    let first = at(layout.firstRows).load(Int32.self, at: key)
    let row = first &+ at(layout.bases).load(Int32.self, at: chunk &* layout.keyCount &+ key) &+ index
    let rank = layout.layout == .bySource ? key : view.owner(ofExpert: key)
    #if CHECKED
      guard index < 0 || view.check(.row, row, below: total(atRank: rank)) else { return .none }
    #endif
    return Place(rank: rank, row: index < 0 ? -1 : row)
  }
}

/// An operation's block: its status, and where its rows are.
@frozen public struct OperationLayout {
  public var rankCount: Int32
  public var expertCount: Int32
  /// Chunks to be numbered; 0 when the operation has no layout step.
  public var chunkCount: Int32
  /// Of a combine in steps; 0 otherwise.
  public var stepCount: Int32
  /// Of scales that are given in columns, in rows; 0 otherwise.
  public var scaleByteCount: Int64

  @inlinable public init(
    rankCount: Int32, expertCount: Int32, chunkCount: Int32, stepCount: Int32 = 0, scaleByteCount: Int64 = 0
  ) {
    self.rankCount = rankCount
    self.expertCount = expertCount
    self.chunkCount = chunkCount
    self.stepCount = stepCount
    self.scaleByteCount = scaleByteCount
  }

  /// `OperationStatus`.
  @inlinable public var status: Int64 { 0 }
  /// UInt32: `ScatterJob.counter`, `ReduceJob.counter`.
  @inlinable var counter: Int64 { 64 }
  /// UInt32: not zero: some rank's completion comes from a launch that follows. Cleared with the counter beside it.
  @inlinable var completesLater: Int64 { counter &+ 4 }
  /// UInt64: when the wait between two parts began.
  @inlinable var waitBegan: Int64 { 72 }
  /// UInt64: of its exchange.
  @inlinable var epoch: Int64 { 80 }
  /// UInt64 `[rankCount, Columns.count]`: the address of each column at each rank.
  @inlinable public var columns: Int64 { 128 }
  /// Int32 `[chunkCount, counterCount]`: tokens per rank and per expert, and `faultMark` where one has a fault, or anything
  /// else.
  @inlinable public var chunkCounters: Int64 { columns &+ 8 &* Int64(rankCount) &* Int64(Columns.count) }
  @inlinable public var counterCount: Int32 { faultIndex &+ 1 }
  @inlinable var faultIndex: Int32 { rankCount &+ expertCount }
  /// Int32 `[expertCount + 1]`: where groups begin.
  @inlinable public var groupStarts: Int64 { chunkCounters &+ 4 &* Int64(chunkCount) &* Int64(counterCount) }
  /// `StepRows` `[stepCount, rankCount]`: this rank's rows of each step at each rank.
  @inlinable var stepRows: Int64 { alignUp(groupStarts &+ 4 &* (Int64(expertCount) &+ 1), to: 16) }
  /// Scales of this rank's tokens, in rows, where they are given in columns.
  @inlinable var scaleRows: Int64 { alignUp(stepRows &+ 8 &* Int64(stepCount) &* Int64(rankCount), to: 64) }
  @inlinable public var byteCount: Int64 { alignUp(scaleRows &+ scaleByteCount, to: 64) }
}

/// How much of an operation a launch is.
@frozen public struct OperationPart: Equatable, Sendable {
  @usableFromInline let bits: Int32

  @inlinable init(bits: Int32) { self.bits = bits }

  /// All of it; its workers wait for the peers.
  @inlinable public static var whole: Self { Self(bits: 7) }
  /// All of it, to be launched in parts: the queue of launches waits for the peers in between.
  @inlinable public static var apart: Self { Self(bits: 15) }
  /// Up to this rank's block of the exchange.
  @inlinable public static var begin: Self { Self(bits: 1) }
  /// From the peers' blocks on, up to this rank's completion.
  @inlinable public static var middle: Self { Self(bits: 2) }
  /// Behind the peers' completions.
  @inlinable public static var end: Self { Self(bits: 4) }

  /// The two halves of an operation whose second one the caller calls for, when it likes. A dispatch has sent its rows then;
  /// of a combine, the rows are ready for the peers.
  @inlinable public static var sendDispatch: Self { Self(bits: 16 | 1 | 2) }
  @inlinable public static var receiveDispatch: Self { Self(bits: 16 | 4) }
  @inlinable public static var sendCombine: Self { Self(bits: 16 | 1) }
  @inlinable public static var receiveCombine: Self { Self(bits: 16 | 2 | 4) }

  @inlinable var isHalf: Bool { bits & 16 != 0 }
  @inlinable var isWhole: Bool { bits & 7 == 7 }
  @inlinable func includes(_ part: Self) -> Bool { bits & part.bits != 0 }
}

/// An operation's block and its layout.
@frozen public struct OperationView {
  public var block: Address
  /// `OperationStatus`: a copy for the host, in memory that it can read. Kernels only write it.
  public var report: Address
  /// Int64 `[rankCount]`: to each, how long its rank was waited for is added, in nanoseconds; null where nobody asks.
  public var waits: Address
  public var layout: OperationLayout
  public var part: OperationPart

  @inlinable public init(
    block: Address, report: Address, waits: Address = .null, layout: OperationLayout, part: OperationPart
  ) {
    self.block = block
    self.report = report
    self.waits = waits
    self.layout = layout
    self.part = part
  }

  /// Whether this launch includes the part.
  @inlinable func does(_ part: OperationPart) -> Bool { self.part.includes(part) }

  /// What kernels of this launch know of its rank when they begin: looked up side by side, so that nothing waits for it later.
  @inlinable func begun<M: Machine>(_ machine: M, _ view: RankView) -> RankView {
    var view = view.recorded(machine)
    view.epoch = does(.begin) ? view.nextEpoch : at(layout.epoch).load(UInt64.self, at: 0)
    view.earlierFailure = findEarlierFailure(view)
    return view
  }

  @inlinable func at(_ offset: Int64) -> Address { block.advanced(byBytes: offset) }

  @inlinable public var status: OperationStatus { at(layout.status).load(OperationStatus.self, at: 0) }
  /// As the host reads it.
  @inlinable public var reported: OperationStatus { report.load(OperationStatus.self, at: 0) }
  @inlinable public func set(_ status: OperationStatus) { at(layout.status).store(status, at: 0) }
  /// All but what `setOutput` sets, which is of no use where nothing was agreed.
  @inlinable func setOutcome(_ status: OperationStatus) {
    let place = at(layout.status)
    place.store(status.code, at: 0)
    place.store(status.rank, at: 1)
    place.store(status.details.0, at: 2)
    place.store(status.details.1, at: 3)
    place.store(status.details.2, at: 4)
    place.store(status.details.3, at: 5)
  }
  /// What this rank's output takes.
  @inlinable func setOutput(_ fit: OutputFit, _ columns: Columns) {
    at(layout.status).store(fit.neededByteCount(columns), at: 6)
    at(layout.status).store(fit.rowCount, at: 7)
  }
  /// What `setOutput` has set.
  @inlinable var output: SIMD2<Int64> { at(layout.status).load(SIMD2<Int64>.self, at: 3) }
  /// Lets the host know the status. Once, when it will not change any more: the host's memory may be far away.
  @inlinable func tell<M: Machine>(_ machine: M, _ view: RankView) {
    machine.forEach(1) { _ in report.store(status, at: 0) }
    // The parts that are left have nothing to wait for; where all ranks have the same status, they all come to the end.
    if !part.isWhole && !outcome.isAgreed { openGates(machine, view) }
  }
  /// The same of an operation that ends well.
  @inlinable func tellEnd<M: Machine>(_ machine: M, _ view: RankView, output: SIMD2<Int64>) {
    let masks = view.masksRanks ? SIMD2(view.mask(.masked), view.mask(.missed)) : SIMD2(0, 0)
    machine.forEach(1) { _ in
      let details = (Int64(bitPattern: masks.x), Int64(bitPattern: masks.y), Int64(0), Int64(0))
      var status = OperationStatus(.ok, rank: 0, details)
      (status.neededByteCount, status.rowCount) = (output.x, output.y)
      if view.masksRanks { set(status) }
      report.store(status, at: 0)
    }
  }
  @inlinable func noteWait(for peer: Int32, nanoseconds: UInt64) {
    if !waits.isNull { waits.store(waits.load(UInt64.self, at: peer) &+ nanoseconds, at: peer) }
  }
  /// Whether rows may be counted when the operation has been completed. Not where ranks can be masked, since what those have sent is
  /// left out then; nor in halves, the first of which ends there.
  @inlinable func countsRowsLast(_ view: RankView) -> Bool { !part.isHalf && !view.masksRanks }
  @inlinable var counter: Address { at(layout.counter) }
  @inlinable public var scaleRows: Address { at(layout.scaleRows) }
  @inlinable var groupStarts: Address { at(layout.groupStarts) }
  /// By the worker that begins the exchange.
  @inlinable func resetCounter() { counter.store(SIMD2<UInt32>(0, 0), at: 0) }
  /// - Parameter header: of any rank.
  @inlinable func note(_ header: ExchangeHeader) {
    if header.completesLater != 0 { at(layout.completesLater).store(UInt32(1), at: 0) }
  }
  @inlinable var outcome: Outcome { Outcome(status) }

  @inlinable func column(_ column: Int32, atRank rank: Int32) -> Address {
    Address(bits: at(layout.columns).load(UInt64.self, at: rank &* Columns.count &+ column))
  }

  @inlinable func setColumn(_ column: Int32, atRank rank: Int32, _ address: Address) {
    at(layout.columns).store(address.bits, at: rank &* Columns.count &+ column)
  }

  @inlinable func counters(ofChunk chunk: Int32) -> Address {
    at(layout.chunkCounters &+ 4 &* Int64(chunk) &* Int64(layout.counterCount))
  }
}

/// What a status says, looked up once. A number, since kernels keep those in registers.
@frozen @usableFromInline struct Outcome {
  /// `StatusCode`.
  @usableFromInline let code: Int32

  @inlinable init(_ code: StatusCode) { self.code = Int32(truncatingIfNeeded: code.rawValue) }
  @inlinable init(_ status: OperationStatus) { code = Int32(truncatingIfNeeded: status.code) }

  @inlinable var isOK: Bool { `is`(.ok) }
  /// Whether all ranks have the same status, good or bad.
  @inlinable var isAgreed: Bool { isOK || `is`(.inputFault) || `is`(.disagreement) || overflows }
  @inlinable var overflows: Bool { `is`(.overflow) }

  @inlinable func `is`(_ code: StatusCode) -> Bool { self.code == Int32(truncatingIfNeeded: code.rawValue) }
}
