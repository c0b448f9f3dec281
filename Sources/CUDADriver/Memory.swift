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
  private let reachableFrom: [GPU]

  /// - Parameter peers: other GPUs that are to reach it.
  package init(_ gpu: GPU, reservedByteCount: Int64, peers: [GPU] = []) throws(DriverError) {
    self.gpu = gpu
    reachableFrom = [gpu] + peers
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

  /// Memory of another process, which `descriptor` came from: all of it, and no more.
  ///
  /// - Parameters:
  ///   - descriptor: stays the caller's.
  ///   - byteCount: what the other had when it exported its one piece.
  package init(_ gpu: GPU, importing descriptor: Int32, byteCount: Int64) throws(DriverError) {
    self.gpu = gpu
    reachableFrom = [gpu]
    granule = try Self.granule(on: gpu)
    reservedByteCount = (byteCount + granule - 1) / granule * granule
    base = try Self.reserve(reservedByteCount, on: gpu)
    var handle: UInt64 = 0
    try gpu.call("cuMemImportFromShareableHandle") {
      $0.cuMemImportFromShareableHandle(
        &handle, UnsafeMutableRawPointer(bitPattern: Int(descriptor)), Self.posixDescriptor)
    }
    try map(handle, reservedByteCount)
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
    try map(handle, added)
  }

  /// Puts a piece, which is this object's from now on, behind those that are there.
  private func map(_ handle: UInt64, _ added: Int64) throws(DriverError) {
    let address = base.advanced(byBytes: byteCount).bits
    do throws(DriverError) {
      try gpu.call("cuMemMap") { $0.cuMemMap(address, Int(added), 0, handle, 0) }
    } catch {
      gpu.release { $0.cuMemRelease(handle) }
      throw error
    }
    pieces.append((byteCount, added, handle))
    let accesses = reachableFrom.map {
      swiftep_cu_access(location: swiftep_cu_location(type: Self.onDevice, id: $0.ordinal), flags: Self.readAndWrite)
    }
    try gpu.call("cuMemSetAccess") { $0.cuMemSetAccess(address, Int(added), accesses, accesses.count) }
    byteCount += added
  }

  /// Open descriptors of the pieces, in order, the caller's to close.
  package func exportDescriptors() throws(DriverError) -> [Int32] {
    var descriptors: [Int32] = []
    do throws(DriverError) {
      for piece in pieces {
        var descriptor: Int32 = -1
        try gpu.call("cuMemExportToShareableHandle") {
          $0.cuMemExportToShareableHandle(&descriptor, piece.handle, Self.posixDescriptor, 0)
        }
        descriptors.append(descriptor)
      }
    } catch {
      for descriptor in descriptors { close(descriptor) }
      throw error
    }
    return descriptors
  }
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
