import Arena
import CUDADriver
import EPKernels
import Glibc
import HostMachine
import Synchronization

/// A rank whose workers are blocks of threads on a GPU, one a multiprocessor.
package final class CUDADevice: Device {
  private static let serialNumbers = Atomic<UInt64>(0)
  private let serialNumber = serialNumbers.wrappingAdd(1, ordering: .relaxed).newValue
  private let rank: Int
  private let host: GPUHost
  private let arenaPlace: ArenaPlace
  private let lane: Lane
  package let workerCountMax: Int
  /// By which streams wait for each other; what it says is heard when a wait is queued.
  private let joint: StreamEvent
  /// By which its launches are those of all ranks; nil where they are its own.
  private let shared: SharedLaunches?
  private let state: Guarded<State>

  private struct State {
    var queuedCount: UInt64
    /// What launches use, by ticket.
    var owners: [(ticket: UInt64, owner: AnyObject & Sendable)] = []
    var failure: EPError?
    var isReserved = true
  }

  private let pauses = Guarded(Pauses())

  private struct Pauses {
    var served: (view: RankView, arena: RankArena, notices: any TensorStorage)?
    var watch: PauseWatch?
  }

  init(
    rank: Int, on host: GPUHost, workerCount: Int, arenaPlace: ArenaPlace, sharing shared: SharedLaunches?
  ) throws(EPError) {
    self.rank = rank
    self.arenaPlace = arenaPlace
    self.host = host
    self.shared = shared
    workerCountMax = workerCount
    try host.reserve(blockCount: workerCount, rank: rank)
    do throws(EPError) {
      do throws(DriverError) { joint = try StreamEvent(host.gpu, isTimed: false) } catch {
        throw EPError(error, rank: rank)
      }
      lane = try host.takeLane(rank: rank)
    } catch {
      host.release(blockCount: workerCount)
      throw error
    }
    state = Guarded(State(queuedCount: loadAcquiring(lane.finishedWord.base)))
  }

  deinit {
    close()
    host.give(lane, isLost: failure != nil)
  }

  package var stream: CUDADriver.Stream { lane.stream }

  package var name: String { "cuda" }
  package var failure: EPError? { state.withLock { $0.failure } }

  /// One, where a warp of it has a piece of a row at most: it need not meet others. In one launch for all ranks, they have as
  /// many.
  package func workerCount(of available: Int, tokenCount: Int, moving byteCount: @autoclosure () -> Int) -> Int {
    let threadCount = host.module.threadCount
    return shared == nil && tokenCount <= threadCount && byteCount() <= threadCount / 32 * 4096 ? 1 : available
  }

  /// A block numbers as many tokens at once as it has threads.
  package func chunkCount(tokenCount: Int, workerCount: Int) -> Int {
    max(1, min(workerCount, (tokenCount + host.module.threadCount - 1) / host.module.threadCount))
  }

  package func serve(_ view: RankView, arena: RankArena, notices: any TensorStorage) {
    pauses.withLock { $0.served = (view, arena, notices) }
  }

  /// To be called before a launch: what must live as long as the stream may wait between its parts; nil where it does not.
  @discardableResult
  private func watchPauses(of launch: KernelLaunch) throws(EPError) -> PauseWatch? {
    if launch.part != .apart { return nil }
    return try pauses.withLock { pauses throws(EPError) in
      if pauses.watch == nil, let (view, arena, notices) = pauses.served {
        pauses.watch = try PauseWatch(view, arena, notices: notices)
      }
      return pauses.watch
    }
  }

  private func gates(of slot: SignalSlot) -> [DeviceAddress] {
    guard let (view, arena, _) = pauses.withLock({ $0.served }) else { return [] }
    return (0..<view.rankCount).filter { $0 != view.rank }.map { source in
      DeviceAddress(bits: arena.base.advanced(byBytes: view.control.gateOffset(slot, source: source)).bits)
    }
  }

  // MARK: Launches

  package func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool,
    stream other: CallStream?
  ) -> UInt64 {
    let watch: PauseWatch?
    do throws(EPError) { watch = try watchPauses(of: launch) } catch {
      note(error)
      watch = nil
    }
    if let other, other.state == .capturing {
      return capture(launch, workerCount, [owner] + (watch.map { [$0] } ?? []), on: other.stream)
    }
    return enqueue(keeping: owner) { ticket throws(EPError) in
      if let shared {
        if other != nil { throw .machineUnavailable("callers' streams, with one launch for all ranks") }
        let steps = launch.steps
        for (index, step) in steps.enumerated() {
          let end = index == steps.count - 1 ? end(ticket) : .untold
          try shared.launch(
            SharedLaunches.Part(launch: step, end: end, workerCount: workerCount, stream: stream), as: rank)
        }
        return
      }
      try driving { () throws(DriverError) in
        try between(other?.stream) { () throws(DriverError) in try start(launch, end(ticket), workerCount, on: stream) }
      }
    }
  }

  private func end(_ ticket: UInt64) -> KernelModule.End {
    KernelModule.End(
      counter: DeviceAddress(bits: lane.counter.base.bits), word: DeviceAddress(bits: lane.finishedWord.base.bits),
      ticket: ticket)
  }

  /// Makes the launch part of the graph that is captured on the stream.
  private func capture(
    _ launch: KernelLaunch, _ workerCount: Int, _ owners: [AnyObject & Sendable], on other: CUDAStream
  ) -> UInt64 {
    state.withLock { state in
      do throws(DriverError) {
        let borrowed = other.borrowed(on: host.gpu)
        for owner in owners { try borrowed.keepInGraph(owner) }
        try start(launch, .untold, workerCount, on: borrowed)
      } catch {
        state.failure = state.failure ?? EPError(error, rank: rank)
      }
    }
    return 0
  }

  /// Queues what `body` queues behind what is on the caller's stream, and what will be there behind that. By one thread at
  /// a time.
  private func between(_ other: CUDAStream?, _ body: () throws(DriverError) -> Void) throws(DriverError) {
    guard let borrowed = other?.borrowed(on: host.gpu) else { return try body() }
    try joint.record(on: borrowed)
    try stream.wait(for: joint)
    try body()
    try joint.record(on: stream)
    try borrowed.wait(for: joint)
  }

  package func state(of stream: CUDAStream) throws(EPError) -> StreamState {
    do throws(DriverError) {
      return try stream.borrowed(on: host.gpu).isCapturing() ? .capturing : .running
    } catch {
      throw EPError(error, rank: rank)
    }
  }

  package func order(of stream: CallStream?) -> LaunchOrder? {
    // What is captured is run whenever its graph is.
    stream?.state == .capturing
      ? nil : LaunchOrder(lane: lane.finishedWord.base, device: serialNumber, stream: stream?.stream)
  }

  package func fence(behind ticket: UInt64) -> (any StreamFence)? {
    TicketFence(host.gpu, word: lane.finishedWord, ticket: ticket)
  }

  package func enqueueWait(for fence: any StreamFence) {
    queue { () throws(DriverError) in try fence.hold(stream) }
  }

  /// - Parameter overlaps: whether its first part may be started before the launch in front of it is over.
  private func start(
    _ launch: KernelLaunch, _ end: KernelModule.End, _ workerCount: Int, overlaps: Bool = false,
    on stream: CUDADriver.Stream
  ) throws(DriverError) {
    let parts = launch.parts
    for (index, part) in parts.enumerated() {
      if let slot = part.waitsFor { try stream.wait(untilNotZero: gates(of: slot)) }
      try startPart(
        part.launch, index == parts.count - 1 ? end : .untold, min(workerCount, part.workerCountMax),
        overlaps: overlaps && index == 0, on: stream)
    }
  }

  private func startPart(
    _ launch: KernelLaunch, _ end: KernelModule.End, _ workerCount: Int, overlaps: Bool, on stream: CUDADriver.Stream
  ) throws(DriverError) {
    func start<Arguments>(_ kernel: KernelModule.Kernel, _ arguments: Arguments) throws(DriverError) {
      try host.module.launch(kernel, arguments, end: end, blockCount: workerCount, overlaps: overlaps, on: stream)
    }
    switch launch {
    case .prepareDispatch(let arguments): try start(.layout, arguments)
    case .deliverDispatch(let arguments): try start(.dispatchRows, arguments)
    case .dispatch(let arguments): try start(kernel(arguments), arguments)
    case .combine(let arguments): try start(kernel(arguments), arguments)
    case .combineStep(let arguments): try start(.combineStep, arguments)
    }
  }

  private func kernel(_ arguments: DispatchArguments) -> KernelModule.Kernel {
    if arguments.isPlainCopy { return .dispatchCopying }
    if arguments.isPlainQuantizing { return .dispatchQuantizing }
    return arguments.isPlainGrouped ? .dispatchGrouped : .dispatch
  }

  private func kernel(_ arguments: CombineArguments) -> KernelModule.Kernel {
    arguments.isPlainInPlace ? .combineInPlace : .combine
  }

  package func makeGraph(_ launches: [RecordedLaunch]) throws(EPError) -> any DeviceGraph {
    if shared != nil { throw .machineUnavailable("graphs, with one launch for all ranks") }
    for launch in launches { try watchPauses(of: launch.launch) }
    return try driving { () throws(DriverError) in
      // Not on the rank's own stream, which others may ask for its health meanwhile: that would end the capture.
      let captured = try CUDADriver.Stream(host.gpu)
      let graph = try CUDADriver.Graph(of: captured) { () throws(DriverError) in
        for (index, next) in launches.enumerated() {
          let isLast = index == launches.count - 1
          let end = isLast ? end(KernelModule.End.next) : .untold
          try start(next.launch, end, next.workerCount, overlaps: index > 0, on: captured)
        }
      }
      return CUDAGraph(self, graph, keeping: launches.map(\.owner))
    }
  }

  private func note(_ error: EPError) { state.withLock { $0.failure = $0.failure ?? error } }

  /// Calls the driver for this rank.
  private func driving<Result>(_ body: () throws(DriverError) -> Result) throws(EPError) -> Result {
    do throws(DriverError) { return try body() } catch { throw EPError(error, rank: rank) }
  }

  fileprivate func launch(
    _ graph: CUDADriver.Graph, keeping owner: AnyObject & Sendable, stream other: CUDAStream?
  ) -> UInt64 {
    enqueue(keeping: owner) { ticket throws(EPError) in
      try driving { () throws(DriverError) in
        try between(other) { () throws(DriverError) in try graph.launch(on: stream) }
      }
    }
  }

  package func enqueueWait(isUrgent: Bool, _ body: @escaping @Sendable () -> Void) {
    queue { () throws(DriverError) in try stream.enqueue(body) }
  }

  /// Queues what has no ticket.
  private func queue(_ body: () throws(DriverError) -> Void) {
    state.withLock { state in
      if state.failure != nil { return }
      do throws(DriverError) { try body() } catch { state.failure = EPError(error, rank: rank) }
    }
  }

  private func enqueue(
    keeping owner: (AnyObject & Sendable)?, _ body: (_ ticket: UInt64) throws(EPError) -> Void
  ) -> UInt64 {
    prune()
    return state.withLock { state in
      state.queuedCount += 1
      if state.failure != nil { return state.queuedCount }
      do throws(EPError) {
        if let owner { state.owners.append((state.queuedCount, owner)) }
        try body(state.queuedCount)
      } catch {
        state.failure = error
      }
      return state.queuedCount
    }
  }

  // MARK: Waiting

  private var finishedCount: UInt64 { loadAcquiring(lane.finishedWord.base) }

  package func isFinished(_ ticket: UInt64) -> Bool {
    prune()
    return finishedCount >= ticket || failure != nil
  }

  /// Calls nothing of the driver's but now and then, to learn of a GPU that is lost.
  package func wait(for ticket: UInt64) {
    let spinEnd = monotonicNow() &+ 200_000
    var checkTime = monotonicNow() &+ 2_000_000
    while finishedCount < ticket && failure == nil {
      let now = monotonicNow()
      if now < spinEnd { continue }
      usleep(20)
      if now < checkTime { continue }
      checkTime = now &+ 2_000_000
      do throws(EPError) {
        try driving { () throws(DriverError) in try stream.checkHealth() }
      } catch {
        note(error)
      }
    }
    prune()
  }

  /// Lets go of what finished launches used.
  private func prune() {
    let finished = finishedCount
    let gone = state.withLock { state in
      let count = state.owners.firstIndex { $0.ticket > finished } ?? state.owners.count
      defer { state.owners.removeFirst(count) }
      return Array(state.owners.prefix(count))
    }
    withExtendedLifetime(gone) {}
  }

  package func close() {
    wait(for: state.withLock { $0.queuedCount })
    shared?.leave(rank)
    // Waits without a launch behind them; and what was queued before a call of the driver failed, unless the GPU is lost.
    try? stream.synchronize()
    pauses.withLock { $0 = Pauses() }
    // Nobody waits for an end that never comes.
    if failure != nil { storeReleasing(1 << 62, in: lane.finishedWord.base) }
    let wasReserved = state.withLock { state in
      state.owners = []
      defer { state.isReserved = false }
      return state.isReserved
    }
    if wasReserved { host.release(blockCount: workerCountMax) }
  }

  // MARK: Memory

  package func makeArena(byteCountMax: Int64, clearing byteCount: Int64) throws(EPError) -> any SymmetricMemory {
    switch arenaPlace {
    case .machine:
      // Tools that want one launch for all take two pieces of an arena for two allocations, which no row may lie across.
      let backed = shared == nil ? 0 : min(byteCountMax, 256 << 20)
      let arena = try GPUArena(host, reservedByteCount: byteCountMax, backedByteCount: backed, rank: rank)
      _ = try arena.extend(to: byteCount)
      try host.copier.clear(arena.address, byteCount: byteCount)
      return arena
    case .host:
      let arena = try RegisteredArena(host, reservedByteCount: byteCountMax, rank: rank)
      _ = try arena.extend(to: byteCount)
      return arena
    }
  }

  package func reach(_ arena: any SymmetricMemory) throws(EPError) {
    try (arena as? GPUArena)?.letIn(host.gpu)
  }

  package func attach(
    _ file: Descriptor, reservedByteCount: Int64, byteCount: Int64
  ) throws(EPError) -> any SymmetricMemory {
    switch arenaPlace {
    case .machine:
      let arena = try GPUArena(host, reservedByteCount: reservedByteCount, rank: rank)
      try arena.map(ArenaPiece(range: 0..<byteCount, file: file))
      return arena
    case .host:
      let arena = try RegisteredArena(host, attaching: file, reservedByteCount: reservedByteCount, rank: rank)
      try arena.map(ArenaPiece(range: 0..<byteCount, file: nil))
      return arena
    }
  }

  package func makeLocalMemory(byteCount: Int64, for order: LaunchOrder?) throws(EPError) -> any TensorStorage {
    // What finished launches used comes first.
    prune()
    return try host.pool.take(byteCount, rank: rank, for: order)
  }

  package func makeNotices(byteCount: Int64) throws(EPError) -> any TensorStorage {
    try host.notices.take(byteCount, rank: rank)
  }

  package func makeTensorMemory(byteCount: Int64) throws(EPError) -> any TensorStorage {
    let block = try host.pool.take(byteCount, rank: rank)
    try host.copier.clear(block.base, byteCount: byteCount)
    return block
  }

  package func reaches(_ tensor: Tensor) -> Bool {
    if tensor.address.bits % 16 != 0 { return false }
    switch tensor.storage.copier {
    case let copier as GPUCopier: return copier.gpu === host.gpu
    case is RegisteredCopier: return true
    default: return false
    }
  }

  package func raise(_ alarm: Address, arena: Address) { raiseAlarm(alarm) }
}

/// Launches of one rank as a CUDA graph.
private final class CUDAGraph: DeviceGraph {
  private let device: CUDADevice
  private let graph: CUDADriver.Graph
  private let owners: [AnyObject & Sendable]

  init(_ device: CUDADevice, _ graph: CUDADriver.Graph, keeping owners: [AnyObject & Sendable]) {
    (self.device, self.graph, self.owners) = (device, graph, owners)
  }

  func launch(stream: CUDAStream?) -> UInt64 { device.launch(graph, keeping: self, stream: stream) }
}
