import Arena
import CUDADriver
import EPKernels
import Glibc
import HostMachine

/// Copies between the host's memory and a GPU's, on a stream of its own: kernels that wait do not hold it up.
struct GPUCopier: MemoryCopier {
  let gpu: GPU
  private let stream: Guarded<CUDADriver.Stream>

  init(_ stream: CUDADriver.Stream) { (gpu, self.stream) = (stream.gpu, Guarded(stream)) }

  func read(_ source: Address, into target: UnsafeMutableRawBufferPointer) throws(EPError) {
    guard let base = target.baseAddress, target.count > 0 else { return }
    try perform { stream throws(DriverError) in
      try stream.copy(from: DeviceAddress(bits: source.bits), to: base, byteCount: target.count)
    }
  }

  func write(_ source: UnsafeRawBufferPointer, to target: Address) throws(EPError) {
    guard let base = source.baseAddress, source.count > 0 else { return }
    try perform { stream throws(DriverError) in
      try stream.copy(from: base, to: DeviceAddress(bits: target.bits), byteCount: source.count)
    }
  }

  func clear(_ target: Address, byteCount: Int64) throws(EPError) {
    try perform { stream throws(DriverError) in
      try stream.fill(DeviceAddress(bits: target.bits), byteCount: Int(byteCount), with: 0)
    }
  }

  private func perform(_ body: (CUDADriver.Stream) throws(DriverError) -> Void) throws(EPError) {
    try stream.withLock { stream throws(EPError) in
      do throws(DriverError) {
        try body(stream)
        try stream.synchronize()
      } catch {
        throw EPError(error, rank: -1)
      }
    }
  }
}

/// Memory of a GPU in pieces, which grows and never shrinks.
final class DevicePool: Sendable {
  private let memory: VirtualMemory
  private let copier: GPUCopier
  private let ranges = Guarded(ReusableRanges())
  private let growthByteCountMin: Int64 = 64 << 20

  init(_ gpu: GPU, _ copier: GPUCopier) throws(DriverError) {
    memory = try VirtualMemory(gpu, reservedByteCount: Int64(gpu.byteCount))
    self.copier = copier
    // Growing while kernels run is possible, but not needed for what operations take.
    try memory.grow(to: growthByteCountMin)
    ranges.withLock { [byteCount = memory.byteCount] in $0.give(0..<byteCount) }
  }

  /// - Parameter order: of the launches that use it first; nil: others do.
  func take(_ byteCount: Int64, rank: Int, for order: LaunchOrder? = nil) throws(EPError) -> DeviceBlock {
    let (range, earlier) = try ranges.withLock { ranges throws(EPError) -> (Range<Int64>, [any ReuseFence]) in
      if let order, let taken = ranges.take(byteCount, for: order) { return taken }
      if let range = ranges.take(byteCount) { return (range, []) }
      let before = memory.byteCount
      let needed = before + max(growthByteCountMin, roundUpToPages(byteCount))
      if needed > memory.reservedByteCount {
        throw .outOfMemory(rank: rank, neededByteCount: needed, availableByteCount: before)
      }
      do throws(DriverError) { try memory.grow(to: needed) } catch {
        if error.isOutOfMemory {
          throw .outOfMemory(rank: rank, neededByteCount: needed, availableByteCount: before)
        }
        throw EPError(error, rank: rank)
      }
      ranges.give(before..<memory.byteCount)
      return (ranges.take(byteCount)!, [])
    }
    return DeviceBlock(self, range, behind: earlier, at: Address(bits: memory.base.bits), copier)
  }

  fileprivate func give(_ range: Range<Int64>, behind fences: [any ReuseFence]) {
    ranges.withLock { $0.give(range, behind: fences) }
  }
}

/// A piece of a GPU's memory, given back when the last reference to it is gone.
final class DeviceBlock: TensorStorage {
  let base: Address
  private let pool: DevicePool
  private let range: Range<Int64>
  let gpuCopier: GPUCopier
  private let uses = StreamUses()
  /// As that of an `ArenaBlock`.
  private let earlier: [any ReuseFence]

  fileprivate init(
    _ pool: DevicePool, _ range: Range<Int64>, behind earlier: [any ReuseFence], at poolBase: Address,
    _ copier: GPUCopier
  ) {
    self.earlier = earlier
    self.pool = pool
    self.range = range
    gpuCopier = copier
    base = poolBase.advanced(byBytes: range.lowerBound)
  }

  deinit {
    let streams = uses.fence(on: gpuCopier.gpu)
    let later = streams.map { [$0] } ?? []
    pool.give(range, behind: streams?.isOfCall == true ? later : earlier + later)
  }

  func noteUse(on stream: CUDAStream) throws(EPError) { try uses.note(stream, on: gpuCopier.gpu, of: self) }
  func noteUse(by call: CallStream) throws(EPError) { try uses.note(by: call, on: gpuCopier.gpu, of: self) }

  var copier: (any MemoryCopier)? { gpuCopier }
}

/// Host memory that kernels reach, in pieces.
final class PinnedPool: Sendable {
  private let gpu: GPU
  private let slabs = Guarded<[Slab]>([])
  private let slabByteCountMin: Int64 = 4 << 20

  private struct Slab {
    let memory: PinnedMemory
    var holes: HoleList
  }

  init(_ gpu: GPU) { self.gpu = gpu }

  /// Zeroed.
  func take(_ byteCount: Int64, rank: Int) throws(EPError) -> PinnedBlock {
    try slabs.withLock { slabs throws(EPError) in
      for index in slabs.indices {
        if let range = slabs[index].holes.take(byteCount) {
          return PinnedBlock(self, slab: index, range, slabs[index].memory)
        }
      }
      do throws(DriverError) {
        let memory = try PinnedMemory(gpu, byteCount: Int(max(slabByteCountMin, roundUpToPages(byteCount))))
        var holes = HoleList()
        holes.give(0..<Int64(memory.byteCount))
        slabs.append(Slab(memory: memory, holes: holes))
      } catch {
        throw EPError(error, rank: rank)
      }
      let last = slabs.count - 1
      return PinnedBlock(self, slab: last, slabs[last].holes.take(byteCount)!, slabs[last].memory)
    }
  }

  fileprivate func give(_ range: Range<Int64>, slab: Int) { slabs.withLock { $0[slab].holes.give(range) } }
}

final class PinnedBlock: TensorStorage {
  let base: Address
  private let pool: PinnedPool
  private let slab: Int
  private let range: Range<Int64>

  fileprivate init(_ pool: PinnedPool, slab: Int, _ range: Range<Int64>, _ memory: PinnedMemory) {
    self.pool = pool
    self.slab = slab
    self.range = range
    base = Address(memory.base + Int(range.lowerBound))
    memset(base.hostPointer, 0, range.count)
  }

  deinit { pool.give(range, slab: slab) }
}

/// A caller's memory on a GPU.
final class BorrowedDeviceMemory: TensorStorage {
  let base: Address
  private let gpuCopier: GPUCopier
  private let owner: (AnyObject & Sendable)?

  init(base: Address, _ copier: GPUCopier, owner: (AnyObject & Sendable)?) {
    (self.base, gpuCopier, self.owner) = (base, copier, owner)
  }

  var copier: (any MemoryCopier)? { gpuCopier }
}
