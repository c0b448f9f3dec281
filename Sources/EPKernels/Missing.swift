/// A rank that keeps others waiting, and what they wait for.
@frozen public struct Missing {
  public var rank: Int32
  public var slot: SignalSlot
  public var epoch: UInt64

  @inlinable public init(rank: Int32, slot: SignalSlot, epoch: UInt64) {
    self.rank = rank
    self.slot = slot
    self.epoch = epoch
  }
}

/// Who is to blame when the time for `missing.rank` is over: that rank may itself wait for another, which has told some
/// ranks and not it before it stopped. Every rank's flight recorder shows for whom it waits, or has waited in vain.
@inlinable func findMissing<M: Machine>(_ machine: M, view: RankView, _ missing: Missing) -> Missing {
  var found = missing
  var step: Int32 = 0
  while step < view.rankCount {
    let next = waitedFor(machine, view: view, by: found)
    if next.rank == found.rank { return found }
    // In a circle, nobody can be told from the others.
    if next.rank == view.rank { return missing }
    found = next
    step = step &+ 1
  }
  return missing
}

/// For whom the rank of `missing` waits; itself, when it waits for nobody.
@inlinable func waitedFor<M: Machine>(_ machine: M, view: RankView, by missing: Missing) -> Missing {
  let arena = view.arena(of: missing.rank)
  let recorder = FlightRecorder(view, arena: arena)
  let progress = FlightProgress(word: machine.read(recorder.at(FlightLayout.progressOffset)))
  let record = recorder.at(recorder.layout.offset(ofRecord: progress.index))
  if progress.step == .idle {
    let code = machine.read(record.advanced(byBytes: FlightField.statusCode.offset))
    let isFailed = code == UInt64(StatusCode.timeout.rawValue) || code == UInt64(StatusCode.departed.rawValue)
    if !isFailed { return missing }
    let rank = Int32(truncatingIfNeeded: machine.read(record.advanced(byBytes: FlightField.statusRank.offset)))
    // Nothing else is ever noted; what does not hold must not become an address.
    if rank < 0 || rank >= view.rankCount { return missing }
    return Missing(rank: rank, slot: missing.slot, epoch: missing.epoch)
  }
  if progress.peer < 0 || progress.step != .exchange && progress.step != .completion { return missing }
  let slot: SignalSlot = progress.step == .exchange ? .exchange : .completion
  let epoch = machine.read(record.advanced(byBytes: FlightField.epoch.offset))
  // Itself: for all that are not there.
  let isAnyone = progress.peer == missing.rank
  var peer = isAnyone ? 0 : progress.peer
  repeat {
    // What it waited for is there: it has stopped without seeing that.
    let offset = view.control.signalOffset(slot, source: peer, epoch: epoch)
    if peer != missing.rank && !machine.isSignalled(arena, offset: offset, epoch: epoch) {
      return Missing(rank: peer, slot: slot, epoch: epoch)
    }
    peer = peer &+ 1
  } while isAnyone && peer < view.rankCount
  return missing
}
