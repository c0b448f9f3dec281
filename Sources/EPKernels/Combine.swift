/// Everything that one rank's combine needs, in one fixed-layout struct.
@frozen public struct CombineArguments {
  public var view: RankView
  public var header: ExchangeHeader
  public var handle: HandleView
  public var operation: OperationView
  /// This rank's rows (and top-k weights) to be copied into its arena first; null when they lie there already.
  public var stagedRows: Address
  public var stagedWeights: Address
  public var rowCount: Int32
  public var steps: CombineSteps
  /// BF16, FP16 or FP32; or LogFMT, which BF16 rows become on the way.
  public var format: RowFormat
  public var elementsPerRow: Int32
  /// Sum of the token's rows, `[tokenCount, elementsPerRow]`, in this rank's memory.
  public var output: Address
  /// Float `[tokenCount, topK]` of the token's owner, by expert only; null: rows are added as they are.
  public var rowWeights: Address
  public var biases: (Address, Address)
  /// Float `[tokenCount, topK]`: the summed top-k weights; null when not asked for.
  public var weightsOutput: Address

  @inlinable public init(
    view: RankView, header: ExchangeHeader, handle: HandleView, operation: OperationView, stagedRows: Address,
    stagedWeights: Address, rowCount: Int32, steps: CombineSteps, format: RowFormat, elementsPerRow: Int32,
    output: Address, rowWeights: Address, biases: (Address, Address), weightsOutput: Address
  ) {
    self.view = view
    self.header = header
    self.handle = handle
    self.operation = operation
    self.stagedRows = stagedRows
    self.stagedWeights = stagedWeights
    self.rowCount = rowCount
    self.steps = steps
    self.format = format
    self.elementsPerRow = elementsPerRow
    self.output = output
    self.rowWeights = rowWeights
    self.biases = biases
    self.weightsOutput = weightsOutput
  }

  @inlinable var rowByteCount: Int32 { elementsPerRow &* (format == .fp32 ? 4 : 2) }
  /// Top-k weights that one received row carries.
  @inlinable var weightsPerRow: Int32 { handle.layout.layout == .bySource ? handle.layout.topK : 1 }
  @inlinable var isEncoded: Bool { format == .logFMT }
  /// Whether this rank reads the rows of its own tokens where the caller has them: by source, they lie together. Not those
  /// that travel coded, so that sums do not depend on where tokens are.
  @inlinable var readsOwnRows: Bool { !stagedRows.isNull && handle.layout.layout == .bySource && !isEncoded }
  /// Whether anything is written into the arena first. What lies there already was written by earlier launches.
  @inlinable var stages: Bool { !stagedRows.isNull || !stagedWeights.isNull || isEncoded }
  /// A row as it is read, with its weights where those are asked for.
  @inlinable var byteCountPerRow: Int64 {
    let sentByteCount = isEncoded ? LogFMT.byteCount(channelCount: elementsPerRow) : rowByteCount
    return Int64(sentByteCount) &+ (weightsOutput.isNull ? 0 : 4 &* Int64(weightsPerRow))
  }
}

@inlinable public func combine<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  var arguments = arguments
  arguments.view = arguments.operation.begun(machine, arguments.view)
  let (view, operation) = (arguments.view, arguments.operation)
  var start = machine.noReduce
  let turn: Turn
  if operation.does(.begin) || operation.does(.middle) {
    turn = inTurn(machine, view: view, operation: operation) {
      prepareCombine(machine, arguments) { start = arguments.startEarly(machine) }
    } meanwhile: {
      start = arguments.startEarly(machine)
    } then: {
      if !$0.isAgreed { operation.tell(machine, view) }
    }
  } else {
    turn = Turn(leads: false, operation.outcome)
  }
  deliverCombine(machine, arguments, turn, from: start)
}

/// First half of a combine: rows outside the arena are staged into it; then the exchange, which says that this rank's
/// rows are ready. Returns what has come of it to the worker that has ended it.
@inlinable func prepareCombine<M: Machine>(
  _ machine: M, _ arguments: CombineArguments, meanwhile: () -> Void
) -> Outcome? {
  let (view, operation) = (arguments.view, arguments.operation)
  let handleEpoch = arguments.handle.epoch(isUsed: arguments.header.fault == 0)
  if (operation.does(.begin) || operation.part.isHalf) && machine.workerIndex == 0 { begin(machine, arguments) }
  if arguments.header.fault == 0 && operation.does(.begin) {
    stageRows(machine, arguments)
    stageWeights(machine, arguments)
  }
  guard machine.arriveLocal(view.arrivals, for: arguments.stages ? view.peers : .rank) else { return nil }
  return findRows(machine, arguments, handleEpoch: handleEpoch, fill: { _ in }, meanwhile: meanwhile) { rank, peer in
    arguments.readsOwnRows && rank == view.rank
      ? arguments.stagedRows : view.arena(of: rank).advanced(byBytes: peer.outputOffset)
  }
}

/// That rows are summed, and how many there are, as a dispatch has counted them. By one worker, on a single lane.
@inlinable func noteSums<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let (recorder, rows) = (FlightRecorder(arguments.view), CountedRows(arguments.handle))
  recorder.enter(machine, .deliver, now: machine.now)
  recorder.count(machine, CountedRows(sent: rows.received, received: rows.sent))
}

/// The flight record begins.
@inlinable func begin<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let half = arguments.operation.part == .receiveCombine
  FlightRecorder(arguments.view).begin(
    machine, view: arguments.view, operation: half ? Operation.receiveCombine.rawValue : arguments.header.operation,
    tokenCount: arguments.handle.layout.chunks.tokenCount, bytesPerRow: arguments.byteCountPerRow)
}

/// The part of one worker alone: where every rank's rows lie. Returns what the status says then.
///
/// - Parameters:
///   - fill: as that of `exchange`, like `meanwhile`.
///   - rows: where a rank's row 0 lies, by its header.
@inlinable @inline(__always) func findRows<M: Machine>(
  _ machine: M, _ arguments: CombineArguments, handleEpoch: Int64, fill: (_ pages: ExchangePages) -> Void,
  meanwhile: () -> Void, rows: (_ rank: Int32, _ peer: ExchangeHeader) -> Address
) -> Outcome {
  let (handle, operation) = (arguments.handle, arguments.operation)
  operation.resetCounter()
  let goesOn = exchange(
    machine, view: arguments.view, header: arguments.header, handleEpoch: handleEpoch, operation: operation,
    fill: { pages in if arguments.header.fault == 0 { fill(pages) } }, meanwhile: meanwhile)
  if !goesOn { return operation.outcome }
  let view = arguments.view.behindExchange
  let (status, _) = compareHeaders(machine, view, with: view.rankCount) { rank in
    let peer = exchangeHeader(view, source: rank)
    operation.note(peer)
    operation.setColumn(Columns.rows, atRank: rank, rows(rank, peer))
    if arguments.isEncoded {
      operation.setColumn(Columns.records, atRank: rank, view.arena(of: rank).advanced(byBytes: peer.recordsOffset))
    }
    operation.setColumn(
      Columns.weights, atRank: rank, view.arena(of: rank).advanced(byBytes: peer.weightsOffset))
    return false
  }
  machine.forEach(1) { _ in operation.set(status) }
  let outcome = Outcome(status)
  if !outcome.isOK { return outcome }
  leaveOutDestinations(machine, view, handle)
  #if CHECKED
    checkRows(machine, arguments)
    if endsInFailedCheck(machine, view: view, operation: operation) { return operation.outcome }
  #endif
  return outcome
}

@inlinable func stageRows<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  if arguments.stagedRows.isNull && !arguments.isEncoded { return }
  let (view, handle, rowByteCount) = (arguments.view, arguments.handle, arguments.rowByteCount)
  #if CHECKED
    let byteCount = Int64(arguments.rowCount) &* Int64(rowByteCount)
    guard view.checkArena(of: view.rank, arguments.header.outputOffset, byteCount: byteCount) else { return }
    if arguments.isEncoded {
      let width = Int64(LogFMT.byteCount(channelCount: arguments.elementsPerRow))
      let recordsByteCount = Int64(arguments.rowCount) &* width
      guard view.checkArena(of: view.rank, arguments.header.recordsOffset, byteCount: recordsByteCount) else { return }
    }
  #endif
  // What lies behind the rows that have come is not read.
  let rowCount = max(0, min(arguments.rowCount, handle.total(atRank: view.rank)))
  let own =
    arguments.readsOwnRows ? handle.ownRows(view, below: rowCount) : Range(uncheckedBounds: (rowCount, rowCount))
  // Of each run what lies before the own rows, and what lies behind them.
  let partCount: Int32 = arguments.readsOwnRows ? 2 : 1
  let runCount = partCount &* handle.runCount
  let run = { (index: Int32) in
    let (run, isFirst) = (handle.run(index / partCount, view), index % partCount == 0)
    let first = isFirst ? run.lowerBound : max(run.lowerBound, own.upperBound)
    return RowRun(first: first, count: min(run.upperBound, isFirst ? own.lowerBound : rowCount) &- first)
  }
  let target = view.ownArena.advanced(byBytes: arguments.header.outputOffset)
  if !arguments.isEncoded {
    let job = CopyJob(source: arguments.stagedRows, target: target, rowByteCount: rowByteCount)
    return machine.copyRows(job, runCount: runCount, run: run)
  }
  let job = EncodeJob(
    source: arguments.stagedRows.isNull ? target : arguments.stagedRows, elementCount: arguments.elementsPerRow,
    records: view.ownArena.advanced(byBytes: arguments.header.recordsOffset), exact: target)
  machine.encodeRows(job, runCount: runCount, run: run)
}

@inlinable func stageWeights<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let arena = arguments.view.ownArena
  if !arguments.stagedWeights.isNull {
    let byteCount = 4 &* arguments.weightsPerRow
    #if CHECKED
      let end = Int64(arguments.rowCount) &* Int64(byteCount)
      guard arguments.view.checkArena(of: arguments.view.rank, arguments.header.weightsOffset, byteCount: end) else {
        return
      }
    #endif
    let staged = arena.advanced(byBytes: arguments.header.weightsOffset)
    machine.copyRecords(arguments.rowCount, byteCount: byteCount) { row in
      let offset = Int64(row) &* Int64(byteCount)
      return RecordRoute(
        source: arguments.stagedWeights.advanced(byBytes: offset), target: staged.advanced(byBytes: offset))
    }
  }
}

/// Second half: each token's owner reads the rows where they lie, sums them, and then tells their owners that it has.
///
/// - Parameter start: of all tokens, where rows lie at places that are known early.
@inlinable func deliverCombine<M: Machine>(
  _ machine: M, _ arguments: CombineArguments, _ turn: Turn, from start: M.ReduceStart
) {
  guard turn.outcome.isAgreed else { return }
  if turn.outcome.isOK && arguments.operation.does(.middle) {
    let (tokens, weights) = (arguments.allTokens, arguments.rowWeights)
    let start =
      arguments.startsEarly ? start : arguments.startSums(machine, of: tokens, rowWeights: weights)
    sumRows(machine, arguments, of: tokens, rowWeights: weights, from: start) {
      if turn.leads != 0 { noteSums(machine, arguments) }
    }
    if !arguments.weightsOutput.isNull { combineWeights(machine, arguments) }
  }
  complete(machine, view: arguments.view, operation: arguments.operation, turn.outcome)
}

extension CombineArguments {
  @inlinable var allTokens: Range<Int32> { Range(uncheckedBounds: (0, handle.layout.chunks.tokenCount)) }

  /// Which rows of which ranks is known before it is known where those have them, unless ranks may be masked in between. Checked
  /// kernels look later, where places that are led astray belong to the step that uses them.
  @inlinable var startsEarly: Bool {
    #if CHECKED
      false
    #else
      operation.does(.middle) && !view.masksRanks
    #endif
  }

  /// A handle of a dispatch that has failed says nothing.
  @inlinable func startEarly<M: Machine>(_ machine: M) -> M.ReduceStart {
    guard startsEarly, header.fault == 0, handle.epoch != 0 else { return machine.noReduce }
    return startSums(machine, of: allTokens, rowWeights: rowWeights)
  }

  @inlinable func startSums<M: Machine>(_ machine: M, of tokens: Range<Int32>, rowWeights: Address) -> M.ReduceStart {
    machine.startReduce(reduceJob(of: tokens, rowWeights: rowWeights)) {
      weightedPlace(token: $0, slot: $1, rowWeights: rowWeights)
    }
  }

  @inlinable func reduceJob(of tokens: Range<Int32>, rowWeights: Address) -> ReduceJob {
    ReduceJob(
      output: output, firstRow: tokens.lowerBound, rowCount: tokens.upperBound &- tokens.lowerBound,
      elementCount: elementsPerRow, slotCount: handle.layout.slotCount, format: format,
      isWeighted: !rowWeights.isNull, biases: biases, counter: operation.counter)
  }

  @inlinable func weightedPlace(token: Int32, slot: Int32, rowWeights: Address) -> WeightedPlace {
    let weight = rowWeights.isNull ? 1 : rowWeights.load(Float.self, at: token &* handle.layout.slotCount &+ slot)
    return WeightedPlace(handle.place(token: token, slot: slot, view), weight: weight)
  }
}

/// - Parameters:
///   - rowWeights: as those of the arguments.
///   - start: of these tokens.
///   - meanwhile: as that of `reduceRows`.
@inlinable func sumRows<M: Machine>(
  _ machine: M, _ arguments: CombineArguments, of tokens: Range<Int32>, rowWeights: Address, from start: M.ReduceStart,
  meanwhile: () -> Void
) {
  let operation = arguments.operation
  let rowByteCount = Int64(arguments.rowByteCount)
  let recordsByteCount = Int64(LogFMT.byteCount(channelCount: arguments.elementsPerRow))
  machine.reduceRows(arguments.reduceJob(of: tokens, rowWeights: rowWeights), from: start, meanwhile: meanwhile) {
    arguments.weightedPlace(token: $0, slot: $1, rowWeights: rowWeights)
  } source: { found in
    let (place, weight) = (found.place, found.weight)
    let column = operation.column(Columns.rows, atRank: place.rank)
    if place.isNone || weight == 0 { return .none }
    let row = column.advanced(byBytes: Int64(place.row) &* rowByteCount)
    if !arguments.isEncoded { return RowSource(row: row, weight: weight) }
    let records = operation.column(Columns.records, atRank: place.rank)
    return RowSource(
      row: records.advanced(byBytes: Int64(place.row) &* recordsByteCount), weight: weight, exact: row)
  }
}

/// By source: sums the received weights over ranks. By expert: each slot's weight comes from its one row.
@inlinable func combineWeights<M: Machine>(_ machine: M, _ arguments: CombineArguments) {
  let (view, handle, operation) = (arguments.view, arguments.handle, arguments.operation)
  let topK = handle.layout.topK
  if handle.layout.layout == .bySource {
    let job = ReduceJob(
      output: arguments.weightsOutput, rowCount: handle.layout.chunks.tokenCount, elementCount: topK,
      slotCount: handle.layout.slotCount, format: .fp32, isWeighted: false, biases: (.null, .null))
    return machine.reduceRows(job) {
      arguments.weightedPlace(token: $0, slot: $1, rowWeights: .null)
    } source: { found in
      let place = found.place
      if place.isNone { return .none }
      let weights = operation.column(Columns.weights, atRank: place.rank)
      return RowSource(row: weights.advanced(byBytes: 4 &* Int64(place.row) &* Int64(topK)), weight: 1)
    }
  }
  machine.shareOut(handle.layout.chunks.tokenCount &* topK) { cell in
    let place = handle.place(token: cell / topK, slot: cell % topK, view)
    let weights = operation.column(Columns.weights, atRank: place.rank)
    arguments.weightsOutput.store(place.isNone ? 0 : weights.load(Float.self, at: place.row), at: cell)
  }
}
