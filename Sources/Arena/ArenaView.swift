import CPlatform
import Glibc

/// Somebody else's arena, mapped to be looked at only, as far as it reaches now.
package final class ArenaView: @unchecked Sendable {
  package let base: UnsafeRawPointer
  package let byteCount: Int

  /// - Throws: `SystemCallError` where it cannot be mapped, or could shrink under the mapping (EPERM): reading would then
  ///   end this process.
  package init(of file: Descriptor) throws(SystemCallError) {
    if try systemCall("fcntl(F_GET_SEALS)", { swiftep_seals_shrinking(file.raw) }) == 0 {
      throw SystemCallError(call: "fcntl(F_GET_SEALS)", code: EPERM)
    }
    var status = stat()
    try systemCall("fstat") { fstat(file.raw, &status) }
    byteCount = Int(status.st_size)
    let mapped = mmap(nil, byteCount, PROT_READ, MAP_SHARED | MAP_NORESERVE, file.raw, 0)
    // SAFETY: MAP_FAILED is not imported; it is the pointer whose bits are all ones.
    guard let mapped, mapped != UnsafeMutableRawPointer(bitPattern: -1) else {
      throw SystemCallError(call: "mmap", code: errno)
    }
    base = UnsafeRawPointer(mapped)
  }

  deinit { munmap(UnsafeMutableRawPointer(mutating: base), byteCount) }
}
