import Testing

@testable import EmulatedGPU

/// What a GPU's block makes of an exchange, on emulated lanes: where rows and columns lie, and what is counted.
@Suite struct PlacementTests {
  struct Case: CustomStringConvertible {
    var rankCount: Int32 = 8
    var expertCount: Int32
    var layout = RowLayout.byExpert
    var groupCapacity: Int32 = 0
    var sourceCapacity: Int32 = 0
    var alignment: Int32 = 1
    /// 0: outputs are as large as what arrives.
    var rowCapacity: Int32 = 0

    var description: String {
      "\(rankCount) ranks, \(expertCount) experts, \(layout), \(groupCapacity), \(sourceCapacity)"
    }
  }

  /// Ranks and experts that lanes have in one turn, and more of them.
  static let cases = [
    Case(rankCount: 1, expertCount: 3, layout: .bySource), Case(expertCount: 256, layout: .bySource),
    Case(rankCount: 70, expertCount: 140, layout: .bySource),
    Case(expertCount: 16, layout: .bySource, sourceCapacity: 60, rowCapacity: 480),
    Case(expertCount: 24, alignment: 4), Case(rankCount: 5, expertCount: 610, alignment: 16, rowCapacity: 100_000),
    Case(expertCount: 256, groupCapacity: 400, rowCapacity: 32 * 400),
    Case(rankCount: 3, expertCount: 9, groupCapacity: 150, sourceCapacity: 50, rowCapacity: 450),
  ]

  /// One rank's view of an exchange in which every source has told random counts.
  final class Exchange {
    let my: Case
    let rank: Int32
    let localCount: Int32
    let counts: [[Int32]]
    let arena: Memory
    let tables: Memory
    let handleMemory: Memory
    let operationMemory: Memory
    let statistics: Memory
    let arguments: DispatchArguments

    /// - Parameter tightRank: its output is a byte too small.
    init(_ my: Case, tightRank: Int32 = -1) {
      self.my = my
      rank = my.rankCount / 2
      let (ranks, experts) = (Int(my.rankCount), Int(my.expertCount))
      localCount = (my.expertCount + my.rankCount - 1 - rank) / my.rankCount
      var random = Random(UInt64(ranks * 1000 + experts))
      counts = (0..<ranks).map { _ in (0..<ranks + experts).map { _ in Int32(random.next() >> 33) % 50 } }
      // Experts go around the ranks.
      let owners = (0..<my.expertCount).map { $0 % my.rankCount }
      let locals = (0..<my.expertCount).map { $0 / my.rankCount }
      let order = (0..<my.rankCount).flatMap { rank in (0..<my.expertCount).filter { owners[Int($0)] == rank } }
      let firstPlaces = (0...my.rankCount).map { rank in Int32(owners.count { $0 < rank }) }
      tables = Memory(
        (0..<Int64(ranks)).flatMap { [Int32($0 + 1) << 20, 0] } + [Int32](repeating: 0, count: 2 * ranks) + owners
          + locals
          + order + firstPlaces)
      let at = { [tables] (index: Int) in tables.address.advanced(byBytes: 4 * Int64(index)) }
      let control = ControlLayout(rankCount: my.rankCount, expertCount: my.expertCount)
      arena = Memory([UInt8](repeating: 0, count: Int(control.byteCount)))
      let view = RankView(
        rank: rank, rankCount: my.rankCount, expertCount: my.expertCount, localExpertCount: localCount, arenas: at(0),
        ownArena: arena.address, expertOwner: at(4 * ranks), expertLocal: at(4 * ranks + experts),
        expertOrder: at(4 * ranks + 2 * experts), firstPlaces: at(4 * ranks + 3 * experts), failure: .null,
        hostFailure: .null, departures: .null, alarm: .null, arrivals: .null, pause: .null, timeoutNanoseconds: 1)
      let layout = HandleLayout(
        chunks: Chunks(tokenCount: 1, chunkCount: 1), rankCount: my.rankCount, expertCount: my.expertCount,
        localExpertCount: localCount, topK: 2, layout: my.layout, groupCapacity: my.groupCapacity,
        sourceCapacity: my.sourceCapacity)
      let operationLayout = OperationLayout(rankCount: my.rankCount, expertCount: my.expertCount, chunkCount: 1)
      handleMemory = Memory(byteCount: Int(layout.byteCount))
      operationMemory = Memory(byteCount: Int(operationLayout.byteCount))
      statistics = Memory([Int32](repeating: 100, count: Int(localCount)))
      var columns = Columns()
      (columns[Columns.rows], columns[Columns.sidecars + 1], columns[Columns.origins]) = (48, 4, 8)
      arguments = DispatchArguments(
        view: view, header: ExchangeHeader(), handle: HandleView(block: handleMemory.address, layout: layout),
        operation: OperationView(
          block: operationMemory.address, report: .null, layout: operationLayout, part: .whole),
        routing: RoutingView(
          tokenCount: 1, topK: 2, indices: .null, indexByteCount: 4, weights: .null, table: .null),
        columns: columns, transform: .copy, scaleStride: 4, globalScale: 1, sourceRowByteCount: 48,
        sources: (.null, .null, .null, .null, .null), expertAlignment: my.alignment, zeroesPadding: 0,
        expertStatistics: statistics.address, isCached: false)
      for source in 0..<my.rankCount {
        let block = arena.address.advanced(byBytes: control.exchangeOffset(source: source, epoch: 0))
        var header = ExchangeHeader()
        header.outputOffset = 4096 + 128 * Int64(source)
        header.outputRowCapacity = Int64(my.rowCapacity)
        header.outputCapacity = byteCount(atRank: source) - (source == tightRank ? 1 : 0)
        block.store(header, at: 0)
        for (index, count) in counts[Int(source)].enumerated() {
          block.advanced(byBytes: ExchangeHeader.byteCount).store(count, at: Int32(index))
        }
      }
    }

    func experts(ofRank rank: Int32) -> [Int32] { (0..<my.expertCount).filter { $0 % my.rankCount == rank } }
    func received(_ index: Int32, before source: Int32? = nil) -> Int32 {
      counts[..<Int(source ?? my.rankCount)].reduce(0) { $0 + $1[Int(index)] }
    }
    func groupSize(_ expert: Int32) -> Int32 {
      if my.groupCapacity != 0 { return my.groupCapacity }
      return (received(my.rankCount + expert) + my.alignment - 1) / my.alignment * my.alignment
    }

    func total(atRank rank: Int32) -> Int32 {
      if my.layout == .byExpert { return experts(ofRank: rank).reduce(0) { $0 + groupSize($1) } }
      return my.sourceCapacity == 0 ? received(rank) : my.rankCount * my.sourceCapacity
    }
    func firstRow(ofKey key: Int32) -> Int32 {
      let group =
        my.layout == .bySource
        ? 0 : experts(ofRank: key % my.rankCount).filter { $0 < key }.reduce(0) { $0 + groupSize($1) }
      if my.sourceCapacity != 0 { return group + rank * my.sourceCapacity }
      return group + received(my.layout == .bySource ? key : my.rankCount + key, before: rank)
    }
    func offset(ofColumn column: Int32, atRank rank: Int32) -> Int64 {
      let rowCapacity = Int64(my.rowCapacity == 0 ? total(atRank: rank) : my.rowCapacity)
      return (0..<column).reduce(0) { $0 + (Int64(arguments.columns[$1]) * rowCapacity + 127) / 128 * 128 }
    }
    func byteCount(atRank rank: Int32) -> Int64 { offset(ofColumn: Columns.count, atRank: rank) }

    var sentRows: Int64 {
      let own = counts[Int(rank)]
      let sent = my.layout == .bySource ? own.prefix(Int(my.rankCount)) : own.dropFirst(Int(my.rankCount))
      return Int64(sent.reduce(0, +))
    }
    var receivedRows: Int64 {
      if my.layout == .bySource { return Int64(received(rank)) }
      return Int64(experts(ofRank: rank).reduce(0) { $0 + received(my.rankCount + $1) })
    }

    func table(_ offset: Int64, _ count: Int32) -> [Int32] {
      (0..<count).map { handleMemory.address.advanced(byBytes: offset).load(Int32.self, at: $0) }
    }
    func number(_ offset: Int64) -> Int64 { handleMemory.address.advanced(byBytes: offset).load(Int64.self, at: 0) }
  }

  @Test(arguments: cases) func rowsAndColumns(_ my: Case) {
    let exchange = Exchange(my)
    let (arguments, handle) = (exchange.arguments, exchange.arguments.handle)
    let fault = emulate(blockCount: 1) { machine in
      _ = place(machine, view: arguments.view.behindExchange, arguments)
      let part = countReceived(machine, arguments, isFitting: true)
      _ = sumReceived(machine, arguments.handle, part, isFitting: true)
    }
    #expect(fault == nil)
    let status = arguments.operation.status
    #expect(status.code == StatusCode.ok.rawValue && status.rowCount == Int64(exchange.total(atRank: exchange.rank)))
    #expect(status.neededByteCount == exchange.byteCount(atRank: exchange.rank))
    let ranks = 0..<my.rankCount
    #expect(exchange.table(handle.layout.totals, my.rankCount) == ranks.map { exchange.total(atRank: $0) })
    let keys = 0..<handle.layout.keyCount
    #expect(
      exchange.table(handle.layout.firstRows, handle.layout.keyCount) == keys.map { exchange.firstRow(ofKey: $0) })
    for rank in ranks {
      for column in 0..<Columns.count {
        let address = UInt64(rank + 1) << 20 + 4096 + 128 * UInt64(rank)
        let expected = address + UInt64(exchange.offset(ofColumn: column, atRank: rank))
        #expect(arguments.operation.column(column, atRank: rank).bits == expected, "column \(column) at rank \(rank)")
      }
    }

    #expect(handle.epoch == 0 && exchange.number(handle.layout.leftOut) == 0)
    #expect(exchange.table(handle.layout.rowCount, 1) == [exchange.total(atRank: exchange.rank)])

    let me = exchange.rank
    let local = exchange.experts(ofRank: me).map { exchange.received(my.rankCount + $0) }
    #expect(
      exchange.table(handle.layout.tokensPerPair, my.rankCount * my.rankCount)
        == exchange.counts.flatMap { $0.prefix(Int(my.rankCount)) })
    #expect(exchange.table(handle.layout.tokensPerSource, my.rankCount) == exchange.counts.map { $0[Int(me)] })
    #expect(exchange.table(handle.layout.tokensPerExpert, exchange.localCount) == local)
    #expect(exchange.statistics.elements(Int32.self) == local.map { $0 + 100 })
    #expect(exchange.number(handle.layout.sentRows) == exchange.sentRows)
    #expect(exchange.number(handle.layout.receivedRows) == exchange.receivedRows)
  }

  /// The first rank whose output is too small is told, and what this rank's own takes, whichever that is.
  @Test(arguments: cases) func anOutputThatIsTooSmall(_ my: Case) {
    for tight in Set([0, my.rankCount - 1]) {
      let exchange = Exchange(my, tightRank: tight)
      let arguments = exchange.arguments
      let fault = emulate(blockCount: 1) { machine in
        _ = place(machine, view: arguments.view.behindExchange, arguments)
        let part = countReceived(machine, arguments, isFitting: false)
        _ = sumReceived(machine, arguments.handle, part, isFitting: false)
      }
      #expect(fault == nil)
      let (status, needed) = (arguments.operation.status, exchange.byteCount(atRank: tight))
      #expect(status.code == StatusCode.overflow.rawValue && status.rank == Int64(tight))
      #expect(status.details.0 == needed && status.details.1 == needed - 1)
      #expect(status.rowCount == Int64(exchange.total(atRank: exchange.rank)))
      #expect(status.neededByteCount == exchange.byteCount(atRank: exchange.rank))
      #expect(exchange.statistics.elements(Int32.self).allSatisfy { $0 == 100 })
      #expect(exchange.number(arguments.handle.layout.sentRows) == exchange.sentRows)
      #expect(exchange.number(arguments.handle.layout.receivedRows) == exchange.receivedRows)
    }
  }
}
