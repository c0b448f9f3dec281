/// Ranks that a buffer goes on without: masked ranks are neither sent to nor waited for, and their tokens count as absent.
///
/// A mask grows at the beginning of an operation, by what the host wants; in an exchange, by the masks of all others, so that
/// all that go on have the same; and, where the plan says so, when a rank is missing. Signals say so as well: in place of every
/// other one, a masked rank gets one of its own kind, or it would wait in vain and mask the others; and until an exchange has
/// shown that all have the same mask, who has masked a rank also signals in its place, so that nobody waits for it any more.
/// Of two ranks only one can miss the other: who is waited for is behind the one that waits, and finds that one's signals.
///
/// Ranks may find one missing in different steps of an operation. So no row's place depends on another rank's counts where
/// ranks can be masked: every source has slots of its own (`HandleLayout.sourceCapacity`).
extension RankView {
  /// Ranks in a mask.
  @inlinable public static var maskedRankCountMax: Int { 64 }

  @inlinable var masksRanks: Bool { !masks.isNull }

  @inlinable func mask(_ word: MaskWord) -> UInt64 { masks.load(UInt64.self, at: word.rawValue) }

  @inlinable func note<M: Machine>(_ machine: M, _ ranks: UInt64, in word: MaskWord) {
    machine.note(ranks, at: masks.advanced(byBytes: 8 &* Int64(word.rawValue)))
  }

  @inlinable var maskedRanks: UInt64 { masksRanks ? mask(.masked) : 0 }

  @inlinable func isMasked(_ rank: Int32) -> Bool { maskedRanks & Self.bit(rank) != 0 }

  @inlinable static func bit(_ rank: Int32) -> UInt64 { 1 &<< UInt64(truncatingIfNeeded: rank) }

  /// Where blocks of an exchange lie that were read together with a mask.
  @inlinable var maskedBlocks: Address { masks.advanced(byBytes: Self.maskedBlocksDistance) }
  @inlinable static var maskedBlocksDistance: Int64 { 128 }

  /// Bytes of what `masks` points to.
  @inlinable public static func masksByteCount(_ control: ControlLayout) -> Int64 {
    maskedBlocksDistance &+ Int64(control.rankCount) &* control.exchangeBlockByteCount
  }

  /// Who signals and is heard in the place of a rank: this rank itself in that of a masked one.
  @inlinable func standIn(for rank: Int32) -> Int32 { isMasked(rank) ? self.rank : rank }

  // MARK: Signals

  /// Signals that this rank gives in a slot of an operation.
  @inlinable var signalCount: Int32 {
    if !masksRanks { return rankCount &- 1 }
    return mask(.masked) == mask(.agreed) ? rankCount : rankCount &* rankCount
  }

  @inlinable func signal(_ slot: SignalSlot, _ index: Int32) -> SignalWord {
    if masksRanks && index >= rankCount {
      return signalInPlace(slot, of: (rank &+ index / rankCount) % rankCount, to: index % rankCount)
    }
    // The last to itself, where it stands in for others.
    let receiver = peer(index)
    return SignalWord(
      arena: arena(of: receiver), offset: control.signalOffset(slot, source: rank, epoch: epoch),
      epoch: isMasked(receiver) ? Self.epochOfMasked : epoch)
  }

  /// Tells another rank not to wait for a masked one; what has nobody to be told of or to, this rank tells itself.
  @inlinable func signalInPlace(_ slot: SignalSlot, of source: Int32, to receiver: Int32) -> SignalWord {
    let isTold = isMasked(source) && !isMasked(receiver) && receiver != rank
    return SignalWord(
      arena: isTold ? arena(of: receiver) : ownArena,
      offset: control.signalOffset(slot, source: isTold ? source : rank, epoch: epoch),
      epoch: isTold ? Self.epochOfMissing : epoch)
  }

  /// The source has masked the receiver.
  @inlinable static var epochOfMasked: UInt64 { .max }
  /// Somebody has masked the source.
  @inlinable static var epochOfMissing: UInt64 { .max &- 1 }

  /// The first rank from `first` on whose signal is at least `epoch`; -1 where none is.
  @inlinable func first<M: Machine>(
    _ machine: M, from first: Int32, signalling epoch: UInt64, _ slot: SignalSlot
  ) -> Int32 {
    machine.first(of: Range(uncheckedBounds: (first, rankCount))) { rank in
      let offset = control.signalOffset(slot, source: standIn(for: rank), epoch: self.epoch)
      return machine.isSignalled(ownArena, offset: offset, epoch: epoch)
    }
  }
}

/// What `RankView.masks` consists of.
@frozen public enum MaskWord: Int32, Sendable {
  /// Those that the host wants to be masked.
  case wanted
  /// Those that are.
  case masked
  /// Of them, those that this rank has found missing.
  case missed
  /// Of them, those that an exchange has shown to be masked by all.
  case agreed
}

/// At the beginning of an operation.
@inlinable func maskWanted<M: Machine>(_ machine: M, _ view: RankView) {
  if !view.masksRanks { return }
  let ranks = view.mask(.masked) | machine.hear(view.masks)
  machine.settle()
  view.note(machine, ranks, in: .masked)
  machine.settle()
}

/// Behind an exchange: its blocks decide whom it is without, and are kept as they are then. The block of a masked rank, which
/// may be written at any time, is this rank's, with nothing to send or to receive.
@inlinable func agreeOnMask<M: Machine>(_ machine: M, _ view: RankView) {
  if !view.masksRanks { return }
  // With those that have been missed since.
  var (ranks, common) = (view.mask(.masked), UInt64.max)
  var rank: Int32 = 0
  while rank < view.rankCount {
    let masked = arrivedBlock(view, source: view.standIn(for: rank)).load(UInt64.self, at: ExchangeHeader.maskedIndex)
    ranks |= masked
    common &= masked
    rank = rank &+ 1
  }
  machine.settle()
  view.note(machine, ranks, in: .masked)
  view.note(machine, common, in: .agreed)
  machine.settle()
  copyBlocks(machine, view)
}

@inlinable func copyBlocks<M: Machine>(_ machine: M, _ view: RankView) {
  let byteCount = view.control.exchangeBlockByteCount
  let lineCount = Int32(truncatingIfNeeded: byteCount / 16)
  let headerLineCount = Int32(truncatingIfNeeded: ExchangeHeader.byteCount / 16)
  machine.forEach(view.rankCount &* lineCount) { index in
    let (source, line) = (index / lineCount, index % lineCount)
    let block = arrivedBlock(view, source: view.standIn(for: source))
    let isAbsent = view.isMasked(source) && line >= headerLineCount
    let words = isAbsent ? SIMD4<UInt32>(repeating: 0) : block.load(SIMD4<UInt32>.self, at: line)
    view.maskedBlocks.advanced(byBytes: Int64(source) &* byteCount).store(words, at: line)
  }
  let own = view.maskedBlocks.advanced(byBytes: Int64(view.rank) &* byteCount &+ ExchangeHeader.byteCount)
  machine.forEach(view.rankCount) { rank in
    if !view.isMasked(rank) { return }
    own.store(Int32(0), at: rank)
    let block = view.maskedBlocks.advanced(byBytes: Int64(rank) &* byteCount)
    block.store(Int64.max, at: ExchangeHeader.capacityIndex)
    block.store(Int64(0), at: ExchangeHeader.capacityIndex &+ 1)
  }
  machine.forEach(view.expertCount) { expert in
    if view.isMasked(view.owner(ofExpert: expert)) { own.store(Int32(0), at: view.rankCount &+ expert) }
  }
}

/// While peers are waited for: masks those that others have masked, and `missing` if it is a rank, and tells the others that
/// may wait for them, too. Returns whether there are any.
///
/// - Parameter told: the first that others have masked, or -1.
@inlinable func maskWhileWaiting<M: Machine>(
  _ machine: M, _ view: RankView, _ slot: SignalSlot, told: Int32, missing: Int32
) -> Bool {
  var ranks = missing < 0 ? 0 : RankView.bit(missing)
  var rank = told
  while rank >= 0 {
    ranks |= RankView.bit(rank)
    rank = view.first(machine, from: rank &+ 1, signalling: RankView.epochOfMissing, slot)
  }
  if ranks == 0 { return false }
  let (masked, missed) = (view.mask(.masked), view.mask(.missed))
  machine.settle()
  view.note(machine, masked | ranks, in: .masked)
  if missing >= 0 { view.note(machine, missed | RankView.bit(missing), in: .missed) }
  machine.signal(2 &* view.rankCount &* view.rankCount, to: view.peers) { index in
    let cell = index / 2
    return view.signalInPlace(
      index & 1 == 0 ? .exchange : .completion, of: cell / view.rankCount, to: cell % view.rankCount)
  }
  return true
}

/// Rows have no place at masked ranks from now on, whatever becomes of the mask. Run by one worker.
@inlinable func leaveOutDestinations<M: Machine>(_ machine: M, _ view: RankView, _ handle: HandleView) {
  let layout = handle.layout
  let masked = view.maskedRanks
  if masked == 0 || masked == handle.at(layout.leftOut).load(UInt64.self, at: 0) { return }
  machine.settle()
  handle.at(layout.leftOut).store(masked, at: 0)
  machine.forEach(layout.chunks.tokenCount &* layout.slotCount) { cell in
    let slotIndices = handle.at(layout.slotIndices)
    if slotIndices.load(Int32.self, at: cell) < 0 { return }
    let isBySource = layout.layout == .bySource
    let key = isBySource ? cell % layout.rankCount : handle.at(layout.slotKeys).load(Int32.self, at: cell)
    if view.isMasked(isBySource ? key : view.owner(ofExpert: key)) { slotIndices.store(Int32(-1), at: cell) }
  }
}

/// What masked ranks have sent does not count: they may not have sent all of it. Run by one worker.
@inlinable func leaveOutSources<M: Machine>(
  _ machine: M, _ view: RankView, _ handle: HandleView, expertAlignment: Int32
) {
  if view.maskedRanks == 0 { return }
  let layout = handle.layout
  machine.forEach(view.rankCount &* view.rankCount) { pair in
    let (source, rank) = (pair / view.rankCount, pair % view.rankCount)
    if view.isMasked(source) || view.isMasked(rank) { handle.at(layout.tokensPerPair).store(Int32(0), at: pair) }
    if view.isMasked(source) { handle.at(layout.tokensPerSource).store(Int32(0), at: source) }
  }
  machine.forEach(view.localExpertCount) { local in
    let counts = handle.at(layout.sourceCounts).advanced(byBytes: 4 &* Int64(local &* view.rankCount))
    var tokenCount: Int32 = 0
    var source: Int32 = 0
    while source < view.rankCount {
      if view.isMasked(source) { counts.store(Int32(0), at: source) }
      tokenCount = tokenCount &+ counts.load(Int32.self, at: source)
      source = source &+ 1
    }
    handle.at(layout.tokensPerExpert).store(tokenCount, at: local)
    handle.at(layout.alignedTokensPerExpert).store(aligned(tokenCount, to: expertAlignment), at: local)
  }
}
