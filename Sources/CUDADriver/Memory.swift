import CCUDA
import Glibc

/// Memory of a GPU, at addresses that are reserved from the start and backed as far as it has grown.
///
/// Made by the driver's calls for virtual memory: growing waits for no kernel, and each piece can be handed to another
/// process as a descriptor.
package final class VirtualMemory: @unchecked Sendable {
  package let gpu: GPU
  package let base: DeviceAddress
  package let reservedByteCount: Int64
  /// Bytes that are there.
  package private(set) var byteCount: Int64 = 0
  private var pieces: [(offset: Int64, byteCount: Int64, handle: UInt64)] = []
  private let granule: Int64
  /// Those that reach it.
  private var ordinals: [Int32]

  package init(_ gpu: GPU, reservedByteCount: Int64) throws(DriverError) {
    self.gpu = gpu
    ordinals = [gpu.ordinal]
    granule = try Self.granule(on: gpu)
    self.reservedByteCount = (max(1, reservedByteCount) + granule - 1) / granule * granule
    base = try Self.reserve(self.reservedByteCount, on: gpu)
  }

  private static func granule(on gpu: GPU) throws(DriverError) -> Int64 {
    var granule = 0
    var allocation = allocation(on: gpu)
    try gpu.call("cuMemGetAllocationGranularity") {
      $0.cuMemGetAllocationGranularity(&granule, &allocation, recommendedGranularity)
    }
    return Int64(granule)
  }

  private static func reserve(_ byteCount: Int64, on gpu: GPU) throws(DriverError) -> DeviceAddress {
    var base: UInt64 = 0
    try gpu.call("cuMemAddressReserve of \(byteCount) bytes") { $0.cuMemAddressReserve(&base, Int(byteCount), 0, 0, 0) }
    return DeviceAddress(bits: base)
  }

  /// Puts a piece of another process's memory where it lies there.
  ///
  /// - Parameters:
  ///   - descriptor: as the other has exported the piece; stays the caller's.
  ///   - offset: behind all that is here.
  ///   - pieceByteCount: all of the piece, at most what is reserved.
  package func map(_ descriptor: Int32, at offset: Int64, byteCount pieceByteCount: Int64) throws(DriverError) {
    let added = (pieceByteCount + granule - 1) / granule * granule
    precondition(byteCount <= offset && offset + added <= reservedByteCount, "not behind the rest, or too much")
    var handle: UInt64 = 0
    try gpu.call("cuMemImportFromShareableHandle") {
      $0.cuMemImportFromShareableHandle(
        &handle, UnsafeMutableRawPointer(bitPattern: Int(descriptor)), Self.posixDescriptor)
    }
    try map(handle, at: offset, added)
  }

  /// Lets another GPU's kernels reach it, all that is there and all that will be.
  package func letIn(_ peer: GPU) throws(DriverError) {
    if ordinals.contains(peer.ordinal) { return }
    ordinals.append(peer.ordinal)
    for piece in pieces { try setAccess(base.advanced(byBytes: piece.offset), piece.byteCount) }
  }

  private func setAccess(_ address: DeviceAddress, _ byteCount: Int64) throws(DriverError) {
    let accesses = ordinals.map {
      swiftep_cu_access(location: swiftep_cu_location(type: Self.onDevice, id: $0), flags: Self.readAndWrite)
    }
    try gpu.call("cuMemSetAccess") { $0.cuMemSetAccess(address.bits, Int(byteCount), accesses, accesses.count) }
  }

  deinit {
    for piece in pieces {
      let address = base.advanced(byBytes: piece.offset).bits
      gpu.release { $0.cuMemUnmap(address, Int(piece.byteCount)) }
      gpu.release { $0.cuMemRelease(piece.handle) }
    }
    gpu.release { $0.cuMemAddressFree(base.bits, Int(reservedByteCount)) }
  }

  private static let recommendedGranularity: Int32 = 1
  private static let pinned: Int32 = 1
  private static let posixDescriptor: Int32 = 1
  private static let onDevice: Int32 = 1
  private static let readAndWrite: Int32 = 3

  private static func allocation(on gpu: GPU) -> swiftep_cu_allocation {
    var allocation = swiftep_cu_allocation()
    allocation.type = pinned
    allocation.handle_types = posixDescriptor
    allocation.location = swiftep_cu_location(type: onDevice, id: gpu.ordinal)
    return allocation
  }

  /// Makes at least `newByteCount` bytes be there, at most what is reserved. What was added is not cleared.
  package func grow(to newByteCount: Int64) throws(DriverError) {
    if newByteCount <= byteCount { return }
    let added = (newByteCount - byteCount + granule - 1) / granule * granule
    precondition(byteCount + added <= reservedByteCount, "more than was reserved")
    var allocation = Self.allocation(on: gpu)
    var handle: UInt64 = 0
    try gpu.call("cuMemCreate of \(added) bytes") { $0.cuMemCreate(&handle, Int(added), &allocation, 0) }
    try map(handle, at: byteCount, added)
  }

  /// Puts a piece there, which is this object's from now on.
  private func map(_ handle: UInt64, at offset: Int64, _ added: Int64) throws(DriverError) {
    let address = base.advanced(byBytes: offset)
    do throws(DriverError) {
      try gpu.call("cuMemMap") { $0.cuMemMap(address.bits, Int(added), 0, handle, 0) }
    } catch {
      gpu.release { $0.cuMemRelease(handle) }
      throw error
    }
    pieces.append((offset, added, handle))
    byteCount = offset + added
    try setAccess(address, added)
  }

  /// An open descriptor, the caller's to close, of the piece that begins at `offset`, and the piece's size.
  package func export(pieceAt offset: Int64) throws(DriverError) -> (descriptor: Int32, byteCount: Int64) {
    guard let piece = pieces.first(where: { $0.offset == offset }) else { preconditionFailure("no piece begins there") }
    var descriptor: Int32 = -1
    try gpu.call("cuMemExportToShareableHandle") {
      $0.cuMemExportToShareableHandle(&descriptor, piece.handle, Self.posixDescriptor, 0)
    }
    return (descriptor, piece.byteCount)
  }
}

/// The host's memory made reachable for the kernels of all GPUs of this process, at the host's own addresses, as long as
/// this object lives.
package final class RegisteredMemory: @unchecked Sendable {
  private let gpu: GPU
  private let base: UnsafeMutableRawPointer
  private let owner: AnyObject

  /// - Parameters:
  ///   - base: of whole pages.
  ///   - owner: what keeps them mapped.
  package init(
    _ gpu: GPU, base: UnsafeMutableRawPointer, byteCount: Int, keeping owner: AnyObject
  ) throws(DriverError) {
    (self.gpu, self.base, self.owner) = (gpu, base, owner)
    let portableAndMapped: UInt32 = 1 | 2
    try gpu.call("cuMemHostRegister of \(byteCount) bytes") { $0.cuMemHostRegister(base, byteCount, portableAndMapped) }
  }

  deinit { gpu.release { $0.cuMemHostUnregister(base) } }
}

/// Host memory that kernels reach at the same address.
package final class PinnedMemory: @unchecked Sendable {
  private let gpu: GPU
  package let base: UnsafeMutableRawPointer
  package let byteCount: Int

  /// Zeroed.
  package init(_ gpu: GPU, byteCount: Int) throws(DriverError) {
    self.gpu = gpu
    self.byteCount = byteCount
    var base: UnsafeMutableRawPointer?
    let portableAndMapped: UInt32 = 1 | 2
    try gpu.call("cuMemHostAlloc of \(byteCount) bytes") { $0.cuMemHostAlloc(&base, byteCount, portableAndMapped) }
    self.base = base!
    memset(self.base, 0, byteCount)
  }

  deinit { gpu.release { $0.cuMemFreeHost(base) } }
}
