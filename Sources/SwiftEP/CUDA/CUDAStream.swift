import CUDADriver
import EPKernels
import HostMachine

/// A stream of the caller's on a GPU: a `CUstream`, which is a `cudaStream_t`, of the GPU's primary context, as the CUDA
/// runtime and the frameworks on it make them.
public struct CUDAStream: Hashable, @unchecked Sendable {
  let handle: UnsafeMutableRawPointer?
  private let owner: (AnyObject & Sendable)?

  /// - Parameters:
  ///   - handle: nil: the default stream. Others must stay valid as long as a buffer whose calls it was named for, and the
  ///     tensors that use it;
  ///   - owner: kept alive as long, if given: it should be what destroys the stream.
  public init(unsafeHandle handle: UnsafeMutableRawPointer?, owner: (AnyObject & Sendable)? = nil) {
    (self.handle, self.owner) = (handle, owner)
  }

  public static func == (left: CUDAStream, right: CUDAStream) -> Bool { left.handle == right.handle }
  public func hash(into hasher: inout Hasher) { hasher.combine(handle) }

  func borrowed(on gpu: GPU) -> CUDADriver.Stream { CUDADriver.Stream(gpu, borrowing: handle) }

  /// Not `CU_STREAM_PER_THREAD`, which is another on each thread.
  var isSameOnAllThreads: Bool { handle != UnsafeMutableRawPointer(bitPattern: 2) }
}

/// What streams of GPUs can wait for.
package protocol StreamFence: ReuseFence {
  /// What is queued on the stream later comes behind it, whether the fence lives until then or not.
  func hold(_ stream: CUDADriver.Stream) throws(DriverError)
  var gpu: GPU { get }
}

extension StreamFence {
  func hold(_ stream: CUDAStream) throws(EPError) {
    do throws(DriverError) { try hold(stream.borrowed(on: gpu)) } catch { throw EPError(error, rank: -1) }
  }
}

/// The end of a launch, by the word of its lane.
struct TicketFence: StreamFence {
  let word: PinnedBlock
  let ticket: UInt64
  let gpu: GPU

  var isPassed: Bool { loadAcquiring(word.base) >= ticket }
  func comesBefore(_ order: LaunchOrder) -> Bool { word.base == order.lane }

  func hold(_ stream: CUDADriver.Stream) throws(DriverError) {
    try stream.wait(until: DeviceAddress(bits: word.base.bits), isAtLeast: ticket)
  }
}

/// What streams have been told to do by now.
struct EventFence: StreamFence {
  let gpu: GPU
  private let events: [(event: StreamEvent, stream: CUDAStream)]

  init(_ streams: some Collection<CUDAStream>, on gpu: GPU) throws(DriverError) {
    self.gpu = gpu
    var events: [(StreamEvent, CUDAStream)] = []
    for stream in streams {
      let event = try StreamEvent(gpu, isTimed: false)
      try event.record(on: stream.borrowed(on: gpu))
      events.append((event, stream))
    }
    self.events = events
  }

  func wait() throws(DriverError) { for (event, _) in events { try event.synchronize() } }

  func hold(_ stream: CUDADriver.Stream) throws(DriverError) {
    for (event, _) in events { try stream.wait(for: event) }
  }

  func comesBefore(_ order: LaunchOrder) -> Bool {
    events.allSatisfy { $0.stream == order.stream && $0.stream.isSameOnAllThreads }
  }

  /// A GPU that is lost does nothing any more.
  var isPassed: Bool { events.allSatisfy { (try? $0.event.isReached()) ?? true } }
}

/// The streams that use a piece of memory, beside the one that it was made for.
final class StreamUses: Sendable {
  private let streams = Guarded<Set<CUDAStream>>([])

  /// From now on the stream uses the memory of `owner`. While a graph is captured on it, the graph does, and keeps it.
  ///
  /// - Parameter state: the stream's; nil: it is not known.
  func note(
    _ stream: CUDAStream, as state: StreamState?, on gpu: GPU, of owner: AnyObject & Sendable
  ) throws(EPError) {
    do throws(DriverError) {
      let borrowed = stream.borrowed(on: gpu)
      let isCaptured = if let state { state == .capturing } else { try borrowed.isCapturing() }
      if isCaptured { return try borrowed.keepInGraph(owner) }
    } catch {
      throw EPError(error, rank: -1)
    }
    streams.withLock { _ = $0.insert(stream) }
  }

  /// What they have been told to do by now; nil where none uses the memory.
  func fence(on gpu: GPU) -> EventFence? {
    let streams = streams.withLock { $0 }
    // A GPU that is lost uses nothing any more.
    return streams.isEmpty ? nil : try? EventFence(streams, on: gpu)
  }
}
