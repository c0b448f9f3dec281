import HostMachine
import SwiftEP
import Testing

@testable import EPKernels

/// What a rank lays out and tells the others, whatever lay in its memory before.
@Suite struct LayoutTests {
  /// Rank 1 of two, with 8 experts, three chunks of two tokens, and two experts a token.
  private struct Rank {
    static let experts: [Int32] = [0, 5, 4, 7, -1, 2, 6, 1, 3, 4, 5, 6]
    let memory: HostMemory
    let arguments: DispatchArguments

    /// - Parameters:
    ///   - changes: cells of `experts` that name something else.
    ///   - before: what lies in the operation's memory, where not the mark of a fault.
    ///   - table: for each token and rank whether it goes there, instead of `experts`.
    init(_ layout: EPKernels.RowLayout, _ changes: [Int: Int32] = [:], before: UInt32? = nil, table: [UInt8] = [])
      throws
    {
      memory = try HostMemory(byteCount: 1 << 20)
      let base = memory.base
      let at = { (offset: Int64) in base.advanced(byBytes: offset) }
      for rank in 0..<Int32(2) { base.store(at(1 << 19).bits, at: rank) }
      let (owners, indices) = (at(256), at(512))
      for expert in 0..<Int32(8) { owners.store(expert / 4, at: expert) }
      let topK: Int32 = table.isEmpty ? 2 : 0
      for (cell, goes) in table.enumerated() { at(768).store(goes, at: Int32(cell)) }
      for (cell, expert) in Self.experts.enumerated() { indices.store(changes[cell] ?? expert, at: Int32(cell)) }
      var view = RankView(
        rank: 1, rankCount: 2, expertCount: 8, localExpertCount: 4, arenas: base, ownArena: at(1 << 19),
        expertOwner: owners, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: at(1024),
        hostFailure: .null, departures: .null, alarm: .null, arrivals: .null, pause: .null, timeoutNanoseconds: 1)
      view.epoch = 3
      let handle = HandleLayout(
        chunks: Chunks(tokenCount: 6, chunkCount: 3), rankCount: 2, expertCount: 8, localExpertCount: 4, topK: topK,
        layout: layout)
      let operation = OperationLayout(rankCount: 2, expertCount: 8, chunkCount: 3)
      HostMachine.host.fill(at(4096), byteCount: operation.byteCount, pattern: before ?? view.faultMark)
      HostMachine.host.fill(at(65536), byteCount: handle.byteCount, pattern: 7)
      arguments = DispatchArguments(
        view: view, header: ExchangeHeader(), handle: HandleView(block: at(65536), layout: handle),
        operation: OperationView(block: at(4096), report: .null, layout: operation, part: .whole),
        routing: RoutingView(
          tokenCount: 6, topK: topK, indices: indices, indexByteCount: 4, weights: .null, table: at(768)),
        columns: Columns(), transform: .copy, scaleStride: 4, globalScale: 1, sourceRowByteCount: 48,
        sources: (.null, .null, .null, .null, .null), expertAlignment: 1, zeroesPadding: 0, expertStatistics: .null,
        isCached: false)
      for chunk in 0..<Int32(3) {
        layOut(
          HostMachine.host, chunk: chunk, routing: arguments.routing, view: view, handle: arguments.handle,
          operation: arguments.operation)
      }
      sumChunks(HostMachine.host, arguments, into: ExchangePages(view))
    }

    var page: Address { ExchangePages(arguments.view).page(atRank: 0) }
    /// The fault, its token, slot and expert.
    var fault: [Int64] { (0..<4).map { page.load(Int64.self, at: ExchangeHeader.faultIndex + $0) } }
    /// Tokens by rank, then by expert.
    var counts: [Int32] {
      (0..<10).map { page.advanced(byBytes: ExchangeHeader.byteCount).load(Int32.self, at: $0) }
    }
    var slots: [Int32] {
      let layout = arguments.handle.layout
      return (0..<12).map { arguments.handle.at(layout.slotIndices).load(Int32.self, at: $0) }
    }
  }

  @Test func slotsAndCounts() throws {
    let bySource = try Rank(.bySource)
    #expect(bySource.fault == [0, 0, 0, 0])
    #expect(bySource.counts == [4, 5] + [1, 1, 1, 1, 2, 2, 2, 1])
    // Of each token, at either rank; chunks number their own.
    #expect(bySource.slots == [0, 0, -1, 1, 0, -1, 1, 0, 0, 0, -1, 1])
    let byExpert = try Rank(.byExpert)
    #expect(byExpert.fault == [0, 0, 0, 0] && byExpert.counts == bySource.counts)
    #expect(byExpert.slots == [0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0])
  }

  @Test func byTable() throws {
    let rank = try Rank(.bySource, table: [1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1])
    // No expert is named.
    #expect(rank.fault == [0, 0, 0, 0] && rank.counts == [3, 4] + [0, 0, 0, 0, 0, 0, 0, 0])
    #expect(rank.slots == [0, 0, -1, 1, -1, -1, 0, -1, 0, 0, -1, 1])
  }

  /// The first token's that has one, whether other chunks look as if they had one or not.
  @Test(arguments: [EPKernels.RowLayout.bySource, .byExpert], [nil, 0] as [UInt32?])
  func faults(_ layout: EPKernels.RowLayout, before: UInt32?) throws {
    let outOfRange = InputFault.expertOutOfRange.rawValue
    #expect(try Rank(layout, before: before).fault == [0, 0, 0, 0])
    #expect(try Rank(layout, [11: 8], before: before).fault == [outOfRange, 5, 1, 8])
    #expect(try Rank(layout, [11: 8, 6: -2], before: before).fault == [outOfRange, 3, 0, -2])
    #expect(try Rank(layout, [1: 0, 11: 8], before: before).fault == [InputFault.duplicateExpert.rawValue, 0, 1, 0])
    // Tokens with a fault go nowhere.
    if layout == .bySource {
      #expect(try Rank(layout, [11: 8], before: before).slots.suffix(2) == [-1, -1])
    }
  }
}
