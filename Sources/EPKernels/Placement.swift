/// From the counts of one exchange to the final row of every token: sums over sources, nothing else.

/// Fills the handle's totals, bases and received counts. Run by one worker after a dispatch's exchange.
@inlinable func place<M: Machine>(
  _ machine: M, view: RankView, epoch: UInt64, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  let layout = handle.layout
  handle.at(layout.epoch).store(epoch, at: 0)
  if layout.layout == .bySource {
    placeBySource(machine, view: view, epoch: epoch, handle: handle, operation: operation)
  } else {
    placeByExpert(
      machine, view: view, epoch: epoch, expertAlignment: expertAlignment, handle: handle, operation: operation)
  }

  handle.at(layout.rowCount).store(handle.total(atRank: view.rank), at: 0)
  machine.forEach(view.rankCount) { source in
    let tokenCount = exchangedCount(view, epoch: epoch, source: source, index: view.rank)
    handle.at(layout.tokensPerSource).store(tokenCount, at: source)
  }
  if layout.topK == 0 { return }
  machine.forEach(view.expertCount) { expert in
    if view.owner(ofExpert: expert) == view.rank {
      let local = view.localIndex(ofExpert: expert)
      let tokenCount = countBefore(view, epoch: epoch, source: view.rankCount, index: view.rankCount &+ expert)
      handle.at(layout.tokensPerExpert).store(tokenCount, at: local)
      handle.at(layout.alignedTokensPerExpert).store(aligned(tokenCount, to: expertAlignment), at: local)
    }
  }
}

@inlinable func placeBySource<M: Machine>(
  _ machine: M, view: RankView, epoch: UInt64, handle: HandleView, operation: OperationView
) {
  machine.forEach(view.rankCount) { rank in
    handle.at(handle.layout.totals)
      .store(countBefore(view, epoch: epoch, source: view.rankCount, index: rank), at: rank)
    placeChunks(
      key: rank, counter: rank, base: countBefore(view, epoch: epoch, source: view.rank, index: rank), handle: handle,
      operation: operation)
  }
  var sentRows: Int64 = 0
  var rank: Int32 = 0
  while rank < view.rankCount {
    sentRows = sentRows &+ Int64(exchangedCount(view, epoch: epoch, source: view.rank, index: rank))
    rank = rank &+ 1
  }
  handle.at(handle.layout.sentRows).store(sentRows, at: 0)
  let receivedRows = Int64(countBefore(view, epoch: epoch, source: view.rankCount, index: view.rank))
  handle.at(handle.layout.receivedRows).store(receivedRows, at: 0)
}

@inlinable func placeByExpert<M: Machine>(
  _ machine: M, view: RankView, epoch: UInt64, expertAlignment: Int32, handle: HandleView, operation: OperationView
) {
  machine.forEach(view.rankCount) { rank in
    var groupStart: Int32 = 0
    var expert: Int32 = 0
    while expert < view.expertCount {
      if view.owner(ofExpert: expert) == rank {
        let index = view.rankCount &+ expert
        let before = countBefore(view, epoch: epoch, source: view.rank, index: index)
        placeChunks(key: expert, counter: index, base: groupStart &+ before, handle: handle, operation: operation)
        let groupCount = countBefore(view, epoch: epoch, source: view.rankCount, index: index)
        groupStart = groupStart &+ aligned(groupCount, to: expertAlignment)
      }
      expert = expert &+ 1
    }
    handle.at(handle.layout.totals).store(groupStart, at: rank)
  }
  var sentRows: Int64 = 0
  var receivedRows: Int64 = 0
  var expert: Int32 = 0
  while expert < view.expertCount {
    let index = view.rankCount &+ expert
    sentRows = sentRows &+ Int64(exchangedCount(view, epoch: epoch, source: view.rank, index: index))
    if view.owner(ofExpert: expert) == view.rank {
      receivedRows = receivedRows &+ Int64(countBefore(view, epoch: epoch, source: view.rankCount, index: index))
    }
    expert = expert &+ 1
  }
  handle.at(handle.layout.sentRows).store(sentRows, at: 0)
  handle.at(handle.layout.receivedRows).store(receivedRows, at: 0)
}

/// Bases of one key: this rank's first row there, then each chunk behind the one before.
@inlinable func placeChunks(key: Int32, counter: Int32, base: Int32, handle: HandleView, operation: OperationView) {
  var row = base
  var chunk: Int32 = 0
  while chunk < handle.layout.chunks.chunkCount {
    handle.at(handle.layout.bases).store(row, at: chunk &* handle.layout.keyCount &+ key)
    row = row &+ operation.counters(ofChunk: chunk).load(Int32.self, at: counter)
    chunk = chunk &+ 1
  }
}

/// The exchanged counts of all sources before `source`, summed.
@inlinable func countBefore(_ view: RankView, epoch: UInt64, source: Int32, index: Int32) -> Int32 {
  var sum: Int32 = 0
  var earlier: Int32 = 0
  while earlier < source {
    sum = sum &+ exchangedCount(view, epoch: epoch, source: earlier, index: index)
    earlier = earlier &+ 1
  }
  return sum
}

@inlinable func aligned(_ count: Int32, to alignment: Int32) -> Int32 {
  Int32(truncatingIfNeeded: alignUp(Int64(count), to: Int64(alignment)))
}

/// Where each column of each rank's output begins. What does not fit becomes the operation's status, the same on all
/// ranks.
@inlinable func fitOutputs(
  _ view: RankView, epoch: UInt64, columns: Columns, handle: HandleView, operation: OperationView
) {
  var status = OperationStatus(.ok, rank: 0, (0, 0, 0, 0))
  var rank: Int32 = 0
  while rank < view.rankCount {
    let header = exchangeHeader(view, epoch: epoch, source: rank)
    let total = Int64(handle.total(atRank: rank))
    let rowCapacity = header.outputRowCapacity == 0 ? total : header.outputRowCapacity
    let needed = columns.byteCount(rowCapacity: max(total, rowCapacity))
    if rank == view.rank { status.neededByteCount = needed }
    if (needed > header.outputCapacity || total > rowCapacity) && status.code == StatusCode.ok.rawValue {
      status.code = StatusCode.overflow.rawValue
      status.rank = Int64(rank)
      // Rows too many may fit into the memory all the same: pages round it up.
      let available = total > rowCapacity ? columns.byteCount(rowCapacity: rowCapacity) : header.outputCapacity
      status.details = (needed, available, 0, 0)
    }
    let block = view.arena(of: rank).advanced(byBytes: header.outputOffset)
    var column: Int32 = 0
    while column < Columns.count {
      operation.setColumn(
        column, atRank: rank, block.advanced(byBytes: columns.offset(of: column, rowCapacity: rowCapacity)))
      column = column &+ 1
    }
    rank = rank &+ 1
  }
  operation.set(status)
}
