import Testing

@testable import EPKernels

/// Which calls take a kernel of their own: what is asked here is what that kernel may leave out.
@Suite struct VariantTests {
  private static let somewhere = Address(bits: 1 << 20)

  private static func dispatch(
    _ transform: RowTransform = .copy, scales: Address = .null, sidecar: Address = .null, scaleByteCount: Int = 64,
    _ change: (inout DispatchArguments) -> Void = { _ in }
  ) -> DispatchArguments {
    let columns = Columns(
      rowByteCount: 256, scaleByteCount: scaleByteCount, sidecarByteCounts: sidecar.isNull ? [] : [16], slotCount: 2,
      indexByteCount: 8, isWeighted: false)
    var arguments = DispatchArguments(
      view: view, header: ExchangeHeader(), handle: handle, operation: operation,
      routing: RoutingView(tokenCount: 0, topK: 2, indices: .null, indexByteCount: 8, weights: .null, table: .null),
      columns: columns, transform: transform, scaleStride: 4, globalScale: 1, sourceRowByteCount: 256,
      sources: (somewhere, scales, sidecar, .null, .null), expertAlignment: 1, zeroesPadding: 0,
      expertStatistics: .null, isCached: false)
    change(&arguments)
    return arguments
  }

  /// GPUs read its words where they lie among a launch's arguments.
  @Test func theHeaderLiesBehindTheView() {
    let offset = Int(ExchangeHeader.offsetInArguments)
    #expect(MemoryLayout<DispatchArguments>.offset(of: \.header) == offset)
    #expect(MemoryLayout<CombineArguments>.offset(of: \.header) == offset)
    #expect(ExchangeHeader.wordCount <= 32 && 8 * Int64(ExchangeHeader.wordCount) <= ExchangeHeader.byteCount)
  }

  private static var view: RankView {
    RankView(
      rank: 0, rankCount: 2, expertCount: 8, localExpertCount: 4, arenas: .null, ownArena: .null, expertOwner: .null,
      expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: .null, hostFailure: .null,
      departures: .null, alarm: .null, arrivals: .null, pause: .null, timeoutNanoseconds: 1)
  }

  private static var operation: OperationView {
    OperationView(
      block: .null, report: .null, layout: OperationLayout(rankCount: 2, expertCount: 8, chunkCount: 0), part: .whole)
  }

  private static var handle: HandleView {
    HandleView(
      block: .null,
      layout: HandleLayout(
        chunks: Chunks(tokenCount: 0, chunkCount: 1), rankCount: 2, expertCount: 8, localExpertCount: 4, topK: 2,
        layout: .bySource))
  }

  @Test func dispatchesThatCopy() {
    #expect(Self.dispatch().isPlainCopy)
    #expect(Self.dispatch { $0.isCached = true }.isPlainCopy)
    // Scales that bulk copies take go beside the rows; others are copied behind them, as what comes second is.
    #expect(Self.dispatch(scales: Self.somewhere).isPlainCopy)
    #expect(!Self.dispatch(scales: Self.somewhere, scaleByteCount: 20).isPlainCopy)
    #expect(!Self.dispatch(scales: Self.somewhere, sidecar: Self.somewhere).isPlainCopy)
    #expect(!Self.dispatch { $0.view.masks = Self.somewhere }.isPlainCopy)
    #expect(!Self.dispatch { $0.operation.part = .sendDispatch }.isPlainCopy)
    #expect(!Self.dispatch { $0.operation.part = .middle }.isPlainCopy)
    #expect(!Self.dispatch { $0.zeroesPadding = 1 }.isPlainCopy)
    #expect(!Self.dispatch(.quantizeFloatScales).isPlainCopy)
    // Up to 8 experts a token, at least one, and up to 64 ranks.
    #expect(Self.dispatch { $0.routing.topK = 8 }.isPlainCopy && !Self.dispatch { $0.routing.topK = 9 }.isPlainCopy)
    #expect(!Self.dispatch { $0.routing.topK = 0 }.isPlainCopy)
    #expect(
      Self.dispatch { $0.view.rankCount = 64 }.isPlainCopy && !Self.dispatch { $0.view.rankCount = 65 }.isPlainCopy)
    #expect(!Self.dispatch { $0.handle.layout.layout = .byExpert }.isPlainCopy)
  }

  @Test(arguments: [RowTransform.quantizeFloatScales, .quantizeUE8M0Scales, .quantizePowerOfTwoScales])
  func dispatchesThatQuantize(_ transform: RowTransform) {
    #expect(Self.dispatch(transform).isPlainQuantizing)
    #expect(!Self.dispatch(transform, sidecar: Self.somewhere).isPlainQuantizing)
    #expect(!Self.dispatch(transform) { $0.isCached = true }.isPlainQuantizing)
    #expect(!Self.dispatch(transform) { $0.view.masks = Self.somewhere }.isPlainQuantizing)
    #expect(!Self.dispatch().isPlainQuantizing && !Self.dispatch(.quantizeNVFP4).isPlainQuantizing)
    // In groups: those that have a capacity.
    let group = { (capacity: Int32) in
      Self.dispatch(transform) { ($0.handle.layout.layout, $0.handle.layout.groupCapacity) = (.byExpert, capacity) }
    }
    #expect(group(16).isPlainGrouped && !group(0).isPlainGrouped && !Self.dispatch(transform).isPlainGrouped)
    #expect(!group(16).isPlainQuantizing && !group(0).isPlainQuantizing)
  }

  @Test func combinesInPlace() {
    let combine = { (change: (inout CombineArguments) -> Void) in
      var arguments = CombineArguments(
        view: Self.view, header: ExchangeHeader(), handle: Self.handle, operation: Self.operation, stagedRows: .null,
        stagedWeights: .null, rowCount: 0, steps: .none, format: .bf16, elementsPerRow: 128, output: Self.somewhere,
        rowWeights: .null, biases: (.null, .null), weightsOutput: .null)
      change(&arguments)
      return arguments.isPlainInPlace
    }
    #expect(combine { _ in })
    #expect(combine { $0.rowWeights = Self.somewhere })
    #expect(!combine { $0.stagedRows = Self.somewhere })
    #expect(!combine { $0.weightsOutput = Self.somewhere })
    #expect(!combine { $0.format = .logFMT } && !combine { $0.format = .fp32 })
    #expect(!combine { $0.view.masks = Self.somewhere })
    #expect(!combine { $0.operation.part = .receiveCombine })
  }
}
