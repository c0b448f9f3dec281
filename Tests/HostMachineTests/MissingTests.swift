import HostMachine
import SwiftEP
import Testing

@testable import EPKernels

/// Who is found to be missing, from what ranks' flight recorders show.
@Suite struct MissingTests {
  /// Arenas of their control words alone.
  private final class Ranks {
    let memory: [HostMemory]
    let tables: HostMemory
    let views: [RankView]

    init(count: Int32) throws {
      let control = ControlLayout(rankCount: count, expertCount: 1)
      memory = try (0..<count).map { _ in try HostMemory(byteCount: control.byteCount) }
      tables = try HostMemory(byteCount: 4096)
      let (memory, base) = (memory, tables.base)
      for (rank, arena) in memory.enumerated() { base.store(arena.base.bits, at: Int32(rank)) }
      views = (0..<count).map { rank in
        RankView(
          rank: rank, rankCount: count, expertCount: 1, localExpertCount: 1, arenas: base,
          ownArena: memory[Int(rank)].base, expertOwner: base, expertLocal: base, expertOrder: base, firstPlaces: base,
          failure: base.advanced(byBytes: 1024 + 256 * Int64(rank)), hostFailure: .null, departures: base, alarm: base,
          arrivals: base, pause: base, timeoutNanoseconds: 1)
      }
    }

    /// `rank` waits for `peer`.
    func wait(_ rank: Int, for peer: Int32, in slot: SignalSlot, epoch: UInt64) {
      let view = views[rank].recorded(HostMachine.host)
      let recorder = FlightRecorder(view)
      recorder.begin(HostMachine.host, view: view, operation: 1, tokenCount: 1, bytesPerRow: 1)
      recorder.note(HostMachine.host, .epoch, in: recorder.record, epoch)
      let step: FlightStep = slot == .exchange ? .exchange : .completion
      recorder.enter(HostMachine.host, step, now: 1)
      recorder.await(HostMachine.host, in: step, peer: peer)
    }

    func missing(_ rank: Int32, in slot: SignalSlot, epoch: UInt64) -> Missing {
      findMissing(HostMachine.host, view: views[0], Missing(rank: rank, slot: slot, epoch: epoch))
    }
  }

  /// Rank 3 has told rank 0 that it has finished operation 4, and then stopped.
  @Test func theLastOfAChain() throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(2, for: 3, in: .completion, epoch: 4)
    ranks.wait(1, for: 2, in: .exchange, epoch: 5)
    let found = ranks.missing(1, in: .exchange, epoch: 5)
    #expect(found.rank == 3 && found.slot == .completion && found.epoch == 4)
    #expect(ranks.missing(3, in: .exchange, epoch: 5).rank == 3)
  }

  /// Rank 1's queue of launches waits for all that are not there: rank 3 alone, since rank 0 and 2 are.
  @Test func aQueueThatWaits() throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(1, for: 1, in: .completion, epoch: 4)
    let view = ranks.views[1]
    for source: Int32 in [0, 2] {
      HostMachine.host.signal(1, to: .system) { _ in
        SignalWord(
          arena: view.ownArena, offset: view.control.signalOffset(.completion, source: source, epoch: 4), epoch: 4)
      }
    }
    let found = ranks.missing(1, in: .exchange, epoch: 5)
    #expect(found.rank == 3 && found.slot == .completion && found.epoch == 4)
    HostMachine.host.signal(1, to: .system) { _ in
      SignalWord(arena: view.ownArena, offset: view.control.signalOffset(.completion, source: 3, epoch: 4), epoch: 4)
    }
    #expect(ranks.missing(1, in: .exchange, epoch: 5).rank == 1)
  }

  /// Rank 2 stopped while it waited for rank 3, which came later.
  @Test func aWaitThatIsOver() throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(2, for: 3, in: .completion, epoch: 4)
    let offset = ranks.views[2].control.signalOffset(.completion, source: 3, epoch: 4)
    HostMachine.host.signal(1, to: .system) { _ in SignalWord(arena: ranks.memory[2].base, offset: offset, epoch: 4) }
    #expect(ranks.missing(2, in: .exchange, epoch: 5).rank == 2)
  }

  /// Rank 2 has given rank 3 up already, and takes no part any more.
  @Test(arguments: [StatusCode.timeout, .departed])
  func aWaitThatWasInVain(_ code: StatusCode) throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(2, for: 3, in: .completion, epoch: 4)
    FlightRecorder(ranks.views[2].recorded(HostMachine.host)).finish(
      HostMachine.host, OperationStatus(code, rank: 3, (0, 0, 0, 0)), now: 2)
    #expect(ranks.missing(2, in: .exchange, epoch: 5).rank == 3)
  }

  /// A rank between two operations, or in one that failed for another reason, is missing itself.
  @Test(arguments: [StatusCode.ok, .overflow])
  func nobodyElse(_ code: StatusCode) throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(2, for: 3, in: .completion, epoch: 4)
    FlightRecorder(ranks.views[2].recorded(HostMachine.host)).finish(
      HostMachine.host, OperationStatus(code, rank: 1, (0, 0, 0, 0)), now: 2)
    #expect(ranks.missing(2, in: .exchange, epoch: 5).rank == 2)
  }

  @Test func circles() throws {
    let ranks = try Ranks(count: 4)
    ranks.wait(2, for: 3, in: .exchange, epoch: 4)
    ranks.wait(3, for: 2, in: .exchange, epoch: 4)
    #expect(ranks.missing(2, in: .exchange, epoch: 4).rank == 2)
    ranks.wait(3, for: 0, in: .exchange, epoch: 4)
    #expect(ranks.missing(2, in: .exchange, epoch: 4).rank == 2)
  }
}
