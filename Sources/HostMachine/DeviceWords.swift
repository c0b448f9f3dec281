import EPKernels
import Synchronization

// Words (UInt64) in the host's memory by which a device tells of the ends of its launches.

package func storeReleasing(_ value: UInt64, in word: Address) {
  atomic(word, UInt64.self).pointee.store(value, ordering: .releasing)
}

/// Pairs with `storeReleasing`, or with what a device does likewise.
package func loadAcquiring(_ word: Address) -> UInt64 {
  atomic(word, UInt64.self).pointee.load(ordering: .acquiring)
}
