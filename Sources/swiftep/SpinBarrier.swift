import Arena
import CPlatform
import Glibc
import HostMachine
import Synchronization

/// Where ranks and their threads, of one process or several, wait for each other: spinning first, since all that are on time should start within a microsecond;
/// then yielding, since there may be more threads than cores; then asleep.
final class SpinBarrier: @unchecked Sendable {
  struct Cancelled: Error {}

  let partyCount: Int
  private let memory: SharedRegion
  /// Rounds completed; what sleepers sleep on.
  private let round: UnsafeMutablePointer<Atomic<UInt32>>
  private let arrived: UnsafeMutablePointer<Atomic<UInt64>>
  private let isCancelled: UnsafeMutablePointer<Atomic<UInt64>>
  private let releasedAt: UnsafeMutablePointer<Atomic<UInt64>>

  init(partyCount: Int) throws(SystemCallError) {
    self.partyCount = partyCount
    memory = try SharedRegion(byteCount: 256)
    round = memory.atomic(UInt32.self, at: 0)
    arrived = memory.atomic(UInt64.self, at: 64)
    isCancelled = memory.atomic(UInt64.self, at: 128)
    releasedAt = memory.atomic(UInt64.self, at: 192)
  }

  /// Returns once all parties have come: the time, in nanoseconds, at which the last came.
  @discardableResult func wait() throws(Cancelled) -> UInt64 {
    let current = round.pointee.load(ordering: .acquiring)
    if arrived.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing).newValue == UInt64(partyCount) {
      arrived.pointee.store(0, ordering: .relaxed)
      releasedAt.pointee.store(monotonicNow(), ordering: .relaxed)
      // Releases what all parties stored before they came.
      round.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing)
      _ = swiftep_futex_wake(round, Int32.max)
    } else {
      waitForNextRound(after: current)
    }
    if isCancelled.pointee.load(ordering: .acquiring) != 0 { throw Cancelled() }
    return releasedAt.pointee.load(ordering: .relaxed)
  }

  /// Ends every wait, now and later, with an error.
  func cancel() {
    isCancelled.pointee.store(1, ordering: .releasing)
    round.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing)
    _ = swiftep_futex_wake(round, Int32.max)
  }

  private func waitForNextRound(after current: UInt32) {
    let spinCountMax = 2_000
    let yieldCountMax = 2_500
    var turn = 0
    while round.pointee.load(ordering: .acquiring) == current {
      if isCancelled.pointee.load(ordering: .acquiring) != 0 { return }
      turn += 1
      if turn < spinCountMax {
        swiftep_relax()
      } else if turn < yieldCountMax {
        sched_yield()
      } else {
        _ = swiftep_futex_wait(round, current, 100_000_000)
      }
    }
  }
}

/// Times a step that several threads take at once: from when the last of them is ready until the last has finished.
final class SharedStopwatch: @unchecked Sendable {
  let barrier: SpinBarrier
  private let memory: SharedRegion
  /// When each party finished. Written by its party only, between two barriers; read by all after the second.
  private let finishedAt: UnsafeMutableBufferPointer<UInt64>

  init(partyCount: Int) throws(SystemCallError) {
    barrier = try SpinBarrier(partyCount: partyCount)
    memory = try SharedRegion(byteCount: 8 * partyCount)
    let times = memory.base.bindMemory(to: UInt64.self, capacity: partyCount)
    finishedAt = UnsafeMutableBufferPointer(start: times, count: partyCount)
  }

  /// All parties call this; all get the same time.
  func measure<Result>(
    party: Int, _ step: () throws -> Result
  ) throws -> (result: Result, nanoseconds: UInt64) {
    // The first wait may end asleep; who comes through it is awake at the second.
    try barrier.wait()
    let start = try barrier.wait()
    let result = try step()
    finishedAt[party] = monotonicNow()
    try barrier.wait()
    return (result, finishedAt.max()! - start)
  }
}
