import CCUDA

/// A queue of work for a GPU, in no order with any other.
package final class Stream: @unchecked Sendable {
  package let gpu: GPU
  /// Nil: the default stream, which others can be made to wait for and to be waited for by as any stream.
  let handle: CUHandle?
  private let isOwned: Bool

  package init(_ gpu: GPU) throws(DriverError) {
    (self.gpu, isOwned) = (gpu, true)
    var handle: CUHandle?
    let nonBlocking: UInt32 = 1
    try gpu.call("cuStreamCreate") { $0.cuStreamCreate(&handle, nonBlocking) }
    self.handle = handle!
  }

  /// A stream of somebody else's, which is to live longer.
  package init(_ gpu: GPU, borrowing handle: UnsafeMutableRawPointer?) {
    (self.gpu, isOwned, self.handle) = (gpu, false, handle.map { CUHandle($0) })
  }

  deinit { if isOwned { gpu.release { $0.cuStreamDestroy(handle!) } } }

  /// The same in every object for this stream.
  package var rawHandle: UnsafeMutableRawPointer? { handle.map { UnsafeMutableRawPointer($0) } }

  /// Whether what is queued becomes part of a graph, rather than being run.
  package func isCapturing() throws(DriverError) -> Bool {
    var status: Int32 = 0
    try gpu.call("cuStreamIsCapturing") { $0.cuStreamIsCapturing(handle, &status) }
    return status != 0
  }

  /// Keeps `owner` as long as the graph lives that is captured on this stream, and what is made from it.
  package func keepInGraph(_ owner: AnyObject & Sendable) throws(DriverError) {
    final class Box: Sendable {
      let owner: AnyObject & Sendable
      init(_ owner: AnyObject & Sendable) { self.owner = owner }
    }
    var (status, graph): (Int32, CUHandle?) = (0, nil)
    try gpu.call("cuStreamGetCaptureInfo") { $0.cuStreamGetCaptureInfo(handle, &status, nil, &graph, nil, nil) }
    guard let graph else { return }
    let box = Unmanaged.passRetained(Box(owner))
    var object: CUHandle?
    let (isNotWaitedFor, isHandedOver): (UInt32, UInt32) = (1, 1)
    do throws(DriverError) {
      try gpu.call("cuUserObjectCreate") { table in
        table.cuUserObjectCreate(
          &object, box.toOpaque(), { Unmanaged<Box>.fromOpaque($0!).release() }, 1, isNotWaitedFor)
      }
    } catch {
      box.release()
      throw error
    }
    try gpu.call("cuGraphRetainUserObject") { $0.cuGraphRetainUserObject(graph, object!, 1, isHandedOver) }
  }

  package func synchronize() throws(DriverError) {
    try gpu.call("cuStreamSynchronize") { $0.cuStreamSynchronize(handle) }
  }

  /// Throws what has gone wrong on the GPU, if anything has; waits for nothing.
  package func checkHealth() throws(DriverError) {
    do throws(DriverError) {
      try gpu.call("cuStreamQuery") { $0.cuStreamQuery(handle) }
    } catch  where error.code == DriverError.notReady {}
  }

  package func copy(
    from source: UnsafeRawPointer, to target: DeviceAddress, byteCount: Int
  ) throws(DriverError) {
    try gpu.call("cuMemcpyHtoDAsync") { $0.cuMemcpyHtoDAsync(target.bits, source, byteCount, handle) }
  }

  package func copy(
    from source: DeviceAddress, to target: UnsafeMutableRawPointer, byteCount: Int
  ) throws(DriverError) {
    try gpu.call("cuMemcpyDtoHAsync") { $0.cuMemcpyDtoHAsync(target, source.bits, byteCount, handle) }
  }

  package func copy(from source: DeviceAddress, to target: DeviceAddress, byteCount: Int) throws(DriverError) {
    try gpu.call("cuMemcpyDtoDAsync") { $0.cuMemcpyDtoDAsync(target.bits, source.bits, byteCount, handle) }
  }

  package func fill(_ target: DeviceAddress, byteCount: Int, with byte: UInt8) throws(DriverError) {
    try gpu.call("cuMemsetD8Async") { $0.cuMemsetD8Async(target.bits, byte, byteCount, handle) }
  }

  /// Queues the store of a word that the host can see, behind everything queued before.
  package func write(_ value: UInt64, to word: DeviceAddress) throws(DriverError) {
    try gpu.call("cuStreamWriteValue64") { $0.cuStreamWriteValue64(handle, word.bits, value, 0) }
  }

  /// Queues a wait until the word is at least `value`: somebody must see to it that it is.
  package func wait(until word: DeviceAddress, isAtLeast value: UInt64) throws(DriverError) {
    try gpu.call("cuStreamWaitValue64") { $0.cuStreamWaitValue64(handle, word.bits, value, 0) }
  }

  /// Queues a wait until none of the words is 0: somebody must see to it that none stays so. At most 256.
  package func wait(untilNotZero words: [DeviceAddress]) throws(DriverError) {
    if words.isEmpty { return }
    var waits = words.map { word in
      // CU_STREAM_MEM_OP_WAIT_VALUE_64, CU_STREAM_WAIT_VALUE_GEQ
      swiftep_cu_wait(operation: 4, address: word.bits, value: 1, flags: 0, alias: 0, padding: 0)
    }
    try gpu.call("cuStreamBatchMemOp") { $0.cuStreamBatchMemOp(handle, UInt32(waits.count), &waits, 0) }
  }

  /// Queues a call of `body` on a thread of the driver's; it must not call the driver.
  package func enqueue(_ body: @escaping @Sendable () -> Void) throws(DriverError) {
    final class Box: Sendable {
      let body: @Sendable () -> Void
      init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }
    let box = Unmanaged.passRetained(Box(body))
    do throws(DriverError) {
      try gpu.call("cuLaunchHostFunc") { table in
        table.cuLaunchHostFunc(handle, { Unmanaged<Box>.fromOpaque($0!).takeRetainedValue().body() }, box.toOpaque())
      }
    } catch {
      box.release()
      throw error
    }
  }

  /// Queues a wait until the event is reached, as it was recorded last.
  package func wait(for event: StreamEvent) throws(DriverError) {
    try gpu.call("cuStreamWaitEvent") { $0.cuStreamWaitEvent(handle, event.handle, 0) }
  }
}

/// A point in a stream's work; timed, also when it was reached.
package final class StreamEvent: @unchecked Sendable {
  private let gpu: GPU
  let handle: CUHandle
  private let isTimed: Bool

  package init(_ gpu: GPU, isTimed: Bool) throws(DriverError) {
    (self.gpu, self.isTimed) = (gpu, isTimed)
    if !isTimed, let spare = gpu.spareEvents.withLock({ $0.popLast() }) {
      handle = CUHandle(bitPattern: spare)!
      return
    }
    var handle: CUHandle?
    let withoutTime: UInt32 = 2
    try gpu.call("cuEventCreate") { $0.cuEventCreate(&handle, isTimed ? 0 : withoutTime) }
    self.handle = handle!
  }

  /// Whoever waits for it waits for what it was recorded behind then.
  deinit {
    if isTimed { return gpu.release { $0.cuEventDestroy(handle) } }
    let spare = UInt(bitPattern: handle)
    gpu.spareEvents.withLock { $0.append(spare) }
  }

  package func record(on stream: Stream) throws(DriverError) {
    try gpu.call("cuEventRecord") { $0.cuEventRecord(handle, stream.handle) }
  }

  /// Whether all is done that was queued before it was recorded.
  package func isReached() throws(DriverError) -> Bool {
    do throws(DriverError) {
      try gpu.call("cuEventQuery") { $0.cuEventQuery(handle) }
      return true
    } catch  where error.code == DriverError.notReady {
      return false
    }
  }

  package func synchronize() throws(DriverError) {
    try gpu.call("cuEventSynchronize") { $0.cuEventSynchronize(handle) }
  }

  /// Both must be timed, and have been reached.
  package func microseconds(since earlier: StreamEvent) throws(DriverError) -> Double {
    var milliseconds: Float = 0
    try gpu.call("cuEventElapsedTime") { $0.cuEventElapsedTime(&milliseconds, earlier.handle, handle) }
    return 1000 * Double(milliseconds)
  }
}
