/// The start of every operation: each rank writes its header and counts into every peer's arena, then waits for theirs.
///
/// Run by one worker. The header is written here; `fill` completes this rank's block by its counts and by faults that are
/// found late. All ranks see the same blocks afterwards, so whatever is decided from them is decided alike everywhere
/// (`compareHeaders`). Whatever that is, a completion follows. Returns false when the operation has failed, as its status says,
/// or goes on in another launch.
///
/// - Parameters:
///   - handleEpoch: of the dispatch that the operation goes by, 0 where that has failed; -1 where there is none.
///   - meanwhile: run when the peers have been told, before they are waited for.
@inlinable func exchange<M: Machine>(
  _ machine: M, view: RankView, header: ExchangeHeader, handleEpoch: Int64, operation: OperationView,
  fill: (_ pages: ExchangePages) -> Void, meanwhile: () -> Void
) -> Bool {
  let begin: UInt64
  if operation.does(.begin) {
    let isAnnounced = announce(
      machine, view: view, header: header, handleEpoch: handleEpoch, operation: operation, fill: fill)
    guard isAnnounced else { return false }
    begin = machine.now
    if !operation.does(.middle) {
      machine.forEach(1) { _ in operation.set(OperationStatus(.ok, rank: 0, (0, 0, 0, 0))) }
      pause(machine, .exchange, now: begin, view: view, operation: operation)
      return false
    }
  } else {
    if !operation.outcome.isOK { return false }
    if operation.part.isHalf && endsAsEarlier(machine, view: view, operation: operation) { return false }
    begin = resume(machine, view: view, operation: operation)
  }
  meanwhile()
  let seen = awaitAll(machine, view: view, slot: .exchange, since: begin, operation: operation)
  guard let seen else { return false }
  agreeOnMask(machine, view)
  FlightRecorder(view).enter(machine, .place, now: seen)
  return true
}

/// This rank's part of an exchange. Returns false when the operation has failed.
@inlinable func announce<M: Machine>(
  _ machine: M, view: RankView, header: ExchangeHeader, handleEpoch: Int64, operation: OperationView,
  fill: (_ pages: ExchangePages) -> Void
) -> Bool {
  if endsAsEarlier(machine, view: view, operation: operation) { return false }
  #if CHECKED
    if endsInFailedCheck(machine, view: view, operation: operation) { return false }
  #endif
  // All workers have begun, and know it.
  machine.settle()
  view.ownArena.advanced(byBytes: ControlLayout.epochOffset).store(view.epoch, at: 0)
  operation.at(operation.layout.epoch).store(view.epoch, at: 0)
  FlightRecorder(view).exchange(machine, epoch: view.epoch)
  maskWanted(machine, view)

  let (pages, masked) = (ExchangePages(view), Int64(bitPattern: view.maskedRanks))
  machine.forEachWord(of: header, copyCount: view.rankCount) { rank, index, word in
    if view.isMasked(rank) { return }
    var word = word
    if index == ExchangeHeader.maskedIndex { word = masked }
    if index == ExchangeHeader.laterIndex && !operation.does(.middle) { word = 1 }
    if index == ExchangeHeader.handleIndex && handleEpoch >= 0 { word = handleEpoch }
    // Of a dispatch that has failed since this operation was queued.
    if index == ExchangeHeader.faultIndex && handleEpoch == 0 { word = InputFault.emptyHandle.rawValue }
    pages.page(atRank: rank).store(word, at: index)
  }
  fill(pages)
  signalPeers(machine, view: view, slot: .exchange)
  return true
}

/// This rank's block of an exchange, at all ranks that take part.
@frozen @usableFromInline struct ExchangePages {
  @usableFromInline let view: RankView
  @usableFromInline let offset: Int64

  @inlinable init(_ view: RankView) {
    self.view = view
    offset = view.control.exchangeOffset(source: view.rank, epoch: view.epoch)
  }

  @inlinable func page(atRank rank: Int32) -> Address { view.arena(of: rank).advanced(byBytes: offset) }

  /// On a single lane.
  ///
  /// - Parameter index: in values of this type.
  @inlinable func store<M: Machine, Value: BitwiseCopyable>(
    _ machine: M, _ value: Value, at index: Int32, behind byteCount: Int64 = 0
  ) {
    // In the place of a masked rank stands this one.
    machine.forEachPlace(view.rankCount, at: { page(atRank: view.standIn(for: $0)) }) {
      $0.advanced(byBytes: byteCount).store(value, at: index)
    }
  }
}

/// The rest of the operation is launched behind a wait of the queue for this slot's gates.
@inlinable func pause<M: Machine>(
  _ machine: M, _ step: FlightStep, now: UInt64, view: RankView, operation: OperationView
) {
  let recorder = FlightRecorder(view)
  if operation.part.isHalf { return recorder.finish(machine, operation.status, now: now) }
  recorder.enter(machine, step, now: now)
  // For all that are not there.
  recorder.await(machine, in: step, peer: view.rank)
  machine.forEach(1) { _ in
    operation.at(operation.layout.waitBegan).store(now, at: 0)
    view.pause.store(now, at: 0)
  }
}

/// The queue has waited. Returns since when; of a half of its own, from now on.
@inlinable func resume<M: Machine>(_ machine: M, view: RankView, operation: OperationView) -> UInt64 {
  if operation.part.isHalf {
    FlightRecorder(view).exchange(machine, epoch: view.epoch)
    return machine.now
  }
  machine.forEach(1) { _ in view.pause.store(UInt64(0), at: 0) }
  return operation.at(operation.layout.waitBegan).load(UInt64.self, at: 0)
}

/// Lets this rank's queue of launches go on, whoever is there.
@inlinable func openGates<M: Machine>(_ machine: M, _ view: RankView) {
  machine.forEach(2 &* (view.rankCount &- 1)) { index in
    let slot: SignalSlot = index & 1 == 0 ? .exchange : .completion
    let offset = view.control.gateOffset(slot, source: view.other(index / 2))
    view.ownArena.advanced(byBytes: offset).store(UInt64(1), at: 0)
  }
}

/// Whether an earlier operation has missed a rank; this one has ended with that, then.
@inlinable func endsAsEarlier<M: Machine>(_ machine: M, view: RankView, operation: OperationView) -> Bool {
  let place = view.earlierFailure
  if place.isNull { return false }
  machine.forEach(1) { _ in
    let earlier = OperationStatus(failureAt: place)
    view.failure.store(earlier, at: 0)
    operation.set(OperationStatus(failedBefore: earlier))
  }
  return true
}

/// Where the status lies that an earlier operation failed with, or the call before this one; null where none has.
@inlinable public func findEarlierFailure(_ view: RankView) -> Address {
  let before = view.hostFailure.isNull ? view.failure : view.hostFailure
  // Both are looked up, so that neither waits for the other.
  let (ownCode, codeBefore) = (view.failure.load(Int64.self, at: 0), before.load(Int64.self, at: 0))
  if ownCode != StatusCode.ok.rawValue { return view.failure }
  return codeBefore != StatusCode.ok.rawValue ? before : .null
}

/// What a worker knows behind the part of its operation that one goes through alone.
@frozen @usableFromInline struct Turn {
  /// Not zero: it is that one. An integer, since kernels keep those in registers.
  @usableFromInline let leads: Int32
  /// What the operation's status said then.
  @usableFromInline let outcome: Outcome

  @inlinable init(leads: Bool, _ outcome: Outcome) {
    self.leads = leads ? 1 : 0
    self.outcome = outcome
  }
}

/// Runs `first` on all workers; one of them ends it alone, to which it returns what has come of it. The others wait for that one, and
/// see all that it saw; before they wait, they run `meanwhile`. It runs `then` when it has let them go on.
@inlinable func inTurn<M: Machine>(
  _ machine: M, view: RankView, operation: OperationView, _ first: () -> Outcome?, meanwhile: () -> Void,
  then: (Outcome) -> Void
) -> Turn {
  let arena = view.ownArena
  // Nobody lets anybody go on before all have come this far.
  let turn = arena.advanced(byBytes: ControlLayout.turnOffset).load(UInt64.self, at: 0) &+ 1
  let begin = machine.now
  if let outcome = first() {
    if machine.workerCount > 1 {
      machine.signal(1, to: .rank) { _ in
        SignalWord(arena: arena, offset: ControlLayout.turnOffset, epoch: turn)
      }
    }
    then(outcome)
    return Turn(leads: true, outcome)
  }
  meanwhile()
  // Later than the peers' deadline, whenever the one begins to wait for them: who is missing should be told by it.
  let timeoutCount = view.masksRanks ? UInt64(truncatingIfNeeded: view.rankCount &+ 1) : 2
  let deadline = begin &+ timeoutCount &* view.timeoutNanoseconds &+ 10_000_000_000
  var heard: UInt64 = 0
  while true {
    let wait = machine.await(
      arena, count: 1, epoch: turn, as: .rank, deadline: deadline, alarm: view.alarm, heard: heard,
      offset: { _ in ControlLayout.turnOffset }, awaited: { _ in }, seen: { _ in })
    switch wait.result {
    case .signalled: return Turn(leads: false, operation.outcome)
    case .alarmed: heard = machine.hear(view.alarm)
    case .timedOut:
      let missing = Missing(rank: view.rank, slot: .exchange, epoch: turn)
      // That one did not come: not all of this rank's workers run.
      fail(machine, .timeout, missing, view: view, since: begin, operation: operation)
      return Turn(leads: false, Outcome(.timeout))
    }
  }
}

/// Waits until every peer has signalled in `slot`; a peer that has not within the time allowed, or never will,
/// is masked, where the plan says so, or becomes the operation's status. Returns when the last one was seen, nil where one
/// was not.
///
/// - Parameter begin: since when this rank waits.
///
/// A peer that departs after it has signalled is missed by nobody in this slot: what it had to do for it, it has done
/// for all.
@inlinable func awaitAll<M: Machine>(
  _ machine: M, view: RankView, slot: SignalSlot, since begin: UInt64, operation: OperationView
) -> UInt64? {
  let epoch = view.epoch
  var end = begin
  var deadline = begin &+ view.timeoutNanoseconds
  let recorder = FlightRecorder(view)
  let step: FlightStep = slot == .exchange ? .exchange : .completion
  recorder.enter(machine, step, now: begin)
  var longest: UInt64 = 0
  var heard: UInt64 = 0
  while true {
    let wait = machine.await(
      view.ownArena, count: view.rankCount &- 1, epoch: epoch, as: view.peers, deadline: deadline, alarm: view.alarm,
      heard: heard,
      offset: { view.control.signalOffset(slot, source: view.standIn(for: view.other($0)), epoch: epoch) },
      awaited: {
        longest = recorder.longestWait(forPeer: view.other($0))
        recorder.await(machine, in: step, peer: view.other($0))
      },
      seen: {
        end = machine.now
        recorder.waited(
          machine, peer: view.other($0), slot: slot, epoch: epoch, nanoseconds: end &- begin, longest: longest)
        operation.noteWait(for: view.other($0), nanoseconds: end &- begin)
      })
    var (code, missing) = (StatusCode.timeout, Missing(rank: -1, slot: slot, epoch: epoch))
    switch wait.result {
    case .signalled: if !view.masksRanks { return end }
    case .timedOut:
      missing.rank = view.other(wait.missing)
      let found = findMissing(machine, view: view, missing)
      // A peer that waits for one that is masked here may have begun to wait later than this one.
      if !view.isMasked(found.rank) { missing = found }
    case .alarmed:
      heard = machine.hear(view.alarm)
      (code, missing.rank) = (.departed, missedRank(machine, view: view, slot: slot, epoch: epoch))
    }
    if view.masksRanks {
      let told = view.first(machine, from: 0, signalling: RankView.epochOfMissing, slot)
      if told < 0 && wait.result == .signalled { return end }
      let masker = told < 0 ? -1 : view.first(machine, from: told, signalling: RankView.epochOfMasked, slot)
      if masker >= 0 {
        (code, missing) = (.masked, Missing(rank: masker, slot: slot, epoch: epoch))
      } else if maskWhileWaiting(
        machine, view, slot, told: told, missing: view.masksMissing != 0 && told < 0 ? missing.rank : -1)
      {
        deadline = machine.now &+ view.timeoutNanoseconds
        // Others may have departed with it.
        heard = 0
        continue
      }
    }
    if missing.rank < 0 { continue }
    fail(machine, code, missing, view: view, since: begin, operation: operation)
    return nil
  }
}

/// The first peer that has departed without the signal, or -1. One that gave it, gave it before it departed, and the
/// alarm came after that.
@inlinable func missedRank<M: Machine>(_ machine: M, view: RankView, slot: SignalSlot, epoch: UInt64) -> Int32 {
  machine.first(of: Range(uncheckedBounds: (0, view.rankCount))) { source in
    if machine.read(view.departures.advanced(byBytes: 8 &* Int64(source))) == 0 { return false }
    if view.isMasked(source) { return false }
    let offset = view.control.signalOffset(slot, source: source, epoch: epoch)
    return !machine.isSignalled(view.ownArena, offset: offset, epoch: epoch)
  }
}

/// A rank is missing: the operation's status, and that of all later ones.
@inlinable func fail<M: Machine>(
  _ machine: M, _ code: StatusCode, _ missing: Missing, view: RankView, since begin: UInt64, operation: OperationView
) {
  let (slot, epoch) = (missing.slot, missing.epoch)
  let details = (Int64(slot.rawValue), Int64(truncatingIfNeeded: epoch), Int64(0), Int64(0))
  let status = OperationStatus(code, rank: Int64(missing.rank), details)
  machine.forEach(1) { _ in
    operation.set(status)
    view.failure.store(status, at: 0)
  }
  operation.tell(machine, view)
  let now = machine.now
  let recorder = FlightRecorder(view)
  let longest = recorder.longestWait(forPeer: missing.rank)
  recorder.waited(
    machine, peer: missing.rank, slot: slot, epoch: epoch, nanoseconds: now &- begin, longest: longest)
  recorder.finish(machine, status, now: now)
}

/// What the headers of one exchange amount to: a pure function of them, hence the same on all ranks. In the same pass looks
/// at `otherCount` more things, which must not matter where headers are odd: each pass takes the memory's delay.
///
/// - Parameter isOdd: asked of each of those.
/// - Returns: the first of those that is odd, where the headers are not; -1 where none is.
@inlinable func compareHeaders<M: Machine>(
  _ machine: M, _ view: RankView, with otherCount: Int32, isOdd: (Int32) -> Bool
) -> (status: OperationStatus, odd: Int32) {
  let fieldCount = ExchangeHeader.faultIndex
  let first = exchangeBlock(view, source: 0)
  // Every rank's fault, then every rank's fields, then the others, each kind by lanes of its own.
  let firstField = machine.firstOfLanes(from: view.rankCount)
  let fieldsEnd = firstField &+ view.rankCount &* fieldCount
  let firstOther = machine.firstOfLanes(from: fieldsEnd)
  let odd = machine.first(of: Range(uncheckedBounds: (0, firstOther &+ otherCount))) { index in
    if index >= firstOther { return isOdd(index &- firstOther) }
    if index < firstField {
      return index < view.rankCount && exchangeHeader(view, source: index).fault != 0
    }
    if index >= fieldsEnd { return false }
    let cell = index &- firstField
    let (rank, field) = (cell / fieldCount, cell % fieldCount)
    return first.load(Int64.self, at: field) != exchangeBlock(view, source: rank).load(Int64.self, at: field)
  }
  if odd < 0 || odd >= firstOther {
    return (OperationStatus(.ok, rank: 0, (0, 0, 0, 0)), odd < 0 ? -1 : odd &- firstOther)
  }
  if odd < view.rankCount {
    let header = exchangeHeader(view, source: odd)
    let (a, b, c) = header.faultDetails
    return (OperationStatus(.inputFault, rank: Int64(odd), (header.fault, a, b, c)), -1)
  }
  let cell = odd &- firstField
  let (rank, field) = (cell / fieldCount, cell % fieldCount)
  let found = exchangeBlock(view, source: rank).load(Int64.self, at: field)
  let details = (Int64(field), first.load(Int64.self, at: field), found, Int64(0))
  return (OperationStatus(.disagreement, rank: Int64(rank), details), -1)
}

@inlinable func exchangeBlock(_ view: RankView, source: Int32) -> Address {
  view.blocks.advanced(byBytes: Int64(source) &* view.control.exchangeBlockByteCount)
}

/// The same where it has arrived.
@inlinable func arrivedBlock(_ view: RankView, source: Int32) -> Address {
  view.ownArena.advanced(byBytes: view.control.exchangeOffset(source: source, epoch: view.epoch))
}

extension RankView {
  /// As the view is behind the operation's exchange.
  @inlinable var behindExchange: RankView {
    var view = self
    view.blocks = masksRanks ? maskedBlocks : arrivedBlock(self, source: 0)
    return view
  }
}

@inlinable func exchangeHeader(_ view: RankView, source: Int32) -> ExchangeHeader {
  exchangeBlock(view, source: source).load(ExchangeHeader.self, at: 0)
}

/// Tokens from `source` per rank (`index` = rank) and per expert (`index` = rank count + expert).
@inlinable func exchangedCount(_ view: RankView, source: Int32, index: Int32) -> Int32 {
  exchangeBlock(view, source: source).advanced(byBytes: ExchangeHeader.byteCount)
    .load(Int32.self, at: index)
}

/// Tells every peer that this rank has come to `slot` of its operation.
@inlinable func signalPeers<M: Machine>(_ machine: M, view: RankView, slot: SignalSlot) {
  machine.signal(view.signalCount, to: view.peers) { view.signal(slot, $0) }
}

/// The end of every operation, also where nothing has moved because all ranks have found a fault: the last worker of
/// this rank tells all peers, then waits for all of them.
///
/// - Parameters:
///   - outcome: what the operation's status says.
///   - meanwhile: what no peer waits for. Run by every worker when it has been counted in, by the last when it has told the peers.
///   - then: run by every worker behind that; by the last when it has waited for the peers, in vain or not, where machines wait beside
///     what goes on.
///   - behind: run by that one when all peers have come.
@inlinable @inline(__always) func complete<M: Machine>(
  _ machine: M, view: RankView, operation: OperationView, _ outcome: Outcome, meanwhile: () -> Void = {},
  then: (RankView) -> Void = { _ in }, behind: () -> Void = {}
) {
  var view = view
  let begin: UInt64
  var isLast = true
  // Looked up early: it is told behind all else.
  let output: SIMD2<Int64>
  if operation.does(.middle) {
    // Again, rather than to keep it while rows move; and before this worker is counted in, since nobody ends the record until then.
    view = view.recorded(machine)
    let completesLater = operation.at(operation.layout.completesLater).load(UInt32.self, at: 0)
    output = operation.output
    isLast = machine.arriveLocal(view.arrivals, for: view.peers)
    if isLast {
      #if CHECKED
        if endsInFailedCheck(machine, view: view, operation: operation) { return }
      #endif
      signalPeers(machine, view: view, slot: .completion)
      // All peers' workers run, up to their completions: blocks that wait for this launch take none of their places.
      if outcome.isOK && completesLater == 0 { machine.startNext() }
    }
    meanwhile()
    // Who looks at this rank's record while it waits sees what it knows.
    if !M.waitsBeside { then(view) }
    begin = machine.now
  } else if operation.does(.end) {
    begin = resume(machine, view: view, operation: operation)
    output = operation.output
  } else {
    return
  }
  var seen: UInt64?
  if isLast && operation.does(.end) {
    seen = awaitAll(machine, view: view, slot: .completion, since: begin, operation: operation)
  }
  if M.waitsBeside && operation.does(.middle) { then(view) }
  if isLast && !operation.does(.end) {
    return pause(machine, .completion, now: begin, view: view, operation: operation)
  }
  guard let seen else { return }
  machine.startNext()
  behind()
  if outcome.isOK {
    FlightRecorder(view).finish(machine, now: seen)
    operation.tellEnd(machine, view, output: output)
  } else {
    FlightRecorder(view).finish(machine, operation.status, now: seen)
    operation.tell(machine, view)
  }
}

/// The same by one worker alone, of an operation in which nothing moves.
@inlinable func endInVain<M: Machine>(_ machine: M, view: RankView, operation: OperationView) {
  signalPeers(machine, view: view, slot: .completion)
  let seen = awaitAll(machine, view: view, slot: .completion, since: machine.now, operation: operation)
  if let seen { FlightRecorder(view).finish(machine, operation.status, now: seen) }
}
