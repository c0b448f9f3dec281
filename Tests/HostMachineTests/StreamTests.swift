import EPKernels
import Glibc
import Synchronization
import Testing

@testable import HostMachine

private let tuning = HostTuning(spinNanoseconds: 2_000, streamingByteCountMin: .max)

/// A flag that one thread sets and others poll.
private final class Flag: Sendable {
  private let value = Atomic<Bool>(false)
  var isSet: Bool { value.load(ordering: .acquiring) }
  func set() { value.store(true, ordering: .releasing) }
  func wait() { while !isSet { usleep(100) } }
}

@Suite struct StreamTests {
  @Test(arguments: [1, 3])
  func tasksRunInOrder(workerCount: Int) throws {
    let stream = try #require(HostStream(workerCount: workerCount, tuning: tuning))
    defer { stream.close() }
    let order = Guarded([Int]())
    var last: UInt64 = 0
    for index in 0..<300 {
      last = stream.enqueue(isUrgent: index % 3 == 0) { order.withLock { $0.append(index) } }
      if index % 70 == 0 { #expect(stream.wait(for: last)) }
    }
    #expect(stream.wait(for: last))
    #expect(order.withLock { $0 } == Array(0..<300))
    #expect(stream.isFinished(last) && stream.isFinished(1))
  }

  /// Several threads queue and wait at once: all tasks run, one at a time.
  @Test func threadsShareAStream() throws {
    let stream = try #require(HostStream(workerCount: 2, tuning: tuning))
    defer { stream.close() }
    let state = Guarded((running: 0, most: 0, done: 0))
    let threads = (0..<4).map { thread in
      startThread {
        for index in 0..<50 {
          let ticket = stream.enqueue(isUrgent: index % 2 == 0) {
            state.withLock {
              $0.running += 1
              $0.most = max($0.most, $0.running)
            }
            state.withLock { ($0.running, $0.done) = ($0.running - 1, $0.done + 1) }
          }
          if (index + thread) % 3 == 0 { _ = stream.wait(for: ticket) }
        }
      }!
    }
    for thread in threads { pthread_join(thread, nil) }
    let last = stream.enqueue(isUrgent: false) {}
    #expect(stream.wait(for: last))
    let (_, most, done) = state.withLock { $0 }
    #expect(most == 1 && done == 200)
  }

  /// Urgent tasks run though nobody waits.
  @Test func urgentTasksRunByThemselves() throws {
    let stream = try #require(HostStream(workerCount: 1, tuning: tuning))
    defer { stream.close() }
    for _ in 0..<20 {
      let flag = Flag()
      let ticket = stream.enqueue(isUrgent: true) { flag.set() }
      flag.wait()
      #expect(stream.wait(for: ticket))
    }
  }

  @Test func waitsHaveDeadlines() throws {
    let stream = try #require(HostStream(workerCount: 1, tuning: tuning))
    defer { stream.close() }
    let (begun, gate) = (Flag(), Flag())
    let blocked = stream.enqueue(isUrgent: true) {
      begun.set()
      gate.wait()
    }
    begun.wait()
    let behind = stream.enqueue(isUrgent: false) {}
    let begin = monotonicNow()
    #expect(!stream.wait(for: behind, until: begin + 30_000_000))
    #expect(monotonicNow() >= begin + 30_000_000)
    #expect(!stream.isFinished(blocked) && !stream.isFinished(behind))
    gate.set()
    #expect(stream.wait(for: behind))
    #expect(stream.isFinished(blocked))
  }

  @Test(arguments: [1, 2, 4], [false, true])
  func closingFinishesTheQueue(workerCount: Int, isUrgent: Bool) throws {
    let stream = try #require(HostStream(workerCount: workerCount, tuning: tuning))
    let done = Guarded(0)
    var last: UInt64 = 0
    for _ in 0..<50 {
      last = stream.enqueue(isUrgent: isUrgent) {
        usleep(100)
        done.withLock { $0 += 1 }
      }
    }
    stream.close()
    #expect(done.withLock { $0 } == 50)
    #expect(stream.isFinished(last))
    stream.close()
  }

  /// Many streams, made and closed, used or not.
  @Test func streamsComeAndGo() throws {
    for round in 0..<50 {
      let stream = try #require(HostStream(workerCount: 1 + round % 4, tuning: tuning))
      if round % 2 == 0 { _ = stream.enqueue(isUrgent: round % 4 == 0) {} }
      if round % 3 == 0 { stream.close() }
    }
  }
}

@Suite struct DoorbellTests {
  private final class Bells: @unchecked Sendable {
    private let memory = UnsafeMutableRawPointer.allocate(byteCount: 128, alignment: 64)
    let ping: Doorbell
    let pong: Doorbell
    let word = Atomic<Int>(0)
    init() {
      memory.initializeMemory(as: UInt8.self, repeating: 0, count: 128)
      (ping, pong) = (Doorbell(at: memory), Doorbell(at: memory + 64))
    }
    deinit { memory.deallocate() }
  }

  /// Two threads that sleep in turn: were rings lost, each turn would last until the end of a sleep's slice, 10 ms, and
  /// all of them four seconds.
  @Test(arguments: [UInt64(0), 20_000])
  func ringsWakeSleepers(spinNanoseconds: UInt64) {
    let bells = Bells()
    let turns = 400
    let begin = monotonicNow()
    let other = startThread {
      for turn in 0..<turns {
        _ = bells.ping.wait(until: .max, spinningFor: spinNanoseconds) {
          bells.word.load(ordering: .acquiring) > 2 * turn
        }
        bells.word.store(2 * turn + 2, ordering: .releasing)
        bells.pong.ring()
      }
    }!
    for turn in 0..<turns {
      bells.word.store(2 * turn + 1, ordering: .releasing)
      bells.ping.ring()
      let deadline = monotonicNow() + 20_000_000_000
      let isHeard = bells.pong.wait(until: deadline, spinningFor: spinNanoseconds) {
        bells.word.load(ordering: .acquiring) > 2 * turn + 1
      }
      #expect(isHeard)
    }
    pthread_join(other, nil)
    let elapsed = monotonicNow() - begin
    #expect(elapsed < 2_000_000_000, "\(elapsed) ns")
  }

  @Test func oneRingWakesAll() {
    let bells = Bells()
    let threads = (0..<4).map { _ in
      startThread { [bells] in
        _ = bells.ping.wait(until: .max, spinningFor: 0) { bells.word.load(ordering: .acquiring) > 0 }
        bells.word.wrappingAdd(1, ordering: .relaxed)
      }!
    }
    usleep(20_000)
    bells.word.store(1, ordering: .releasing)
    bells.ping.ring()
    for thread in threads { pthread_join(thread, nil) }
    #expect(bells.word.load(ordering: .relaxed) == 5)
  }

  @Test func waitsEndAtTheirDeadline() {
    let bells = Bells()
    let begin = monotonicNow()
    #expect(!bells.ping.wait(until: begin + 25_000_000, spinningFor: 1_000) { false })
    #expect(monotonicNow() >= begin + 25_000_000)
    #expect(!bells.ping.wait(until: 0, spinningFor: 0) { false })
    #expect(bells.ping.wait(until: 0, spinningFor: 0) { true })
  }

  /// A store whose ring never came (its thread was killed) is found at the end of a slice.
  @Test func aMissedRingIsSurvived() {
    let bells = Bells()
    let other = startThread { [bells] in
      usleep(20_000)
      bells.word.store(1, ordering: .releasing)
    }!
    let isHeard = bells.ping.wait(until: monotonicNow() + 20_000_000_000, spinningFor: 0) {
      bells.word.load(ordering: .acquiring) == 1
    }
    #expect(isHeard)
    pthread_join(other, nil)
  }
}
