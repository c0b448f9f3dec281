/// From the counts of one exchange to the final row of every token: sums over sources, nothing else.

/// Fills the handle's totals and first rows. Run by one worker after a dispatch's exchange.
@inlinable func place<M: Machine>(
  _ machine: M, view: RankView, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  let layout = handle.layout
  handle.at(layout.epoch).store(view.epoch, at: 0)
  handle.at(layout.leftOut).store(UInt64(0), at: 0)
  if layout.layout == .bySource {
    placeBySource(machine, view: view, handle: handle)
  } else {
    placeByExpert(
      machine, view: view, expertAlignment: expertAlignment, handle: handle, operation: operation)
  }
}

/// Fills the handle's counts of what this rank receives. Run by the worker that has placed it.
@inlinable func countReceived<M: Machine>(_ machine: M, _ arguments: DispatchArguments) {
  let (view, handle) = (arguments.view.behindExchange, arguments.handle)
  let layout = handle.layout
  handle.at(layout.rowCount).store(handle.total(atRank: view.rank), at: 0)
  let hasOffsets = layout.layout == .byExpert && layout.sourceCapacity == 0
  machine.forEach(view.rankCount &* view.rankCount) { pair in
    let (source, rank) = (pair / view.rankCount, pair % view.rankCount)
    let tokenCount = exchangedCount(view, source: source, index: rank)
    handle.at(layout.tokensPerPair).store(tokenCount, at: pair)
    if rank == view.rank { handle.at(layout.tokensPerSource).store(tokenCount, at: source) }
  }
  machine.forEach(view.expertCount) { expert in
    if view.owner(ofExpert: expert) == view.rank {
      let local = view.localIndex(ofExpert: expert)
      let offsets = handle.at(layout.sourceOffsets)
      let firstOffset = local &* (view.rankCount &+ 1)
      let tokenCount = machine.sum(over: layout.topK == 0 ? 0 : view.rankCount) {
        exchangedCount(view, source: $0, index: view.rankCount &+ expert)
      } before: { source, sum in
        if hasOffsets { offsets.store(sum, at: firstOffset &+ source) }
      }
      if hasOffsets { offsets.store(tokenCount, at: firstOffset &+ view.rankCount) }
      if layout.sourceCapacity != 0 {
        let counts = handle.at(layout.sourceCounts).advanced(byBytes: 4 &* Int64(local &* view.rankCount))
        var source: Int32 = 0
        while source < view.rankCount {
          counts.store(exchangedCount(view, source: source, index: view.rankCount &+ expert), at: source)
          source = source &+ 1
        }
      }
      handle.at(layout.tokensPerExpert).store(tokenCount, at: local)
      handle.at(layout.alignedTokensPerExpert).store(aligned(tokenCount, to: arguments.expertAlignment), at: local)
      let statistics = arguments.expertStatistics
      if !statistics.isNull { statistics.store(statistics.load(Int32.self, at: local) &+ tokenCount, at: local) }
    }
  }
}

@inlinable func placeBySource<M: Machine>(_ machine: M, view: RankView, handle: HandleView) {
  let (layout, capacity) = (handle.layout, handle.layout.sourceCapacity)
  // What each rank receives, and, behind that, what this one sends: sums of as many counts, taken side by side.
  machine.forEach(view.rankCount &+ 1) { cell in
    let isSent = cell == view.rankCount
    var first: Int32 = 0
    let total = machine.sum(over: view.rankCount) { index in
      exchangedCount(view, source: isSent ? view.rank : index, index: isSent ? index : cell)
    } before: { source, sum in
      if source == view.rank { first = sum }
    }
    if isSent { return handle.at(layout.sentRows).store(Int64(total), at: 0) }
    handle.at(layout.totals).store(capacity == 0 ? total : view.rankCount &* capacity, at: cell)
    handle.at(layout.firstRows).store(capacity == 0 ? first : view.rank &* capacity, at: cell)
    if cell == view.rank { handle.at(layout.receivedRows).store(Int64(total), at: 0) }
  }
}

@inlinable func placeByExpert<M: Machine>(
  _ machine: M, view: RankView, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  // Groups over all ranks; what lies before a rank's first group is then subtracted.
  let starts = operation.at(operation.layout.groupStarts)
  let capacity = handle.layout.groupCapacity
  if capacity == 0 {
    machine.scan(
      view.expertCount,
      value: { place in
        let index = view.rankCount &+ view.expertOrder.load(Int32.self, at: place)
        return aligned(countBefore(machine, view, source: view.rankCount, index: index), to: expertAlignment)
      },
      visit: { place, before, value in
        starts.store(before, at: place)
        if place &+ 1 == view.expertCount { starts.store(before &+ value, at: view.expertCount) }
      })
  }
  let distance = { (first: Int32, end: Int32) in
    if capacity != 0 { return (end &- first) &* capacity }
    return starts.load(Int32.self, at: end) &- starts.load(Int32.self, at: first)
  }
  let firstCell = machine.firstOfLanes(from: view.rankCount)
  machine.forEach(firstCell &+ view.expertCount) { cell in
    if cell < firstCell {
      if cell >= view.rankCount { return }
      let rows = distance(view.firstPlace(ofRank: cell), view.firstPlace(ofRank: cell &+ 1))
      return handle.at(handle.layout.totals).store(rows, at: cell)
    }
    let place = cell &- firstCell
    let expert = view.expertOrder.load(Int32.self, at: place)
    let rank = view.owner(ofExpert: expert)
    let groupStart = distance(view.firstPlace(ofRank: rank), place)
    let sourceCapacity = handle.layout.sourceCapacity
    let before =
      sourceCapacity == 0
      ? countBefore(machine, view, source: view.rank, index: view.rankCount &+ expert) : view.rank &* sourceCapacity
    handle.at(handle.layout.firstRows).store(groupStart &+ before, at: expert)
  }
}

/// Rows that this rank sends and receives.
@inlinable func countRowsByExpert<M: Machine>(_ machine: M, view: RankView, handle: HandleView) {
  sumCounts(machine, view, into: handle.at(handle.layout.sentRows)) { expert in
    exchangedCount(view, source: view.rank, index: view.rankCount &+ expert)
  }
  sumCounts(machine, view, into: handle.at(handle.layout.receivedRows)) { expert in
    if view.owner(ofExpert: expert) != view.rank { return 0 }
    return countBefore(machine, view, source: view.rankCount, index: view.rankCount &+ expert)
  }
}

/// The sum of `count` over all experts, as an Int64.
@inlinable func sumCounts<M: Machine>(
  _ machine: M, _ view: RankView, into sum: Address, count: (_ expert: Int32) -> Int32
) {
  machine.scan(view.expertCount, value: count) { expert, before, value in
    if expert &+ 1 == view.expertCount { sum.store(Int64(before &+ value), at: 0) }
  }
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

/// Where each column of each rank's output begins, if all that was exchanged fits together. Whether it does becomes the
/// operation's status, the same on all ranks.
@inlinable func fitOutputs<M: Machine>(
  _ machine: M, _ view: RankView, columns: Columns, handle: HandleView, operation: OperationView
) -> OperationStatus {
  let rowCount = handle.total(atRank: view.rank)
  let own = OutputFit(view, columns: columns, rowCount: rowCount, atRank: view.rank)
  var (status, tightCell) = compareHeaders(machine, view, with: view.rankCount &* Columns.count) { cell in
    let (rank, column) = (cell / Columns.count, cell % Columns.count)
    let fit = OutputFit(view, columns: columns, rowCount: handle.total(atRank: rank), atRank: rank)
    let block = view.arena(of: rank).advanced(byBytes: fit.header.outputOffset)
    operation.setColumn(
      column, atRank: rank, block.advanced(byBytes: columns.offset(of: column, rowCapacity: fit.rowCapacity)))
    return !fit.fits
  }
  if tightCell >= 0 {
    let tight = tightCell / Columns.count
    let fit = OutputFit(view, columns: columns, rowCount: handle.total(atRank: tight), atRank: tight)
    // Rows too many may fit into the memory all the same: pages round it up.
    let available =
      fit.rowCount > fit.rowCapacity ? columns.byteCount(rowCapacity: fit.rowCapacity) : fit.header.outputCapacity
    status = OperationStatus(.overflow, rank: Int64(tight), (fit.neededByteCount, available, 0, 0))
  }
  if status.code == StatusCode.ok.rawValue || status.code == StatusCode.overflow.rawValue {
    status.neededByteCount = own.neededByteCount
    status.rowCount = Int64(rowCount)
  }
  machine.forEach(1) { [status] _ in operation.set(status) }
  return status
}

/// Whether what a rank receives fits into what it has offered.
@frozen @usableFromInline struct OutputFit {
  @usableFromInline let header: ExchangeHeader
  @usableFromInline let rowCount: Int64
  @usableFromInline let rowCapacity: Int64
  @usableFromInline let neededByteCount: Int64

  @inlinable init(_ view: RankView, columns: Columns, rowCount: Int32, atRank rank: Int32) {
    header = exchangeHeader(view, source: rank)
    self.rowCount = Int64(rowCount)
    rowCapacity = header.outputRowCapacity == 0 ? self.rowCount : header.outputRowCapacity
    neededByteCount = columns.byteCount(rowCapacity: max(self.rowCount, rowCapacity))
  }

  @inlinable var fits: Bool { neededByteCount <= header.outputCapacity && rowCount <= rowCapacity }
}
