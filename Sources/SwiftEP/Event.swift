import CUDADriver
import EPKernels
import Glibc
import HostMachine

/// A point in the work of a buffer, or of the caller: something that can be waited for.
public final class Event: Sendable {
  private enum Kind: Sendable {
    case operation(PendingOperation)
    /// A launch of the graph, by its ticket.
    case graph(OperationGraph, UInt64)
    case manual(Guarded<Bool>)
    case stream(EventFence)
  }

  private let kind: Kind

  init(_ operation: PendingOperation) { kind = .operation(operation) }
  init(_ graph: OperationGraph, ticket: UInt64) { kind = .graph(graph, ticket) }

  /// An event that the caller completes with `signal()`: for work of its own that operations are to wait for.
  public init() { kind = .manual(Guarded(false)) }

  /// What a stream of the caller's has been told to do by now: operations wait for it on the GPU, and for nothing of the
  /// host's.
  ///
  /// - Parameters:
  ///   - stream: of the caller's.
  ///   - gpu: the stream's, by its index among those that the driver shows.
  /// - Throws: `machineUnavailable`, `driver`.
  public init(recordedOn stream: CUDAStream, gpu: Int) throws(EPError) {
    let gpu = try GPUHost.shared(gpu).gpu
    do throws(DriverError) { kind = .stream(try EventFence([stream: nil], on: gpu)) } catch {
      throw EPError(error, rank: -1)
    }
  }

  /// What is queued on the stream later comes behind the event, without any wait of the host.
  ///
  /// - Throws: `driver`; `invalidArgument` of an event that no GPU completes.
  public func enqueueWait(on stream: CUDAStream) throws(EPError) {
    try checkReceived()
    guard let fence else {
      throw .invalidArgument(
        rank: -1, argument: "event", expected: "one that a GPU completes", found: "one that the host completes")
    }
    try fence.hold(stream)
  }

  /// The event as it is now, for streams to wait for; nil where no GPU completes it.
  var fence: (any StreamFence)? {
    switch kind {
    case .operation(let operation): operation.fence
    case .graph(let graph, let ticket): graph.fence(behind: ticket)
    case .manual: nil
    case .stream(let fence): fence
    }
  }

  /// Whether the event will be complete without a further call: results are to be received first.
  var isReceived: Bool {
    if case .operation(let operation) = kind { return operation.isReceived.withLock { $0 } }
    return true
  }

  private func checkReceived() throws(EPError) {
    if isReceived { return }
    throw .invalidArgument(
      rank: -1, argument: "event", expected: "one of a result that has been received", found: "one that has not")
  }

  /// Completes an event that was made with `init()`; of others, nothing changes.
  public func signal() {
    if case .manual(let flag) = kind { flag.withLock { $0 = true } }
  }

  public var isComplete: Bool {
    switch kind {
    case .operation(let operation): isReceived && operation.isFinished
    case .graph(let graph, let ticket): graph.isFinished(ticket)
    case .manual(let flag): flag.withLock { $0 }
    case .stream(let fence): fence.isPassed
    }
  }

  /// Returns when the event is complete.
  ///
  /// - Throws: what the operation failed with; `invalidArgument` where its result is still to be received.
  public func wait() throws(EPError) {
    try checkReceived()
    switch kind {
    case .operation(let operation): try operation.finish()
    case .graph(let graph, let ticket): try graph.finish(ticket)
    case .manual(let flag):
      while !flag.withLock({ $0 }) { usleep(50) }
    case .stream(let fence):
      do throws(DriverError) { try fence.wait() } catch { throw EPError(error, rank: -1) }
    }
  }

  /// A wait for the event as it is now, whatever is launched after this call. Returns whether it is complete: an
  /// operation that failed is, one that is not within so many nanoseconds is not.
  func makeWait() -> @Sendable (_ nanoseconds: UInt64) -> Bool {
    switch kind {
    case .operation(let operation):
      // Its own waits for peers are bounded.
      let wait = operation.makeWait()
      return { _ in
        wait()
        return true
      }
    case .graph(let graph, let ticket):
      return { _ in
        graph.wait(ticket)
        return true
      }
    case .manual(let flag): return { poll(for: $0) { flag.withLock { $0 } } }
    case .stream(let fence): return { poll(for: $0) { fence.isPassed } }
    }
  }

  /// Whether operations of `core` are behind this event anyway.
  func isOf(_ core: BufferCore) -> Bool {
    switch kind {
    case .operation(let operation): operation.core === core
    case .graph(let graph, _): graph.isOf(core)
    case .manual, .stream: false
    }
  }
}

/// Returns whether `isThere` has become true within so many nanoseconds.
private func poll(for nanoseconds: UInt64, _ isThere: () -> Bool) -> Bool {
  let deadline = monotonicNow() &+ nanoseconds
  while !isThere() {
    if monotonicNow() >= deadline { return false }
    usleep(50)
  }
  return true
}

/// An operation under way. Keeps its status, not what its kernels use.
final class PendingOperation: Sendable {
  let core: BufferCore
  private let memory: any TensorStorage
  private let report: any TensorStorage
  private let layout: OperationLayout
  private let part: OperationPart
  private let waitStatistics: Tensor?
  /// `BufferCore.returnCount`, when it was made.
  private let returnCount: Int
  /// False from a call that is received later until it is.
  let isReceived = Guarded(true)
  /// The last launch queued so far.
  private let ticket = Guarded<UInt64>(0)

  init(
    _ core: BufferCore, stream: CallStream?, chunkCount: Int = 0, stepCount: Int = 0, scaleByteCount: Int64 = 0,
    waiting: Waiting, waitStatistics: Tensor? = nil, firstHalf: OperationPart? = nil
  ) throws(EPError) {
    self.core = core
    self.waitStatistics = waitStatistics
    returnCount = core.returnCount
    part = firstHalf ?? (waiting == .stream ? .apart : .whole)
    if firstHalf != nil { isReceived.withLock { $0 = false } }
    layout = OperationLayout(
      rankCount: core.view.rankCount, expertCount: core.view.expertCount, chunkCount: Int32(chunkCount),
      stepCount: Int32(stepCount), scaleByteCount: scaleByteCount)
    memory = try core.device.makeLocalMemory(byteCount: layout.byteCount, for: core.device.order(of: stream))
    report = try core.device.makeNotices(byteCount: OperationStatus.byteCount)
  }

  var view: OperationView {
    OperationView(
      block: memory.base, report: report.base, waits: waitStatistics?.address ?? .null, layout: layout, part: part)
  }

  /// The status, once a launch that sets it has finished.
  var status: OperationStatus { view.reported }

  /// What that means; nil when it means success.
  var error: EPError? { core.error(from: status, since: returnCount) }

  /// What the kernels use, to be kept alive until the last of them has finished.
  ///
  /// - Parameter isGraphed: whether the operation is part of a graph, and is run later and often.
  func makeResources(_ retained: [any Sendable], isGraphed: Bool) -> OperationResources {
    OperationResources(
      view: view, memory: [memory, report] + core.viewMemory, arena: core.arena, membership: core.membership,
      masks: core.masks, maskedBefore: isGraphed ? 0 : core.masks?.known ?? 0,
      retained: waitStatistics.map { retained + [$0] } ?? retained)
  }

  /// Queues a launch of this operation, or records it.
  ///
  /// - Parameter stream: as that of `Device.enqueue`.
  func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping resources: OperationResources, isUrgent: Bool,
    stream: CallStream? = nil
  ) {
    let recorded = RecordedLaunch(launch: launch, workerCount: workerCount, owner: resources)
    if core.record(recorded, of: self) { return }
    isQueued(
      as: core.device.enqueue(
        launch, workerCount: workerCount, keeping: resources, isUrgent: isUrgent, stream: stream))
  }

  /// Its last launch so far has this ticket.
  func isQueued(as queued: UInt64) {
    ticket.withLock { $0 = queued }
    core.lastTicket.withLock { $0 = max($0, queued) }
  }

  var isFinished: Bool { core.device.isFinished(ticket.withLock { $0 }) }

  /// The end of all launches queued so far.
  var fence: (any StreamFence)? { core.device.fence(behind: ticket.withLock { $0 }) }

  /// All launches have been queued: arena blocks are kept no longer than the caller keeps them, see `handOver(until:)`.
  func handOver(_ resources: OperationResources, stream: CallStream?) {
    if core.isGraphed(stream) { return }
    if let fence { resources.handOver(until: fence) }
  }

  /// Waits for all launches queued so far.
  func wait() { core.device.wait(for: ticket.withLock { $0 }) }

  /// The same, later, for those queued by now.
  func makeWait() -> @Sendable () -> Void {
    let (device, queued) = (core.device, ticket.withLock { $0 })
    return { device.wait(for: queued) }
  }

  /// Waits until a launch has set the status, or throws why none ever will.
  func waitForStatus() throws(EPError) {
    wait()
    if let failure = core.device.failure { throw failure }
  }

  /// Waits, then throws what the operation failed with.
  func finish() throws(EPError) {
    try waitForStatus()
    if let error { throw error }
  }
}

/// Memory that an operation's kernels use. Queued launches hold it; it goes with the last of them.
final class OperationResources: Sendable {
  private let view: OperationView
  private let memory: [any TensorStorage]
  private let arena: RankArena
  private let membership: Membership
  private let masks: RankMasks?
  /// Ranks that the operation has offered nothing, whenever it has run.
  private let maskedBefore: UInt64
  /// `BufferCore.returnCount`, when it was called.
  private let returnCount: Int
  private let retained: Guarded<[any Sendable]>

  init(
    view: OperationView, memory: [any TensorStorage], arena: RankArena, membership: Membership, masks: RankMasks?,
    maskedBefore: UInt64, retained: [any Sendable]
  ) {
    self.view = view
    self.memory = memory
    self.arena = arena
    self.membership = membership
    self.masks = masks
    self.maskedBefore = maskedBefore
    returnCount = masks?.returnCount ?? 0
    self.retained = Guarded(retained)
  }

  /// Peers that came too late may still write to what an operation offered them that missed a rank, or read it. The
  /// others learn of it even if nobody here waits for the result.
  deinit {
    let status = view.reported
    switch StatusCode(rawValue: status.code) {
    case .ok:
      guard let masks else { return }
      let masked = UInt64(bitPattern: status.details.0)
      if masked & ~maskedBefore != 0 { quarantine() }
      let missing = UInt64(bitPattern: status.details.1)
      membership.report(missing: masks.learn(masked, missing: missing, since: returnCount))
    case .timeout, .departed, .checkFailed:
      quarantine()
      membership.lose(to: status)
    case .masked: quarantine()
    case .failedBefore:
      quarantine()
      if status.earlier.code != StatusCode.masked.rawValue { membership.lose(to: status.earlier) }
    default: break
    }
  }

  private func quarantine() { arena.quarantine(retained.withLock { $0 }) }

  /// The same once more: the end of one half of an operation is not that of the other.
  func again() -> OperationResources {
    OperationResources(
      view: view, memory: memory, arena: arena, membership: membership, masks: masks,
      maskedBefore: maskedBefore, retained: retained.withLock { $0 })
  }

  /// From now on the arena's blocks are not kept: they are in use until the fence, and free for what comes behind it as soon as
  /// the caller has let go of them, however far ahead of the GPU it is. Not of buffers that go on where a rank is missed, since
  /// that one may come late.
  func handOver(until fence: any StreamFence) {
    if masks != nil { return }
    let blocks = retained.withLock { retained in
      defer { retained.removeAll { $0 is ArenaBlock } }
      return retained.compactMap { $0 as? ArenaBlock }
    }
    for block in blocks { block.noteUse(until: fence) }
  }

  func retain(_ more: any Sendable) { retained.withLock { $0.append(more) } }

  func releaseLast() { retained.withLock { _ = $0.removeLast() } }
}
