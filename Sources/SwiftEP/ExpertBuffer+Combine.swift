import Arena
import EPKernels
import HostMachine

extension ExpertBuffer {
  /// Brings rows back to their tokens' owners and sums them: the inverse, and the gradient, of the dispatch that made
  /// `handle`. Collective.
  ///
  /// `tokens[t] = round(sum of w * row over the places t went to + biases)`, in Float, in the order of ranks (by
  /// expert: of top-k slots), rounded once to nearest even. By source, rows arrive as they are to be added; by expert
  /// they can be weighted here. Owners read the rows where they lie; rows outside the arena (see `combineInput`) are
  /// copied into it, as the plan says (`ExpertBuffer.Staging`), and those that travel as LogFMT are coded there.
  ///
  /// - Parameters:
  ///   - rows: `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`; bf16, fp16 or fp32, in rows of a multiple
  ///     of 16 bytes, as many as the dispatch returned. Not to be changed until the result's event is complete.
  ///   - handle: of a dispatch of this buffer. It can be used any number of times.
  ///   - options: weights, biases, where to put the sums, and how to wait.
  /// - Throws: as `dispatch`.
  public func combine(
    _ rows: Tensor, with handle: DispatchHandle, options: CombineOptions = CombineOptions()
  ) throws(EPError) -> CombineResult {
    try core.callLock.withLock { _ throws(EPError) in
      try core.checkOpen()
      let stream = try core.find(options.stream)
      return try CombineCall(core: core, rows: rows, handle: handle, options: options, stream: stream).run()
    }
  }

  /// A tensor for `combine`'s rows that lies where peers can read it, so that nothing is copied: `[rows, hidden]` (grouped
  /// `[local experts, rows of a group, hidden]`) for the rows of `handle`'s dispatch. Its bytes are whatever lay there
  /// before. Not collective.
  ///
  /// - Throws: `outOfMemory` when the arena can hold no more, `invalidArgument`, `bufferClosed`.
  public func combineInput(for handle: DispatchHandle, hidden: Int, dtype: DType) throws(EPError) -> Tensor {
    // Under the lock, since a dispatch under way holds the largest hole until its counts are known.
    try core.callLock.withLock { _ throws(EPError) in
      try core.checkOpen()
      do throws(ArgumentFault) {
        try core.check(handle)
        try check(.rows, hidden, in: 1...1 << 28)
      } catch {
        throw error.error(rank: rank)
      }
      let block = try core.arena.take(Int64(handle.rowCapacity * hidden * dtype.byteCount), from: .high)
      return Tensor(dtype: dtype, shape: handle.rowShape + [hidden], storage: block, byteOffset: 0)
    }
  }
}

extension ExpertBuffer {
  /// A tensor in this rank's arena, for whatever `combine` is to read where it lies: memory that a caller divides itself, and
  /// that the plan does not count. Its bytes are whatever lay there before. Not collective.
  ///
  /// - Throws: `outOfMemory` when the arena can hold no more, `invalidArgument` as `Tensor.init(zeros:_:)`, `bufferClosed`.
  public func makeArenaTensor(_ shape: [Int], _ dtype: DType) throws(EPError) -> Tensor {
    let byteCount = Int64(try Tensor.byteCount(shape, dtype))
    // As `combineInput`.
    return try core.callLock.withLock { _ throws(EPError) in
      try core.checkOpen()
      return Tensor(dtype: dtype, shape: shape, storage: try core.arena.take(byteCount, from: .high), byteOffset: 0)
    }
  }
}

/// One call of `combine`.
private struct CombineCall {
  let core: BufferCore
  let rows: Tensor
  let handle: DispatchHandle
  let options: CombineOptions
  let stream: CallStream?

  private var workerCount: Int {
    core.device.workerCount(
      of: options.workers ?? core.device.workerCountMax, tokenCount: handle.tokenCount,
      moving: (handle.tokenCount + (copiesRows ? handle.rowCapacity : 0)) * rowByteCount)
  }
  private var copiesRows: Bool { core.arenaOffset(of: rows) == nil || options.encoding != .none }
  private var hidden: Int { rows.shape[rows.shape.count - 1] }
  private var rowByteCount: Int { hidden * rows.dtype.byteCount }
  private var weightsPerRow: Int { handle.rowLayout == .bySource ? handle.topK : 1 }

  func run() throws(EPError) -> CombineResult {
    try core.checkRecordable(
      isAsynchronous: options.isAsynchronous, sizing: .worstCase, after: options.after,
      stream: stream)
    try core.beginCall(
      exchangeCount: Int(steps.stepCount) + 1, waiting: options.waiting, receivesLater: options.receivesLater)
    do throws(ArgumentFault) {
      try checkArguments()
    } catch {
      if !options.receivesLater { try core.report(error, as: .combine, stream: stream) }
      return try sendFault(error)
    }
    let steps = steps
    let pending = try PendingOperation(
      core, stream: stream, stepCount: Int(steps.stepCount), waiting: options.waiting,
      waitStatistics: options.waitStatistics, firstHalf: options.receivesLater ? .sendCombine : nil)
    let resources = pending.makeResources(
      [rows.storage, handle, options.biases, options.rowWeights as any Sendable, core.arenas],
      isGraphed: core.isGraphed(stream))
    core.queueWaits(options.after, of: .combine, isUrgent: options.isAsynchronous)

    var header = makeHeader()
    header.tokensPerStep = Int64(steps.tokensPerStep)
    var staged: (rows: Address, weights: Address) = (.null, .null)
    var outputs: (tokens: Tensor, topKWeights: Tensor?)?
    do throws(EPError) {
      staged = try placeInputs(&header, steps, resources)
      outputs = try makeOutputs()
      resources.retain(outputs!.tokens.storage)
      if let weights = outputs!.topKWeights { resources.retain(weights.storage) }
    } catch {
      header.set(error)
      if core.isGraphed(stream) { throw core.exhausted(header) }
    }
    let arguments = CombineArguments(
      view: core.view(after: options.after), header: header, handle: handle.view, operation: pending.view,
      stagedRows: staged.rows,
      stagedWeights: staged.weights, rowCount: Int32(handle.rowCapacity), steps: steps,
      format: options.encoding == .logFMT ? .logFMT : rows.dtype.sumFormat, elementsPerRow: Int32(hidden),
      output: outputs?.tokens.address ?? .null,
      rowWeights: options.rowWeights?.address ?? .null,
      biases: (options.biases.first?.address ?? .null, options.biases.dropFirst().first?.address ?? .null),
      weightsOutput: outputs?.topKWeights?.address ?? .null)
    let launch: KernelLaunch = steps.stepCount == 0 ? .combine(arguments) : .combineStep(arguments)
    pending.enqueue(
      launch, workerCount: workerCount, keeping: resources, isUrgent: options.isAsynchronous, stream: stream)
    if options.receivesLater {
      return try makeResult(pending, launch, workerCount: workerCount, resources, outputs)
    }
    pending.handOver(resources, stream: stream)
    if let outputs { try noteUse(of: outputs) }
    if outputs == nil || !options.isAsynchronous { try pending.finish() }
    guard let outputs else { preconditionFailure("a fault that no rank reported") }
    return CombineResult(
      tokens: outputs.tokens, topKWeights: outputs.topKWeights, event: Event(pending), receiving: nil)
  }

  /// By the call's stream.
  private func noteUse(of outputs: (tokens: Tensor, topKWeights: Tensor?)) throws(EPError) {
    guard let stream else { return }
    try outputs.tokens.storage.noteUse(by: stream)
    // Apart from the sums, where those go to the caller's memory.
    if options.output != nil { try outputs.topKWeights?.storage.noteUse(by: stream) }
  }

  /// Of a call whose first half is queued. Without outputs, the second one throws what all ranks learn then.
  private func makeResult(
    _ pending: PendingOperation, _ launch: KernelLaunch, workerCount: Int, _ resources: OperationResources,
    _ outputs: (tokens: Tensor, topKWeights: Tensor?)?
  ) throws(EPError) -> CombineResult {
    let receiving = PendingReceive(
      pending, launch.with(.receiveCombine), workerCount: workerCount, keeping: resources,
      isAsynchronous: options.isAsynchronous, stream: stream)
    if let outputs { try noteUse(of: outputs) }
    if !options.isAsynchronous { try pending.waitForStatus() }
    let tokens: Tensor
    if let outputs { tokens = outputs.tokens } else { tokens = try Tensor(zeros: [0, 0], rows.dtype) }
    return CombineResult(
      tokens: tokens, topKWeights: outputs?.topKWeights, event: Event(pending), receiving: receiving)
  }

  /// The peers, which do not wait for each other yet, learn of it when they receive; and so does the caller.
  private func sendFault(_ fault: ArgumentFault) throws(EPError) -> CombineResult {
    if core.isGraphed(stream) { throw fault.error(rank: core.rank) }
    let pending = try PendingOperation(core, stream: stream, waiting: .workers, firstHalf: .sendCombine)
    let launch = core.faultLaunch(fault, as: .combine, pending)
    let resources = pending.makeResources([], isGraphed: false)
    pending.enqueue(
      launch, workerCount: 1, keeping: resources, isUrgent: options.isAsynchronous, stream: stream)
    return try makeResult(pending, launch, workerCount: 1, resources, nil)
  }

  private func checkArguments() throws(ArgumentFault) {
    try core.check(stream)
    try core.check(handle)
    try core.check(.rows, rows)
    try core.check(.topKWeights, options.topKWeights)
    try core.check(.rowWeights, options.rowWeights)
    try core.check(.output, options.output)
    for bias in options.biases { try core.check(.biases, bias) }
    try rows.check(.rows, shape: handle.rowShape + [nil])
    try rows.check(.rows, dtype: [.bf16, .fp16, .fp32])
    try rows.check(.rows, rowByteCount: rowByteCount, multipleOf: 16)
    if options.encoding == .logFMT {
      try rows.check(.rows, dtype: [.bf16])
      try rows.check(.rows, rowByteCount: rowByteCount, multipleOf: 2 * Int(LogFMT.channelsPerBlock))
    }
    if !handle.isReceived.withLock({ $0 }) { throw ArgumentFault(.unreceived, .handle, expected: 0, found: 1) }
    if steps.stepCount > 0 && options.receivesLater { throw ArgumentFault(.steps, .rows, expected: 0, found: 1) }
    if steps.stepCount > 0 { try check(.handleTokens, handle.tokenCount, in: 0...core.plan.shape.tokensPerRankMax) }
    if let topKWeights = options.topKWeights {
      if handle.topK == 0 { throw ArgumentFault(.presence, .topKWeights, expected: 0, found: 1) }
      try topKWeights.check(.topKWeights, shape: handle.rowShape + [weightsPerRow])
      try topKWeights.check(.topKWeights, dtype: [.fp32])
    }
    if let rowWeights = options.rowWeights {
      if handle.rowLayout == .bySource { throw ArgumentFault(.layout, .handle, expected: 1, found: 0) }
      try rowWeights.check(.rowWeights, shape: [handle.tokenCount, handle.topK])
      try rowWeights.check(.rowWeights, dtype: [.fp32])
    }
    try check(.biases, options.biases.count, in: 0...2)
    for bias in options.biases {
      try bias.check(.biases, shape: [handle.tokenCount, hidden])
      try bias.check(.biases, dtype: [rows.dtype])
    }
    try options.output?.check(.output, shape: [handle.tokenCount, hidden])
    try options.output?.check(.output, dtype: [rows.dtype])
    if let output = options.output, output.overlaps(rows) {
      throw ArgumentFault(.overlap, .output, expected: 0, found: 1)
    }
    if let workers = options.workers { try check(.workers, workers, in: 1...core.device.workerCountMax) }
    try core.check(waitStatistics: options.waitStatistics)
    try core.check(after: options.after)
  }

  /// In how many steps rows outside the arena are combined.
  private var steps: CombineSteps {
    core.arenaOffset(of: rows) == nil && options.encoding == .none ? core.plan.steps(of: handle.rowLayout) : .none
  }

  private func makeHeader() -> ExchangeHeader {
    var header = ExchangeHeader()
    header.operation = Operation.combine.rawValue
    header.format = Int64(rows.dtype.rawValue)
    header.encoding = options.encoding.code
    header.elementsPerRow = Int64(hidden)
    header.isWeighted = options.topKWeights == nil ? 0 : 1
    header.layout = handle.rowLayout.code
    return header
  }

  /// Says in the header where peers find this rank's rows. Returns what has to be copied there first.
  private func placeInputs(
    _ header: inout ExchangeHeader, _ steps: CombineSteps, _ resources: OperationResources
  ) throws(EPError) -> (rows: Address, weights: Address) {
    let weights = options.topKWeights
    let rowsOffset = core.arenaOffset(of: rows)
    let weightsOffset = weights.map { core.arenaOffset(of: $0) } ?? 0
    let stagedRowCount = steps.stepCount == 0 ? handle.rowCapacity : steps.stagedRowCount(rankCount: core.rankCount)
    let stagedRowBytes = rowsOffset == nil ? alignUp(Int64(stagedRowCount * rowByteCount), to: 128) : 0
    let recordBytes = options.encoding.recordByteCount(rowCount: handle.rowCapacity, hidden: hidden)
    let stagedWeightBytes = weightsOffset == nil ? Int64(weights!.byteCount) : 0
    let block = try core.take(
      stagedRowBytes + recordBytes + stagedWeightBytes, from: .high, stream: stream)
    resources.retain(block)
    resources.retain(weights as any Sendable)
    header.outputOffset = rowsOffset ?? block.range.lowerBound
    header.recordsOffset = block.range.lowerBound + stagedRowBytes
    header.weightsOffset = weightsOffset ?? header.recordsOffset + recordBytes
    return (rowsOffset == nil ? rows.address : .null, weightsOffset == nil ? weights!.address : .null)
  }

  private func makeOutputs() throws(EPError) -> (Tensor, Tensor?) {
    let rowBytes = options.output == nil ? alignUp(Int64(handle.tokenCount * rowByteCount), to: 128) : 0
    let weightBytes = options.topKWeights == nil ? 0 : Int64(handle.tokenCount * handle.topK * 4)
    let block = try core.take(rowBytes + weightBytes, from: .high, stream: stream)
    let tokens =
      options.output
      ?? Tensor(dtype: rows.dtype, shape: [handle.tokenCount, hidden], storage: block, byteOffset: 0)
    if weightBytes == 0 && options.topKWeights == nil { return (tokens, nil) }
    let weights = Tensor(
      dtype: .fp32, shape: [handle.tokenCount, handle.topK], storage: block, byteOffset: rowBytes)
    return (tokens, weights)
  }
}

extension RowEncoding {
  /// As it travels in headers.
  var code: Int64 { Int64(Self.allCases.firstIndex(of: self)!) }

  init?(code: Int64) {
    guard let encoding = Self.allCases.first(where: { $0.code == code }) else { return nil }
    self = encoding
  }

  /// Bytes of the arena that coded rows take.
  func recordByteCount(rowCount: Int, hidden: Int) -> Int64 {
    if self == .none { return 0 }
    return alignUp(Int64(rowCount) * Int64(LogFMT.byteCount(channelCount: Int32(hidden))), to: 128)
  }
}

extension DType {
  /// As the kernels name what can be summed.
  fileprivate var sumFormat: RowFormat {
    switch self {
    case .bf16: .bf16
    case .fp16: .fp16
    default: .fp32
    }
  }
}

extension BufferCore {
  func check(waitStatistics: Tensor?) throws(ArgumentFault) {
    try check(.waitStatistics, waitStatistics)
    try waitStatistics?.check(.waitStatistics, shape: [rankCount])
    try waitStatistics?.check(.waitStatistics, dtype: [.int64])
  }

  func check(after events: [Event]) throws(ArgumentFault) {
    for event in events where !event.isReceived { throw ArgumentFault(.unreceived, .after, expected: 0, found: 1) }
  }

  func check(_ handle: DispatchHandle) throws(ArgumentFault) {
    if handle.buffer !== identity { throw ArgumentFault(.foreign, .handle, expected: 0, found: 1) }
    if !isCurrent(handle) { throw ArgumentFault(.masks, .handle, expected: 0, found: 1) }
    recording.withLock { $0?.handles.append(handle) }
  }

  /// Whether no ranks have returned since.
  func isCurrent(_ handle: DispatchHandle) -> Bool { handle.returnCount == returnCount }

  func check(_ stream: CallStream?) throws(ArgumentFault) {
    if stream?.state == .unknown {
      throw ArgumentFault(.presence, .stream, expected: 0, found: 1)
    }
  }

  /// Arena memory for an operation of the call's stream.
  func take(_ byteCount: Int64, from end: HoleList.End, stream: CallStream?) throws(EPError) -> ArenaBlock {
    try arena.take(byteCount, from: end, for: device.order(of: stream)) { [device] in device.enqueueWait(for: $0) }
  }

  /// Kernels must be able to use the tensor where it lies.
  func check(_ name: ArgumentFault.Name, _ tensor: Tensor?) throws(ArgumentFault) {
    if let fault = tensor?.fault { throw fault }
    if let tensor, !device.reaches(tensor) { throw ArgumentFault(.memory, name, expected: 0, found: 1) }
  }

  /// Where a tensor lies in this rank's arena; nil when it lies elsewhere.
  func arenaOffset(of tensor: Tensor) -> Int64? {
    // Whoever refers to it: callers, too, have tensors on memory that they were given.
    let offset = Int64(bitPattern: tensor.address.bits &- arena.base.bits)
    // Those without elements lie at its beginning.
    return (0..<arena.byteCountMax).contains(offset) ? offset : nil
  }

  /// Queues waits for the events that this buffer's own order does not imply.
  func queueWaits(_ events: [Event], of operation: Operation, isUrgent: Bool) {
    for event in events where !event.isOf(self) {
      if let fence = fence(of: event) {
        device.enqueueWait(for: fence)
        continue
      }
      let view = viewBehindWaits
      // A GPU's arena is not the host's to write to: there, records begin with the operation itself.
      let keepsRecord = arena.memory.copier == nil
      let wait = event.makeWait()
      device.enqueueWait(isUrgent: isUrgent) {
        let recorder = keepsRecord ? Self.beginRecord(of: operation, view) : nil
        if wait(view.timeoutNanoseconds) { return }
        // What this rank was to send never became ready: it is itself the missing one.
        let status = OperationStatus(.timeout, rank: Int64(view.rank), (StatusCode.inputSlot, 0, 0, 0))
        view.hostFailure.store(status, at: 0)
        recorder?.finish(HostMachine.host, status, now: HostMachine.host.now)
      }
    }
  }

  /// A record of an operation that waits. Nil where an earlier one has missed a rank: nothing is noted behind that.
  private static func beginRecord(of operation: Operation, _ view: RankView) -> FlightRecorder? {
    var view = view.recorded(HostMachine.host)
    view.earlierFailure = findEarlierFailure(view)
    let recorder = FlightRecorder(view)
    return recorder.awaitInput(HostMachine.host, view: view, operation: operation.rawValue) ? recorder : nil
  }

  /// This rank's view for an operation that waits for events.
  func view(after events: [Event]) -> RankView {
    events.contains { !$0.isOf(self) && fence(of: $0) == nil } ? viewBehindWaits : view
  }

  /// What the device itself can wait for.
  private func fence(of event: Event) -> (any StreamFence)? { device is CUDADevice ? event.fence : nil }

  /// What a header says of memory that its rank does not have, as this rank's own error.
  func exhausted(_ header: ExchangeHeader) -> EPError {
    .outOfMemory(rank: rank, neededByteCount: header.faultDetails.0, availableByteCount: header.faultDetails.1)
  }

  /// Meets the peers of a call that this rank cannot make, so that all ranks learn why. Throws what they throw.
  func report(_ fault: ArgumentFault, as operation: Operation, stream: CallStream?) throws(EPError) -> Never {
    if isGraphed(stream) { throw fault.error(rank: rank) }
    let pending = try PendingOperation(self, stream: nil, waiting: .workers)
    pending.enqueue(
      faultLaunch(fault, as: operation, pending), workerCount: 1, keeping: pending.makeResources([], isGraphed: false),
      isUrgent: false)
    try pending.finish()
    preconditionFailure("a fault that no rank reported")
  }

  /// What tells the peers of a call that this rank cannot make.
  func faultLaunch(
    _ fault: ArgumentFault, as operation: Operation, _ pending: PendingOperation
  ) -> KernelLaunch {
    var header = ExchangeHeader()
    header.operation = operation.rawValue
    header.set(fault)
    let handle = HandleView(
      block: .null,
      layout: HandleLayout(
        chunks: Chunks(tokenCount: 0, chunkCount: 1), rankCount: 0, expertCount: 0, localExpertCount: 0, topK: 0,
        layout: .bySource))
    let arguments = CombineArguments(
      view: view, header: header, handle: handle, operation: pending.view, stagedRows: .null, stagedWeights: .null,
      rowCount: 0, steps: .none, format: .bf16, elementsPerRow: 0, output: .null, rowWeights: .null,
      biases: (.null, .null), weightsOutput: .null)
    return .combine(arguments)
  }
}
