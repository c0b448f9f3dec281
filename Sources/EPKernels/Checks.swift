/// What kernels check of themselves in a checked build (`CHECKED`, which debug builds define): wherever an exchange
/// that does not add up would have them read or write where they must not. Other builds have nothing of it.

/// What is checked; each is of a number that must lie in a range.
@frozen public enum Check: Int32, CaseIterable, Sendable {
  /// An expert that a token names, when it is used: it was in range before.
  case expert
  /// The number of a token among those of its chunk that go to the same place.
  case slotIndex
  /// Tokens that some rank says it sends to a rank, or to an expert.
  case count
  /// Where memory begins that some rank offers, in bytes behind its arena's control words; all of it is in the arena.
  case arenaOffset
  /// A token whose row is wanted.
  case token
  /// Whose rows are numbered: a rank, or an expert.
  case key
  /// A row, at its receiver or in this rank's own output.
  case row
  /// The rank that a received row says it comes from.
  case source
  /// By how much a received row's source and token, as one number, are above those of the row before: each token's row
  /// arrives once, and in order.
  case order

  /// Where the range begins.
  @inlinable public var first: Int64 { self == .expert ? -1 : self == .order ? 1 : 0 }
}

/// Whether this build checks.
@inlinable public var isChecked: Bool {
  #if CHECKED
    true
  #else
    false
  #endif
}

extension RankView {
  /// Int64 `[Check, 2]`: of each check that has failed on this rank, what it found, and where its range ends, counted
  /// from 1.
  @inlinable var findings: Address { failure.advanced(byBytes: OperationStatus.byteCount) }
  @inlinable public static var findingsByteCount: Int64 { 16 &* 16 }

  /// Whether `found` is in the check's range, which ends before `end`.
  ///
  /// Where it is not, the caller leaves out what it is about to do, and the rank's operation fails: see
  /// `endsInFailedCheck`. Any lane may ask; of several that find something, one is remembered.
  @inlinable func check(_ check: Check, _ found: Int64, below end: Int64) -> Bool {
    if found >= check.first && found < end { return true }
    findings.store(SIMD2(found, max(0, end) &+ 1), at: check.rawValue)
    return false
  }

  @inlinable func check(_ check: Check, _ found: Int32, below end: Int32) -> Bool {
    self.check(check, Int64(found), below: Int64(end))
  }

  /// Whether `byteCount` bytes from `offset` on are in the arena of `rank`, behind its control words; nothing always
  /// is.
  @inlinable func checkArena(of rank: Int32, _ offset: Int64, byteCount: Int64) -> Bool {
    if byteCount == 0 { return true }
    let begin = control.byteCount
    return check(.arenaOffset, offset &- begin, below: arenaByteCount(of: rank) &- begin &- byteCount &+ 1)
  }

  /// The first check that has failed.
  @inlinable func failedCheck<M: Machine>(_ machine: M) -> OperationStatus? {
    var check: Int32 = 0
    while check <= Check.order.rawValue {
      let finding = findings.load(SIMD2<Int64>.self, at: check)
      if finding.y != 0 {
        let step = FlightRecorder(self).progress(machine).step
        // What is looked at behind the end of an operation is how it was completed.
        let failedAt = step == .idle ? .completion : step
        let details = (Int64(check) | Int64(failedAt.rawValue) &<< 8, finding.x, finding.y &- 1, Int64(0))
        return OperationStatus(.checkFailed, rank: Int64(rank), details)
      }
      check = check &+ 1
    }
    return nil
  }
}

/// Whether a check of this rank's kernels has failed. The operation has ended with that then, and so will all later
/// ones; peers, which would wait for this rank in vain, are told by the host. To be asked by one worker when all have
/// arrived.
@inlinable func endsInFailedCheck<M: Machine>(_ machine: M, view: RankView, operation: OperationView) -> Bool {
  guard let status = view.failedCheck(machine) else { return false }
  machine.forEach(1) { _ in
    operation.set(status)
    view.failure.store(status, at: 0)
  }
  operation.tell(machine, view)
  FlightRecorder(view).finish(machine, status, now: machine.now)
  return true
}

/// Counts that all ranks have told in an exchange: so many rows can be numbered.
@inlinable func checkCounts<M: Machine>(_ machine: M, view: RankView, topK: Int32) {
  let counterCount = view.rankCount &+ view.expertCount
  let countMax = Int64(Int32.max / (view.rankCount &* max(1, topK)))
  machine.forEach(view.rankCount &* counterCount) { cell in
    let count = exchangedCount(view, source: cell / counterCount, index: cell % counterCount)
    _ = view.check(.count, Int64(count), below: countMax &+ 1)
  }
}

/// Memory that all ranks have offered.
@inlinable func checkOffers<M: Machine>(_ machine: M, view: RankView) {
  machine.forEach(view.rankCount) { rank in
    if view.isMasked(rank) { return }
    let header = exchangeHeader(view, source: rank)
    _ = view.checkArena(of: rank, header.outputOffset, byteCount: header.outputCapacity)
  }
}

/// The rows of all ranks lie where peers may read them.
@inlinable func checkRows<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let view = arguments.view.behindExchange
  let weightsByteCount = arguments.weightsOutput.isNull ? 0 : 4 &* Int64(arguments.weightsPerRow)
  machine.forEach(view.rankCount) { rank in
    if view.isMasked(rank) { return }
    let header = exchangeHeader(view, source: rank)
    let rowCount = Int64(arguments.handle.total(atRank: rank))
    let stagedRowCount = Int64(arguments.steps.stagedRowCount(rankCount: Int(view.rankCount)))
    let readRowCount = arguments.steps.stepCount == 0 ? rowCount : stagedRowCount
    _ = view.checkArena(of: rank, header.outputOffset, byteCount: readRowCount &* Int64(arguments.rowByteCount))
    _ = view.checkArena(of: rank, header.weightsOffset, byteCount: rowCount &* weightsByteCount)
    if arguments.isEncoded {
      let width = Int64(LogFMT.byteCount(channelCount: arguments.elementsPerRow))
      _ = view.checkArena(of: rank, header.recordsOffset, byteCount: rowCount &* width)
    }
  }
}

/// The end of a dispatch's workers: every row of this rank's output has come from some rank, once. Within a group of
/// rows, they are in order.
@inlinable func checkArrivals<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, operation) = (arguments.view, arguments.operation)
  // Not all workers need have left the countdown before this one.
  guard machine.arriveLocal(view.arrivals.advanced(byBytes: 4), for: .rank), operation.outcome.isOK else { return }
  checkOrigins(machine, arguments)
  _ = endsInFailedCheck(machine, view: view, operation: operation)
}

@inlinable func checkOrigins<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, handle) = (arguments.view, arguments.handle)
  if !handle.layout.hasPadding {
    var index: Int32 = 0
    while index < handle.runCount {
      let run = handle.run(index, view)
      checkOrigins(machine, arguments, first: run.lowerBound, count: run.upperBound &- run.lowerBound)
      index = index &+ 1
    }
    return
  }
  var first: Int32 = 0
  var expert: Int32 = 0
  while expert < view.localExpertCount {
    let count = handle.at(handle.layout.tokensPerExpert).load(Int32.self, at: expert)
    checkOrigins(machine, arguments, first: first, count: count)
    first = first &+ handle.at(handle.layout.alignedTokensPerExpert).load(Int32.self, at: expert)
    expert = expert &+ 1
  }
}

@inlinable func checkOrigins<M: Machine>(_ machine: M, _ arguments: DispatchArguments, first: Int32, count: Int32) {
  let view = arguments.view
  let origins = arguments.operation.column(Columns.origins, atRank: view.rank)
  machine.forEach(count) { index in
    let row = first &+ index
    let origin = origins.load(SIMD2<Int32>.self, at: row)
    _ = view.check(.source, origin.x, below: view.rankCount)
    if index == 0 { return }
    let before = origins.load(SIMD2<Int32>.self, at: row &- 1)
    let distance = (Int64(origin.x) &- Int64(before.x)) &<< 32 &+ Int64(origin.y) &- Int64(before.y)
    _ = view.check(.order, distance, below: Int64.max &- 1)
  }
}
