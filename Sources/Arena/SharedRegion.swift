import Glibc
import Synchronization

/// Zeroed memory that this process shares with those that it forks afterwards.
package final class SharedRegion: @unchecked Sendable {
  package let base: UnsafeMutableRawPointer
  private let byteCount: Int

  package init(byteCount: Int) throws(SystemCallError) {
    self.byteCount = max(1, byteCount)
    let mapped = mmap(nil, self.byteCount, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
    // SAFETY: MAP_FAILED is not imported; it is the pointer whose bits are all ones.
    guard let mapped, mapped != UnsafeMutableRawPointer(bitPattern: -1) else {
      throw SystemCallError(call: "mmap", code: errno)
    }
    base = mapped
  }

  /// An integer at `offset`, a multiple of its size, that is used as an atomic one only.
  package func atomic<Word: AtomicRepresentable>(
    _ type: Word.Type, at offset: Int
  ) -> UnsafeMutablePointer<Atomic<Word>> {
    // SAFETY: an atomic integer has its integer's layout, and zero is a value of it.
    (base + offset).assumingMemoryBound(to: Atomic<Word>.self)
  }

  deinit { munmap(base, byteCount) }
}
