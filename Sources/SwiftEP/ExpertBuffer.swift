import Arena
import CPlatform
import EPKernels
import HostMachine

/// One rank's end of an expert-parallel group: dispatches tokens to the ranks of their experts and combines what comes
/// back.
///
/// Every operation is collective: all ranks call the same operations in the same order, each from its own thread or
/// process. A call that this rank cannot make sense of still meets its peers', so that all ranks throw the same error
/// and can go on. Calls on one buffer may come from any thread, one at a time; further ones wait.
public final class ExpertBuffer: Sendable {
  public let plan: Plan
  public let rank: Int
  public let rankCount: Int
  let core: BufferCore

  /// Creates this rank's buffer. Collective. Takes the memory of the plan at once.
  ///
  /// - Parameters:
  ///   - communicator: the group; its rank count must be the plan's.
  ///   - plan: what to hold; the same on all ranks.
  ///   - workers: threads that one call can use; nil: this rank's share of the host's cores, at least one.
  ///   - timeout: how long a rank is waited for before it is reported missing.
  /// - Throws: `invalidArgument`, `ranksDisagree`, `rankMissing` (step `setup`), `systemCall`; the same on all ranks
  ///   where all are concerned.
  public init(
    _ communicator: Communicator, plan: Plan, workers: Int? = nil, timeout: Duration = .seconds(100)
  ) throws(EPError) {
    let ranksOnHost = communicator.bootstrap.ranksOnHost
    let coreCount = Int(swiftep_usable_core_count())
    let workerCount = workers ?? max(1, coreCount / ranksOnHost)
    var mine = Contribution(terms: Self.terms(plan))
    var made: (arena: RankArena, device: HostDevice)?
    do {
      try Self.check(communicator, plan, workerCount)
      let tuning = HostTuning(threadCount: ranksOnHost * workerCount, coreCount: coreCount)
      let control = ControlLayout(rankCount: Int32(plan.shape.rankCount), expertCount: Int32(plan.shape.expertCount))
      let arena = try Self.makeArena(plan, rank: communicator.rank, controlByteCount: control.byteCount)
      made = (arena, try HostDevice(workerCount: workerCount, tuning: tuning))
      mine.arena = arena.memory
    } catch {
      mine.failure = error
    }
    let all = try communicator.bootstrap.allGather(mine, timeout: timeout)
    for contribution in all {
      if let failure = contribution.failure { throw failure }
    }
    try Self.compare(all)
    guard let made else { preconditionFailure("nothing made and no failure") }
    self.plan = plan
    rank = communicator.rank
    rankCount = communicator.rankCount
    core = try BufferCore(
      communicator: communicator, plan: plan, device: made.device, arena: made.arena, arenas: all.map { $0.arena! },
      timeout: timeout)
  }

  /// Ends the buffer after what was queued has finished. Results and handles stay readable; their use in operations is
  /// an error. Not collective, but to be called when all ranks have made their last call: a rank that calls on finds
  /// this one missing.
  public func close() { core.close() }

  /// Bytes of this rank's arena now: the plan's, or more where routing made it grow.
  public var arenaByteCount: Int64 { core.arena.byteCount }

  /// The machine that runs the protocol.
  public var machineName: String { core.device.name }

  /// Workers that one call can use.
  public var workerCountMax: Int { core.device.workerCountMax }

  // MARK: Setup

  private static func check(_ communicator: Communicator, _ plan: Plan, _ workerCount: Int) throws(EPError) {
    if plan.shape.rankCount != communicator.rankCount {
      throw .invalidArgument(
        rank: communicator.rank, argument: "plan.shape.rankCount", expected: "\(communicator.rankCount)",
        found: "\(plan.shape.rankCount)")
    }
    if !(1...1024).contains(workerCount) {
      throw .invalidArgument(
        rank: communicator.rank, argument: "workers", expected: "1 to 1024", found: "\(workerCount)")
    }
  }

  private static func makeArena(_ plan: Plan, rank: Int, controlByteCount: Int64) throws(EPError) -> RankArena {
    do {
      return try RankArena(
        rank: rank, controlByteCount: controlByteCount, byteCount: plan.arenaByteCount,
        byteCountMax: plan.arenaByteCountMax)
    } catch {
      throw .systemCall(name: error.call, code: error.code)
    }
  }

  /// What must be the same on all ranks for their buffers to work together.
  private static func terms(_ plan: Plan) -> [Contribution.Term] {
    let shape = plan.shape
    return [
      .init(name: "rankCount", value: "\(shape.rankCount)"),
      .init(name: "expertCount", value: "\(shape.expertCount)"),
      .init(name: "expertOwners", value: "\(shape.owners)"),
      .init(name: "tokensPerRankMax", value: "\(shape.tokensPerRankMax)"),
      .init(name: "hidden", value: "\(shape.hidden)"),
      .init(name: "topK", value: "\(shape.topK)"),
      .init(name: "dtype", value: "\(shape.dtype)"),
    ]
  }

  private static func compare(_ all: [Contribution]) throws(EPError) {
    for (rank, contribution) in all.enumerated() {
      for (expected, found) in zip(all[0].terms, contribution.terms) where expected != found {
        throw .ranksDisagree(about: expected.name, rank: rank, expected: expected.value, found: found.value)
      }
    }
  }
}
