import FoundationEssentials
import Rendezvous

extension Communicator {
  /// Ranks that are processes of this host, which find each other by the variables that their launcher has set.
  /// Collective.
  ///
  /// The rank and the number of ranks come from the first of these that are set: `SWIFTEP_RANK` and
  /// `SWIFTEP_RANK_COUNT` (`swiftep launch`), `RANK` and `WORLD_SIZE` (torchrun), `OMPI_COMM_WORLD_RANK` and `_SIZE`
  /// (OpenMPI), `PMI_RANK` and `PMI_SIZE` (MPICH), `SLURM_PROCID` and `SLURM_NTASKS` (SLURM). The token is in
  /// `SWIFTEP_TOKEN`, or in the file that `SWIFTEP_TOKEN_FILE` names. The ranks meet at `SWIFTEP_ADDRESS`
  /// (`host:port`) if that is set, else on the loopback address.
  ///
  /// - Parameters:
  ///   - environment: the variables. Nil: this process's.
  ///   - timeout: how long the other ranks are waited for.
  /// - Throws: `invalidArgument` naming a variable that is missing, malformed or contradicts another, also where ranks
  ///   are on several hosts; otherwise as `processes(rank:rankCount:at:timeout:)`.
  public static func fromEnvironment(
    _ environment: [String: String]? = nil, timeout: Duration = .seconds(100)
  ) throws(EPError) -> Communicator {
    let variables = environment ?? ProcessInfo.processInfo.environment
    let job = try EPError.mapping { () throws(InputFault) in try JobEnvironment(variables) }
    return try processes(
      rank: job.rank, rankCount: job.rankCount, at: MeetingPoint(job.meetingPlace), timeout: timeout)
  }

  /// Becomes the last rank of a group that was made by `fromEnvironment`, and whose ranks call `admit` without an
  /// `allGather`.
  ///
  /// The variables are those of the group's job, but for the rank and the number of ranks, which do not count.
  ///
  /// - Parameters:
  ///   - environment: the variables. Nil: this process's.
  ///   - timeout: how long to wait for the group.
  /// - Throws: `invalidArgument` naming a variable; otherwise as `join(at:timeout:)`.
  public static func joinFromEnvironment(
    _ environment: [String: String]? = nil, timeout: Duration = .seconds(100)
  ) throws(EPError) -> Communicator {
    let variables = environment ?? ProcessInfo.processInfo.environment
    let place = try EPError.mapping { () throws(InputFault) in try JobEnvironment.meetingPlace(variables) }
    return try join(at: MeetingPoint(place), timeout: timeout)
  }

  /// Ranks that are processes of this host, this one being `rank`, which meet at `point`. Collective.
  ///
  /// The processes have to be of one user, one boot of one host, and one network namespace.
  ///
  /// - Parameters:
  ///   - rank: this process's, in `0..<rankCount`.
  ///   - rankCount: at most 4096.
  ///   - point: where the ranks meet; the same on all.
  ///   - timeout: how long the other ranks are waited for.
  /// - Throws: `invalidArgument`; `rankMissing` (step `setup`) naming the lowest rank that did not come, on all that are
  ///   there; `ranksDisagree` on the rank that is wrong about the number of ranks, and on all where processes cannot
  ///   share memory; `rendezvousFailed` where another process is this rank, nobody can listen at `point`, or somebody
  ///   listens there that does not know the token; `systemCall`.
  public static func processes(
    rank: Int, rankCount: Int, at point: MeetingPoint, timeout: Duration = .seconds(100)
  ) throws(EPError) -> Communicator {
    try check(rank: rank, of: rankCount, atMost: Seat.countMax)
    return Communicator(
      group: try Group.processes(
        rank: rank, rankCount: rankCount, timeout: timeout, meeting: point.meeting,
        allGather: point.gather(rank: rank, rankCount: rankCount, timeout: timeout)))
  }

  /// Becomes the last rank of a group that was made at `point`, and whose ranks call `admit` without an `allGather`.
  ///
  /// - Parameters:
  ///   - point: where the group was made.
  ///   - timeout: how long to wait for the group.
  /// - Throws: `rankMissing` (step `regrouping`) where no group comes to `point`; `rendezvousFailed` where another
  ///   process joins already, or a group starts there rather than admits; otherwise as `join(timeout:allGather:)`.
  public static func join(at point: MeetingPoint, timeout: Duration = .seconds(100)) throws(EPError) -> Communicator {
    Communicator(group: try Group.join(timeout: timeout, meeting: point.meeting))
  }
}
