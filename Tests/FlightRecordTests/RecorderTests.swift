import Conformance
import Foundation
import HostMachine
import Testing

@testable import EPKernels
@testable import SwiftEP

@Suite struct RecorderTests {
  @Test(arguments: [0, 1, 63, 64, 65, 200])
  func theLastOperationsAreThere(count: Int) {
    let recording = Recording()
    for index in 0..<count { recording.run(index + 1) }
    let record = recording.read()
    #expect(record.operations.map(\.index) == Array(max(1, count - 63)..<count + 1))
    for operation in record.operations { #expect(fault(in: operation) == nil && operation.outcome == .ok) }
    #expect(record.current.step == .idle)
    #expect(record.current.sinceNanoseconds == record.operations.last?.spans.last?.endNanoseconds ?? 5)
    #expect(record.rank == 1 && record.rankCount == 4 && record.group == "abc")
  }

  /// Stopped anywhere, a rank shows where, and keeps showing what it did before.
  @Test func everyStep() {
    let recording = Recording()
    for index in 1...70 { recording.run(index) }
    func expect(_ step: FlightRecord.Step, _ peer: Int? = nil, steps: [FlightRecord.Step]) {
      let record = recording.read()
      #expect(record.current.step == step && record.current.peer == peer && record.current.operation == .combine)
      #expect(record.current.epoch == (step == .input ? nil : 1071))
      #expect(record.operations.map(\.index) == Array(8...71))
      #expect(record.operations.dropLast().allSatisfy { fault(in: $0) == nil && $0.outcome == .ok })
      let last = record.operations.last!
      #expect(last.outcome == .underWay && last.culprit == nil && last.spans.map(\.step) == steps)
      #expect(last.spans.last!.endNanoseconds == nil)
      #expect(record.current.sinceNanoseconds == last.spans.last!.beginNanoseconds)
    }
    #expect(recording.recorder.awaitInput(recording.machine, view: recording.begun, operation: 3))
    // A second event to wait for is the same wait.
    #expect(recording.recorder.awaitInput(recording.machine, view: recording.begun, operation: 3))
    expect(.input, steps: [.input])
    recording.begin(71)
    expect(.prepare, steps: [.input, .prepare])
    recording.recorder.enter(recording.machine, .exchange, now: monotonicNow())
    expect(.exchange, steps: [.input, .prepare, .exchange])
    recording.recorder.await(recording.machine, in: .exchange, peer: 3)
    expect(.exchange, 3, steps: [.input, .prepare, .exchange])
    recording.deliver(71)
    expect(.deliver, steps: [.input, .prepare, .exchange, .place, .deliver])
    recording.wait(71, in: .completion, for: [2: 10])
    expect(.completion, 2, steps: [.input, .prepare, .exchange, .place, .deliver, .completion])
    recording.finish(.timeout, culprit: 2)
    let record = recording.read()
    #expect(record.current.step == .idle && record.current.operation == nil && record.current.peer == nil)
    #expect(record.operations.last!.outcome == .timeout && record.operations.last!.culprit == 2)
  }

  /// A record of which nothing can be seen yet is nobody's.
  @Test func aRankStoppedWhereItBegins() {
    let recording = Recording()
    for index in 1...64 { recording.run(index) }
    recording.machine.publish(
      FlightProgress(index: 65, step: .prepare).word,
      at: Address(recording.arena).advanced(byBytes: recording.control.recorderOffset))
    let record = recording.read()
    #expect(record.operations.map(\.index) == Array(2...64))
    #expect(record.operations.allSatisfy { fault(in: $0) == nil })
    #expect(record.current.step == .prepare && record.current.operation == nil)
  }

  /// An operation that went well may be seen as over before its end is.
  @Test func anEndThatIsNotSeenYet() {
    let recording = Recording()
    recording.run(1)
    recording.begin(2)
    recording.deliver(2)
    recording.wait(2, in: .completion, for: [0: 3])
    recording.machine.note(
      FlightProgress(index: 2, step: .idle).word,
      at: Address(recording.arena).advanced(byBytes: recording.control.recorderOffset))
    let record = recording.read()
    #expect(record.operations.map(\.outcome) == [.ok, .underWay])
    #expect(
      record.operations[1].spans.last!.step == .completion && record.operations[1].spans.last!.endNanoseconds == nil)
    #expect(record.current.step == .completion && record.current.operation == record.operations[1].kind)
    #expect(record.current.peer == nil)
    // Nor need it be when the next one has begun.
    recording.begin(3)
    #expect(recording.read().operations.map(\.index) == [1, 3])
  }

  /// After a failure, later operations end at once: they must not push out what explains it.
  @Test func nothingIsNotedAfterAFailure() {
    let recording = Recording()
    recording.run(1)
    recording.view.failure.store(OperationStatus(.timeout, rank: 2, (0, 0, 0, 0)), at: 0)
    let before = recording.read(at: 77)
    #expect(!recording.recorder.awaitInput(recording.machine, view: recording.begun, operation: 1))
    recording.recorder.begin(recording.machine, view: recording.begun, operation: 1, tokenCount: 1, bytesPerRow: 1)
    #expect(recording.read(at: 77) == before)
  }

  @Test func longestWaits() {
    let recording = Recording()
    typealias Longest = FlightRecord.LongestWait
    #expect(recording.read().longestWaits == [])
    recording.run(100)
    recording.run(10)
    recording.begin(11)
    recording.wait(11, in: .completion, for: [0: 101, 2: 150])
    #expect(
      recording.read().longestWaits == [
        Longest(peer: 0, nanoseconds: 101, step: .completion, epoch: 1011),
        Longest(peer: 2, nanoseconds: 200, step: .exchange, epoch: 1100),
        Longest(peer: 3, nanoseconds: 400, step: .completion, epoch: 1100),
      ])
    recording.recorder.forgetWaits(recording.machine)
    #expect(recording.read().longestWaits == [])
    recording.wait(12, in: .exchange, for: [2: 1])
    #expect(recording.read().longestWaits == [Longest(peer: 2, nanoseconds: 1, step: .exchange, epoch: 1012)])
  }

  /// Read while it is written, a record is never a mixture: what is shown as complete is one operation's.
  @Test func readersSeeWholeRecords() throws {
    let recording = Recording()
    let writerCount = Guarded(0)
    let isDone = Guarded(false)
    let faults = Guarded<[String]>([])
    // Records that were being written when they were read, and such that were dropped for it.
    let overtaken = Guarded((underWay: 0, dropped: 0))
    try inParallel(3) { thread in
      if thread == 0 {
        let end = monotonicNow() + 1_500_000_000
        var index = 0
        while monotonicNow() < end {
          index += 1
          recording.run(index)
        }
        writerCount.withLock { $0 = index }
        isDone.withLock { $0 = true }
        return
      }
      var newest = 0
      while !isDone.withLock({ $0 }) {
        let record = recording.read()
        for operation in record.operations {
          guard let fault = fault(in: operation) else { continue }
          faults.withLock { if $0.count < 10 { $0.append("operation \(operation.index): \(fault)") } }
        }
        let indices = record.operations.map(\.index)
        let isUnderWay = record.operations.last?.outcome == .underWay
        overtaken.withLock {
          $0.underWay += isUnderWay ? 1 : 0
          $0.dropped += newest > 64 && indices.count < 64 ? 1 : 0
        }
        if indices != indices.sorted() || Set(indices).count != indices.count || (indices.last ?? newest) < newest {
          faults.withLock { $0.append("operations \(indices) after \(newest)") }
        }
        newest = indices.last ?? newest
        for wait in record.longestWaits where wait.peer != 1 {
          // Every operation waits longer than the one before.
          let factor = [0: 1, 2: 2, 3: 4][wait.peer]!
          if Int(wait.nanoseconds) != factor * (Int(wait.epoch) - 1000)
            || wait.step != (wait.peer == 3 ? .completion : .exchange)
          {
            faults.withLock { $0.append("\(wait)") }
          }
        }
      }
    }
    #expect(faults.withLock { $0 } == [])
    // Otherwise nothing has been tried.
    let (underWay, dropped) = overtaken.withLock { $0 }
    #expect(underWay > 0 && dropped > 0 && writerCount.withLock { $0 } > 64)
  }

  /// A longest wait is shown with its own epoch and step, though both change under the reader.
  @Test func readersSeeWholeWaits() throws {
    let recording = Recording()
    let isDone = Guarded(false)
    let found = Guarded((faults: [String](), epochs: Set<UInt64>()))
    try inParallel(2) { thread in
      if thread == 0 {
        let end = monotonicNow() + 700_000_000
        var wait: UInt64 = 1
        while monotonicNow() < end {
          for _ in 0..<100 {
            let slot = wait % 2 == 0 ? SignalSlot.exchange : .completion
            recording.recorder.waited(
              recording.machine, peer: 2, slot: slot, epoch: 3 * wait, nanoseconds: wait,
              longest: recording.recorder.longestWait(forPeer: 2))
            wait += 1
            // Slow enough for a reader to come between.
            for _ in 0..<wait % 16 { _ = monotonicNow() }
          }
        }
        return isDone.withLock { $0 = true }
      }
      while !isDone.withLock({ $0 }) {
        for wait in recording.read().longestWaits {
          let step: FlightRecord.Step = wait.nanoseconds % 2 == 0 ? .exchange : .completion
          found.withLock { found in
            if wait.epoch != 3 * wait.nanoseconds || wait.step != step { found.faults.append("\(wait)") }
            found.epochs.insert(wait.epoch)
          }
        }
      }
    }
    #expect(found.withLock { $0.faults.prefix(5) } == [])
    #expect(found.withLock { $0.epochs.count } > 10)
  }

  /// Whatever lies in an arena, reading it ends, and well.
  @Test func garbage() {
    var random = SplitMix64(seed: 3, 1)
    for _ in 0..<300 {
      let recording = Recording()
      let words = recording.arena.assumingMemoryBound(to: UInt64.self)
      for index in Int(recording.control.recorderOffset / 8)..<Int(recording.control.byteCount / 8) {
        words[index] = random.next() >> (random.next() % 64)
      }
      let record = recording.read()
      #expect(record.operations.count <= 64 && !record.description.isEmpty && !record.situation.isEmpty)
      #expect(!record.lossReport(.rankMissing(rank: 1, step: .exchange, because: .exited)).isEmpty)
    }
  }
}

@Suite struct FlightLayoutTests {
  @Test(arguments: [Int32(1), 2, 8, 1024])
  func nothingOverlaps(rankCount: Int32) {
    let control = ControlLayout(rankCount: rankCount, expertCount: 3)
    let layout = FlightLayout(rankCount: rankCount)
    var offsets = [FlightLayout.progressOffset]
    for peer in 0..<rankCount {
      for field in [PeerField.process, .longestWait, .longestWaitEpoch, .longestWaitStep] {
        offsets.append(layout.offset(of: field, peer: peer))
      }
    }
    // Those that are read, and the one that is cleared meanwhile.
    for index in Int64(1)...66 {
      for field in 0..<FlightField.byteCount / 8 { offsets.append(layout.offset(ofRecord: index) + 8 * field) }
    }
    #expect(Set(offsets).count == offsets.count)
    #expect(offsets.allSatisfy { $0 % 8 == 0 && $0 >= 0 && $0 + 8 <= layout.byteCount })
    #expect(layout.offset(ofRecord: 1 << 30) == layout.offset(ofRecord: 0))
    let pagesEnd = control.exchangeOffset(source: rankCount - 1, epoch: 7) + control.exchangeBlockByteCount
    #expect(control.recorderOffset >= pagesEnd && control.recorderOffset % 64 == 0)
    #expect(control.byteCount >= control.recorderOffset + layout.byteCount)
    #expect(ControlLayout.identityOffset + ArenaIdentity.byteCount <= ControlLayout.epochOffset)
    #expect(MemoryLayout<ArenaIdentity>.size <= ArenaIdentity.byteCount)
  }

  @Test(arguments: [FlightStep.idle, .input, .prepare, .exchange, .place, .deliver, .completion])
  func progressIsOneWord(_ step: FlightStep) {
    for index in [Int64(0), 1, 64, 1 << 39] {
      for peer in [Int32(-1), 0, 7, 65535] {
        let progress = FlightProgress(index: index, step: step, peer: peer)
        #expect(progress.index == index && progress.step == step && progress.peer == peer)
      }
    }
  }
}
