import HostMachine
import SwiftEP
import Testing

@testable import EPKernels

/// What an exchange or a received row says that cannot be.
@Suite struct CheckTests {
  /// Rank 1 of two, with a page of an exchange of epoch 2, rows that have arrived, and 8 experts.
  private struct Rank {
    let memory: HostMemory
    let view: RankView
    let operation: OperationView
    let control = ControlLayout(rankCount: 2, expertCount: 8)
    let arenaByteCount: Int64 = 1 << 20

    init() throws {
      memory = try HostMemory(byteCount: 2 << 20)
      let (tables, arena) = (memory.base, memory.base.advanced(byBytes: 1 << 20))
      for rank in 0..<Int32(2) {
        tables.store(arena.bits, at: rank)
        tables.store(arenaByteCount, at: 2 + rank)
      }
      let at = { (offset: Int64) in tables.advanced(byBytes: offset) }
      view =
        RankView(
          rank: 1, rankCount: 2, expertCount: 8, localExpertCount: 4, arenas: tables, ownArena: arena,
          expertOwner: .null, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: at(1024),
          hostFailure: .null, departures: .null, alarm: .null, arrivals: at(960), pause: at(968), timeoutNanoseconds: 1
        ).behindExchange.recorded(HostMachine.host)
      operation = OperationView(
        block: at(8192), report: at(4096), layout: OperationLayout(rankCount: 2, expertCount: 8, chunkCount: 0),
        part: .whole)
      for rank in 0..<Int32(2) {
        var header = ExchangeHeader()
        header.outputOffset = control.byteCount
        header.outputCapacity = 4096
        block(of: rank).store(header, at: 0)
      }
    }

    func block(of rank: Int32) -> Address { exchangeBlock(view, source: rank) }

    /// Counts of tokens, by rank, then by expert.
    func counts(of rank: Int32) -> Address { block(of: rank).advanced(byBytes: ExchangeHeader.byteCount) }

    /// What the exchange fails with, as the host is told.
    func failure() -> (check: Check?, found: Int64, end: Int64)? {
      checkCounts(HostMachine.host, view: view, topK: 2)
      checkOffers(HostMachine.host, view: view)
      guard endsInFailedCheck(HostMachine.host, view: view, operation: operation) else { return nil }
      let status = operation.reported
      #expect(status.code == StatusCode.checkFailed.rawValue && status.rank == 1)
      #expect(operation.status.code == status.code && view.failure.load(Int64.self, at: 0) == status.code)
      return (status.failedCheck.check, status.details.1, status.details.2)
    }
  }

  @Test func nothingToFind() throws {
    let rank = try Rank()
    rank.counts(of: 0).store(Int32.max / 4, at: 9)
    #expect(rank.failure() == nil)
  }

  @Test(arguments: [(0, -1), (1, Int32.max / 4 + 1), (9, Int32.min)] as [(Int32, Int32)])
  func counts(index: Int32, found: Int32) throws {
    let rank = try Rank()
    rank.counts(of: 0).store(found, at: index)
    let failure = try #require(rank.failure())
    #expect(failure == (.count, Int64(found), Int64(Int32.max / 4 + 1)))
  }

  /// Memory that is offered in the control words, behind the arena, or in part behind it.
  @Test(arguments: [(-64, 64), (1 << 20, 4096), (0, 1 << 20)] as [(Int64, Int64)])
  func offers(offset: Int64, byteCount: Int64) throws {
    let rank = try Rank()
    var header = ExchangeHeader()
    (header.outputOffset, header.outputCapacity) = (rank.control.byteCount + offset, byteCount)
    rank.block(of: 0).store(header, at: 0)
    let failure = try #require(rank.failure())
    let end = rank.arenaByteCount - rank.control.byteCount - byteCount + 1
    #expect(failure == (.arenaOffset, offset, max(0, end)))
  }

  /// Rows by source rank and token: one that comes twice, one that comes too early, one from nowhere.
  @Test(
    arguments: [
      ([[0, 3], [0, 3], [1, 0]], Check.order, Int64(0)), ([[0, 3], [1, 5], [1, 4]], .order, -1),
      ([[0, 3], [0, 4], [2, 0]], .source, 2), ([[0, 3], [0, 4], [1, 0]], nil, 0),
    ] as [([[Int32]], Check?, Int64)])
  func origins(rows: [[Int32]], check: Check?, found: Int64) throws {
    let rank = try Rank()
    let origins = rank.memory.base.advanced(byBytes: 16384)
    rank.operation.setColumn(Columns.origins, atRank: 1, origins)
    for (row, origin) in rows.enumerated() { origins.store(SIMD2(origin[0], origin[1]), at: Int32(row)) }
    let arguments = DispatchArguments(
      view: rank.view, header: ExchangeHeader(),
      handle: HandleView(
        block: .null,
        layout: HandleLayout(
          chunks: Chunks(tokenCount: 0, chunkCount: 1), rankCount: 2, expertCount: 8, localExpertCount: 4, topK: 2,
          layout: .bySource)),
      operation: rank.operation,
      routing: RoutingView(
        tokenCount: 0, topK: 2, indices: .null, indexByteCount: 8, weights: .null, table: .null),
      columns: Columns(), transform: .copy, scaleStride: 4, globalScale: 1, sourceRowByteCount: 16,
      sources: (.null, .null, .null, .null, .null),
      expertAlignment: 1, zeroesPadding: 0, expertStatistics: .null, isCached: false)
    checkOrigins(HostMachine.host, arguments, first: 0, count: 3)
    let status = rank.view.failedCheck(HostMachine.host)
    #expect(status?.failedCheck.check == check && status?.details.1 ?? 0 == found)
  }
}
