/// A combine of rows that lie outside the arena, in steps: so many tokens of every rank, with their rows at all ranks. A
/// step's rows are copied into the arena in one launch, and summed in the next, while those of the step behind are
/// copied. So two steps' rows are there at a time, and pulls begin before the copy ends.
///
/// To peers, each launch is a combine of its own: its exchange says that what the launch before has copied is there, and
/// its completion that this rank has read theirs. By source only: there, a source's rows of a step lie together.
@frozen public struct CombineSteps {
  /// This launch copies the rows of step `launch`, and sums those of `launch - 1`.
  public var launch: Int32
  /// 0: the combine is not in steps.
  public var stepCount: Int32
  public var tokensPerStep: Int32

  /// - Parameter tokenCount: that a rank has at most.
  @inlinable public init(tokenCount: Int32, tokensPerStep: Int32) {
    launch = 0
    stepCount = tokensPerStep == 0 ? 0 : (tokenCount &- 1) / tokensPerStep &+ 1
    self.tokensPerStep = tokensPerStep
  }

  @inlinable public static var none: CombineSteps { CombineSteps(tokenCount: 0, tokensPerStep: 0) }

  /// Rows of the arena that they take: of two steps, of all peers' tokens.
  @inlinable public func stagedRowCount(rankCount: Int) -> Int { 2 * (rankCount - 1) * Int(tokensPerStep) }

  @inlinable func tokens(ofStep step: Int32, of tokenCount: Int32) -> Range<Int32> {
    let first = min(Int64(tokenCount), Int64(step) &* Int64(tokensPerStep))
    let end = min(Int64(tokenCount), first &+ Int64(tokensPerStep))
    return Range(uncheckedBounds: (Int32(truncatingIfNeeded: first), Int32(truncatingIfNeeded: end)))
  }

  /// Which row of a rank's staging memory is the first of the step and the source.
  @inlinable func place(step: Int32, source: Int32, at rank: Int32, rankCount: Int32) -> Int32 {
    let region = (step & 1) &* (rankCount &- 1) &+ (source < rank ? source : source &- 1)
    return region &* tokensPerStep
  }
}

/// One rank's rows of a step at one rank: they follow each other.
@frozen @usableFromInline struct StepRows {
  @usableFromInline var first: Int32
  @usableFromInline var count: Int32

  @inlinable init(first: Int32, count: Int32) {
    self.first = first
    self.count = count
  }
}

@inlinable public func combineStep<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  var arguments = arguments
  arguments.view = arguments.operation.begun(machine, arguments.view)
  let (view, operation, steps) = (arguments.view, arguments.operation, arguments.steps)
  if steps.launch > 0 && !operation.outcome.isOK {
    // It has ended with an earlier launch.
    if !operation.does(.middle) && machine.workerIndex == 0 { openGates(machine, view) }
    return
  }
  let turn: Turn
  if operation.does(.begin) || operation.does(.middle) {
    turn = inTurn(machine, view: view, operation: operation) {
      prepareStep(machine, arguments)
    } meanwhile: {
    } then: {
      if $0.isOK && operation.does(.middle) { noteSums(machine, arguments) }
      if !$0.isAgreed { operation.tell(machine, view) }
    }
  } else {
    turn = Turn(leads: false, operation.outcome)
  }
  guard turn.outcome.isAgreed else { return }
  if turn.outcome.isOK && operation.does(.middle) {
    copyStep(machine, arguments)
    if steps.launch > 0 {
      let tokens = steps.tokens(ofStep: steps.launch &- 1, of: arguments.handle.layout.chunks.tokenCount)
      // By source, rows are added as they are.
      let start = arguments.startSums(machine, of: tokens, rowWeights: .null)
      sumRows(machine, arguments, of: tokens, rowWeights: .null, from: start) {}
    }
    if steps.launch == steps.stepCount && !arguments.weightsOutput.isNull { combineWeights(machine, arguments) }
  }
  complete(machine, view: view, operation: operation, turn.outcome)
}

@inlinable func prepareStep<M: Machine>(_ machine: M, _ arguments: CombineArguments) -> Outcome? {
  let (view, operation, steps) = (arguments.view, arguments.operation, arguments.steps)
  let handleEpoch = arguments.handle.epoch(isUsed: arguments.header.fault == 0)
  if operation.does(.begin) && machine.workerIndex == 0 { begin(machine, arguments) }
  if steps.launch == 0 && arguments.header.fault == 0 && operation.does(.begin) {
    findStepRows(machine, arguments)
    stageWeights(machine, arguments)
  }
  guard machine.arriveLocal(view.arrivals, for: view.peers) else { return nil }
  let rowByteCount = Int64(arguments.rowByteCount)
  let outcome = findRows(machine, arguments, handleEpoch: handleEpoch) { pages in
    machine.forEach(view.rankCount) { rank in
      pages.store(machine, operation.stepRows(steps.launch, atRank: rank), at: rank, behind: ExchangeHeader.byteCount)
    }
  } meanwhile: {
  } rows: { rank, peer in
    if rank == view.rank { return arguments.stagedRows }
    let step = steps.launch &- 1
    let place = steps.place(step: step, source: view.rank, at: rank, rankCount: view.rankCount)
    let rowZero = Int64(place) &- Int64(operation.stepRows(step, atRank: rank).first)
    return view.arena(of: rank).advanced(byBytes: peer.outputOffset &+ rowZero &* rowByteCount)
  }
  #if CHECKED
    if operation.does(.middle) && outcome.isOK {
      checkSteps(machine, arguments)
      if endsInFailedCheck(machine, view: view, operation: operation) { return operation.outcome }
    }
  #endif
  return outcome
}

/// This rank's rows of all steps at all peers; nothing of a dispatch that has failed.
@inlinable func findStepRows<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let (view, handle, operation, steps) = (arguments.view, arguments.handle, arguments.operation, arguments.steps)
  if handle.epoch == 0 { return }
  var cell = machine.workerIndex
  while cell < steps.stepCount &* view.rankCount {
    let rank = cell % view.rankCount
    let tokens = steps.tokens(ofStep: cell / view.rankCount, of: handle.layout.chunks.tokenCount)
    let first = machine.first(of: tokens) { rank != view.rank && handle.goes(token: $0, to: rank) }
    // The other way round.
    let distance = machine.first(of: Range(uncheckedBounds: (0, tokens.upperBound &- tokens.lowerBound))) {
      handle.goes(token: tokens.upperBound &- 1 &- $0, to: rank)
    }
    machine.forEach(1) { _ in
      var rows = StepRows(first: 0, count: 0)
      if first >= 0 {
        rows.first = handle.place(token: first, slot: rank, view).row
        let last = handle.place(token: tokens.upperBound &- 1 &- distance, slot: rank, view).row
        rows.count = last &- rows.first &+ 1
      }
      operation.at(operation.layout.stepRows).store(rows, at: cell)
    }
    cell = cell &+ machine.workerCount
  }
}

#if CHECKED
  /// What all sources have told can be copied.
  @inlinable func checkSteps<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
    let (view, total) = (arguments.view, arguments.handle.total(atRank: arguments.view.rank))
    machine.forEach(view.rankCount) { source in
      let rows = stepRows(view, source: source)
      _ = view.check(.count, rows.count, below: arguments.steps.tokensPerStep &+ 1)
      _ = view.check(.row, rows.first &+ rows.count, below: total &+ 1)
    }
  }
#endif

/// What a source has told of the step's rows here.
@inlinable func stepRows(_ view: RankView, source: Int32) -> StepRows {
  arrivedBlock(view, source: source).advanced(byBytes: ExchangeHeader.byteCount).load(StepRows.self, at: view.rank)
}

/// Copies the rows of this launch's step.
@inlinable func copyStep<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let (view, steps) = (arguments.view, arguments.steps)
  let job = CopyJob(
    source: arguments.stagedRows, target: view.ownArena.advanced(byBytes: arguments.header.outputOffset),
    rowByteCount: arguments.rowByteCount)
  machine.copyRows(job, runCount: view.rankCount) { source in
    let rows = stepRows(view, source: source)
    let place = steps.place(step: steps.launch, source: source, at: view.rank, rankCount: view.rankCount)
    return RowRun(first: rows.first, count: rows.count, place: place)
  }
}

extension HandleView {
  /// By source.
  @inlinable func goes(token: Int32, to rank: Int32) -> Bool {
    at(layout.slotIndices).load(Int32.self, at: token &* layout.rankCount &+ rank) >= 0
  }
}

extension OperationView {
  /// Of this rank's tokens; of no step where there is none.
  @inlinable func stepRows(_ step: Int32, atRank rank: Int32) -> StepRows {
    if step < 0 || step >= layout.stepCount { return StepRows(first: 0, count: 0) }
    return at(layout.stepRows).load(StepRows.self, at: step &* layout.rankCount &+ rank)
  }
}
