import EPKernels
import Synchronization

// Words that one thread writes and any other, of whatever process, reads. All are released and acquired: then a reader that
// sees a word of a new record also sees that the old one is gone. Only what is shown depends on that, never what is done.

extension HostMachine {
  @inline(__always)
  package func note(_ word: UInt64, at address: Address) {
    atomic(address, UInt64.self).pointee.store(word, ordering: .releasing)
  }

  @inline(__always)
  package func noteZeros(_ count: Int32, at address: Address) {
    forEach(count) { note(0, at: address.advanced(byBytes: 8 &* Int64($0))) }
  }

  @inline(__always)
  package func publish(_ word: UInt64, at address: Address) { note(word, at: address) }

  @inline(__always)
  package func read(_ address: Address) -> UInt64 { address.noted() }

  @inline(__always)
  package func peek(_ address: Address) -> UInt64 { atomic(address, UInt64.self).pointee.load(ordering: .relaxed) }

  /// For what the host itself notes.
  package static var host: HostMachine {
    HostMachine(workerIndex: 0, workerCount: 1, tuning: HostTuning(threadCount: 1, coreCount: 1))
  }
}

extension Address {
  /// A word that was noted or published.
  @inline(__always)
  package func noted() -> UInt64 { atomic(self, UInt64.self).pointee.load(ordering: .acquiring) }
}
