import EPKernels

extension ExpertBuffer {
  /// Sends each token to the ranks of its experts, once a rank (by expert: once an expert), and returns what arrives
  /// here. Collective.
  ///
  /// Received rows are ordered by source rank, then token (by expert and grouped: by local expert first), the same in every
  /// run.
  /// The algorithm places rows as DeepEP's dispatch orders them, but writes each directly to its final place, which is
  /// known from counts exchanged first.
  ///
  /// - Parameters:
  ///   - x: `[tokens, hidden]`, in rows of a multiple of 16 bytes; bf16, fp16, fp32, fp8E4M3 or, opaque, uint8.
  ///   - scales: of fp8E4M3 rows: fp32 `[tokens, ceil(hidden / 128)]` or, packed UE8M0, int32 `[tokens, ceil(hidden /
  ///     512)]`. In columns: see `DispatchOptions.givenScaleOrder`.
  ///   - sidecars: up to three arrays `[tokens, …]` that travel with the rows; rows of a multiple of 4 bytes.
  ///   - routing: where the tokens go.
  ///   - options: layout, sizing, quantization, and how to wait.
  /// - Throws: `invalidArgument`, `ranksDisagree` and `outOfMemory`, the same on all ranks, which can then go on;
  ///   `rankMissing`, after which the buffer is lost; `bufferLost`, `bufferClosed`.
  public func dispatch(
    _ x: Tensor, scales: Tensor? = nil, sidecars: [Tensor] = [], to routing: Routing,
    options: DispatchOptions = DispatchOptions()
  ) throws(EPError) -> DispatchResult {
    try core.callLock.withLock { _ throws(EPError) in
      try core.checkOpen()
      let call = DispatchCall(
        buffer: self, x: x, scales: scales, sidecars: sidecars, routing: routing, options: options,
        stream: try core.find(options.stream))
      return try call.run()
    }
  }
}

extension ExpertBuffer {
  /// Experts that this rank holds.
  public var localExpertCount: Int { Int(core.view.localExpertCount) }

  /// The sizes before the last of what a dispatch of worst-case size returns here (`Sizing.worstCase`): `[rows]`, grouped
  /// `[local experts, rows of a group]`.
  public func worstCaseRowShape(_ layout: RowLayout, topK: Int, expertAlignment: Int = 1) -> [Int] {
    var shape = plan.shape
    (shape.layout, shape.topK, shape.expertAlignment) = (layout, topK, expertAlignment)
    if layout == .grouped { return [localExpertCount, shape.groupCapacity] }
    let rowCount = shape.rowCountMax(localExpertCount: localExpertCount)
    return [core.masks != nil ? rowCount : min(plan.rowsPerResult, rowCount)]
  }
}

/// What a dispatch is given and its kernels use: one value, since each that is kept by itself takes memory of its own.
private struct DispatchInputs: Sendable {
  let x: Tensor
  let scales: Tensor?
  let sidecars: [Tensor]
  let routing: Routing
  let statistics: Tensor?
}

/// One call of `dispatch`.
private struct DispatchCall {
  let buffer: ExpertBuffer
  let x: Tensor
  let scales: Tensor?
  let sidecars: [Tensor]
  let routing: Routing
  let options: DispatchOptions
  let stream: CallStream?
  // What the routing is, apart: to ask it copies it.
  private let topK: (indices: Tensor, weights: Tensor?)?
  private let cachedHandle: DispatchHandle?

  init(
    buffer: ExpertBuffer, x: Tensor, scales: Tensor?, sidecars: [Tensor], routing: Routing, options: DispatchOptions,
    stream: CallStream?
  ) {
    self.buffer = buffer
    self.x = x
    self.scales = scales
    self.sidecars = sidecars
    self.routing = routing
    self.options = options
    self.stream = stream
    switch routing {
    case .topK(let indices, let weights): (topK, cachedHandle) = ((indices, weights), nil)
    case .table: (topK, cachedHandle) = (nil, nil)
    case .cached(let handle): (topK, cachedHandle) = (nil, handle)
    }
  }

  private var core: BufferCore { buffer.core }

  func run() throws(EPError) -> DispatchResult {
    try core.checkRecordable(
      isAsynchronous: options.isAsynchronous, sizing: sizing, after: options.after,
      stream: stream)
    try core.beginCall(
      exchangeCount: sizing == .exact ? nil : 1, waiting: options.waiting, receivesLater: options.receivesLater)
    do throws(ArgumentFault) {
      try checkArguments()
    } catch {
      try core.report(error, as: operation, stream: stream)
    }
    let layout = cachedHandle?.layout ?? makeHandleLayout()
    let pending = try PendingOperation(
      core, stream: stream, chunkCount: cachedHandle == nil ? Int(layout.chunks.chunkCount) : 0,
      scaleByteCount: givesScaleColumns ? Int64(tokenCount) * Int64(columns[Columns.scales]) : 0,
      waiting: options.waiting, waitStatistics: options.waitStatistics,
      firstHalf: options.receivesLater ? .sendDispatch : nil)
    let handle: DispatchHandle
    if let cachedHandle { handle = cachedHandle } else { handle = try makeHandle(layout, pending) }
    let resources = pending.makeResources(
      [
        DispatchInputs(
          x: x, scales: scales, sidecars: sidecars, routing: routing, statistics: options.expertStatistics),
        handle, core.arenas,
      ],
      isGraphed: core.isGraphed(stream))
    core.queueWaits(options.after, of: operation, isUrgent: options.isAsynchronous)

    var arguments = makeArguments(handle, pending)
    var missingByteCount: Int64?
    while true {
      let block = offerBlock(&arguments.header, handle, needing: missingByteCount)
      if let block { resources.retain(block) }
      if sizing == .worstCase, let block {
        return try launch(
          .dispatch(arguments), arguments.columns, handle, pending, resources, block, rowCapacity: handle.rowCapacity)
      }
      if core.isGraphed(stream) { throw core.exhausted(arguments.header) }
      pending.enqueue(
        .prepareDispatch(arguments), workerCount: workerCount, keeping: resources, isUrgent: options.isAsynchronous,
        stream: stream)
      try pending.waitForStatus()
      let status = pending.status
      if let block, status.code == StatusCode.ok.rawValue {
        core.arena.trim(block, to: status.neededByteCount)
        let rowCapacity = Int(status.rowCount)
        return try launch(
          .deliverDispatch(arguments), arguments.columns, exactHandle(handle, rowCapacity), pending, resources, block,
          rowCapacity: rowCapacity)
      }
      if block != nil { resources.releaseLast() }
      guard sizing == .exact, status.code == StatusCode.overflow.rawValue else {
        throw pending.error!
      }
      missingByteCount = status.neededByteCount
    }
  }

  /// Queues what ends the call.
  private func launch(
    _ launch: KernelLaunch, _ columns: Columns, _ handle: DispatchHandle, _ pending: PendingOperation,
    _ resources: OperationResources, _ block: ArenaBlock, rowCapacity: Int
  ) throws(EPError) -> DispatchResult {
    pending.enqueue(
      launch, workerCount: workerCount, keeping: resources, isUrgent: options.isAsynchronous, stream: stream)
    var receiving: PendingReceive?
    if options.receivesLater {
      receiving = PendingReceive(
        pending, launch.with(.receiveDispatch), workerCount: 1, keeping: resources,
        isAsynchronous: options.isAsynchronous, stream: stream)
    } else {
      pending.handOver(resources, stream: stream)
    }
    if let stream {
      try block.noteUse(by: stream)
      try handle.memory.noteUse(by: stream)
    }
    if !options.isAsynchronous { try pending.finish() }
    return makeResult(columns, handle, pending, receiving, block, rowCapacity: rowCapacity)
  }

  // MARK: What the call means

  private var operation: Operation { cachedHandle == nil ? .dispatch : .cachedDispatch }

  private var layout: RowLayout { cachedHandle?.rowLayout ?? options.layout }

  private var sizing: Sizing { layout == .grouped || core.masks != nil ? .worstCase : options.sizing }

  private var expertAlignment: Int {
    layout == .grouped ? 1 : cachedHandle?.expertAlignment ?? options.expertAlignment
  }

  private var workerCount: Int {
    core.device.workerCount(
      of: options.workers ?? core.device.workerCountMax, tokenCount: tokenCount,
      moving: x.byteCount + ([scales].compactMap { $0 } + sidecars).reduce(markByteCount) { $0 + $1.byteCount })
  }

  /// Rows that no token fills are marked, and perhaps zeroed.
  private var markByteCount: Int {
    if layout == .grouped { return 0 }
    let columns = columns
    let unmarked = options.zeroesPadding ? 0 : Int64(columns[Columns.rows])
    return worstCaseRows * Int(columns.byteCountPerRow - unmarked)
  }

  private var hasScaleColumns: Bool { options.scaleOrder == .columnMajor }

  private var givesScaleColumns: Bool { scales != nil && options.givenScaleOrder == .columnMajor }

  /// The scales as they travel, if not as they lie.
  private var scaleRows: Tensor? { givesScaleColumns ? scales?.reshaped([tokenCount, scales!.shape[0]]) : scales }

  private var tokenCount: Int { x.shape[0] }

  private var hidden: Int { x.rowByteCount / x.dtype.byteCount }

  private var outputDType: DType { options.quantization?.rowDType ?? x.dtype }

  private var outputElementCount: Int { hidden / outputDType.channelsPerElement }

  private var topKCount: Int { topK?.indices.shape[1] ?? 0 }

  /// Top-k experts that a received row carries.
  private var slotCount: Int { layout == .bySource ? topKCount : min(1, topKCount) }

  /// What a received row consists of.
  private var columns: Columns {
    Columns(
      rowByteCount: outputElementCount * outputDType.byteCount,
      scaleByteCount: options.quantization?.byteCount(hidden: hidden) ?? scaleRows?.rowByteCount ?? 0,
      sidecarByteCounts: sidecars.map(\.rowByteCount), slotCount: slotCount,
      indexByteCount: topK?.indices.dtype.byteCount ?? 4, isWeighted: topK?.weights != nil)
  }

  // MARK: Checks

  private func checkArguments() throws(ArgumentFault) {
    try core.check(stream)
    try core.check(.x, x)
    try x.check(.x, shape: [nil, nil])
    try x.check(.x, dtype: options.quantization == nil ? [.bf16, .fp16, .fp32, .fp8E4M3, .uint8] : [.bf16])
    // Quantized rows have fewer bytes, and those too must be a multiple of 16.
    try x.check(.x, rowByteCountMultipleOf: options.quantization.map { 2 * $0.channelStep } ?? 16)
    try checkScales()
    try checkGlobalScale()
    if hasScaleColumns && (layout != .grouped || options.quantization == nil) {
      throw ArgumentFault(.order, .scaleOrder, expected: 0, found: 1)
    }
    try check(.sidecars, sidecars.count, in: 0...Int(Columns.sidecarCountMax))
    for sidecar in sidecars {
      try core.check(.sidecars, sidecar)
      if sidecar.shape.first != tokenCount {
        throw ArgumentFault(.dimension, .sidecars, expected: tokenCount, found: sidecar.shape.first ?? 0)
      }
      try sidecar.check(.sidecars, rowByteCountMultipleOf: 4)
    }
    try checkRouting()
    if core.masks != nil && layout == .byExpert { throw ArgumentFault(.masks, .layout, expected: 0, found: 1) }
    try check(.expertAlignment, options.expertAlignment, in: 1...max(1, (1 << 30) / max(1, core.owners.count)))
    if let rowsMax = options.rowsMax {
      let isUsed = sizing == .worstCase && layout != .grouped && core.masks == nil && cachedHandle == nil
      if !isUsed { throw ArgumentFault(.presence, .rowsMax, expected: 0, found: 1) }
      try check(.rowsMax, rowsMax, in: 1...Int(Int32.max) / max(4, topKCount))
    }
    if let workers = options.workers { try check(.workers, workers, in: 1...core.device.workerCountMax) }
    try core.check(.expertStatistics, options.expertStatistics)
    try options.expertStatistics?.check(.expertStatistics, shape: [Int(core.view.localExpertCount)])
    try options.expertStatistics?.check(.expertStatistics, dtype: [.int32])
    try core.check(waitStatistics: options.waitStatistics)
    try core.check(after: options.after)
    if layout == .grouped && cachedHandle == nil {
      // A plan has looked at that, unless it was for another layout.
      let rowCount = Int(core.view.localExpertCount) * buffer.plan.shape.groupCapacity
      let rowCountMax = Int(Int32.max) / max(4, topKCount)
      if rowCount > rowCountMax { throw ArgumentFault(.rowCount, .layout, expected: rowCountMax, found: rowCount) }
    }
    // Kernels number rows with an Int32, whatever the routing.
    let rowsPerTokenMax = 2 * core.rankCount * max(1, topKCount)
    try check(
      .x, tokenCount,
      in: 0...(sizing == .worstCase ? buffer.plan.shape.tokensPerRankMax : Int(Int32.max) / rowsPerTokenMax))
  }

  private func checkScales() throws(ArgumentFault) {
    guard x.dtype == .fp8E4M3 else {
      if scales != nil { throw ArgumentFault(.presence, .scales, expected: 0, found: 1) }
      return
    }
    guard let scales else { throw ArgumentFault(.presence, .scales, expected: 1, found: 0) }
    try core.check(.scales, scales)
    try scales.check(.scales, dtype: [.fp32, .int32])
    let format: ScaleFormat = scales.dtype == .fp32 ? .float : .ue8m0
    let scaleCount = format.byteCount(hidden: hidden) / 4
    if !givesScaleColumns { return try scales.check(.scales, shape: [tokenCount, scaleCount]) }
    try scales.check(.scales, shape: [scaleCount, nil])
    try check(.scales, scales.shape[1], in: tokenCount...max(tokenCount, Int(Int32.max) / 4 / max(1, scaleCount)))
  }

  private func checkGlobalScale() throws(ArgumentFault) {
    let globalScale = options.globalScale
    let isUsed = options.quantization == .nvfp4
    if isUsed ? (0x1p-118...0x1p118).contains(globalScale) : globalScale == 1 { return }
    throw ArgumentFault(
      .globalScale, .globalScale, expected: isUsed ? 1 : 0, found: Int(globalScale.bitPattern))
  }

  private func checkRouting() throws(ArgumentFault) {
    switch routing {
    case .topK(let indices, let weights):
      try core.check(.indices, indices)
      try core.check(.weights, weights)
      try indices.check(.indices, shape: [tokenCount, nil])
      try indices.check(.indices, dtype: [.int32, .int64])
      try check(.indices, indices.shape[1], in: 1...topKMax)
      try weights?.check(.weights, shape: [tokenCount, indices.shape[1]])
      try weights?.check(.weights, dtype: [.fp32])
    case .table(let table):
      try core.check(.table, table)
      try table.check(.table, shape: [tokenCount, core.rankCount])
      try table.check(.table, dtype: [.uint8])
      if options.layout.hasRowPerExpert {
        throw ArgumentFault(
          .layout, .layout, expected: Int(RowLayout.bySource.code), found: Int(options.layout.code))
      }
    case .cached(let handle):
      try core.check(handle)
      if handle.tokenCount != tokenCount {
        throw ArgumentFault(.dimension, .x, expected: handle.tokenCount, found: tokenCount)
      }
    }
  }

  // MARK: Kernel arguments

  private func makeHandleLayout() -> HandleLayout {
    HandleLayout(
      chunks: Chunks(
        tokenCount: Int32(tokenCount),
        chunkCount: Int32(core.device.chunkCount(tokenCount: tokenCount, workerCount: workerCount))),
      rankCount: core.view.rankCount,
      expertCount: core.view.expertCount, localExpertCount: core.view.localExpertCount, topK: Int32(topKCount),
      layout: options.layout.kernelLayout,
      groupCapacity: Int32(options.layout == .grouped ? buffer.plan.shape.groupCapacity : 0),
      sourceCapacity: Int32(core.masks == nil ? 0 : buffer.plan.shape.tokensPerRankMax))
  }

  private func makeHandle(_ layout: HandleLayout, _ pending: PendingOperation) throws(EPError) -> DispatchHandle {
    let memory = try core.device.makeLocalMemory(byteCount: layout.byteCount, for: core.device.order(of: stream))
    let handle = DispatchHandle(
      core: core, memory: memory, layout: layout, rowCapacity: worstCaseRows, expertAlignment: options.expertAlignment,
      isReceived: pending.isReceived)
    core.recording.withLock { $0?.madeHandles.append(handle) }
    return handle
  }

  /// Rows of a worst-case output; 0 when sizing is exact.
  private var worstCaseRows: Int {
    if sizing == .exact { return 0 }
    if let cachedHandle { return cachedHandle.rowCapacity }
    if let rowsMax = options.rowsMax { return rowsMax }
    return buffer.worstCaseRowShape(options.layout, topK: topKCount, expertAlignment: options.expertAlignment)
      .reduce(1, *)
  }

  /// After a dispatch with exact sizing, how many rows there are is known. A cached handle may stem from a worst-case
  /// dispatch, whose tensors have more.
  private func exactHandle(_ handle: DispatchHandle, _ rowCapacity: Int) -> DispatchHandle {
    if handle.rowCapacity == rowCapacity { return handle }
    return DispatchHandle(
      core: core, memory: handle.memory, layout: handle.layout, rowCapacity: rowCapacity,
      expertAlignment: handle.expertAlignment)
  }

  private func makeArguments(_ handle: DispatchHandle, _ pending: PendingOperation) -> DispatchArguments {
    let columns = columns
    var header = ExchangeHeader()
    header.operation = operation.rawValue
    header.format = Int64(x.dtype.rawValue)
    header.transform = options.transformCode
    header.elementsPerRow = Int64(hidden)
    header.topK = Int64(topKCount)
    header.indexByteCount = Int64(topK?.indices.dtype.byteCount ?? 0)
    header.isWeighted = topK?.weights == nil ? 0 : 1
    header.layout = layout.code
    header.sizing = sizing == .exact ? 0 : 1
    header.expertAlignment = Int64(expertAlignment)
    header.scales = scaleRows?.rowCode ?? Int64(columns[Columns.scales])
    let codes = sidecars.map(\.rowCode) + [0, 0, 0]
    header.sidecars = (codes[0], codes[1], codes[2])
    let sources = (0..<3).map { $0 < sidecars.count ? sidecars[$0].address : .null }
    var table = Address.null
    if case .table(let tensor) = routing { table = tensor.address }
    return DispatchArguments(
      view: core.view(after: options.after), header: header, handle: handle.view, operation: pending.view,
      routing: RoutingView(
        tokenCount: Int32(tokenCount), topK: cachedHandle?.layout.topK ?? Int32(topKCount),
        indices: topK?.indices.address ?? .null,
        indexByteCount: Int32(topK?.indices.dtype.byteCount ?? 0), weights: topK?.weights?.address ?? .null,
        table: table),
      columns: columns, transform: options.transform,
      scaleStride: hasScaleColumns ? 4 * handle.layout.groupCapacity : 4, globalScale: options.globalScale,
      sourceRowByteCount: Int32(x.rowByteCount),
      sources: (x.address, scaleSource(pending), sources[0], sources[1], sources[2]),
      scaleColumns: givesScaleColumns ? scales!.address : .null,
      scaleColumnByteCount: givesScaleColumns ? Int32(4 * scales!.shape[1]) : 0,
      expertAlignment: Int32(expertAlignment), zeroesPadding: options.zeroesPadding ? 1 : 0,
      expertStatistics: options.expertStatistics?.address ?? .null, isCached: cachedHandle != nil)
  }

  /// Where the scales lie in rows when rows move.
  private func scaleSource(_ pending: PendingOperation) -> Address {
    givesScaleColumns ? pending.view.scaleRows : scales?.address ?? .null
  }

  /// Takes the memory that peers may write to and says so in the header; where there is none, the header says that
  /// instead.
  ///
  /// - Parameter needing: what an earlier exchange has shown to be needed here, where it did not fit.
  private func offerBlock(_ header: inout ExchangeHeader, _ handle: DispatchHandle, needing: Int64?) -> ArenaBlock? {
    do throws(EPError) {
      let block: ArenaBlock
      if sizing == .worstCase {
        header.outputRowCapacity = Int64(worstCaseRows)
        block = try core.take(
          columns.byteCount(rowCapacity: header.outputRowCapacity), from: .low, stream: stream)
      } else if let needing {
        block = try core.take(needing, from: .low, stream: stream)
      } else {
        block = core.arena.takeLargest()
      }
      header.outputOffset = block.range.lowerBound
      header.outputCapacity = block.byteCount
      return block
    } catch {
      header.set(error)
      return nil
    }
  }

  // MARK: Result

  private func makeResult(
    _ columns: Columns, _ handle: DispatchHandle, _ pending: PendingOperation, _ receiving: PendingReceive?,
    _ block: ArenaBlock, rowCapacity: Int
  ) -> DispatchResult {
    let rowShape = handle.rowShape
    func tensor(_ column: Int32, _ dtype: DType, _ trailing: some Collection<Int>) -> Tensor {
      Tensor(
        dtype: dtype, shape: rowShape + trailing, storage: block,
        byteOffset: columns.offset(of: column, rowCapacity: Int64(rowCapacity)))
    }
    var scaleTensor: Tensor?
    if columns[Columns.scales] > 0 {
      let dtype = scales?.dtype ?? options.quantization!.dtype
      let byteCount = Int(columns[Columns.scales])
      scaleTensor = tensor(Columns.scales, dtype, CollectionOfOne(byteCount / dtype.byteCount))
      if hasScaleColumns {
        let scales = dtype.byteCount == 4 ? [] : [4 / dtype.byteCount]
        scaleTensor = scaleTensor?.reshaped([rowShape[0], byteCount / 4, rowShape[1]] + scales)
      }
    }
    return DispatchResult(
      rows: tensor(Columns.rows, outputDType, CollectionOfOne(outputElementCount)), scales: scaleTensor,
      sidecars: sidecars.enumerated().map { index, sidecar in
        tensor(Columns.sidecars + Int32(index), sidecar.dtype, sidecar.shape.dropFirst())
      },
      origins: tensor(Columns.origins, .int32, CollectionOfOne(2)),
      topKIndices: topK.map { tensor(Columns.indices, $0.indices.dtype, CollectionOfOne(slotCount)) },
      topKWeights: topK?.weights == nil ? nil : tensor(Columns.weights, .fp32, CollectionOfOne(slotCount)),
      handle: handle, event: Event(pending), receiving: receiving)
  }
}

extension DispatchOptions {
  fileprivate var transform: RowTransform {
    switch quantization {
    case nil: .copy
    case .float: .quantizeFloatScales
    case .ue8m0: .quantizeUE8M0Scales
    case .powerOfTwo: .quantizePowerOfTwoScales
    case .nvfp4: .quantizeNVFP4
    }
  }

  /// As it travels in headers: the transform, the order of scales, and the global scale's bits where there is one.
  fileprivate var transformCode: Int64 {
    Int64(transform.rawValue) | (scaleOrder == .columnMajor ? 1 << 8 : 0)
      | (quantization == .nvfp4 ? Int64(globalScale.bitPattern) << 32 : 0)
  }
}
