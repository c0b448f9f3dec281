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
final class TicketFence: StreamFence {
  let gpu: GPU
  private let word: PinnedBlock
  private let ticket: UInt64

  init(_ gpu: GPU, word: PinnedBlock, ticket: UInt64) { (self.gpu, self.word, self.ticket) = (gpu, word, ticket) }

  var isPassed: Bool { loadAcquiring(word.base) >= ticket }
  func comesBefore(_ order: LaunchOrder) -> Bool { word.base == order.lane }

  func hold(_ stream: CUDADriver.Stream) throws(DriverError) {
    try stream.wait(until: DeviceAddress(bits: word.base.bits), isAtLeast: ticket)
  }
}

/// What streams have been told to do by now.
final class EventFence: StreamFence {
  let gpu: GPU
  private let points: [Point]

  private struct Point {
    let event: StreamEvent
    /// Without what keeps it alive.
    let stream: CUDAStream
    /// Of the buffer that the stream is kept for; nil: it may be gone, and another have its handle.
    let device: UInt64?
  }

  /// - Parameter streams: each with the buffer's device that has called with it; nil for none.
  init(_ streams: [CUDAStream: UInt64?], on gpu: GPU) throws(DriverError) {
    self.gpu = gpu
    var points: [Point] = []
    for (stream, device) in streams {
      let event = try StreamEvent(gpu, isTimed: false)
      try event.record(on: stream.borrowed(on: gpu))
      points.append(Point(event: event, stream: CUDAStream(unsafeHandle: stream.handle), device: device))
    }
    self.points = points
  }

  /// Whether a buffer has called with one of the streams.
  var isOfCall: Bool { points.contains { $0.device != nil } }

  func wait() throws(DriverError) { for point in points { try point.event.synchronize() } }

  func hold(_ stream: CUDADriver.Stream) throws(DriverError) {
    for point in points { try stream.wait(for: point.event) }
  }

  func comesBefore(_ order: LaunchOrder) -> Bool {
    points.allSatisfy { point in
      point.stream == order.stream && point.device == order.device && point.stream.isSameOnAllThreads
    }
  }

  /// A GPU that is lost does nothing any more.
  var isPassed: Bool { points.allSatisfy { (try? $0.event.isReached()) ?? true } }
}

/// The streams that use a piece of memory, beside the one that it was made for.
final class StreamUses: Sendable {
  /// Each with the buffer's device that has called with it, if one has.
  private let streams = Guarded<[CUDAStream: UInt64?]>([:])

  /// From now on the stream uses the memory of `owner`. While a graph is captured on it, the graph does, and keeps it.
  func note(_ stream: CUDAStream, on gpu: GPU, of owner: AnyObject & Sendable) throws(EPError) {
    do throws(DriverError) {
      let borrowed = stream.borrowed(on: gpu)
      if try borrowed.isCapturing() { return try borrowed.keepInGraph(owner) }
    } catch {
      throw EPError(error, rank: -1)
    }
    streams.withLock { streams in if streams[stream] == nil { streams[stream] = .some(nil) } }
  }

  /// The same of a call's own stream.
  func note(by call: CallStream, on gpu: GPU, of owner: AnyObject & Sendable) throws(EPError) {
    if call.state == .capturing {
      do throws(DriverError) { return try call.stream.borrowed(on: gpu).keepInGraph(owner) } catch {
        throw EPError(error, rank: -1)
      }
    }
    streams.withLock { $0[call.stream] = .some(call.device) }
  }

  /// What they have been told to do by now; nil where none uses the memory.
  func fence(on gpu: GPU) -> EventFence? {
    let streams = streams.withLock { $0 }
    // A GPU that is lost uses nothing any more.
    return streams.isEmpty ? nil : try? EventFence(streams, on: gpu)
  }
}
