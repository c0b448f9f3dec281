import Conformance
import Foundation
import HostMachine
import SwiftEP
import Testing

@testable import swiftep

@Suite struct SpinBarrierTests {
  @Test func nobodyRunsAhead() throws {
    let partyCount = 5
    let barrier = try SpinBarrier(partyCount: partyCount)
    let arrived = Guarded(0)
    try inParallel(partyCount) { _ in
      for round in 1...200 {
        arrived.withLock { $0 += 1 }
        try barrier.wait()
        #expect(arrived.withLock { $0 } == round * partyCount)
        try barrier.wait()
      }
    }
  }

  @Test func cancellingLetsEverybodyOut() throws {
    let barrier = try SpinBarrier(partyCount: 3)
    try inParallel(3) { index in
      if index == 2 {
        usleep(20_000)
        barrier.cancel()
      } else {
        #expect(throws: SpinBarrier.Cancelled.self) { try barrier.wait() }
      }
    }
    #expect(throws: SpinBarrier.Cancelled.self) { try barrier.wait() }
  }

  @Test func theSlowestCounts() throws {
    let stopwatch = try SharedStopwatch(partyCount: 3)
    let times = Guarded<[UInt64]>([])
    try inParallel(3) { party in
      let time = try stopwatch.measure(party: party) { if party == 1 { usleep(30_000) } }
      times.withLock { $0.append(time.nanoseconds) }
    }
    let found = times.withLock { $0 }
    #expect(found.count == 3 && Set(found).count == 1)
    #expect(found[0] >= 30_000_000)
  }
}

@Suite struct CopyFloorTests {
  @Test(arguments: CopyFloor.Kind.allCases, [1, 3])
  func copiesOfUnequalSizes(_ kind: CopyFloor.Kind, _ workerCount: Int) throws {
    let sizes = [(1600, 4000), (4000, 1600), (0, 160), (33, 33)].map {
      CopyFloor.Sizes(readByteCount: $0.0, writtenByteCount: $0.1)
    }
    let sources = try sizes.map { size in
      try Tensor(
        copying: (0..<size.readByteCount).map { UInt8(1 + $0 % 200) }, shape: [size.readByteCount], .uint8)
    }
    for (size, source) in zip(sizes, sources) {
      let floor = try CopyFloor(size, source: source, workerCount: workerCount)
      for worker in 0..<workerCount { floor.copy(kind, worker: worker) }
      if source.byteCount == 0 { continue }
      let (from, to) = (try source.elements(UInt8.self), try floor.destination.elements(UInt8.self))
      if from.count <= to.count {
        #expect(to == to.indices.map { from[$0 % from.count] })
      } else {
        // Of a larger source, which pass came last in a place depends on the workers; some did.
        #expect(!to.contains(0))
      }
    }
    #expect(sizes.movedByteCount == 2 * (4000 + 4000 + 0 + 48))
    #expect(sizes.repetitionCount == 16)
  }
}

@Suite struct ExpertRowsTests {
  @Test func e4m3() {
    #expect(floatFromE4M3(0x00) == 0)
    #expect(floatFromE4M3(0x01) == 0x1p-9)
    #expect(floatFromE4M3(0x08) == 0x1p-6)
    #expect(floatFromE4M3(0x38) == 1)
    #expect(floatFromE4M3(0xbc) == -1.5)
    #expect(floatFromE4M3(0x7e) == 448)
    #expect(floatFromE4M3(0xff).isNaN)
  }

  @Test func bf16() {
    #expect(bf16Bits(1) == 0x3f80)
    #expect(bf16Bits(Float(bitPattern: 0x3f80_8000)) == 0x3f80)
    #expect(bf16Bits(Float(bitPattern: 0x3f81_8000)) == 0x3f82)
    #expect(bf16Bits(Float(bitPattern: 0x3f80_8001)) == 0x3f81)
  }
}

@Suite struct ReportTests {
  @Test func tables() {
    var table = TextTable(["name", "bytes"])
    table.append(["a", "1"])
    table.append(["longer", "1,234"])
    #expect(
      table.description == """
        name    bytes
        -------------
        a           1
        longer  1,234
        """)
  }

  @Test func numbers() {
    #expect([0, 999, 1000, -1_234_567].map(\.grouped) == ["0", "999", "1,000", "-1,234,567"])
    #expect(12.96.rounded(toPlaces: 1) == "13.0")
    #expect((-0.25).rounded(toPlaces: 2) == "-0.25")
    #expect(3.07.rounded(toPlaces: 2) == "3.07")
    #expect(2.5.rounded(toPlaces: 0) == "3")
    #expect([UInt64]().percentile(99) == 0)
    #expect([UInt64(7)].percentile(99) == 7)
    #expect((1...100).map(UInt64.init).shuffled().percentile(99) == 99)
    #expect((1...101).map(UInt64.init).shuffled().percentile(99) == 100)
    #expect((1...10_000).map(UInt64.init).shuffled().percentile(99) == 9_900)
    #expect([UInt64]().median == 0)
    #expect([UInt64(5), 1, 3].median == 3)
    #expect([UInt64(4), 1, 3, 2].median == 2.5)
  }

  @Test func hashes() {
    var hash = FNVHash()
    Array("foobar".utf8).withUnsafeBytes { hash.add($0) }
    #expect(hash.text == "85944171f73967e8")
  }

  @Test func progress() {
    let bar = ProgressBar(title: "bench", count: 8)
    #expect(bar.text(0) == "bench [\(String(repeating: ".", count: 40))] 0/8")
    #expect(bar.text(2).contains("[##########....."))
    #expect(bar.text(8) == "bench [\(String(repeating: "#", count: 40))] 8/8")
  }

  @Test func exitCodes() {
    #expect(ExitCode(CheckFailure(what: "x")) == .checkFailed)
    #expect(ExitCode(UsageError("a", expected: "b", found: "c")) == .usage)
    #expect(ExitCode(EPError.bufferClosed) == .runtime)
  }

  @Test func failuresSayHowToRepeatThem() {
    let failure = ConformanceFailure(job: .random(seed: 17), rank: 1, step: "dispatch", what: "rows differ")
    let text = failureText(failure, processes: false)
    #expect(text.hasPrefix("rank 1, dispatch: rows differ\njob: seed 17"))
    #expect(text.hasSuffix("repeat: swiftep verify --seconds 1 --seed 17"))
    let ofProcesses = failureText(failure, processes: true)
    #expect(ofProcesses.hasSuffix("repeat: swiftep verify --processes --seconds 1 --seed 17"))
  }
}
