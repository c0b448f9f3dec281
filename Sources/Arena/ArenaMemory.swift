import CPlatform
import Glibc
import HostFacts

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
  /// What the system says of itself.
  private let facts: FileTree

  /// A new file of no bytes, mapped for `reservedByteCount` (rounded up to pages).
  ///
  /// - Parameter facts: what the system says of the memory that can be had.
  package init(reservedByteCount: Int64, facts: FileTree = .host) throws(SystemCallError) {
    self.facts = facts
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
    facts = .host
    // Saves the first operations a fault for each page. Not to be had: no harm.
    var status = stat()
    if fstat(file.raw, &status) == 0 { _ = swiftep_map_present(base, min(Int(status.st_size), Int(reservedByteCount))) }
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

  /// Grows the file to `newByteCount`, which is not less than before, and takes its memory from the system at once. To be
  /// called on an arena of this rank's own.
  ///
  /// - Throws: `SystemCallError`, where there is not as much (ENOMEM) or a file may not be as large (EFBIG): to take it
  ///   nevertheless would get the process killed. No more memory is taken then than before.
  package func grow(to newByteCount: Int64) throws(SystemCallError) {
    precondition(newByteCount >= byteCount && newByteCount <= reservedByteCount)
    guard let descriptor else { preconditionFailure("a peer's arena does not grow here") }
    if newByteCount > fileByteCount {
      if let limit = facts.limit(.fileSize), newByteCount > limit.soft {
        throw SystemCallError(call: "ftruncate", code: EFBIG)
      }
      try systemCall("ftruncate") { ftruncate(descriptor.raw, Int(newByteCount)) }
      fileByteCount = newByteCount
    }
    var taken = byteCount
    do throws(SystemCallError) {
      // In steps, so that ranks that grow at the same time see what the others have taken.
      while taken < newByteCount {
        if let available = facts.grantableByteCount, newByteCount - taken > available {
          throw SystemCallError(call: "madvise(MADV_POPULATE_WRITE)", code: ENOMEM)
        }
        let step = min(newByteCount - taken, Self.stepByteCount)
        try systemCall("madvise(MADV_POPULATE_WRITE)") { swiftep_populate(base + Int(taken), Int(step)) }
        taken += step
      }
    } catch {
      madvise(base + Int(byteCount), Int(min(taken + Self.stepByteCount, newByteCount) - byteCount), MADV_REMOVE)
      throw error
    }
    byteCount = newByteCount
  }

  private static let stepByteCount: Int64 = 32 << 20
}
