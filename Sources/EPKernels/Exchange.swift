/// The start of every operation: each rank writes its header and counts into every peer's arena, then waits for theirs.
///
/// Run by one worker. The header is written here; `fill` completes this rank's block: its counts, and what the header
/// cannot know yet. All ranks see the same blocks afterwards, so whatever is decided from them is decided alike everywhere. Returns the exchange's
/// epoch, or nil when the operation has failed; its status says how.
@inlinable func exchange<M: Machine>(
  _ machine: M, view: RankView, header: ExchangeHeader, operation: OperationView, fill: (_ block: Address) -> Void
) -> UInt64? {
  let earlier = view.failure.load(OperationStatus.self, at: 0)
  if earlier.code != StatusCode.ok.rawValue {
    machine.forEach(1) { _ in operation.set(OperationStatus(.failedBefore, rank: earlier.rank, earlier.details)) }
    return nil
  }
  let control = view.control
  let epochWord = view.ownArena.advanced(byBytes: ControlLayout.epochOffset)
  let epoch = epochWord.load(UInt64.self, at: 0) &+ 1
  machine.settle()
  epochWord.store(epoch, at: 0)

  let offset = control.exchangeOffset(epoch: epoch, source: view.rank)
  let block = view.ownArena.advanced(byBytes: offset)
  machine.forEach(1) { _ in block.store(header, at: 0) }
  fill(block)
  let lineCount = Int32(truncatingIfNeeded: control.exchangeBlockByteCount / 16)
  machine.forEach((view.rankCount &- 1) &* lineCount) { index in
    let (peer, line) = (view.peer(index / lineCount), index % lineCount)
    let page = view.arena(of: peer).advanced(byBytes: offset)
    page.store(block.load(SIMD4<UInt32>.self, at: line), at: line)
  }
  signalPeers(machine, view: view, slot: .exchange, epoch: epoch)
  if !awaitAll(machine, view: view, slot: .exchange, epoch: epoch, operation: operation) { return nil }

  let verdict = compareHeaders(machine, view, epoch: epoch)
  machine.forEach(1) { _ in operation.set(verdict) }
  return verdict.code == StatusCode.ok.rawValue ? epoch : nil
}

/// Waits until every peer has signalled `epoch` in `slot`; a peer that has not within the time allowed, or never will,
/// becomes the operation's status.
///
/// A peer that departs after it has signalled is missed by nobody in this slot: what it had to do for it, it has done
/// for all.
@inlinable func awaitAll<M: Machine>(
  _ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64, operation: OperationView
) -> Bool {
  let deadline = machine.now &+ view.timeoutNanoseconds
  var heard: UInt64 = 0
  while true {
    let wait = machine.await(
      view.ownArena, count: view.rankCount &- 1, epoch: epoch, deadline: deadline, alarm: view.alarm, heard: heard
    ) { view.control.signalOffset(slot, source: view.peer($0)) }
    switch wait.result {
    case .signalled: return true
    case .timedOut:
      let missing = view.peer(wait.missing)
      fail(machine, .timeout, rank: missing, view: view, slot: slot, epoch: epoch, operation: operation)
      return false
    case .alarmed:
      heard = machine.hear(view.alarm)
      if isMissed(machine, view: view, slot: slot, epoch: epoch, operation: operation) { return false }
    }
  }
}

/// Whether a peer has departed without the signal. One that gave it, gave it before it departed, and the alarm came
/// after that.
@inlinable func isMissed<M: Machine>(
  _ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64, operation: OperationView
) -> Bool {
  let missed = machine.first(of: Range(uncheckedBounds: (0, view.rankCount))) { source in
    if view.departures.load(UInt32.self, at: source) == 0 { return false }
    let word = view.ownArena.advanced(byBytes: view.control.signalOffset(slot, source: source))
    return word.load(UInt64.self, at: 0) < epoch
  }
  if missed < 0 { return false }
  fail(machine, .departed, rank: missed, view: view, slot: slot, epoch: epoch, operation: operation)
  return true
}

/// A rank is missing: the operation's status, and that of all later ones.
@inlinable func fail<M: Machine>(
  _ machine: M, _ code: StatusCode, rank: Int32, view: RankView, slot: SignalSlot, epoch: UInt64,
  operation: OperationView
) {
  let status = OperationStatus(code, rank: Int64(rank), (Int64(slot.rawValue), Int64(truncatingIfNeeded: epoch), 0, 0))
  machine.forEach(1) { _ in
    operation.set(status)
    view.failure.store(status, at: 0)
  }
}

/// What the headers of one exchange amount to: a pure function of them, hence the same on all ranks.
@inlinable func compareHeaders<M: Machine>(_ machine: M, _ view: RankView, epoch: UInt64) -> OperationStatus {
  let faulty = machine.first(of: Range(uncheckedBounds: (0, view.rankCount))) {
    exchangeHeader(view, epoch: epoch, source: $0).fault != 0
  }
  if faulty >= 0 {
    let header = exchangeHeader(view, epoch: epoch, source: faulty)
    let (a, b, c) = header.faultDetails
    return OperationStatus(.inputFault, rank: Int64(faulty), (header.fault, a, b, c))
  }
  let fieldCount = Int32(truncatingIfNeeded: HeaderField.sidecar2.rawValue &+ 1)
  let first = exchangeBlock(view, epoch: epoch, source: 0)
  let odd = machine.first(of: Range(uncheckedBounds: (0, view.rankCount &* fieldCount))) { index in
    let other = exchangeBlock(view, epoch: epoch, source: index / fieldCount)
    return first.load(Int64.self, at: index % fieldCount) != other.load(Int64.self, at: index % fieldCount)
  }
  if odd < 0 { return OperationStatus(.ok, rank: 0, (0, 0, 0, 0)) }
  let (rank, field) = (odd / fieldCount, odd % fieldCount)
  let found = exchangeBlock(view, epoch: epoch, source: rank).load(Int64.self, at: field)
  return OperationStatus(
    .disagreement, rank: Int64(rank), (Int64(field), first.load(Int64.self, at: field), found, 0))
}

@inlinable func exchangeBlock(_ view: RankView, epoch: UInt64, source: Int32) -> Address {
  view.ownArena.advanced(byBytes: view.control.exchangeOffset(epoch: epoch, source: source))
}

@inlinable func exchangeHeader(_ view: RankView, epoch: UInt64, source: Int32) -> ExchangeHeader {
  exchangeBlock(view, epoch: epoch, source: source).load(ExchangeHeader.self, at: 0)
}

/// Tokens from `source` per rank (`index` = rank) and per expert (`index` = rank count + expert).
@inlinable func exchangedCount(_ view: RankView, epoch: UInt64, source: Int32, index: Int32) -> Int32 {
  exchangeBlock(view, epoch: epoch, source: source).advanced(byBytes: ExchangeHeader.byteCount)
    .load(Int32.self, at: index)
}

/// Tells every peer that this rank has reached `epoch` in `slot`.
@inlinable func signalPeers<M: Machine>(_ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64) {
  machine.signal(view.rankCount &- 1, epoch: epoch) { index in
    SignalWord(
      arena: view.arena(of: view.peer(index)), offset: view.control.signalOffset(slot, source: view.rank))
  }
}

/// The end of every operation: the last worker of this rank tells all peers, then waits for all of them.
@inlinable func complete<M: Machine>(_ machine: M, view: RankView, operation: OperationView) {
  guard machine.arriveLocal(view.arrivals) else { return }
  let epoch = view.ownArena.advanced(byBytes: ControlLayout.epochOffset).load(UInt64.self, at: 0)
  signalPeers(machine, view: view, slot: .completion, epoch: epoch)
  _ = awaitAll(machine, view: view, slot: .completion, epoch: epoch, operation: operation)
}
