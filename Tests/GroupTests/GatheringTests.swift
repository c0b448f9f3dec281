import Conformance
import Glibc
import HostMachine
import Testing

@testable import SwiftEP

/// Where ranks bring together what is to be one launch.
@Suite struct GatheringTests {
  /// The last to come has the items of all, by rank and of one round; nobody goes on before it is done.
  @Test(arguments: [1, 2, 5]) func roundsDoNotMix(rankCount: Int) throws {
    let gathering = Gathering<[Int]>(rankCount: rankCount)
    let done = Guarded(0)
    try inParallel(rankCount) { rank in
      for round in 0..<200 {
        try gathering.meet(as: rank, with: [round, rank]) { items in
          #expect(items == (0..<rankCount).map { [round, $0] })
          done.withLock { $0 += 1 }
        }
        #expect(done.withLock { $0 } > round)
      }
    }
    #expect(done.withLock { $0 } == 200)
  }

  @Test func whatTheLastThrowsIsThrownToAll() throws {
    let gathering = Gathering<Int>(rankCount: 3)
    let errors = try valuesInParallel(3) { rank in
      try error { () throws(EPError) in
        try gathering.meet(as: rank, with: rank) { _ throws(EPError) in throw .bufferClosed }
      }
    }
    #expect(errors == [.bufferClosed, .bufferClosed, .bufferClosed])
  }

  /// Who waits for a rank that leaves, and who comes after it has left.
  @Test(arguments: [0, 50_000] as [UInt32]) func aRankThatLeaves(after microseconds: UInt32) throws {
    let gathering = Gathering<Int>(rankCount: 2)
    let errors = try valuesInParallel(2) { rank in
      if rank == 1 {
        usleep(microseconds)
        gathering.leave(1)
        return EPError.bufferClosed
      }
      if microseconds == 0 { usleep(50_000) }
      return try error { () throws(EPError) in try gathering.meet(as: 0, with: 0) { _ in } }
    }
    #expect(errors[0] == .machineUnavailable("one launch for all ranks: rank 1 launches no more"))
  }

  private func error(of call: () throws(EPError) -> Void) throws -> EPError {
    do throws(EPError) { try call() } catch { return error }
    throw Nothing()
  }

  private struct Nothing: Error {}
}
