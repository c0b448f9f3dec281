import Conformance
import Glibc
import HostMachine
import Testing

@testable import SwiftEP

/// How ranks agree on who is masked no more (`Mesh.gather` of places).
@Suite struct TakingBackTests {
  private let meshes: [Mesh]
  private let groups: [Group]
  private let key = BufferKey(generation: 0, index: 0)

  init() throws {
    groups = try Group.threads(rankCount: 4)
    meshes = groups.map(\.mesh)
  }

  /// What a rank calls, with an epoch to know it by.
  private func gather(
    _ rank: Int, epoch: UInt64, masked: UInt64 = 0, timeout: Duration = .seconds(20)
  ) throws(EPError) -> [UInt64?] {
    let place = Contribution.Place(masked: masked, epoch: epoch, attempt: .random(in: 1 ... .max))
    return try meshes[rank].gather(place, for: key, timeout: timeout) {}.map { $0?.epoch }
  }

  /// Whom it misses.
  private func failure(_ rank: Int, epoch: UInt64, masked: UInt64 = 0) -> Int? {
    do throws(EPError) {
      _ = try gather(rank, epoch: epoch, masked: masked, timeout: .milliseconds(20))
    } catch {
      if case .rankMissing(let missing, .regrouping, .silent) = error { return missing }
    }
    return nil
  }

  /// Calls that come late, or soon after others, all find the same, and no call finds what is another's.
  @Test func callsFollowEachOther() throws {
    try inParallel(4) { rank in
      var random = SplitMix64(seed: 3, rank)
      for call in UInt64(0)..<500 {
        if random.chance(0.3) { usleep(UInt32(random.pick(0...300))) }
        let epochs = try gather(rank, epoch: 10 * call + UInt64(rank))
        #expect(epochs == (0..<4).map { 10 * call + $0 })
      }
    }
  }

  /// What is left of calls that have failed, each rank as often as it likes, does not keep the next from success.
  @Test(arguments: [[0, 0, 0, 0], [0, 1, 2, 5], [3, 0, 3, 0]]) func callsThatHaveFailed(_ counts: [Int]) throws {
    for (rank, count) in counts.enumerated() {
      for call in 0..<count {
        // One after the other: nobody takes part.
        _ = failure(rank, epoch: UInt64(100 * rank + call))
      }
    }
    try inParallel(4) { rank in
      usleep(UInt32(3000 * rank))
      let epochs = try gather(rank, epoch: UInt64(1000 + rank))
      #expect(epochs == [1000, 1001, 1002, 1003])
    }
  }

  /// A masked rank's calls do not count, nor whom it masks; to itself, those that mask it do not take part.
  @Test func maskedRanks() throws {
    #expect(failure(2, epoch: 7, masked: 0b0010) != nil)
    try inParallel(4) { rank in
      if rank == 2 { return }
      // The last one returns, and knows of no mask.
      let epochs = try gather(rank, epoch: UInt64(rank), masked: rank == 3 ? 0 : 0b0100)
      #expect(epochs == [0, 1, nil, 3])
    }
    #expect(failure(2, epoch: 8) == 0)
  }
}
