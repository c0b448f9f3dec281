import CPlatform
import Glibc

/// A system call that failed.
package struct SystemCallError: Error, Equatable {
  package let call: String
  package let code: Int32
}

/// One rank's symmetric memory: a memory file without a name, mapped once a process.
///
/// The mapping spans `reservedByteCount` of address space from the start; the file behind it grows up to that. A peer
/// that has mapped it needs no word of the growth: what it is told to write to exists by then. The file can never
/// shrink, so no access to what once existed faults.
package final class ArenaMemory: @unchecked Sendable {
  package let descriptor: Int32
  package let base: UnsafeMutableRawPointer
  package let reservedByteCount: Int64
  /// Bytes that are there to be used. Touched by the owning rank only.
  package private(set) var byteCount: Int64 = 0
  /// The file's size: larger than `byteCount` where growing it was possible, but not taking its memory.
  private var fileByteCount: Int64 = 0

  /// A new file of no bytes, mapped for `reservedByteCount` (rounded up to pages).
  package init(reservedByteCount: Int64) throws(SystemCallError) {
    self.reservedByteCount = HoleList.roundUp(reservedByteCount)
    descriptor = try systemCall("memfd_create") { swiftep_memfd_create("swiftep-arena") }
    do throws(SystemCallError) {
      try systemCall("fcntl(F_ADD_SEALS)") { [descriptor] in swiftep_seal_shrink(descriptor) }
      let mapped = mmap(
        nil, Int(self.reservedByteCount), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor, 0)
      // SAFETY: MAP_FAILED is not imported; it is the pointer whose bits are all ones.
      guard let mapped, mapped != UnsafeMutableRawPointer(bitPattern: -1) else {
        throw SystemCallError(call: "mmap", code: errno)
      }
      base = mapped
    } catch {
      Glibc.close(descriptor)
      throw error
    }
  }

  deinit {
    munmap(base, Int(reservedByteCount))
    Glibc.close(descriptor)
  }

  /// Grows the file to `newByteCount`, which is not less than before, and takes its memory from the system at once.
  package func grow(to newByteCount: Int64) throws(SystemCallError) {
    precondition(newByteCount >= byteCount && newByteCount <= reservedByteCount)
    if newByteCount > fileByteCount {
      try systemCall("ftruncate") { [descriptor] in ftruncate(descriptor, Int(newByteCount)) }
      fileByteCount = newByteCount
    }
    let added = base + Int(byteCount)
    try systemCall("madvise(MADV_POPULATE_WRITE)") { [byteCount] in
      swiftep_populate(added, Int(newByteCount - byteCount))
    }
    byteCount = newByteCount
  }
}

@discardableResult
private func systemCall(_ name: String, _ body: () -> Int32) throws(SystemCallError) -> Int32 {
  while true {
    let result = body()
    if result != -1 { return result }
    if errno != EINTR { throw SystemCallError(call: name, code: errno) }
  }
}
