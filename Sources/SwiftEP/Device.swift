import Arena
import EPKernels
import Glibc
import HostMachine

/// What the API asks of the hardware that runs the protocol: queues of launches, and memory.
package protocol Device: AnyObject, Sendable {
  /// The kind of hardware: `cpu`, `cuda`.
  var name: String { get }
  /// Workers that one call can use.
  var workerCountMax: Int { get }
  /// Why nothing runs here any more; nil while all is well.
  var failure: EPError? { get }

  /// How many workers a call is best given, of those that it may have.
  ///
  /// - Parameters:
  ///   - tokenCount: of the call.
  ///   - byteCount: of what tokens have to be sent, or of the sums, and of what else is written.
  func workerCount(of available: Int, tokenCount: Int, moving byteCount: @autoclosure () -> Int) -> Int

  /// Chunks that a dispatch's tokens are best numbered in.
  func chunkCount(tokenCount: Int, workerCount: Int) -> Int

  /// To be called once, before the first launch: whose launches they will be.
  func serve(_ view: RankView, arena: RankArena, notices: any TensorStorage)

  // MARK: Launches

  /// Queues a launch behind all earlier ones; `owner` is kept alive until it has finished. Returns its ticket.
  /// An urgent launch makes progress though nobody waits for it.
  ///
  /// - Parameter stream: a caller's: the launch comes behind what is queued there, and what is queued there later comes
  ///   behind it. Where a graph is captured there, it becomes part of that and is not run; then the ticket is 0.
  func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool, stream: CallStream?
  ) -> UInt64

  /// Whether this device knows streams of callers at all, and whether a graph is captured on this one.
  func state(of stream: CUDAStream) throws(EPError) -> StreamState

  /// Behind what launches of calls with this stream come, without being told to; nil where that is nothing.
  func order(of stream: CallStream?) -> LaunchOrder?

  /// What streams of GPUs can wait for, and comes with the end of the launch; nil where this is no GPU.
  func fence(behind ticket: UInt64) -> (any StreamFence)?

  /// Later launches come behind the fence. Of a device that has fences.
  func enqueueWait(for fence: any StreamFence)

  /// Queues a wait: later launches begin after `body` has returned.
  func enqueueWait(isUrgent: Bool, _ body: @escaping @Sendable () -> Void)

  /// Prepares launches to be queued together, as often as wanted.
  func makeGraph(_ launches: [RecordedLaunch]) throws(EPError) -> any DeviceGraph

  func isFinished(_ ticket: UInt64) -> Bool
  func wait(for ticket: UInt64)

  // MARK: Memory

  /// A rank's arena that can grow to `byteCountMax`, with `byteCount` zero bytes.
  func makeArena(byteCountMax: Int64, clearing byteCount: Int64) throws(EPError) -> any SymmetricMemory

  /// The arena of a rank of another process, which `file` came from.
  ///
  /// - Parameter byteCount: what was there of it when it was sent.
  func attach(_ file: Descriptor, reservedByteCount: Int64, byteCount: Int64) throws(EPError) -> any SymmetricMemory

  /// Lets this rank's kernels reach the arena of a rank of this process.
  func reach(_ arena: any SymmetricMemory) throws(EPError)

  /// Memory for this rank's kernels alone, whatever lay there before.
  ///
  /// - Parameter order: of the launches that use it first; nil: others than those do.
  func makeLocalMemory(byteCount: Int64, for order: LaunchOrder?) throws(EPError) -> any TensorStorage

  /// Zeroed memory for a few words that this rank's kernels and its host both read and write.
  func makeNotices(byteCount: Int64) throws(EPError) -> any TensorStorage

  /// Zeroed memory for tensors that calls are given.
  func makeTensorMemory(byteCount: Int64) throws(EPError) -> any TensorStorage

  /// Whether kernels can use the tensor where it lies.
  func reaches(_ tensor: Tensor) -> Bool

  /// Changes the alarm, and ends the waits of this rank's kernels that watch it.
  func raise(_ alarm: Address, arena: Address)

  /// Finishes what is queued and gives everything back.
  func close()
}

package enum StreamState: Sendable {
  case unknown, running, capturing
}

/// A caller's stream as a call has found it: it is asked once, since that takes the driver most of a microsecond.
package struct CallStream: Sendable {
  let stream: CUDAStream
  let state: StreamState
  /// As that of a `LaunchOrder`; 0: none.
  let device: UInt64
}

extension BufferCore {
  func find(_ stream: CUDAStream?) throws(EPError) -> CallStream? {
    guard let stream else { return nil }
    return CallStream(stream: stream, state: try device.state(of: stream), device: device.order(of: nil)?.device ?? 0)
  }
}

/// A launch that is to be queued later.
package struct RecordedLaunch: Sendable {
  let launch: KernelLaunch
  let workerCount: Int
  let owner: AnyObject & Sendable
}

/// Launches of one device, which it queues one behind the other.
package protocol DeviceGraph: AnyObject, Sendable {
  /// Queues them behind all earlier launches; returns the last one's ticket.
  ///
  /// - Parameter stream: as that of `Device.enqueue`.
  func launch(stream: CUDAStream?) -> UInt64
}

private final class HostGraph: DeviceGraph {
  private let device: HostDevice
  private let launches: [RecordedLaunch]

  init(_ device: HostDevice, _ launches: [RecordedLaunch]) { (self.device, self.launches) = (device, launches) }

  func launch(stream _: CUDAStream?) -> UInt64 {
    launches.reduce(0) { _, next in
      device.enqueue(next.launch, workerCount: next.workerCount, keeping: next.owner, isUrgent: true, stream: nil)
    }
  }
}

/// A rank whose workers are threads.
package final class HostDevice: Device {
  private let rank: Int
  private let stream: HostStream
  private let pool = HostPool()

  package init(rank: Int, workerCount: Int, tuning: HostTuning) throws(EPError) {
    guard let stream = HostStream(workerCount: workerCount, tuning: tuning) else {
      throw .systemCall(rank: rank, name: "pthread_create", code: EAGAIN)
    }
    self.rank = rank
    self.stream = stream
  }

  package var name: String { "cpu" }
  package var failure: EPError? { nil }
  package var workerCountMax: Int { stream.workerCountMax }
  package func serve(_ view: RankView, arena: RankArena, notices: any TensorStorage) {}

  package func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool, stream _: CallStream?
  ) -> UInt64 {
    if launch.isOnePart {
      return stream.enqueue(launch, workerCount: workerCount, keeping: owner, isUrgent: isUrgent)
    }
    var ticket: UInt64 = 0
    for part in launch.parts {
      // A part that waits for peers sleeps while it does.
      ticket = stream.enqueue(
        part.launch, workerCount: min(workerCount, part.workerCountMax), keeping: owner, isUrgent: isUrgent)
    }
    return ticket
  }

  package func enqueueWait(isUrgent: Bool, _ body: @escaping @Sendable () -> Void) {
    _ = stream.enqueue(isUrgent: isUrgent, body)
  }

  package func state(of stream: CUDAStream) -> StreamState { .unknown }
  package func order(of stream: CallStream?) -> LaunchOrder? { nil }
  package func fence(behind ticket: UInt64) -> (any StreamFence)? { nil }
  package func enqueueWait(for fence: any StreamFence) {}

  package func makeGraph(_ launches: [RecordedLaunch]) -> any DeviceGraph { HostGraph(self, launches) }

  package func isFinished(_ ticket: UInt64) -> Bool { stream.isFinished(ticket) }
  package func wait(for ticket: UInt64) { _ = stream.wait(for: ticket) }
  package func workerCount(of available: Int, tokenCount _: Int, moving _: @autoclosure () -> Int) -> Int { available }
  package func chunkCount(tokenCount: Int, workerCount: Int) -> Int { workerCount }
  package func close() { stream.close() }

  // MARK: Memory

  package func makeArena(byteCountMax: Int64, clearing byteCount: Int64) throws(EPError) -> any SymmetricMemory {
    do throws(SystemCallError) {
      let memory = try ArenaMemory(reservedByteCount: byteCountMax)
      try memory.grow(to: byteCount)
      return memory
    } catch {
      throw .systemCall(rank: rank, name: error.call, code: error.code)
    }
  }

  package func attach(
    _ file: Descriptor, reservedByteCount: Int64, byteCount: Int64
  ) throws(EPError) -> any SymmetricMemory {
    do throws(SystemCallError) {
      return try ArenaMemory(attaching: file, reservedByteCount: reservedByteCount)
    } catch {
      throw .systemCall(rank: rank, name: error.call, code: error.code)
    }
  }

  package func reach(_ arena: any SymmetricMemory) {}

  package func makeLocalMemory(byteCount: Int64, for order: LaunchOrder?) throws(EPError) -> any TensorStorage {
    let memory = try pool.take(byteCount)
    // Nothing may rely on zeros that happen to be there, or on what was there before.
    if isChecked { HostMachine.host.fill(memory.base, byteCount: byteCount & ~3, pattern: 0xa5a5_a5a5) }
    return memory
  }
  package func makeNotices(byteCount: Int64) throws(EPError) -> any TensorStorage {
    let memory = try pool.take(byteCount)
    memory.base.hostPointer.initializeMemory(as: UInt8.self, repeating: 0, count: Int(byteCount))
    return memory
  }
  package func makeTensorMemory(byteCount: Int64) throws(EPError) -> any TensorStorage {
    try HostMemory(byteCount: byteCount)
  }
  package func reaches(_ tensor: Tensor) -> Bool { tensor.storage.copier == nil }
  package func raise(_ alarm: Address, arena: Address) { raiseAlarm(alarm, waking: arena) }
}
