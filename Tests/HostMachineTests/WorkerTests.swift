import EPKernels
import Glibc
import Testing

@testable import HostMachine

private func machine(_ index: Int32 = 0, of count: Int32 = 1) -> HostMachine {
  HostMachine(
    workerIndex: index, workerCount: count, tuning: HostTuning(spinNanoseconds: 2_000, streamingByteCountMin: .max))
}

extension HostMachine {
  /// For one word.
  fileprivate func await(
    _ arena: Address, offset: Int64, epoch: UInt64, deadline: UInt64, alarm: Address, heard: UInt64
  ) -> WaitResult {
    self.await(
      arena, count: 1, epoch: epoch, as: .system, deadline: deadline, alarm: alarm, heard: heard,
      offset: { _ in offset },
      awaited: { _ in }, seen: { _ in }
    ).result
  }

  /// Without an alarm that anybody raises.
  fileprivate func await(_ arena: Address, offset: Int64, epoch: UInt64, deadline: UInt64) -> Bool {
    self.await(arena, offset: offset, epoch: epoch, deadline: deadline, alarm: arena.advanced(byBytes: 2048), heard: 0)
      == .signalled
  }

  fileprivate func signal(_ arena: Address, offset: Int64, epoch: UInt64) {
    signal(1, to: .system) { _ in SignalWord(arena: arena, offset: offset, epoch: epoch) }
  }
}

/// Zeroed memory for words that threads share.
private final class Words: @unchecked Sendable {
  let base: UnsafeMutableRawPointer
  init(byteCount: Int) {
    base = .allocate(byteCount: byteCount, alignment: 64)
    base.initializeMemory(as: UInt8.self, repeating: 0, count: byteCount)
  }
  deinit { base.deallocate() }
}

@Suite struct WorkerTests {
  @Test(arguments: [Int32(0), 1, 2, 7, 64, 1000], [Int32(1), 2, 3, 8])
  func everyIndexIsSharedOutOnce(count: Int32, workerCount: Int32) {
    var visits = [Int](repeating: 0, count: Int(count))
    for worker in 0..<workerCount { machine(worker, of: workerCount).shareOut(count) { visits[Int($0)] += 1 } }
    #expect(visits.allSatisfy { $0 == 1 })
  }

  @Test func forEachFirstAndScan() {
    var seen: [Int32] = []
    machine().forEach(5) { seen.append($0) }
    #expect(seen.sorted() == [0, 1, 2, 3, 4])
    #expect(machine().first(of: 3..<10) { $0 % 4 == 0 } == 4)
    #expect(machine().first(of: 5..<8) { $0 % 4 == 0 } == -1)
    #expect(machine().first(of: 5..<5) { _ in true } == -1)
    var visits: [[Int32]] = []
    machine().scan(4, value: { 10 - $0 }, visit: { visits.append([$0, $1, $2]) })
    #expect(visits == [[0, 0, 10], [1, 10, 9], [2, 19, 8], [3, 27, 7]])
    #expect(machine().total(machine().part(ofTotal: 4) { SIMD2($0, 10 - $0) }) == SIMD2(6, 34))
    #expect(machine().total(machine().part(ofTotal: 0) { SIMD2($0, 1) }) == SIMD2(0, 0))
  }

  @Test(arguments: [Int32(1), 3, 64])
  func numberTokensPerDestination(destinationCount: Int32) {
    var random = Random(UInt64(destinationCount))
    let tokens = Range<Int32>(7...60)
    let goes = (0..<61).map { _ in (0..<Int(destinationCount)).map { _ in random.next() % 3 == 0 } }
    let counters = Words(byteCount: 4 * Int(destinationCount))
    for destination in 0..<destinationCount { Address(counters.base).store(Int32(7), at: destination) }
    var visits: [[Int32]] = []
    machine().numberTokens(tokens, destinationCount: destinationCount, counters: Address(counters.base)) { token in
      (0..<Int(destinationCount)).reduce(UInt64(0)) { goes[Int(token)][$1] ? $0 | 1 << UInt64($1) : $0 }
    } visit: { token, destination, index in
      visits.append([token, destination, index])
    }
    var expected: [[Int32]] = []
    for destination in 0..<destinationCount {
      let going = tokens.filter { goes[Int($0)][Int(destination)] }
      for (index, token) in going.enumerated() { expected.append([token, destination, Int32(index)]) }
      expected += tokens.filter { !going.contains($0) }.map { [$0, destination, -1] }
      #expect(Address(counters.base).load(Int32.self, at: destination) == Int32(going.count))
    }
    #expect(Set(visits) == Set(expected) && visits.count == expected.count)
  }

  /// Every cell names one of 100 keys, or none.
  @Test func numberCellsPerKey() {
    var random = Random(5)
    let cells = Range<Int32>(16...327)
    let keys = (0...327).map { _ in random.next() % 4 == 0 ? -1 : Int32(random.next() % 100) }
    let (counters, counted) = (Words(byteCount: 400), Words(byteCount: 400))
    for words in [counters, counted] { (0..<100).forEach { Address(words.base).store(Int32(7), at: $0) } }
    machine().countCells(cells, keyCount: 100, counters: Address(counted.base)) { keys[Int($0)] }
    var visits: [[Int32]] = []
    machine().numberCells(cells, keyCount: 100, counters: Address(counters.base)) { cell in
      keys[Int(cell)]
    } visit: { cell, index in
      visits.append([cell, index])
    }
    var expected = cells.filter { keys[Int($0)] < 0 }.map { [$0, -1] }
    for key in Int32(0)..<100 {
      let naming = cells.filter { keys[Int($0)] == key }
      for (index, cell) in naming.enumerated() { expected.append([cell, Int32(index)]) }
      #expect(Address(counters.base).load(Int32.self, at: key) == Int32(naming.count))
      #expect(Address(counted.base).load(Int32.self, at: key) == Int32(naming.count))
    }
    #expect(Set(visits) == Set(expected) && visits.count == expected.count)
  }

  /// A wait for several words ends when all are there, or names the first that is not; it tells of those only that
  /// were not there when their turn came.
  @Test func severalSignals() {
    let words = Words(byteCount: 4096)
    let arena = Address(words.base)
    var told: [String] = []
    func wait(until deadline: UInt64 = 0) -> Wait {
      machine().await(
        arena, count: 3, epoch: 4, as: .system, deadline: deadline, alarm: arena.advanced(byBytes: 2048), heard: 0,
        offset: { 512 + 64 * Int64($0) },
        awaited: {
          told.append("awaited \($0)")
          if deadline != 0 { machine().signal(arena, offset: 576, epoch: 9) }
        },
        seen: { told.append("seen \($0)") })
    }
    machine().signal(2, to: .system) { SignalWord(arena: arena, offset: 512 + 128 * Int64($0), epoch: 4) }
    let missed = wait()
    #expect(missed.result == .timedOut && missed.missing == 1 && told == ["awaited 1"])
    #expect(wait(until: .max).result == .signalled && told == ["awaited 1", "awaited 1", "seen 1"])
    #expect(wait().result == .signalled && told.count == 3)
  }

  @Test func recordsAndFills() {
    let words = Words(byteCount: 64)
    let base = Address(words.base)
    for index in 0..<16 { base.store(UInt32(100 + index), at: Int32(index)) }
    machine().copyRecords(3, byteCount: 4) { record in
      if record == 1 { return .none }
      let source = base.advanced(byBytes: 4 * Int64(record))
      return RecordRoute(source: source, target: source.advanced(byBytes: 32))
    }
    machine().fill(base.advanced(byBytes: 4), byteCount: 8, pattern: 7)
    machine().fill(base, byteCount: 0, pattern: 7)
    let found = (0..<16).map { base.load(UInt32.self, at: $0) }
    #expect(found == [100, 7, 7, 103, 104, 105, 106, 107, 100, 109, 102, 111, 112, 113, 114, 115])
  }

  /// The last worker, and it alone, is told so, and sees what all the others wrote; the counter serves again.
  @Test(arguments: [1, 2, 4])
  func theLastWorkerSeesAll(workerCount: Int) {
    let rounds = 200
    let words = Words(byteCount: 64 * (rounds + 1) + 4 * rounds * workerCount)
    let notes = Address(words.base + 64 * (rounds + 1))
    let lastCounts = Guarded([Int](repeating: 0, count: rounds))
    let threads = (0..<workerCount).map { index in
      startThread {
        let worker = machine(Int32(index), of: Int32(workerCount))
        for round in 0..<rounds {
          notes.store(Int32(round + 1), at: Int32(round * workerCount + index))
          guard worker.arriveLocal(Address(words.base + 64 * round), for: .rank) else { continue }
          let isComplete = (0..<workerCount).allSatisfy {
            notes.load(Int32.self, at: Int32(round * workerCount + $0)) == Int32(round + 1)
          }
          lastCounts.withLock { $0[round] += isComplete ? 1 : 1000 }
        }
      }!
    }
    for thread in threads { pthread_join(thread, nil) }
    #expect(lastCounts.withLock { $0 } == [Int](repeating: 1, count: rounds))
    #expect((0..<rounds).allSatisfy { words.base.load(fromByteOffset: 64 * $0, as: UInt32.self) == 0 })
  }

  /// What was written before a signal is there after the wait.
  @Test func signalsCarryMemory() {
    let words = Words(byteCount: 4096)
    let arena = Address(words.base)
    let rounds: UInt64 = 500
    let failures = Guarded(0)
    let receiver = startThread {
      let worker = machine()
      for epoch in 1...rounds {
        let isThere = worker.await(arena, offset: 512, epoch: epoch, deadline: monotonicNow() + 20_000_000_000)
        let note = arena.load(UInt64.self, at: 128)
        if !isThere || note < epoch { failures.withLock { $0 += 1 } }
        worker.signal(arena, offset: 768, epoch: epoch)
      }
    }!
    for epoch in 1...rounds {
      arena.store(epoch, at: 128)
      machine().signal(arena, offset: 512, epoch: epoch)
      #expect(machine().await(arena, offset: 768, epoch: epoch, deadline: monotonicNow() + 20_000_000_000))
    }
    pthread_join(receiver, nil)
    #expect(failures.withLock { $0 } == 0)
  }

  @Test func awaitGivesUp() {
    let words = Words(byteCount: 4096)
    let arena = Address(words.base)
    let begin = monotonicNow()
    #expect(!machine().await(arena, offset: 512, epoch: 1, deadline: begin + 30_000_000))
    #expect(monotonicNow() >= begin + 30_000_000)
    machine().signal(arena, offset: 512, epoch: 5)
    // What is there needs no time, and a later epoch will do.
    #expect(machine().await(arena, offset: 512, epoch: 3, deadline: 0))
    #expect(!machine().await(arena, offset: 512, epoch: 6, deadline: 0))
  }

  /// A sleeping waiter wakes up at an alarm that it has not heard yet; a signal that is there counts more.
  @Test func alarmsEndWaits() {
    let words = Words(byteCount: 4096)
    let arena = Address(words.base)
    let alarm = Address(words.base + 1024)
    let heard = machine().hear(alarm)
    let ringer = startThread {
      usleep(50_000)
      raiseAlarm(alarm, waking: arena)
    }!
    let begin = monotonicNow()
    let deadline = begin + 20_000_000_000
    #expect(machine().await(arena, offset: 512, epoch: 1, deadline: deadline, alarm: alarm, heard: heard) == .alarmed)
    #expect(monotonicNow() < begin + 5_000_000_000)
    pthread_join(ringer, nil)
    #expect(machine().hear(alarm) == heard + 1)
    let again = machine().hear(alarm)
    #expect(machine().await(arena, offset: 512, epoch: 1, deadline: 0, alarm: alarm, heard: again) == .timedOut)
    machine().signal(arena, offset: 512, epoch: 1)
    #expect(machine().await(arena, offset: 512, epoch: 1, deadline: 0, alarm: alarm, heard: heard) == .signalled)
  }
}
