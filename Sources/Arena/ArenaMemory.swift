import CPlatform
import Glibc

/// One rank's symmetric memory: a memory file without a name, mapped once a process.
///
/// The mapping spans `reservedByteCount` of address space from the start; the file behind it grows up to that. A peer
/// that has mapped it needs no word of the growth: what it is told to write to exists by then. The file can never
/// shrink, so no access to what once existed faults.
package final class ArenaMemory: @unchecked Sendable {
  package let base: UnsafeMutableRawPointer
  package let reservedByteCount: Int64
  /// Bytes that are there to be used; 0 where the arena is a peer's. Touched by the owning rank only.
  package private(set) var byteCount: Int64 = 0
  /// The file, of its owner only: a mapping needs no descriptor.
  package let descriptor: Descriptor?
  /// The file's size: larger than `byteCount` where growing it was possible, but not taking its memory.
  private var fileByteCount: Int64 = 0

  /// A new file of no bytes, mapped for `reservedByteCount` (rounded up to pages).
  package init(reservedByteCount: Int64) throws(SystemCallError) {
    let file = try Descriptor("memfd_create") { swiftep_memfd_create(ArenaMemory.fileName) }
    try systemCall("fcntl(F_ADD_SEALS)") { swiftep_seal_shrink(file.raw) }
    self.reservedByteCount = HoleList.roundUp(reservedByteCount)
    base = try Self.map(file, byteCount: self.reservedByteCount)
    descriptor = file
  }

  /// A peer's arena: `file` came from it, as did `reservedByteCount`.
  ///
  /// - Throws: `SystemCallError` where it cannot be mapped, or could shrink under the mapping (EPERM).
  package init(attaching file: Descriptor, reservedByteCount: Int64) throws(SystemCallError) {
    if try systemCall("fcntl(F_GET_SEALS)", { swiftep_seals_shrinking(file.raw) }) == 0 {
      throw SystemCallError(call: "fcntl(F_GET_SEALS)", code: EPERM)
    }
    self.reservedByteCount = reservedByteCount
    base = try Self.map(file, byteCount: reservedByteCount)
    descriptor = nil
  }

  /// By this name `/proc` shows arenas to `swiftep inspect`.
  package static let fileName = "swiftep-arena"

  deinit { munmap(base, Int(reservedByteCount)) }

  private static func map(_ file: Descriptor, byteCount: Int64) throws(SystemCallError) -> UnsafeMutableRawPointer {
    let mapped = mmap(nil, Int(byteCount), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file.raw, 0)
    // SAFETY: MAP_FAILED is not imported; it is the pointer whose bits are all ones.
    guard let mapped, mapped != UnsafeMutableRawPointer(bitPattern: -1) else {
      throw SystemCallError(call: "mmap", code: errno)
    }
    // A child that outlives its parent must not hold the memory of a rank that is gone. Not to be had: no harm.
    _ = swiftep_hide_from_forks(mapped, Int(byteCount))
    return mapped
  }

  /// Grows the file to `newByteCount`, which is not less than before, and takes its memory from the system at once.
  /// To be called on an arena of this rank's own.
  package func grow(to newByteCount: Int64) throws(SystemCallError) {
    precondition(newByteCount >= byteCount && newByteCount <= reservedByteCount)
    guard let descriptor else { preconditionFailure("a peer's arena does not grow here") }
    if newByteCount > fileByteCount {
      try systemCall("ftruncate") { ftruncate(descriptor.raw, Int(newByteCount)) }
      fileByteCount = newByteCount
    }
    let added = base + Int(byteCount)
    try systemCall("madvise(MADV_POPULATE_WRITE)") { [byteCount] in
      swiftep_populate(added, Int(newByteCount - byteCount))
    }
    byteCount = newByteCount
  }
}
