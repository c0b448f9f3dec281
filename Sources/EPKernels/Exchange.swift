/// The start of every operation: each rank writes its header and counts into every peer's arena, then waits for theirs.
///
/// Run by one worker. `fill` completes this rank's block (its counts); the header's fields are written here. All ranks
/// see the same blocks afterwards, so whatever is decided from them is decided alike everywhere. Returns the exchange's
/// epoch, or nil when the operation has failed; its status says how.
@inlinable func exchange<M: Machine>(
  _ machine: M, view: RankView, header: ExchangeHeader, operation: OperationView, fill: (_ block: Address) -> Void
) -> UInt64? {
  let earlier = view.failure.load(OperationStatus.self, at: 0)
  if earlier.code != StatusCode.ok.rawValue {
    operation.set(OperationStatus(.failedBefore, rank: earlier.rank, earlier.details))
    return nil
  }
  let control = view.control
  let epochWord = view.ownArena.advanced(byBytes: ControlLayout.epochOffset)
  let epoch = epochWord.load(UInt64.self, at: 0) &+ 1
  epochWord.store(epoch, at: 0)
  let recorder = FlightRecorder(view)
  recorder.exchange(machine, epoch: epoch)

  let offset = control.exchangeOffset(epoch: epoch, source: view.rank)
  let block = view.ownArena.advanced(byBytes: offset)
  block.store(header, at: 0)
  fill(block)
  var step: Int32 = 1
  while step < view.rankCount {
    let peer = view.arena(of: (view.rank &+ step) % view.rankCount)
    machine.copyRecord(
      from: block, to: peer.advanced(byBytes: offset),
      byteCount: Int32(truncatingIfNeeded: control.exchangeBlockByteCount))
    machine.signal(peer, offset: control.signalOffset(.exchange, source: view.rank), epoch: epoch)
    step = step &+ 1
  }
  let seen = awaitAll(machine, view: view, slot: .exchange, epoch: epoch, operation: operation)
  guard let seen else { return nil }
  recorder.enter(machine, .place, now: seen)
  let verdict = compareHeaders(view, epoch: epoch)
  operation.set(verdict)
  if verdict.code == StatusCode.ok.rawValue { return epoch }
  recorder.finish(machine, verdict, now: machine.now)
  return nil
}

/// Waits until every peer has signalled `epoch` in `slot`; a peer that has not within the time allowed, or never will,
/// becomes the operation's status. Returns when the last one was seen, nil where one was not.
///
/// A peer that departs after it has signalled is missed by nobody in this slot: what it had to do for it, it has done
/// for all.
@inlinable func awaitAll<M: Machine>(
  _ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64, operation: OperationView
) -> UInt64? {
  let begin = machine.now
  var end = begin
  let deadline = begin &+ view.timeoutNanoseconds
  let recorder = FlightRecorder(view)
  recorder.enter(machine, slot == .exchange ? .exchange : .completion, now: begin)
  var heard = machine.hear(view.alarm)
  var source: Int32 = 0
  while source < view.rankCount {
    if heard != 0 {
      let missed = missedRank(machine, view: view, slot: slot, epoch: epoch)
      if missed >= 0 {
        let missing = Missing(rank: missed, slot: slot, epoch: epoch)
        fail(machine, .departed, missing, view: view, since: begin, operation: operation)
        return nil
      }
    }
    while source < view.rankCount {
      let offset = view.control.signalOffset(slot, source: source)
      if source != view.rank && !machine.isSignalled(view.ownArena, offset: offset, epoch: epoch) {
        recorder.await(machine, peer: source)
        let result = machine.await(
          view.ownArena, offset: offset, epoch: epoch, deadline: deadline, alarm: view.alarm, heard: heard)
        if result == .alarmed { break }
        if result == .timedOut {
          let missing = findMissing(machine, view: view, Missing(rank: source, slot: slot, epoch: epoch))
          fail(machine, .timeout, missing, view: view, since: begin, operation: operation)
          return nil
        }
        end = machine.now
        recorder.waited(machine, peer: source, slot: slot, epoch: epoch, nanoseconds: end &- begin)
      }
      source = source &+ 1
    }
    heard = machine.hear(view.alarm)
  }
  return end
}

/// The first peer that has departed without the signal, or -1.
@inlinable func missedRank<M: Machine>(_ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64) -> Int32 {
  var source: Int32 = 0
  while source < view.rankCount {
    if view.departures.load(UInt32.self, at: source) != 0 {
      // It signalled before it departed, if it did.
      let offset = view.control.signalOffset(slot, source: source)
      if !machine.isSignalled(view.ownArena, offset: offset, epoch: epoch) { return source }
    }
    source = source &+ 1
  }
  return -1
}

/// A rank is missing: the operation's status, and that of all later ones.
@inlinable func fail<M: Machine>(
  _ machine: M, _ code: StatusCode, _ missing: Missing, view: RankView, since begin: UInt64, operation: OperationView
) {
  let (slot, epoch) = (missing.slot, missing.epoch)
  let details = (Int64(slot.rawValue), Int64(truncatingIfNeeded: epoch), Int64(0), Int64(0))
  let status = OperationStatus(code, rank: Int64(missing.rank), details)
  operation.set(status)
  view.failure.store(status, at: 0)
  let now = machine.now
  let recorder = FlightRecorder(view)
  recorder.waited(machine, peer: missing.rank, slot: slot, epoch: epoch, nanoseconds: now &- begin)
  recorder.finish(machine, status, now: now)
}

/// What the headers of one exchange amount to: a pure function of them, hence the same on all ranks.
@inlinable func compareHeaders(_ view: RankView, epoch: UInt64) -> OperationStatus {
  let first = exchangeBlock(view, epoch: epoch, source: 0)
  var rank: Int32 = 0
  while rank < view.rankCount {
    let header = exchangeHeader(view, epoch: epoch, source: rank)
    if header.fault != 0 {
      let (a, b, c) = header.faultDetails
      return OperationStatus(.inputFault, rank: Int64(rank), (header.fault, a, b, c))
    }
    rank = rank &+ 1
  }
  rank = 1
  while rank < view.rankCount {
    let other = exchangeBlock(view, epoch: epoch, source: rank)
    var field: Int32 = 0
    while Int64(field) <= HeaderField.sidecar2.rawValue {
      let expected = first.load(Int64.self, at: field)
      let found = other.load(Int64.self, at: field)
      if expected != found {
        return OperationStatus(.disagreement, rank: Int64(rank), (Int64(field), expected, found, 0))
      }
      field = field &+ 1
    }
    rank = rank &+ 1
  }
  return OperationStatus(.ok, rank: 0, (0, 0, 0, 0))
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

/// The end of every operation: the last worker of this rank tells all peers, then waits for all of them.
@inlinable func complete<M: Machine>(_ machine: M, view: RankView, operation: OperationView) {
  guard machine.arriveLocal(operation.at(operation.layout.delivered)) else { return }
  let epoch = view.ownArena.advanced(byBytes: ControlLayout.epochOffset).load(UInt64.self, at: 0)
  let offset = view.control.signalOffset(.completion, source: view.rank)
  var step: Int32 = 1
  while step < view.rankCount {
    machine.signal(view.arena(of: (view.rank &+ step) % view.rankCount), offset: offset, epoch: epoch)
    step = step &+ 1
  }
  let seen = awaitAll(machine, view: view, slot: .completion, epoch: epoch, operation: operation)
  if let seen { FlightRecorder(view).finish(machine, operation.status, now: seen) }
}
