/// Everything that one rank's dispatch needs, in one fixed-layout struct.
@frozen public struct DispatchArguments {
  public var view: RankView
  public var header: ExchangeHeader
  public var handle: HandleView
  public var operation: OperationView
  public var routing: RoutingView
  public var columns: Columns
  public var transform: RowTransform
  /// Bytes from four bytes of a row's scales to the next four: 4, or, where a group's scales lie in columns, those of a
  /// column.
  public var scaleStride: Int32
  /// As `ScatterJob.globalScale`.
  public var globalScale: Float
  /// Bytes of one row of the caller's tensor.
  public var sourceRowByteCount: Int32
  /// The caller's tensors for the columns `Columns.rows` to `Columns.origins - 1`; null where there is none.
  public var sources: (Address, Address, Address, Address, Address)
  /// Where the caller's scales lie, if in columns: their source is then where the operation brings them into rows. Null
  /// otherwise.
  public var scaleColumns: Address
  public var scaleColumnByteCount: Int32
  public var expertAlignment: Int32
  /// Not zero: rows between groups of experts are zeroed. An integer, since kernels keep those in registers.
  public var zeroesPadding: Int32
  /// Int32 `[localExpertCount]`: to each, the tokens that the expert receives are added; null where nobody asks.
  public var expertStatistics: Address
  /// The handle is complete: no layout, no counts.
  public var isCached: Bool
  /// The column that is written with the rows: their scales that are made, or else the first of scales and sidecars that can be
  /// copied beside them; that of the rows where there is none.
  public var besideColumn: Int32
  /// Bytes a row there.
  public var besideByteCount: Int32
  /// Row 0 of what is copied; null where nothing is.
  public var beside: Address
  /// Not zero: there are scales or sidecars that are not copied beside the rows.
  public var copiesColumns: Int32

  @inlinable public init(
    view: RankView, header: ExchangeHeader, handle: HandleView, operation: OperationView, routing: RoutingView,
    columns: Columns, transform: RowTransform, scaleStride: Int32, globalScale: Float, sourceRowByteCount: Int32,
    sources: (Address, Address, Address, Address, Address), scaleColumns: Address = .null,
    scaleColumnByteCount: Int32 = 0, expertAlignment: Int32, zeroesPadding: Int32, expertStatistics: Address,
    isCached: Bool
  ) {
    self.view = view
    self.header = header
    self.handle = handle
    self.operation = operation
    self.routing = routing
    self.columns = columns
    self.transform = transform
    self.scaleStride = scaleStride
    self.globalScale = globalScale
    self.sourceRowByteCount = sourceRowByteCount
    self.sources = sources
    self.scaleColumns = scaleColumns
    self.scaleColumnByteCount = scaleColumnByteCount
    self.expertAlignment = expertAlignment
    self.zeroesPadding = zeroesPadding
    self.expertStatistics = expertStatistics
    self.isCached = isCached
    (besideColumn, besideByteCount, beside, copiesColumns) = (Columns.rows, 0, .null, 0)
    besideColumn = transform == .copy ? columnToCopy : Columns.scales
    if besideColumn != Columns.rows {
      besideByteCount = columns[besideColumn]
      if transform == .copy { beside = source(ofColumn: besideColumn) }
    }
    let hasMore = (Columns.scales..<Columns.origins).contains { $0 != besideColumn && !source(ofColumn: $0).isNull }
    copiesColumns = hasMore ? 1 : 0
  }

  /// Counts say where padding lies: workers wait for them.
  @inlinable var countsFirst: Bool { handle.layout.hasPadding && !isCached }
  @inlinable func countsLater(_ outcome: Outcome) -> Bool {
    !isCached && !(countsFirst && outcome.isOK) && (outcome.isOK || outcome.overflows)
  }

  @usableFromInline var columnToCopy: Int32 {
    if handle.layout.slotCount > 32 { return Columns.rows }
    return (Columns.scales..<Columns.origins).first { column in
      let fits = columns[column] % 16 == 0 && columns[column] <= ScatterJob.besideByteCountMax
      return fits && !source(ofColumn: column).isNull
    } ?? Columns.rows
  }

  /// Workers that wait for their turn, or for the peers, read their first rows meanwhile, unless those have scales that are still to
  /// be brought into rows.
  @inlinable var startsEarly: Bool { operation.does(.middle) && scaleColumns.isNull }

  /// Of a rank that was called wrongly, whose rows do not move, nothing need be where its arguments say.
  @inlinable func startEarly<M: Machine>(_ machine: M) -> M.ScatterStart {
    startsEarly && header.fault == 0 ? machine.startScatter(scatterJob) : machine.noScatter
  }

  /// But for `writtenByteCount`.
  @inlinable var scatterJob: ScatterJob {
    ScatterJob(
      source: source(ofColumn: Columns.rows), rowCount: handle.layout.chunks.tokenCount,
      rowByteCount: sourceRowByteCount, slotCount: handle.layout.slotCount, transform: transform,
      scaleStride: scaleStride, globalScale: globalScale, beside: beside, besideByteCount: besideByteCount,
      writtenByteCount: 0, counter: operation.counter, sharerCount: view.sharesDevice == 0 ? 1 : view.rankCount)
  }

  @inlinable func source(ofColumn column: Int32) -> Address {
    switch column {
    case 0: sources.0
    case 1: sources.1
    case 2: sources.2
    case 3: sources.3
    default: sources.4
    }
  }
}

/// A whole dispatch, for outputs of the worst case: no host has to know the counts in between.
@inlinable public func dispatch<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  var arguments = arguments
  if arguments.operation.does(.begin) { expectRouting(machine, arguments) }
  arguments.view = arguments.operation.begun(machine, arguments.view)
  let (view, operation) = (arguments.view, arguments.operation)
  var start = machine.noScatter
  let turn: Turn
  if operation.does(.begin) || operation.does(.middle) {
    turn = inTurn(machine, view: view, operation: operation) {
      prepareDispatch(machine, arguments) { start = arguments.startEarly(machine) }
    } meanwhile: {
      start = arguments.startEarly(machine)
    } then: { outcome in
      noteExchange(machine, view, operation, outcome)
      if !operation.countsRowsLast(view) {
        noteRows(machine, arguments, view, outcome, rowsToNote(machine, arguments, outcome))
      }
    }
  } else {
    turn = Turn(leads: false, operation.outcome)
  }
  if !turn.outcome.isOK || !operation.does(.middle) {
    machine.abandon(start)
  } else {
    if !arguments.startsEarly { start = machine.startScatter(arguments.scatterJob) }
    moveRows(machine, arguments, from: start, isCounted: arguments.isCached)
  }
  endDispatch(machine, arguments, turn.outcome, countsRows: operation.countsRowsLast(view) ? turn.leads : 0)
}

/// What a worker numbers its first chunk by.
@inlinable func expectRouting<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, routing) = (arguments.view, arguments.routing)
  machine.expect(view.arenas, byteCount: 8 &* Int64(view.rankCount))
  if arguments.isCached || routing.topK == 0 || arguments.header.fault != 0 { return }
  machine.expect(view.expertOwner, byteCount: 4 &* Int64(view.expertCount))
  let tokens = arguments.handle.layout.chunks.tokens(of: machine.workerIndex)
  let tokenByteCount = Int64(routing.topK) &* Int64(routing.indexByteCount)
  machine.expect(
    routing.indices.advanced(byBytes: Int64(tokens.lowerBound) &* tokenByteCount),
    byteCount: Int64(tokens.upperBound &- tokens.lowerBound) &* tokenByteCount)
}

/// The first half of a dispatch with exact sizing: the host waits for its status.
@inlinable public func prepareExactDispatch<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  var arguments = arguments
  arguments.view = arguments.operation.begun(machine, arguments.view)
  let (view, operation) = (arguments.view, arguments.operation)
  guard let outcome = prepareDispatch(machine, arguments, meanwhile: {}) else { return }
  noteExchange(machine, view, operation, outcome)
  guard operation.does(.middle), outcome.isAgreed else { return }
  noteRows(machine, arguments, view, outcome, rowsToNote(machine, arguments, outcome))
  if !outcome.isOK { endInVain(machine, view: view, operation: operation) }
  operation.tell(machine, view)
}

/// First half of a dispatch: layout, exchange, placement. Afterwards every rank knows every row's place, and nothing
/// has moved. Returns what has come of it to the worker that has ended it.
///
/// - Parameter meanwhile: as that of `exchange`.
@inlinable func prepareDispatch<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, meanwhile: () -> Void
) -> Outcome? {
  let (view, handle, operation) = (arguments.view, arguments.handle, arguments.operation)
  let handleEpoch = handle.epoch(isUsed: arguments.isCached && arguments.header.fault == 0)
  // The first worker has the most to do.
  if operation.does(.begin) && machine.workerIndex &+ 1 == machine.workerCount { begin(machine, arguments) }
  if operation.does(.begin) && !arguments.scaleColumns.isNull { bringScalesIntoRows(machine, arguments) }
  let isLaidOut = !arguments.isCached && arguments.header.fault == 0
  if isLaidOut && operation.does(.begin) {
    var chunk = machine.workerIndex
    while chunk < handle.layout.chunks.chunkCount {
      layOut(
        machine, chunk: chunk, routing: arguments.routing, view: view, handle: handle, operation: operation)
      chunk = chunk &+ machine.workerCount
    }
  }
  guard machine.arriveLocal(view.arrivals, for: .rank) else { return nil }
  return agree(machine, arguments, handleEpoch: handleEpoch, isLaidOut: isLaidOut, meanwhile: meanwhile)
}

/// Rows of scales, which go with their tokens' rows later, from columns.
@inlinable func bringScalesIntoRows<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (tokenCount, rows) = (arguments.handle.layout.chunks.tokenCount, arguments.source(ofColumn: Columns.scales))
  let scaleCount = arguments.columns[Columns.scales] / 4
  // Neighbours read along a column, and write to as many rows: eight scales each, read together, and written in vectors where
  // rows have whole ones.
  machine.shareOut(tokenCount &* ((scaleCount &+ 7) / 8)) { cell in
    let (first, token) = (cell / tokenCount &* 8, cell % tokenCount)
    let row = rows.advanced(byBytes: 4 &* (Int64(token) &* Int64(scaleCount) &+ Int64(first)))
    let scale = { (index: Int32) -> UInt32 in
      let offset = Int64(first &+ index) &* Int64(arguments.scaleColumnByteCount)
      return arguments.scaleColumns.advanced(byBytes: offset).load(UInt32.self, at: token)
    }
    if scaleCount & 7 == 0 {
      let (a, b) = (SIMD4(scale(0), scale(1), scale(2), scale(3)), SIMD4(scale(4), scale(5), scale(6), scale(7)))
      row.store(a, at: 0)
      row.store(b, at: 1)
      return
    }
    var index: Int32 = 0
    while index < min(8, scaleCount &- first) {
      row.store(scale(index), at: index)
      index = index &+ 1
    }
  }
}

/// The flight record begins.
///
/// - Parameter half: what it is of, if not of all of the operation.
@inlinable func begin<M: Machine>(_ machine: M, _ arguments: DispatchArguments, _ half: Operation? = nil) {
  FlightRecorder(arguments.view).begin(
    machine, view: arguments.view, operation: half?.rawValue ?? arguments.header.operation,
    tokenCount: arguments.handle.layout.chunks.tokenCount, bytesPerRow: arguments.columns.byteCountPerRow)
}

/// The part of one worker alone: what all ranks tell each other, and what follows from it. Returns what the status says then.
@inlinable func agree<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, handleEpoch: Int64, isLaidOut: Bool, meanwhile: () -> Void
) -> Outcome {
  let (handle, operation) = (arguments.handle, arguments.operation)
  operation.resetCounter()
  // What a later call finds in the handle must not be what lay there before.
  let empty = { if !arguments.isCached { handle.at(handle.layout.epoch).store(UInt64(0), at: 0) } }
  let goesOn = exchange(
    machine, view: arguments.view, header: arguments.header, handleEpoch: handleEpoch, operation: operation,
    fill: { pages in if isLaidOut { sumChunks(machine, arguments, into: pages) } }, meanwhile: meanwhile)
  if !goesOn {
    empty()
    return operation.outcome
  }
  let view = arguments.view.behindExchange
  let outcome = Outcome(place(machine, view: view, arguments))
  // The headers call for another end.
  if !outcome.isOK && !outcome.overflows {
    empty()
    return outcome
  }
  leaveOutDestinations(machine, view, handle)
  if arguments.countsFirst && outcome.isOK {
    let part = countReceived(machine, arguments, isFitting: true)
    _ = sumReceived(machine, handle, part, isFitting: true)
  }
  #if CHECKED
    if !arguments.isCached { checkCounts(machine, view: view, topK: arguments.routing.topK) }
    checkOffers(machine, view: view)
    if endsInFailedCheck(machine, view: view, operation: operation) {
      handle.at(handle.layout.epoch).store(UInt64(0), at: 0)
      return operation.outcome
    }
  #endif
  // Its places would lie outside the outputs.
  if !outcome.isOK { empty() }
  return outcome
}

/// What follows from an exchange, and this rank's other workers need not wait for: that rows move is noted, or the host is told
/// what this rank alone has failed with.
@inlinable func noteExchange<M: Machine>(
  _ machine: M, _ view: RankView, _ operation: OperationView, _ outcome: Outcome
) {
  if outcome.isOK && operation.does(.middle) { FlightRecorder(view).enter(machine, .deliver, now: machine.now) }
  if !outcome.isAgreed { operation.tell(machine, view) }
}

/// Counts this rank's rows, where the exchange says so and they have not been counted. By one worker, which no other waits for. What it
/// returns is for `noteRows`.
@inlinable func rowsToNote<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, _ outcome: Outcome
) -> SIMD2<Int32> {
  guard arguments.operation.does(.middle), arguments.countsLater(outcome) else { return SIMD2(0, 0) }
  return countReceived(machine, arguments, isFitting: outcome.isOK)
}

/// Notes how many rows this rank has, where the exchange says so.
///
/// - Parameters:
///   - view: of the flight record.
///   - part: what `rowsToNote` returned.
@inlinable func noteRows<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, _ view: RankView, _ outcome: Outcome, _ part: SIMD2<Int32>
) {
  guard arguments.operation.does(.middle), outcome.isOK || outcome.overflows else { return }
  let handle = arguments.handle
  var rows = CountedRows(handle)
  if arguments.countsLater(outcome) { rows = sumReceived(machine, handle, part, isFitting: outcome.isOK) }
  FlightRecorder(view).count(machine, rows)
}

/// This rank's tokens per rank and per expert: its chunks' counters, summed. What each sum is before a chunk is the
/// chunk's base. And its first fault.
@inlinable func sumChunks<M: Machine>(_ machine: M, _ arguments: DispatchArguments, into pages: ExchangePages) {
  let (handle, operation) = (arguments.handle, arguments.operation)
  let (layout, mark) = (handle.layout, arguments.view.faultMark)
  let bases = handle.at(layout.bases)
  let firstKey = layout.layout == .bySource ? 0 : layout.rankCount
  machine.forEach(operation.layout.counterCount) { index in
    let key = index &- firstKey
    let isKey = key >= 0 && key < layout.keyCount
    var chunkOfFault: Int32 = 0
    let isFault = index == operation.layout.faultIndex
    let total = machine.sum(over: layout.chunks.chunkCount) {
      let count = operation.counters(ofChunk: $0).load(Int32.self, at: index)
      return isFault ? (UInt32(bitPattern: count) == mark ? 1 : 0) : count
    } before: { chunk, sum in
      if sum == 0 { chunkOfFault = chunk }
      if isKey { bases.store(sum, at: chunk &* layout.keyCount &+ key) }
    }
    if !isFault {
      return pages.store(machine, total, at: index, behind: ExchangeHeader.byteCount)
    }
    if total != 0 {
      reportFault(
        machine, fromChunk: chunkOfFault, in: pages, routing: arguments.routing, handle: handle,
        expertCount: arguments.view.expertCount)
    }
  }
}

/// The second half of a dispatch with exact sizing.
@inlinable public func deliverExactDispatch<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  var arguments = arguments
  let operation = arguments.operation
  arguments.view = arguments.view.recorded(machine)
  arguments.view.epoch = operation.at(operation.layout.epoch).load(UInt64.self, at: 0)
  let outcome = operation.outcome
  if outcome.isOK && operation.does(.middle) {
    moveRows(machine, arguments, from: machine.startScatter(arguments.scatterJob), isCounted: true)
  }
  endDispatch(machine, arguments, outcome, countsRows: 0)
}

/// What comes when this worker has sent its rows: the signals.
///
/// - Parameter countsRows: not zero: this worker has still to count this rank's rows: behind the signals, since no peer waits for it.
@inlinable func endDispatch<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, _ outcome: Outcome, countsRows: Int32
) {
  let (view, handle, operation) = (arguments.view, arguments.handle, arguments.operation)
  guard outcome.isAgreed else { return }
  if operation.part == .receiveDispatch {
    if endsAsEarlier(machine, view: view, operation: operation) { return operation.tell(machine, view) }
    begin(machine, arguments, .receiveDispatch)
  }
  var part = SIMD2<Int32>(0, 0)
  complete(machine, view: view, operation: operation, outcome) {
    if countsRows != 0 { part = rowsToNote(machine, arguments, outcome) }
    // Padding between groups, which goes by counts, has them from before the rows.
    if outcome.isOK { markPadding(machine, arguments) }
  } then: { view in
    if countsRows != 0 { noteRows(machine, arguments, view, outcome, part) }
  } behind: {
    leaveOutSources(machine, view, handle, expertAlignment: arguments.expertAlignment)
  }
  #if CHECKED
    if operation.does(.end) { checkArrivals(machine, arguments) }
  #endif
}

/// Every row is written straight to its final place, with its metadata.
///
/// - Parameter isCounted: whether rows by expert have been counted, too, not only will be.
@inlinable func moveRows<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, from start: M.ScatterStart, isCounted: Bool
) {
  let (view, handle, operation) = (arguments.view, arguments.handle, arguments.operation)
  let rowWidth = Int64(arguments.columns[Columns.rows])
  let scaleWidth = Int64(arguments.besideByteCount)
  let tokenCount = handle.layout.chunks.tokenCount
  let rowCount =
    isCounted || handle.layout.layout == .bySource
    ? handle.at(handle.layout.sentRows).load(Int64.self, at: 0) : Int64(tokenCount &* handle.layout.slotCount)
  var job = arguments.scatterJob
  job.writtenByteCount = rowCount &* rowWidth
  let expertCount = arguments.columns[Columns.indices] / max(1, arguments.routing.indexByteCount)
  machine.scatterRows(
    job, from: start,
    route: { token, slot in
      let place = handle.place(token: token, slot: slot, view)
      let column = operation.column(Columns.rows, atRank: place.rank)
      let row = place.isNone ? .null : column.advanced(byBytes: Int64(place.row) &* rowWidth)
      if arguments.besideByteCount == 0 { return RowTarget(row: row, scales: .null) }
      let scales = operation.column(arguments.besideColumn, atRank: place.rank)
      var offset = Int64(place.row) &* scaleWidth
      if arguments.scaleStride != 4 {
        let rowInGroup = Int64(place.row % handle.layout.groupCapacity)
        offset = offset &- rowInGroup &* (scaleWidth &- 4)
      }
      return RowTarget(row: row, scales: scales.advanced(byBytes: offset))
    },
    labelCount: max(1, expertCount),
    content: { token, slot, part in
      let firstSlot = handle.layout.layout == .bySource ? 0 : slot
      let cell = token &* arguments.routing.topK &+ firstSlot &+ part
      return part < expertCount ? RoutedExpert(arguments, cell: cell) : RoutedExpert()
    },
    label: { token, slot in RowLabel(arguments, token: token, slot: slot) },
    write: { label, expert, part in
      if part == 0 { label.writeOrigin(arguments) }
      if part < expertCount { label.write(expert, arguments, part) }
    })
  copyColumns(machine, arguments)
}

/// Scales and sidecars, as the caller gave them, but for what is copied with the rows.
@inlinable func copyColumns<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, handle, operation) = (arguments.view, arguments.handle, arguments.operation)
  if arguments.copiesColumns == 0 { return }
  let slotCount = handle.layout.slotCount
  var column = Columns.scales
  while column < Columns.origins {
    let source = arguments.source(ofColumn: column)
    let (copied, width) = (column, arguments.columns[column])
    if !source.isNull && column != arguments.besideColumn {
      machine.copyRecords(handle.layout.chunks.tokenCount &* slotCount, byteCount: width) { cell in
        let token = cell / slotCount
        let place = handle.place(token: token, slot: cell % slotCount, view)
        if place.isNone { return .none }
        let target = operation.column(copied, atRank: place.rank)
        return RecordRoute(
          source: source.advanced(byBytes: Int64(token) &* Int64(width)),
          target: target.advanced(byBytes: Int64(place.row) &* Int64(width)))
      }
    }
    column = column &+ 1
  }
}

/// One of a token's experts, and what the token gives it.
@frozen @usableFromInline struct RoutedExpert {
  @usableFromInline let expert: Int32
  /// -1 where there is no expert.
  @usableFromInline let rank: Int32
  /// Its number there.
  @usableFromInline let local: Int32
  /// 0 where there are no weights.
  @usableFromInline let weight: Float

  @inlinable init(_ arguments: DispatchArguments, cell: Int32) {
    let (view, routing) = (arguments.view, arguments.routing)
    expert = routing.expert(cell: cell)
    weight = arguments.columns[Columns.weights] == 0 ? 0 : routing.weights.load(Float.self, at: cell)
    // Looked up whether there is one or not: a branch would wait for it.
    let isExpert = view.hasExpert(expert)
    let owner = view.owner(ofExpert: isExpert ? expert : 0)
    rank = isExpert ? owner : -1
    local = view.localIndex(ofExpert: isExpert ? expert : 0)
  }

  @inlinable init() { (expert, rank, local, weight) = (-1, -1, -1, 0) }
}

/// What a row says of itself where it arrives: where it came from, its local experts and weights.
@frozen @usableFromInline struct RowLabel {
  @usableFromInline let rank: Int32
  @usableFromInline let token: Int32
  @usableFromInline let origin: Address
  @usableFromInline let indices: Address
  @usableFromInline let weights: Address

  /// Nil: there is no such row.
  @inlinable init?(_ arguments: DispatchArguments, token: Int32, slot: Int32) {
    let place = arguments.handle.place(token: token, slot: slot, arguments.view)
    if place.isNone { return nil }
    let (row, columns) = (Int64(place.row), arguments.columns)
    let at = { (column: Int32) in
      arguments.operation.column(column, atRank: place.rank).advanced(byBytes: row &* Int64(columns[column]))
    }
    rank = place.rank
    self.token = token
    (origin, indices, weights) = (at(Columns.origins), at(Columns.indices), at(Columns.weights))
  }

  @inlinable func writeOrigin(_ arguments: DispatchArguments) {
    origin.store(arguments.view.rank, at: 0)
    origin.store(token, at: 1)
  }

  @inlinable func write(_ routed: RoutedExpert, _ arguments: DispatchArguments, _ index: Int32) {
    #if CHECKED
      guard arguments.view.check(.expert, routed.expert, below: arguments.view.expertCount) else { return }
    #endif
    let isLocal = routed.rank == rank
    let local = isLocal ? routed.local : -1
    if arguments.routing.indexByteCount == 8 {
      indices.store(Int64(local), at: index)
    } else {
      indices.store(local, at: index)
    }
    if arguments.columns[Columns.weights] == 0 { return }
    weights.store(isLocal ? routed.weight : 0, at: index)
  }
}

/// Marks the rows of this rank's own output that no token fills: between groups of experts, and the tail of a
/// worst-case output.
@inlinable func markPadding<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, handle) = (arguments.view, arguments.handle)
  let total = handle.total(atRank: view.rank)
  if handle.layout.hasPadding && arguments.expertAlignment > 1 {
    var groupStart: Int32 = 0
    var expert: Int32 = 0
    while expert < view.localExpertCount {
      let first = groupStart &+ handle.at(handle.layout.tokensPerExpert).load(Int32.self, at: expert)
      let end = groupStart &+ handle.at(handle.layout.alignedTokensPerExpert).load(Int32.self, at: expert)
      if expert % machine.workerCount == machine.workerIndex {
        markRows(machine, arguments, first: first, end: end, zeroing: arguments.zeroesPadding != 0)
      }
      groupStart = end
      expert = expert &+ 1
    }
  }
  // The tail, in equal shares.
  let rowCapacity = Int32(truncatingIfNeeded: arguments.header.outputRowCapacity)
  let share = (max(0, rowCapacity &- total) &+ machine.workerCount &- 1).over(machine.workerCount)
  let first = min(rowCapacity, total &+ share &* machine.workerIndex)
  markRows(machine, arguments, first: first, end: min(rowCapacity, first &+ share), zeroing: false)
}

@inlinable func markRows<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, first: Int32, end: Int32, zeroing: Bool
) {
  if end <= first { return }
  #if CHECKED
    let view = arguments.view
    let rowCount = max(Int64(arguments.handle.total(atRank: view.rank)), arguments.header.outputRowCapacity)
    guard view.check(.row, Int64(end) &- 1, below: rowCount) else { return }
  #endif
  markColumn(machine, arguments, Columns.origins, first: first, end: end, pattern: UInt32.max)
  markColumn(machine, arguments, Columns.indices, first: first, end: end, pattern: UInt32.max)
  markColumn(machine, arguments, Columns.weights, first: first, end: end, pattern: 0)
  if !zeroing { return }
  var column = Columns.rows
  while column < Columns.origins {
    markColumn(machine, arguments, column, first: first, end: end, pattern: 0)
    column = column &+ 1
  }
}

@inlinable func markColumn<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, _ column: Int32, first: Int32, end: Int32, pattern: UInt32
) {
  let width = Int64(arguments.columns[column])
  machine.fill(
    arguments.operation.column(column, atRank: arguments.view.rank).advanced(byBytes: Int64(first) &* width),
    byteCount: Int64(end &- first) &* width, pattern: pattern)
}
