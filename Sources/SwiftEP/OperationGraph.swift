import EPKernels
import HostMachine

/// Operations of one buffer, recorded once and run as often as wanted: on a GPU as a CUDA graph, which costs one launch.
///
/// The graph keeps what its operations were given and what they return; tensors change from run to run as their owner
/// and the operations write to them.
public final class OperationGraph: Sendable {
  private let core: BufferCore
  private let graph: any DeviceGraph
  fileprivate let operations: [PendingOperation]
  /// Of dispatches outside of it.
  private let handles: [DispatchHandle]

  fileprivate init(_ core: BufferCore, _ recording: Recording, repeatCount: Int) throws(EPError) {
    self.core = core
    operations = recording.operations
    handles = recording.handles.filter { handle in !recording.madeHandles.contains { $0 === handle } }
    graph = try core.device.makeGraph(Array(repeatElement(recording.launches, count: repeatCount).joined()))
  }

  /// Runs the operations once more, behind everything that the buffer was told to do before. Collective: all ranks launch
  /// graphs of the same operations. Returns at once.
  ///
  /// - Parameter stream: as `DispatchOptions.stream`; a graph that is captured there is no place for another.
  /// - Returns: what is complete when all operations of this launch are, and throws what the first of them failed with: of
  ///   launches that are queued one behind the other, what the latest that has run did. The operations' own events are of the
  ///   latest launch.
  /// - Throws: `bufferLost`, `bufferClosed`; `invalidArgument` inside of a recording, or while results are to be received.
  @discardableResult
  public func launch(stream: CUDAStream? = nil) throws(EPError) -> Event {
    let ticket = try core.callLock.withLock { _ throws(EPError) in
      try core.checkOpen()
      if let stream, try core.device.state(of: stream) != .running {
        throw .invalidArgument(
          rank: core.rank, argument: "stream", expected: "one of this buffer's GPU on which no graph is captured",
          found: "another")
      }
      if core.isRecording {
        throw .invalidArgument(
          rank: core.rank, argument: "body", expected: "no launch of a graph while one is recorded", found: "one")
      }
      try core.checkReceived("launch")
      if !handles.allSatisfy({ core.isCurrent($0) }) {
        throw .invalidArgument(
          rank: core.rank, argument: "launch",
          expected: "a graph whose handles are of dispatches since masked ranks have returned",
          found: "one of an earlier dispatch")
      }
      let ticket = graph.launch(stream: stream)
      for operation in operations { operation.isQueued(as: ticket) }
      return ticket
    }
    return Event(self, ticket: ticket)
  }

  func isFinished(_ ticket: UInt64) -> Bool { core.device.isFinished(ticket) }

  func isOf(_ core: BufferCore) -> Bool { self.core === core }

  func fence(behind ticket: UInt64) -> (any StreamFence)? { core.device.fence(behind: ticket) }

  func wait(_ ticket: UInt64) { core.device.wait(for: ticket) }

  /// Waits, then throws what the first operation has failed with whose latest run did.
  func finish(_ ticket: UInt64) throws(EPError) {
    wait(ticket)
    if let failure = core.device.failure { throw failure }
    for operation in operations {
      if let error = operation.error { throw error }
    }
  }
}

extension ExpertBuffer {
  /// Records the operations that `body` calls on this buffer, instead of running them. Not collective; the recorded
  /// operations are, when they are launched.
  ///
  /// They must be asynchronous, dispatches of worst-case size, and wait for no event but this buffer's own. Nothing else may
  /// call this buffer meanwhile. Where several ranks are threads of one process, none should launch before all have recorded:
  /// the GPU's driver may wait for running kernels when it makes a graph, and those for the ranks that still record.
  ///
  /// - Returns: the graph, and what `body` returned. Results hold nothing before the first launch has run.
  /// - Throws: what `body` throws; `invalidArgument` where it records nothing, or what cannot be recorded, or where results
  ///   are to be received before it or behind it; `outOfMemory`;
  ///   `driver`.
  public func record<Result>(
    _ body: () throws(EPError) -> Result
  ) throws(EPError) -> (graph: OperationGraph, result: Result) { try record(repeatCount: 1, body) }

  /// - Parameter repeatCount: how often each launch runs the operations, one after the other.
  package func record<Result>(
    repeatCount: Int, _ body: () throws(EPError) -> Result
  ) throws(EPError) -> (graph: OperationGraph, result: Result) {
    try core.checkOpen()
    try core.checkReceived("body")
    let isFree = core.recording.withLock { recording in
      defer { recording = recording ?? Recording() }
      return recording == nil
    }
    if !isFree {
      throw .invalidArgument(rank: rank, argument: "body", expected: "no recording in a recording", found: "one")
    }
    let outcome: Swift.Result<Result, EPError>
    do throws(EPError) { outcome = .success(try body()) } catch { outcome = .failure(error) }
    let recording = core.recording.withLock { recording in
      defer { recording = nil }
      return recording!
    }
    defer { core.receives.withLock { $0.removeAll() } }
    let result = try outcome.get()
    try core.checkReceived("body")
    if recording.operations.isEmpty {
      throw .invalidArgument(rank: rank, argument: "body", expected: "at least one operation", found: "none")
    }
    return (try OperationGraph(core, recording, repeatCount: repeatCount), result)
  }
}

/// What has been recorded so far.
struct Recording: Sendable {
  fileprivate(set) var launches: [RecordedLaunch] = []
  fileprivate(set) var operations: [PendingOperation] = []
  /// That calls were given.
  var handles: [DispatchHandle] = []
  /// Of the dispatches among them.
  var madeHandles: [DispatchHandle] = []
}

extension BufferCore {
  var isRecording: Bool { recording.withLock { $0 != nil } }

  /// Whether the launch has been recorded, and is not to be queued.
  func record(_ launch: RecordedLaunch, of operation: PendingOperation) -> Bool {
    recording.withLock { recording in
      if recording == nil { return false }
      recording!.launches.append(launch)
      recording!.operations.append(operation)
      return true
    }
  }

  /// Throws where a graph is being recorded, or captured on the call's stream, and the call cannot be part of it.
  func checkRecordable(
    isAsynchronous: Bool, sizing: Sizing, after events: [Event], stream: CallStream?
  ) throws(EPError) {
    if !isGraphed(stream) { return }
    func fail(_ argument: String, expected: String, found: String) -> EPError {
      .invalidArgument(rank: rank, argument: argument, expected: "\(expected) while a graph is recorded", found: found)
    }
    if isRecording && stream != nil { throw fail("stream", expected: "none", found: "one") }
    if !isAsynchronous { throw fail("isAsynchronous", expected: "true", found: "false") }
    if sizing != .worstCase { throw fail("sizing", expected: "worstCase", found: "exact") }
    if let index = events.firstIndex(where: { !$0.isOf(self) }) {
      throw fail("after[\(index)]", expected: "an event of the same buffer", found: "another")
    }
  }

  /// Whether a call becomes part of a graph, rather than being run.
  func isGraphed(_ stream: CallStream?) -> Bool { isRecording || stream?.state == .capturing }
}
