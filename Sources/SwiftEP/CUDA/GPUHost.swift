import Arena
import CUDADriver
import EPKernels
import HostMachine

/// What the ranks of this process share of one GPU: its kernels, and memory that is handed out in pieces. Made once, and
/// kept: giving it back would wait for kernels of others.
package final class GPUHost: Sendable {
  package let gpu: GPU
  let module: KernelModule
  let copier: GPUCopier
  /// Memory of the GPU that no peer reaches.
  let pool: DevicePool
  /// Words that the host and the kernels both see.
  let notices: PinnedPool
  /// The host's monotonic clock less the GPU's, in nanoseconds that wrap around.
  let clockOffset: UInt64
  /// That no rank has at present.
  private let idleLanes = Guarded<[Lane]>([])
  /// Of ranks whose driver has failed: for good, since streams of callers may still wait for words of theirs.
  private let lostLanes = Guarded<[Lane]>([])

  /// Blocks that wait for each other, and must therefore all be running: those of every buffer of this process.
  private let reservedBlockCount = Guarded(0)

  /// Those that some of a buffer's ranks have asked for, and how many.
  let openLaunches = Guarded<[SharedLaunches.Key: (launches: SharedLaunches, askedCount: Int)]>([:])

  private static let made = Guarded<[Int: GPUHost]>([:])

  /// - Throws: `driver` where there is no such GPU, or none that the kernels run on.
  package static func shared(_ index: Int) throws(EPError) -> GPUHost {
    try made.withLock { made throws(EPError) in
      if let host = made[index] { return host }
      let host = try GPUHost(index)
      made[index] = host
      return host
    }
  }

  private init(_ index: Int) throws(EPError) {
    let driver: Driver
    switch Driver.shared {
    case .success(let found): driver = found
    case .failure(let absence): throw .machineUnavailable("\(absence)")
    }
    guard (0..<driver.gpuCount).contains(index) else {
      throw .machineUnavailable("GPU \(index) of \(driver.gpuCount)")
    }
    do throws(DriverError) {
      gpu = try GPU(driver, index: index)
    } catch {
      throw EPError(error, rank: -1)
    }
    if gpu.architecture < KernelModule.architectureMin {
      throw .machineUnavailable(
        "GPU \(index), \(gpu.name), is of sm_\(gpu.architecture); needed is sm_\(KernelModule.architectureMin) or later"
      )
    }
    let kernels: KernelText
    do throws(KernelText.Fault) { kernels = try KernelText(architecture: gpu.architecture) } catch {
      throw .machineUnavailable("\(error)")
    }
    do throws(DriverError) {
      module = try KernelModule(gpu, kernels)
      copier = GPUCopier(try Stream(gpu))
      pool = try DevicePool(gpu, copier)
    } catch {
      throw EPError(error, rank: -1)
    }
    notices = PinnedPool(gpu)
    clockOffset = try Self.findClockOffset(module, pool, notices, copier)
    try warmUp()
  }
}

extension GPUHost {
  /// Blocks that are not set apart. Where MPS gives each process a part of the GPU, other processes' are not in it.
  func room() throws(EPError) -> Int { try blockCountMax() - reservedBlockCount.withLock { $0 } }

  /// Blocks that the GPU runs at a time.
  private func blockCountMax() throws(EPError) -> Int {
    do throws(DriverError) {
      return try module.blocksPerMultiprocessor() * gpu.multiprocessorCount
    } catch {
      throw EPError(error, rank: -1)
    }
  }

  /// Sets blocks apart for a rank's kernels.
  ///
  /// - Throws: `invalidArgument` where not all blocks could run at the same time.
  func reserve(blockCount: Int, rank: Int) throws(EPError) {
    let room = try blockCountMax()
    try reservedBlockCount.withLock { reserved throws(EPError) in
      if reserved + blockCount > room {
        throw .invalidArgument(
          rank: rank, argument: "workers",
          expected:
            "at most \(room - reserved): \(reserved) of the \(room) blocks that \(gpu.name) runs at a time belong to other ranks or buffers",
          found: "\(blockCount)")
      }
      reserved += blockCount
    }
  }

  func release(blockCount: Int) { reservedBlockCount.withLock { $0 -= blockCount } }

  /// Every kind of copy once, small and large: none is to be the first while kernels wait for its rank.
  private func warmUp() throws(EPError) {
    for byteCount in [64, 4 << 20] {
      let block = try pool.take(Int64(byteCount), rank: -1)
      let memory = try HostMemory(byteCount: Int64(byteCount))
      let bytes = UnsafeMutableRawBufferPointer(start: memory.base.hostPointer, count: byteCount)
      try copier.clear(block.base, byteCount: Int64(byteCount))
      try copier.write(UnsafeRawBufferPointer(bytes), to: block.base)
      try copier.read(block.base, into: bytes)
    }
  }

  /// From a few kernels that tell the time: by the one that was heard of soonest.
  private static func findClockOffset(
    _ module: KernelModule, _ pool: DevicePool, _ notices: PinnedPool, _ copier: GPUCopier
  ) throws(EPError) -> UInt64 {
    let (counter, word) = (try pool.take(64, rank: -1), try notices.take(64, rank: -1))
    try copier.clear(counter.base, byteCount: 64)
    var best: (offset: UInt64, doubt: UInt64) = (0, .max)
    do throws(DriverError) {
      let stream = try CUDADriver.Stream(module.gpu)
      for _ in 0..<8 {
        storeReleasing(0, in: word.base)
        let before = monotonicNow()
        try module.tellTime(
          counter: DeviceAddress(bits: counter.base.bits), word: DeviceAddress(bits: word.base.bits), blockCount: 1,
          on: stream)
        while loadAcquiring(word.base) == 0 && monotonicNow() &- before < 100_000_000 {}
        let doubt = monotonicNow() &- before
        try stream.synchronize()
        if doubt < best.doubt { best = (before &+ doubt / 2 &- loadAcquiring(word.base), doubt) }
      }
    } catch {
      throw EPError(error, rank: -1)
    }
    return best.offset
  }

  func takeLane(rank: Int) throws(EPError) -> Lane {
    if let lane = idleLanes.withLock({ $0.popLast() }) { return lane }
    let (finishedWord, counter) = (try notices.take(64, rank: rank), try pool.take(64, rank: rank))
    let lane: Lane
    do throws(DriverError) {
      lane = Lane(stream: try CUDADriver.Stream(gpu), finishedWord: finishedWord, counter: counter)
      // Nothing of the stream is left to be set up when ranks wait for each other.
      try lane.stream.fill(DeviceAddress(bits: counter.base.bits), byteCount: 64, with: 0)
      try module.tellTime(
        counter: DeviceAddress(bits: counter.base.bits), word: DeviceAddress(bits: finishedWord.base.bits),
        blockCount: gpu.multiprocessorCount, on: lane.stream)
      try lane.stream.fill(DeviceAddress(bits: counter.base.bits), byteCount: 64, with: 0)
      try lane.stream.synchronize()
    } catch {
      throw EPError(error, rank: rank)
    }
    storeReleasing(0, in: finishedWord.base)
    return lane
  }

  /// Nothing may be queued on it any more, unless it is lost.
  func give(_ lane: Lane, isLost: Bool) { (isLost ? lostLanes : idleLanes).withLock { $0.append(lane) } }
}

/// A stream, and where its launches count their ends. Used again rather than made anew: a stream's first use is slow and
/// may wait for kernels of others; and numbers go on, so that whoever comes late to wait for an end finds it.
struct Lane: Sendable {
  let stream: CUDADriver.Stream
  /// UInt64: launches that have finished, as the last of them has told.
  let finishedWord: PinnedBlock
  /// Where a launch's blocks count themselves out: `KernelModule.End.counter`.
  let counter: DeviceBlock
}

extension EPError {
  init(_ error: DriverError, rank: Int) {
    self = .driver(rank: rank, call: error.call, code: error.code, name: error.name)
  }
}
