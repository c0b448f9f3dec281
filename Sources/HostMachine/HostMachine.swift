import CPlatform
import EPKernels
import Synchronization

/// The protocol's machine on a CPU: one worker is one thread.
package struct HostMachine: Machine {
  package let workerIndex: Int32
  package let workerCount: Int32
  let tuning: HostTuning

  init(workerIndex: Int32, workerCount: Int32, tuning: HostTuning) {
    self.workerIndex = workerIndex
    self.workerCount = workerCount
    self.tuning = tuning
  }

  /// One worker, outside of any stream.
  package init(spinNanoseconds: UInt64) {
    let tuning = HostTuning(spinNanoseconds: spinNanoseconds, streamingByteCountMin: .max)
    self.init(workerIndex: 0, workerCount: 1, tuning: tuning)
  }
}

/// What differs between hosts and jobs, found once.
package struct HostTuning: Sendable {
  /// How long a wait spins before it sleeps: long where every worker has a core, short where ranks share cores.
  package var spinNanoseconds: UInt64
  /// Writing more bytes than this in one operation, a rank streams around the caches.
  package var streamingByteCountMin: Int64

  package init(spinNanoseconds: UInt64, streamingByteCountMin: Int64) {
    self.spinNanoseconds = spinNanoseconds
    self.streamingByteCountMin = streamingByteCountMin
  }

  /// For `threadCount` threads that will wait for each other on a host with `coreCount` cores.
  package init(threadCount: Int, coreCount: Int) {
    self.init(
      spinNanoseconds: threadCount <= coreCount ? 50_000 : 2_000, streamingByteCountMin: 8 << 20)
  }
}

// MARK: - Loops

extension HostMachine {
  /// A contiguous share, so that a worker's rows lie together.
  @inline(__always)
  func share(of count: Int32) -> Range<Int32> {
    let first = Int32(Int64(count) * Int64(workerIndex) / Int64(workerCount))
    let end = Int32(Int64(count) * Int64(workerIndex + 1) / Int64(workerCount))
    return first..<end
  }

  @inline(__always)
  package func firstOfLanes(from index: Int32) -> Int32 { index }

  @inline(__always)
  package func shareOut(_ count: Int32, _ body: (Int32) -> Void) {
    for index in share(of: count) { body(index) }
  }

  @inline(__always)
  package func forEach(_ count: Int32, _ body: (Int32) -> Void) {
    var index: Int32 = 0
    while index < count {
      body(index)
      index &+= 1
    }
  }

  @inline(__always)
  package func first(of indices: Range<Int32>, where predicate: (Int32) -> Bool) -> Int32 {
    for index in indices where predicate(index) { return index }
    return -1
  }

  @inline(__always)
  package func scan(_ count: Int32, value: (Int32) -> Int32, visit: (Int32, Int32, Int32) -> Void) {
    var before: Int32 = 0
    forEach(count) { index in
      let value = value(index)
      visit(index, before, value)
      before &+= value
    }
  }

  @inline(__always)
  package func sum(over count: Int32, _ value: (Int32) -> Int32, before: (Int32, Int32) -> Void) -> Int32 {
    var sum: Int32 = 0
    forEach(count) { index in
      before(index, sum)
      sum &+= value(index)
    }
    return sum
  }

  @inline(__always)
  package func forEachPlace(_ count: Int32, at place: (Int32) -> Address, _ body: (Address) -> Void) {
    forEach(count) { body(place($0)) }
  }

  package static var waitsBeside: Bool { false }

  @inline(__always)
  package func part(ofTotal count: Int32, _ value: (Int32) -> SIMD2<Int32>) -> SIMD2<Int32> {
    var total = SIMD2<Int32>(0, 0)
    forEach(count) { total &+= value($0) }
    return total
  }

  @inline(__always)
  package func total(_ part: SIMD2<Int32>) -> SIMD2<Int32> { part }

  @inline(__always)
  package func numberTokens(
    _ tokens: Range<Int32>, destinationCount: Int32, counters: Address, members: (Int32) -> UInt64,
    visit: (Int32, Int32, Int32) -> Void
  ) {
    fill(counters, byteCount: 4 &* Int64(destinationCount), pattern: 0)
    for token in tokens {
      var remaining = members(token)
      for destination in 0..<destinationCount {
        visit(token, destination, remaining & 1 != 0 ? countUp(counters, at: destination) : -1)
        remaining &>>= 1
      }
    }
  }

  @inline(__always)
  package func numberCells(
    _ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (Int32) -> Int32, visit: (Int32, Int32) -> Void
  ) {
    fill(counters, byteCount: 4 &* Int64(keyCount), pattern: 0)
    for cell in cells {
      let key = key(cell)
      visit(cell, key >= 0 ? countUp(counters, at: key) : -1)
    }
  }

  @inline(__always)
  package func countCells(_ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (Int32) -> Int32) {
    numberCells(cells, keyCount: keyCount, counters: counters, key: key) { _, _ in }
  }

  /// The counter's value before this call.
  @inline(__always)
  private func countUp(_ counters: Address, at index: Int32) -> Int32 {
    let count = counters.load(Int32.self, at: index)
    counters.store(count &+ 1, at: index)
    return count
  }

  /// A CPU finds out by itself.
  package func expect(_ address: Address, byteCount: Int64) {}
}

// MARK: - Order

extension HostMachine {
  package func arriveLocal(_ counter: Address, for _: Audience) -> Bool {
    let word = atomic(counter, UInt32.self)
    // Releases this worker's stores to the last; the last acquires those of all.
    let arrived = word.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing).newValue
    if arrived < UInt32(workerCount) { return false }
    word.pointee.store(0, ordering: .relaxed)
    return true
  }

  @inline(__always)
  package func startNext() {}

  @inline(__always)
  package func forEachWord(
    of header: ExchangeHeader, copyCount: Int32, _ body: (Int32, Int32, Int64) -> Void
  ) {
    withUnsafeBytes(of: header) { bytes in
      let words = bytes.bindMemory(to: Int64.self)
      for copy in 0..<copyCount {
        for index in 0..<ExchangeHeader.wordCount { body(copy, index, words[Int(index)]) }
      }
    }
  }

  /// One lane: its loads and stores of a word are in order by themselves.
  @inline(__always)
  package func settle() {}

  package func signal(_ count: Int32, to _: Audience, word: (Int32) -> SignalWord) {
    forEach(count) { index in
      let target = word(index)
      // Releases everything written to the peer; pairs with the acquire in `await`.
      atomic(target.arena.advanced(byBytes: target.offset), UInt64.self).pointee.store(
        target.epoch, ordering: .releasing)
      doorbell(of: target.arena).ring()
    }
  }

  package func await(
    _ arena: Address, count: Int32, epoch: UInt64, as _: Audience, deadline: UInt64, alarm: Address, heard: UInt64,
    offset: (Int32) -> Int64, awaited: (Int32) -> Void, seen: (Int32) -> Void
  ) -> Wait {
    var index: Int32 = 0
    while index < count {
      let offset = offset(index)
      if !isSignalled(arena, offset: offset, epoch: epoch) {
        awaited(index)
        switch wait(arena, offset: offset, epoch: epoch, deadline: deadline, alarm: alarm, heard: heard) {
        case .signalled: seen(index)
        case .timedOut: return Wait(.timedOut, missing: index)
        case .alarmed: return Wait(.alarmed)
        }
      }
      index &+= 1
    }
    return Wait(.signalled)
  }

  private func wait(
    _ arena: Address, offset: Int64, epoch: UInt64, deadline: UInt64, alarm: Address, heard: UInt64
  ) -> WaitResult {
    let alarmWord = atomic(alarm, UInt64.self)
    var result = WaitResult.timedOut
    _ = doorbell(of: arena).wait(until: deadline, spinningFor: tuning.spinNanoseconds) {
      if isSignalled(arena, offset: offset, epoch: epoch) {
        result = .signalled
      } else if alarmWord.pointee.load(ordering: .relaxed) != heard {
        result = .alarmed
      }
      return result != .timedOut
    }
    return result
  }

  @inline(__always)
  package func isSignalled(_ arena: Address, offset: Int64, epoch: UInt64) -> Bool {
    // Pairs with the release in `signal`.
    atomic(arena.advanced(byBytes: offset), UInt64.self).pointee.load(ordering: .acquiring) >= epoch
  }

  package func hear(_ alarm: Address) -> UInt64 {
    // Pairs with that in `raiseAlarm`. Stronger than acquire for the same reason as the doorbell's: what it decides is
    // only how soon a wait that is in vain ends.
    atomic(alarm, UInt64.self).pointee.load(ordering: .sequentiallyConsistent)
  }

  package var now: UInt64 { monotonicNow() }

  private func doorbell(of arena: Address) -> Doorbell {
    Doorbell(at: arena.advanced(byBytes: ControlLayout.doorbellOffset).hostPointer)
  }
}

/// Ends the waits of a rank's kernels that watch `alarm` (UInt64), which sleep on the doorbell of `arena`.
package func raiseAlarm(_ alarm: Address, waking arena: Address) {
  raiseAlarm(alarm)
  Doorbell(at: arena.advanced(byBytes: ControlLayout.doorbellOffset).hostPointer).ring()
}

/// Changes an alarm (UInt64) that nobody sleeps on.
package func raiseAlarm(_ alarm: Address) {
  atomic(alarm, UInt64.self).pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
}

func atomic<Word: AtomicRepresentable>(_ address: Address, _ type: Word.Type) -> UnsafeMutablePointer<
  Atomic<Word>
> {
  // SAFETY: an atomic integer has its integer's layout; signal words, alarms and counters are used as nothing else.
  address.hostPointer.assumingMemoryBound(to: Atomic<Word>.self)
}

extension Address {
  /// The address as this process's memory; the address must not be null.
  package var hostPointer: UnsafeMutableRawPointer {
    UnsafeMutableRawPointer(bitPattern: UInt(bits))!
  }

  package init(_ pointer: UnsafeRawPointer) {
    self.init(bits: UInt64(UInt(bitPattern: pointer)))
  }
}
