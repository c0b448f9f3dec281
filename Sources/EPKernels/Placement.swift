/// From the counts of one exchange to the final row of every token: sums over sources, nothing else.

/// Fills the handle's totals and first rows, unless it is complete, and finds where each column of each rank's output begins,
/// if all that was exchanged fits together. Whether it does becomes the operation's status, the same on all ranks; where it does
/// not, the tables need not be complete. Run by one worker after a dispatch's exchange.
@inlinable func place<M: Machine>(_ machine: M, view: RankView, _ arguments: DispatchArguments) -> OperationStatus {
  let (handle, operation, columns) = (arguments.handle, arguments.operation, arguments.columns)
  if !arguments.isCached {
    handle.at(handle.layout.epoch).store(view.epoch, at: 0)
    handle.at(handle.layout.leftOut).store(UInt64(0), at: 0)
    if handle.layout.hasPadding { findGroups(machine, view, arguments) }
  }
  // Every rank's columns, then all else: in one pass, since each takes the memory's delay.
  let columnsEnd = view.rankCount &* Columns.count
  let firstKey = machine.firstOfLanes(from: columnsEnd)
  let keyCount = arguments.isCached ? 0 : handle.layout.layout == .bySource ? 1 : view.expertCount
  var (status, tightCell) = compareHeaders(machine, view, with: firstKey &+ keyCount) { cell in
    if cell >= firstKey { placeKey(machine, view, arguments, cell &- firstKey) }
    if cell >= columnsEnd { return false }
    let (rank, column) = (cell / Columns.count, cell % Columns.count)
    let rows = exchangedRows(machine, view, arguments, atRank: rank)
    if column == 0 && !arguments.isCached { placeRank(handle, rank, rows) }
    let fit = OutputFit(view, columns: columns, rowCount: rows.count, atRank: rank)
    if column == 0 { operation.note(fit.header) }
    if column == 0 && rank == view.rank { operation.setOutput(fit, columns) }
    let block = view.arena(of: rank).advanced(byBytes: fit.header.outputOffset)
    operation.setColumn(
      column, atRank: rank, block.advanced(byBytes: columns.offset(of: column, rowCapacity: fit.rowCapacity)))
    return !fit.fits
  }
  if tightCell >= 0 {
    // This rank first, since not all need have been looked at.
    let tight = tightCell / Columns.count
    var rank = view.rank
    while true {
      let fit = OutputFit(machine, view, arguments, atRank: rank)
      if rank == view.rank { machine.forEach(1) { _ in operation.setOutput(fit, columns) } }
      if rank == tight {
        // Rows too many may fit into the memory all the same: pages round it up.
        let available = fit.rowCount > fit.rowCapacity ? fit.byteCount : fit.header.outputCapacity
        status = OperationStatus(.overflow, rank: Int64(tight), (fit.neededByteCount(columns), available, 0, 0))
        break
      }
      rank = tight
    }
  }
  machine.forEach(1) { [status] _ in operation.setOutcome(status) }
  return status
}

/// Finds where groups begin that have no capacity, counted over all ranks.
@inlinable func findGroups<M: Machine>(_ machine: M, _ view: RankView, _ arguments: DispatchArguments) {
  let starts = arguments.operation.groupStarts
  machine.scan(
    view.expertCount,
    value: { place in
      let index = view.rankCount &+ view.expertOrder.load(Int32.self, at: place)
      let count = countBefore(machine, view, source: view.rankCount, index: index)
      return aligned(count, to: arguments.expertAlignment)
    },
    visit: { place, before, value in
      starts.store(before, at: place)
      if place &+ 1 == view.expertCount { starts.store(before &+ value, at: view.expertCount) }
    })
}

/// Rows of the groups from one place to another.
@inlinable func groupDistance(_ arguments: DispatchArguments, _ first: Int32, _ end: Int32) -> Int32 {
  let (capacity, starts) = (arguments.handle.layout.groupCapacity, arguments.operation.groupStarts)
  if capacity != 0 { return (end &- first) &* capacity }
  return starts.load(Int32.self, at: end) &- starts.load(Int32.self, at: first)
}

/// How many rows a rank has; by source also the first that this rank sends there.
@inlinable func exchangedRows<M: Machine>(
  _ machine: M, _ view: RankView, _ arguments: DispatchArguments, atRank rank: Int32
) -> (count: Int32, first: Int32) {
  let (handle, layout) = (arguments.handle, arguments.handle.layout)
  if arguments.isCached { return (handle.total(atRank: rank), 0) }
  if layout.layout == .byExpert {
    return (groupDistance(arguments, view.firstPlace(ofRank: rank), view.firstPlace(ofRank: rank &+ 1)), 0)
  }
  let capacity = layout.sourceCapacity
  if capacity != 0 { return (view.rankCount &* capacity, view.rank &* capacity) }
  var first: Int32 = 0
  let count = machine.sum(over: view.rankCount) {
    exchangedCount(view, source: $0, index: rank)
  } before: { source, sum in
    if source == view.rank { first = sum }
  }
  return (count, first)
}

/// - Parameter rows: as `exchangedRows` finds them at the rank.
@inlinable func placeRank(_ handle: HandleView, _ rank: Int32, _ rows: (count: Int32, first: Int32)) {
  handle.at(handle.layout.totals).store(rows.count, at: rank)
  if handle.layout.layout == .bySource { handle.at(handle.layout.firstRows).store(rows.first, at: rank) }
}

/// By expert: this rank's first row there. By source, where there is one key: the rows that this rank sends.
@inlinable func placeKey<M: Machine>(_ machine: M, _ view: RankView, _ arguments: DispatchArguments, _ key: Int32) {
  let (handle, layout) = (arguments.handle, arguments.handle.layout)
  if layout.layout == .bySource {
    let sent = machine.sum(over: view.rankCount) {
      exchangedCount(view, source: view.rank, index: $0)
    } before: { _, _ in
    }
    return handle.at(layout.sentRows).store(Int64(sent), at: 0)
  }
  let local = view.localIndex(ofExpert: key)
  var groupStart = local &* layout.groupCapacity
  if layout.groupCapacity == 0 {
    let first = view.firstPlace(ofRank: view.owner(ofExpert: key))
    groupStart = groupDistance(arguments, first, first &+ local)
  }
  let capacity = layout.sourceCapacity
  let before =
    capacity == 0
    ? countBefore(machine, view, source: view.rank, index: view.rankCount &+ key) : view.rank &* capacity
  handle.at(layout.firstRows).store(groupStart &+ before, at: key)
}

/// Rows of a dispatch that a rank sends and receives.
@frozen @usableFromInline struct CountedRows {
  @usableFromInline let sent: Int64
  @usableFromInline let received: Int64

  @inlinable init(sent: Int64, received: Int64) {
    self.sent = sent
    self.received = received
  }

  /// Of a handle that is complete.
  @inlinable init(_ handle: HandleView) {
    sent = handle.at(handle.layout.sentRows).load(Int64.self, at: 0)
    received = handle.at(handle.layout.receivedRows).load(Int64.self, at: 0)
  }
}

/// Fills the handle's counts of what this rank sends and receives, but for the sums, which `sumReceived` makes of what this returns. Run
/// by the worker that has placed its rows.
///
/// - Parameter isFitting: whether rows move, and count in statistics.
@inlinable func countReceived<M: Machine>(
  _ machine: M, _ arguments: DispatchArguments, isFitting: Bool
) -> SIMD2<Int32> {
  let (view, handle) = (arguments.view.behindExchange, arguments.handle)
  let layout = handle.layout
  if isFitting { handle.at(layout.rowCount).store(handle.total(atRank: view.rank), at: 0) }
  let pairCount = view.rankCount &* view.rankCount
  let firstExpert = machine.firstOfLanes(from: pairCount)
  return machine.part(ofTotal: firstExpert &+ view.expertCount) { cell in
    if cell >= firstExpert {
      return countRows(machine, view, arguments, ofExpert: cell &- firstExpert, isFitting: isFitting)
    }
    if cell >= pairCount { return SIMD2(0, 0) }
    let source = cell.over(view.rankCount)
    let rank = cell &- source &* view.rankCount
    let tokenCount = exchangedCount(view, source: source, index: rank)
    handle.at(layout.tokensPerPair).store(tokenCount, at: cell)
    if rank == view.rank { handle.at(layout.tokensPerSource).store(tokenCount, at: source) }
    if layout.layout == .byExpert { return SIMD2(0, 0) }
    return SIMD2(source == view.rank ? tokenCount : 0, rank == view.rank ? tokenCount : 0)
  }
}

/// - Parameters:
///   - part: what `countReceived` returned.
///   - isFitting: as that of `countReceived`.
@inlinable func sumReceived<M: Machine>(
  _ machine: M, _ handle: HandleView, _ part: SIMD2<Int32>, isFitting: Bool
) -> CountedRows {
  let rows = machine.total(part)
  let counted = CountedRows(sent: Int64(rows.x), received: Int64(rows.y))
  let layout = handle.layout
  machine.forEach(1) { _ in
    // By source, other workers read it already, if rows move.
    if layout.layout == .byExpert || !isFitting { handle.at(layout.sentRows).store(counted.sent, at: 0) }
    handle.at(layout.receivedRows).store(counted.received, at: 0)
  }
  return counted
}

/// Counts what this rank receives for an expert, where that is its own. By expert, returns how many rows it sends there and
/// receives for it.
@inlinable func countRows<M: Machine>(
  _ machine: M, _ view: RankView, _ arguments: DispatchArguments, ofExpert expert: Int32, isFitting: Bool
) -> SIMD2<Int32> {
  let (handle, layout) = (arguments.handle, arguments.handle.layout)
  let index = view.rankCount &+ expert
  let isByExpert = layout.layout == .byExpert
  let sent = isByExpert ? exchangedCount(view, source: view.rank, index: index) : 0
  if view.owner(ofExpert: expert) != view.rank { return SIMD2(sent, 0) }
  let local = view.localIndex(ofExpert: expert)
  let hasOffsets = isByExpert && layout.sourceCapacity == 0
  let hasCounts = layout.sourceCapacity != 0
  let offsets = handle.at(layout.sourceOffsets).advanced(byBytes: 4 &* Int64(local &* (view.rankCount &+ 1)))
  let counts = handle.at(layout.sourceCounts).advanced(byBytes: 4 &* Int64(local &* view.rankCount))
  let tokenCount = machine.sum(over: view.rankCount) {
    let count = exchangedCount(view, source: $0, index: index)
    if hasCounts { counts.store(count, at: $0) }
    return count
  } before: { source, sum in
    if hasOffsets { offsets.store(sum, at: source) }
  }
  if hasOffsets { offsets.store(tokenCount, at: view.rankCount) }
  handle.at(layout.tokensPerExpert).store(tokenCount, at: local)
  handle.at(layout.alignedTokensPerExpert).store(aligned(tokenCount, to: arguments.expertAlignment), at: local)
  let statistics = arguments.expertStatistics
  if !statistics.isNull && isFitting {
    statistics.store(statistics.load(Int32.self, at: local) &+ tokenCount, at: local)
  }
  return SIMD2(sent, isByExpert ? tokenCount : 0)
}

/// The exchanged counts of all sources before `source`, summed.
@inlinable func countBefore<M: Machine>(_ machine: M, _ view: RankView, source: Int32, index: Int32) -> Int32 {
  machine.sum(over: source) {
    exchangedCount(view, source: $0, index: index)
  } before: { _, _ in
  }
}

@inlinable func aligned(_ count: Int32, to alignment: Int32) -> Int32 {
  (count &+ alignment &- 1) / alignment &* alignment
}

/// Whether what a rank receives fits into what it has offered.
@frozen @usableFromInline struct OutputFit {
  @usableFromInline let header: ExchangeHeader
  @usableFromInline let rowCount: Int64
  @usableFromInline let rowCapacity: Int64
  /// What the rank has laid out.
  @usableFromInline let byteCount: Int64

  @inlinable init(_ view: RankView, columns: Columns, rowCount: Int32, atRank rank: Int32) {
    header = exchangeHeader(view, source: rank)
    self.rowCount = Int64(rowCount)
    rowCapacity = header.outputRowCapacity == 0 ? self.rowCount : header.outputRowCapacity
    byteCount = columns.byteCount(rowCapacity: rowCapacity)
  }

  @inlinable init<M: Machine>(_ machine: M, _ view: RankView, _ arguments: DispatchArguments, atRank rank: Int32) {
    let rows = exchangedRows(machine, view, arguments, atRank: rank)
    self.init(view, columns: arguments.columns, rowCount: rows.count, atRank: rank)
  }

  @inlinable var fits: Bool { byteCount <= header.outputCapacity && rowCount <= rowCapacity }

  @inlinable func neededByteCount(_ columns: Columns) -> Int64 {
    rowCount <= rowCapacity ? byteCount : columns.byteCount(rowCapacity: rowCount)
  }
}
