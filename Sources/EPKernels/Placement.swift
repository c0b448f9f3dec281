/// From the counts of one exchange to the final row of every token: sums over sources, nothing else.

/// Fills the handle's totals and first rows. Run by one worker after a dispatch's exchange.
@inlinable func place<M: Machine>(
  _ machine: M, view: RankView, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  let layout = handle.layout
  handle.at(layout.epoch).store(view.epoch, at: 0)
  if layout.layout == .bySource {
    placeBySource(machine, view: view, handle: handle)
  } else {
    placeByExpert(
      machine, view: view, expertAlignment: expertAlignment, handle: handle, operation: operation)
  }
}

/// Fills the handle's counts of what this rank receives. Run by the worker that has placed it.
@inlinable func countReceived<M: Machine>(
  _ machine: M, view: RankView, expertAlignment: Int32, handle: HandleView
) {
  let layout = handle.layout
  handle.at(layout.rowCount).store(handle.total(atRank: view.rank), at: 0)
  machine.forEach(view.rankCount) { source in
    let tokenCount = exchangedCount(view, source: source, index: view.rank)
    handle.at(layout.tokensPerSource).store(tokenCount, at: source)
  }
  machine.forEach(view.expertCount) { expert in
    if view.owner(ofExpert: expert) == view.rank {
      let local = view.localIndex(ofExpert: expert)
      let isCounted = layout.topK != 0
      let tokenCount =
        isCounted ? countBefore(view, source: view.rankCount, index: view.rankCount &+ expert) : 0
      handle.at(layout.tokensPerExpert).store(tokenCount, at: local)
      handle.at(layout.alignedTokensPerExpert).store(aligned(tokenCount, to: expertAlignment), at: local)
    }
  }
}

@inlinable func placeBySource<M: Machine>(_ machine: M, view: RankView, handle: HandleView) {
  machine.forEach(view.rankCount) { rank in
    handle.at(handle.layout.totals)
      .store(countBefore(view, source: view.rankCount, index: rank), at: rank)
    handle.at(handle.layout.firstRows).store(countBefore(view, source: view.rank, index: rank), at: rank)
  }
  let sentRows = sum(over: view.rankCount) { exchangedCount(view, source: view.rank, index: $0) }
  handle.at(handle.layout.sentRows).store(Int64(sentRows), at: 0)
  let receivedRows = Int64(countBefore(view, source: view.rankCount, index: view.rank))
  handle.at(handle.layout.receivedRows).store(receivedRows, at: 0)
}

@inlinable func placeByExpert<M: Machine>(
  _ machine: M, view: RankView, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  // Groups one behind the other, over all ranks; what lies before a rank's first group is then subtracted.
  let starts = operation.at(operation.layout.groupStarts)
  machine.scan(
    view.expertCount,
    value: { place in
      let index = view.rankCount &+ view.expertOrder.load(Int32.self, at: place)
      return aligned(countBefore(view, source: view.rankCount, index: index), to: expertAlignment)
    },
    visit: { place, before, value in
      starts.store(before, at: place)
      if place &+ 1 == view.expertCount { starts.store(before &+ value, at: view.expertCount) }
    })
  machine.forEach(view.rankCount) { rank in
    let end = starts.load(Int32.self, at: view.firstPlace(ofRank: rank &+ 1))
    handle.at(handle.layout.totals).store(end &- starts.load(Int32.self, at: view.firstPlace(ofRank: rank)), at: rank)
  }
  machine.forEach(view.expertCount) { place in
    let expert = view.expertOrder.load(Int32.self, at: place)
    let rank = view.owner(ofExpert: expert)
    let groupStart =
      starts.load(Int32.self, at: place) &- starts.load(Int32.self, at: view.firstPlace(ofRank: rank))
    let before = countBefore(view, source: view.rank, index: view.rankCount &+ expert)
    handle.at(handle.layout.firstRows).store(groupStart &+ before, at: expert)
  }
  sumCounts(machine, view, into: handle.at(handle.layout.sentRows)) { expert in
    exchangedCount(view, source: view.rank, index: view.rankCount &+ expert)
  }
  sumCounts(machine, view, into: handle.at(handle.layout.receivedRows)) { expert in
    if view.owner(ofExpert: expert) != view.rank { return 0 }
    return countBefore(view, source: view.rankCount, index: view.rankCount &+ expert)
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
@inlinable func countBefore(_ view: RankView, source: Int32, index: Int32) -> Int32 {
  sum(over: source) { exchangedCount(view, source: $0, index: index) }
}

/// The sum of the values of `0..<count`; a value is asked for more than once, and counts once.
@inlinable func sum(over count: Int32, _ value: (_ index: Int32) -> Int32) -> Int32 {
  var sum: Int32 = 0
  var index: Int32 = 0
  while index < count {
    // Four at a time, so that no load waits for another.
    let last = count &- 1
    let (a, b) = (value(index), value(min(last, index &+ 1)))
    let (c, d) = (value(min(last, index &+ 2)), value(min(last, index &+ 3)))
    sum = sum &+ a &+ (index < last ? b : 0) &+ (index &+ 1 < last ? c : 0) &+ (index &+ 2 < last ? d : 0)
    index = index &+ 4
  }
  return sum
}

@inlinable func aligned(_ count: Int32, to alignment: Int32) -> Int32 {
  Int32(truncatingIfNeeded: alignUp(Int64(count), to: Int64(alignment)))
}

/// Where each column of each rank's output begins. What does not fit becomes the operation's status, the same on all
/// ranks.
@inlinable func fitOutputs<M: Machine>(
  _ machine: M, _ view: RankView, columns: Columns, handle: HandleView, operation: OperationView
) {
  machine.forEach(view.rankCount &* Columns.count) { cell in
    let (rank, column) = (cell / Columns.count, cell % Columns.count)
    let fit = OutputFit(view, columns: columns, rowCount: handle.total(atRank: rank), atRank: rank)
    let block = view.arena(of: rank).advanced(byBytes: fit.header.outputOffset)
    operation.setColumn(
      column, atRank: rank, block.advanced(byBytes: columns.offset(of: column, rowCapacity: fit.rowCapacity)))
  }
  let tight = machine.first(of: Range(uncheckedBounds: (0, view.rankCount))) { rank in
    !OutputFit(view, columns: columns, rowCount: handle.total(atRank: rank), atRank: rank).fits
  }
  let rowCount = handle.total(atRank: view.rank)
  let own = OutputFit(view, columns: columns, rowCount: rowCount, atRank: view.rank)
  var status = OperationStatus(.ok, rank: 0, (0, 0, 0, 0))
  if tight >= 0 {
    let fit = OutputFit(view, columns: columns, rowCount: handle.total(atRank: tight), atRank: tight)
    // Rows too many may fit into the memory all the same: pages round it up.
    let available =
      fit.rowCount > fit.rowCapacity ? columns.byteCount(rowCapacity: fit.rowCapacity) : fit.header.outputCapacity
    status = OperationStatus(.overflow, rank: Int64(tight), (fit.neededByteCount, available, 0, 0))
  }
  status.neededByteCount = own.neededByteCount
  status.rowCount = Int64(rowCount)
  machine.forEach(1) { [status] _ in operation.set(status) }
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
