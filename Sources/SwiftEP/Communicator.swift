import Arena
import EPKernels
import Glibc
import HostMachine

/// A rank's membership in a group of ranks.
///
/// Creating buffers is collective: all ranks of a communicator do it in the same order. When ranks are missing, those
/// that are left go on with `shrink`, and take in others with `admit`; both make a new communicator, since ranks are
/// counted anew. A process ends its membership by letting go of its communicator and its buffers, or by ending.
public struct Communicator: Sendable {
  package let group: Group

  public var rank: Int { group.rank }
  public var rankCount: Int { group.rankCount }
  /// How often the group has changed.
  public var generation: Int { group.generation }

  /// Ranks that are threads of this process, one communicator each. Each is to be used from a thread of its own, since
  /// collective calls wait for the other ranks.
  ///
  /// - Throws: `invalidArgument` unless `rankCount` is positive.
  public static func threads(rankCount: Int) throws(EPError) -> [Communicator] {
    try check(rankCount: rankCount, atMost: rankCountMax)
    return try Group.threads(rankCount: rankCount).map { Communicator(group: $0) }
  }

  /// Ranks that are processes of this host, this one being `rank`. Collective.
  ///
  /// The processes pass each other their memory over abstract Unix sockets with random names. They have to be of one
  /// user, one boot of one host, and one network namespace.
  ///
  /// - Parameters:
  ///   - rank: this process's, in `0..<rankCount`.
  ///   - rankCount: at most 65536.
  ///   - timeout: how long each other process is waited for, once `allGather` has returned.
  ///   - allGather: the caller's way of telling bytes to all ranks: is called once, with at most 1 KiB, and returns
  ///     what each rank passed, in rank order. What it passes is a secret of the ranks': whoever reads it can connect
  ///     to them, if of the same user.
  /// - Throws: `invalidArgument`; `rendezvousFailed` where `allGather` fails; `ranksDisagree`, the same on all ranks,
  ///   where processes cannot share memory; `rankMissing` (step `setup`); `systemCall`.
  public static func processes(
    rank: Int, rankCount: Int, timeout: Duration = .seconds(100), allGather: ([UInt8]) throws -> [[UInt8]]
  ) throws(EPError) -> Communicator {
    try check(rank: rank, of: rankCount, atMost: rankCountMax)
    return Communicator(
      group: try Group.processes(
        rank: rank, rankCount: rankCount, timeout: timeout, meeting: nil, allGather: allGather))
  }

  private static let rankCountMax = 1 << 16

  static func check(rank: Int, of rankCount: Int, atMost rankCountMax: Int) throws(EPError) {
    try check(rankCount: rankCount, atMost: rankCountMax)
    if (0..<rankCount).contains(rank) { return }
    throw .invalidArgument(rank: rank, argument: "rank", expected: "one of 0..<\(rankCount)", found: "\(rank)")
  }

  private static func check(rankCount: Int, atMost rankCountMax: Int) throws(EPError) {
    if (1...rankCountMax).contains(rankCount) { return }
    let expected = rankCount < 1 ? "at least 1" : "at most \(rankCountMax)"
    throw .invalidArgument(rank: -1, argument: "rankCount", expected: expected, found: "\(rankCount)")
  }
}

// MARK: - Changing the group

extension Communicator {
  /// The ranks that are still there, in the same order, counted anew. Collective over those.
  ///
  /// Left out are ranks that have exited, and those that some rank has waited for in vain, here or in a buffer. Buffers
  /// of this communicator can be closed before or after; new ones are made with the new communicator. Tolerates ranks
  /// that go missing meanwhile.
  ///
  /// - Parameter timeout: how long a rank is waited for that is alive but does not call this.
  /// - Throws: `rankMissing` (step `regrouping`) with this rank's own number, where the others go on without it.
  public func shrink(timeout: Duration = .seconds(100)) throws(EPError) -> Communicator {
    Communicator(group: try group.shrink(timeout: timeout))
  }

  /// As `shrink`, and a process that calls `join` becomes the last rank. Collective.
  ///
  /// - Parameters:
  ///   - timeout: how long to wait for it.
  ///   - allGather: the caller's way to reach it: called on the lowest rank only, as the first of two that gather
  ///     bytes. Nil: by the rendezvous that the job was started with.
  /// - Returns: the new communicator, with one rank more than stayed, or `refusal` saying why not.
  /// - Throws: as `shrink`; `invalidArgument` where ranks are threads.
  public func admit(
    timeout: Duration = .seconds(100), allGather: (@Sendable ([UInt8]) throws -> [[UInt8]])? = nil
  ) throws(EPError) -> (communicator: Communicator, refusal: EPError?) {
    var meeting: Group.Meeting?
    if let allGather { meeting = { _, bytes, _ in try allGather(bytes) } }
    let (next, refusal) = try group.admit(timeout: timeout, meeting: meeting)
    return (Communicator(group: next), refusal)
  }

  /// Becomes the last rank of a group whose ranks call `admit`.
  ///
  /// - Parameters:
  ///   - timeout: how long to wait for the group.
  ///   - allGather: the caller's way to reach the group's lowest rank: called once, as the second of two that gather
  ///     bytes.
  /// - Throws: `rendezvousFailed`, `ranksDisagree`, `rankMissing` (step `regrouping`), `systemCall`.
  public static func join(
    timeout: Duration = .seconds(100), allGather: @escaping @Sendable ([UInt8]) throws -> [[UInt8]]
  ) throws(EPError) -> Communicator {
    Communicator(group: try Group.join(timeout: timeout) { _, bytes, _ in try allGather(bytes) })
  }
}

extension Duration {
  package var nanoseconds: UInt64 {
    // A century is as good as for ever, and no sum of a time and this overflows.
    let (seconds, attoseconds) = components
    return UInt64(min(max(0, seconds), 3_155_760_000)) * 1_000_000_000 + UInt64(max(0, attoseconds / 1_000_000_000))
  }
}
