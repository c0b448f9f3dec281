import Arena
import CUDADriver
import EPKernels
import Glibc
import HostMachine

/// One rank's arena in a GPU's memory.
final class GPUArena: SymmetricMemory {
  private let memory: Guarded<VirtualMemory>
  private let gpuCopier: GPUCopier
  private let rank: Int
  let gpu: GPU?
  let clockOffset: UInt64
  let address: Address
  let reservedByteCount: Int64
  private let state = Guarded(State())

  private struct State {
    var byteCount: Int64 = 0
    /// Whether other processes map it, piece by piece.
    var isShared = false
    var descriptor: Descriptor?
  }

  /// An arena of this process's own; or, where it is mapped piece by piece, another's.
  ///
  /// - Parameter backedByteCount: what is there from the start, before `extend` gives it out.
  init(_ host: GPUHost, reservedByteCount: Int64, backedByteCount: Int64 = 0, rank: Int) throws(EPError) {
    self.rank = rank
    gpuCopier = host.copier
    gpu = host.gpu
    clockOffset = host.clockOffset
    self.reservedByteCount = roundUpToPages(reservedByteCount)
    do throws(DriverError) {
      let memory = try VirtualMemory(host.gpu, reservedByteCount: reservedByteCount)
      if backedByteCount > 0 { try memory.grow(to: backedByteCount) }
      address = Address(bits: memory.base.bits)
      self.memory = Guarded(memory)
    } catch {
      throw EPError(error, rank: rank)
    }
  }

  var byteCount: Int64 { state.withLock { $0.byteCount } }
  var copier: (any MemoryCopier)? { gpuCopier }

  /// Of the first piece.
  var descriptor: Descriptor? {
    state.withLock { state in
      state.isShared = true
      if state.descriptor == nil { state.descriptor = try? piece(at: 0).file }
      return state.descriptor
    }
  }

  private func piece(at offset: Int64) throws(EPError) -> ArenaPiece {
    do throws(DriverError) {
      let (descriptor, byteCount) = try memory.withLock { memory throws(DriverError) in
        try memory.export(pieceAt: offset)
      }
      return ArenaPiece(range: offset..<offset + byteCount, file: Descriptor(owning: descriptor))
    } catch {
      throw EPError(error, rank: rank)
    }
  }

  func extend(to byteCount: Int64) throws(EPError) -> [ArenaPiece] {
    let before = memory.withLock { $0.byteCount }
    do throws(DriverError) {
      try memory.withLock { memory throws(DriverError) in try memory.grow(to: byteCount) }
    } catch {
      if error.isOutOfMemory {
        throw .outOfMemory(rank: rank, neededByteCount: byteCount, availableByteCount: before)
      }
      throw EPError(error, rank: rank)
    }
    let isShared = state.withLock { state in
      state.byteCount = max(state.byteCount, byteCount)
      return state.isShared
    }
    return isShared && memory.withLock({ $0.byteCount }) > before ? [try piece(at: before)] : []
  }

  func map(_ piece: ArenaPiece) throws(EPError) {
    guard let file = piece.file else { throw .receivedNoDescriptor(rank: rank) }
    do throws(DriverError) {
      try memory.withLock { memory throws(DriverError) in
        try memory.map(file.raw, at: piece.range.lowerBound, byteCount: Int64(piece.range.count))
      }
    } catch {
      throw EPError(error, rank: rank)
    }
    state.withLock { $0.byteCount = piece.range.upperBound }
  }

  /// Lets the kernels of another GPU of this process reach it.
  func letIn(_ gpu: GPU) throws(EPError) {
    do throws(DriverError) {
      try memory.withLock { memory throws(DriverError) in try memory.letIn(gpu) }
    } catch {
      throw EPError(error, rank: rank)
    }
  }
}

/// One rank's arena in the host's memory, where GPUs that do not reach each other's meet: a memory file as on CPUs,
/// registered with the driver piece by piece.
final class RegisteredArena: SymmetricMemory {
  private let host: GPUHost
  private let memory: ArenaMemory
  private let rank: Int
  private let registered = Guarded<[RegisteredMemory]>([])

  /// An arena of this process's own.
  convenience init(_ host: GPUHost, reservedByteCount: Int64, rank: Int) throws(EPError) {
    try self.init(host, rank: rank) { () throws(SystemCallError) in
      try ArenaMemory(reservedByteCount: reservedByteCount)
    }
  }

  /// Another process's, to be mapped piece by piece.
  convenience init(_ host: GPUHost, attaching file: Descriptor, reservedByteCount: Int64, rank: Int) throws(EPError) {
    try self.init(host, rank: rank) { () throws(SystemCallError) in
      try ArenaMemory(attaching: file, reservedByteCount: reservedByteCount)
    }
  }

  private init(_ host: GPUHost, rank: Int, _ make: () throws(SystemCallError) -> ArenaMemory) throws(EPError) {
    (self.host, self.rank) = (host, rank)
    if !host.gpu.reachesHostAddresses {
      throw .machineUnavailable("arenas in host memory: \(host.gpu.name) does not reach it at the host's addresses")
    }
    do throws(SystemCallError) { memory = try make() } catch {
      throw .systemCall(rank: rank, name: error.call, code: error.code)
    }
  }

  var address: Address { Address(memory.base) }
  var reservedByteCount: Int64 { memory.reservedByteCount }
  var byteCount: Int64 { memory.byteCount }
  var descriptor: Descriptor? { memory.descriptor }
  var gpu: GPU? { host.gpu }
  /// By the host itself: the driver does not copy across pieces.
  var copier: (any MemoryCopier)? { RegisteredCopier() }
  var clockOffset: UInt64 { host.clockOffset }

  func extend(to byteCount: Int64) throws(EPError) -> [ArenaPiece] {
    let before = memory.byteCount
    do throws(SystemCallError) { try memory.grow(to: byteCount) } catch {
      if error.code == ENOMEM {
        throw .outOfMemory(rank: rank, neededByteCount: byteCount, availableByteCount: before)
      }
      throw .systemCall(rank: rank, name: error.call, code: error.code)
    }
    let piece = ArenaPiece(range: before..<byteCount, file: nil)
    try map(piece)
    return piece.range.isEmpty ? [] : [piece]
  }

  func map(_ piece: ArenaPiece) throws(EPError) {
    if piece.range.isEmpty { return }
    do throws(DriverError) {
      let piece = try RegisteredMemory(
        host.gpu, base: memory.base + Int(piece.range.lowerBound), byteCount: piece.range.count,
        keeping: memory)
      registered.withLock { $0.append(piece) }
    } catch {
      throw EPError(error, rank: rank)
    }
  }
}

/// Of memory that the host and kernels both reach.
struct RegisteredCopier: MemoryCopier {
  func read(_ source: Address, into target: UnsafeMutableRawBufferPointer) {
    target.copyMemory(from: UnsafeRawBufferPointer(start: source.hostPointer, count: target.count))
  }

  func write(_ source: UnsafeRawBufferPointer, to target: Address) {
    if let base = source.baseAddress { target.hostPointer.copyMemory(from: base, byteCount: source.count) }
  }
}
