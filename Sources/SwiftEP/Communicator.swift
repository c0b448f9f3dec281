import Arena
import EPKernels
import Glibc
import HostMachine

/// A rank's membership in a group of ranks.
///
/// Creating buffers is collective: all ranks of a communicator do it in the same order.
public struct Communicator: Sendable {
  public let rank: Int
  public let rankCount: Int
  package let bootstrap: any Bootstrap

  /// Ranks that are threads of this process, one communicator each. Each is to be used from a thread of its own, since
  /// collective calls wait for the other ranks.
  ///
  /// - Throws: `invalidArgument` unless `rankCount` is positive.
  public static func threads(rankCount: Int) throws(EPError) -> [Communicator] {
    guard rankCount >= 1 else {
      throw .invalidArgument(rank: -1, argument: "rankCount", expected: "at least 1", found: "\(rankCount)")
    }
    let meeting = ThreadMeeting(rankCount: rankCount)
    return (0..<rankCount).map { rank in
      Communicator(rank: rank, rankCount: rankCount, bootstrap: ThreadBootstrap(rank: rank, meeting: meeting))
    }
  }
}

/// How ranks meet before they share memory.
package protocol Bootstrap: Sendable {
  /// Ranks of this host that share its cores with this one, itself included.
  var ranksOnHost: Int { get }

  /// Gives every rank's contribution to every rank, in rank order. Collective.
  ///
  /// - Throws: `rankMissing` when a rank has not come within `timeout`.
  func allGather(_ contribution: Contribution, timeout: Duration) throws(EPError) -> [Contribution]
}

/// What a rank tells the others when a buffer is created.
package struct Contribution: Sendable {
  /// What must be the same on all ranks: names and values.
  package var terms: [Term]
  /// Nil when this rank could not make one.
  package var arena: ArenaMemory?
  package var failure: EPError?

  package struct Term: Equatable, Sendable {
    package let name: String
    package let value: String
  }
}

private struct ThreadBootstrap: Bootstrap {
  let rank: Int
  let meeting: ThreadMeeting

  var ranksOnHost: Int { meeting.rankCount }

  func allGather(_ contribution: Contribution, timeout: Duration) throws(EPError) -> [Contribution] {
    try meeting.allGather(contribution, from: rank, timeout: timeout)
  }
}

/// Where the ranks of one process meet: rounds of contributions, each of which is complete once every rank has come.
private final class ThreadMeeting: Sendable {
  let rankCount: Int
  private let rounds: Guarded<Rounds>

  private struct Rounds {
    /// Contributions of the rounds that some rank has not finished yet, the oldest first.
    var open: [[Contribution?]] = []
    var firstOpen = 0
    /// Rounds that each rank has entered, and left.
    var entered: [Int]
    var left: [Int]
  }

  init(rankCount: Int) {
    self.rankCount = rankCount
    rounds = Guarded(
      Rounds(entered: [Int](repeating: 0, count: rankCount), left: [Int](repeating: 0, count: rankCount)))
  }

  func allGather(_ contribution: Contribution, from rank: Int, timeout: Duration) throws(EPError) -> [Contribution] {
    let round = rounds.withLock { rounds in
      let round = rounds.entered[rank]
      rounds.entered[rank] += 1
      while rounds.firstOpen + rounds.open.count <= round {
        rounds.open.append([Contribution?](repeating: nil, count: rankCount))
      }
      rounds.open[round - rounds.firstOpen][rank] = contribution
      return round
    }
    defer { leave(round, rank) }
    let deadline = monotonicNow() &+ timeout.nanoseconds
    while true {
      let (contributions, missing) = rounds.withLock { rounds in
        let round = rounds.open[round - rounds.firstOpen]
        return (round.compactMap { $0 }, round.firstIndex { $0 == nil })
      }
      guard let missing else { return contributions }
      if monotonicNow() >= deadline { throw .rankMissing(rank: missing, step: .setup, timeout: timeout) }
      usleep(200)
    }
  }

  private func leave(_ round: Int, _ rank: Int) {
    rounds.withLock { rounds in
      rounds.left[rank] = round + 1
      while let last = rounds.left.min(), rounds.firstOpen < last {
        rounds.open.removeFirst()
        rounds.firstOpen += 1
      }
    }
  }
}

extension Duration {
  package var nanoseconds: UInt64 {
    // A century is as good as for ever, and no sum of a time and this overflows.
    let (seconds, attoseconds) = components
    return UInt64(min(max(0, seconds), 3_155_760_000)) * 1_000_000_000 + UInt64(max(0, attoseconds / 1_000_000_000))
  }
}
