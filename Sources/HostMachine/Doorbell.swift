import CPlatform
import EPKernels
import Synchronization

/// Lets threads, of one process or several, sleep until a word in shared memory may have changed. It lies in shared
/// memory itself, 8 bytes, zero at first, and holds no lock: a thread killed at any instruction leaves it usable.
struct Doorbell {
  private let rings: UnsafeMutablePointer<Atomic<UInt32>>
  private let sleepers: UnsafeMutablePointer<Atomic<UInt32>>

  /// No sleep lasts longer, so that a waker that was killed before it rang delays its peers by this much at most.
  private static let sliceNanoseconds: UInt64 = 10_000_000

  init(at address: UnsafeMutableRawPointer) {
    // SAFETY: `Atomic<UInt32>` has the layout of UInt32, the memory is zeroed, and it is only ever used through this
    // type.
    rings = address.assumingMemoryBound(to: Atomic<UInt32>.self)
    sleepers = (address + 4).assumingMemoryBound(to: Atomic<UInt32>.self)
  }

  /// To be called after the store that a sleeper waits for.
  func ring() {
    // Sequentially consistent, as are the sleeper's: either it sees this ring and stays awake, or this sees the sleeper
    // and wakes it.
    rings.pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
    if sleepers.pointee.load(ordering: .sequentiallyConsistent) > 0 {
      _ = swiftep_futex_wake(rings, Int32.max)
    }
  }

  /// Returns true once `condition` holds, false when `deadline` (`monotonicNow`) passes first: spins a while, then
  /// sleeps between rings.
  func wait(until deadline: UInt64, spinningFor spinNanoseconds: UInt64, _ condition: () -> Bool) -> Bool {
    if condition() { return true }
    let spinEnd = min(deadline, monotonicNow() &+ spinNanoseconds)
    repeat {
      for _ in 0..<32 {
        if condition() { return true }
        swiftep_relax()
      }
    } while monotonicNow() < spinEnd

    sleepers.pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { sleepers.pointee.wrappingSubtract(1, ordering: .sequentiallyConsistent) }
    while true {
      let heard = rings.pointee.load(ordering: .sequentiallyConsistent)
      if condition() { return true }
      let now = monotonicNow()
      if now >= deadline { return false }
      _ = swiftep_futex_wait(rings, heard, min(Self.sliceNanoseconds, deadline - now))
    }
  }
}

/// A doorbell in this process's own memory.
package final class SharedBell: @unchecked Sendable {
  private let memory = UnsafeMutableRawPointer.allocate(byteCount: 64, alignment: 64)
  private let doorbell: Doorbell

  package init() {
    memory.initializeMemory(as: UInt64.self, repeating: 0, count: 8)
    doorbell = Doorbell(at: memory)
  }
  deinit { memory.deallocate() }

  package func ring() { doorbell.ring() }
  package func wait(until deadline: UInt64, spinningFor spinNanoseconds: UInt64, _ condition: () -> Bool) -> Bool {
    doorbell.wait(until: deadline, spinningFor: spinNanoseconds, condition)
  }
}
