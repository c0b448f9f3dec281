import Arena
import EPKernels
import Glibc
import HostFacts
import HostMachine

/// The creation of one rank's buffer. In three gathers, so that what goes wrong anywhere is the same error everywhere:
/// what the ranks want, the arenas that they have made for it, and whether each could reach all of those.
struct BufferSetup {
  let group: Group
  let plan: ExpertBuffer.Plan
  let workers: Int?
  let timeout: Duration
  private let key: BufferKey

  init(group: Group, plan: ExpertBuffer.Plan, workers: Int?, timeout: Duration) {
    (self.group, self.plan, self.workers, self.timeout) = (group, plan, workers, timeout)
    key = group.mesh.nextBuffer(of: group.generation)
  }

  private var coreCount: Int { usableCoreCount() }
  private var workerCount: Int { workers ?? max(1, coreCount / group.rankCount) }

  func run() throws(EPError) -> BufferCore {
    _ = try gather(0) { contribution throws(EPError) in
      try checkArguments()
      contribution.terms = terms
      contribution.memory = memoryNeed
      return nil
    } checkingAll: { all throws(EPError) in
      try compare(all)
      try MemoryNeed.check(all.map(\.memory))
    }
    var made: (arena: RankArena, device: HostDevice)?
    let parcels = try gather(1) { contribution throws(EPError) in
      let mine = (try makeArena(), try makeDevice())
      contribution.arenaReservedByteCount = mine.0.memory.reservedByteCount
      made = mine
      return mine.0.memory
    }
    guard let (arena, device) = made else { preconditionFailure("nothing made and no failure") }
    var core: BufferCore?
    _ = try gather(2) { _ throws(EPError) in
      core = try BufferCore(
        membership: Membership(group: group, key: key, timeout: timeout, arena: arena), plan: plan, device: device,
        arena: arena,
        arenas: try attach(parcels, own: arena.memory), timeout: timeout)
      return nil
    }
    return core!
  }

  // MARK: Gathers

  /// Contributes what `prepare` makes, and throws what it or any other rank's has thrown.
  private func gather(
    _ step: Int, _ prepare: (inout Contribution) throws(EPError) -> ArenaMemory?,
    checkingAll check: ([Contribution]) throws(EPError) -> Void = { _ in }
  ) throws(EPError) -> [(contribution: Contribution, parcel: Parcel)] {
    var contribution = Contribution()
    var memory: ArenaMemory?
    do {
      memory = try prepare(&contribution)
    } catch {
      contribution.failure = error
    }
    let all = try group.mesh.gather(contribution, memory: memory, for: key, step: step, timeout: timeout)
    for (contribution, _) in all {
      if let failure = contribution.failure { throw failure }
    }
    try check(all.map(\.contribution))
    return all
  }

  /// What must be the same on all ranks for their buffers to work together.
  private var terms: [Contribution.Term] {
    let shape = plan.shape
    return [
      .init(name: "rankCount", value: "\(shape.rankCount)"),
      .init(name: "expertCount", value: "\(shape.expertCount)"),
      .init(name: "expertOwners", value: Self.describe(shape.owners)),
      .init(name: "tokensPerRankMax", value: "\(shape.tokensPerRankMax)"),
      .init(name: "hidden", value: "\(shape.hidden)"),
      .init(name: "topK", value: "\(shape.topK)"),
      .init(name: "dtype", value: "\(shape.dtype)"),
    ]
  }

  /// Short, and different for different owners: messages have a limited size.
  private static func describe(_ owners: [Int32]) -> String {
    if owners.count <= 256 { return "\(owners)" }
    let hash = owners.reduce(0xcbf2_9ce4_8422_2325 as UInt64) {
      ($0 ^ UInt64(UInt32(bitPattern: $1))) &* 0x100_0000_01b3
    }
    return "\(owners.prefix(8)) and \(owners.count - 8) more (hash \(String(hash, radix: 16)))"
  }

  private func compare(_ all: [Contribution]) throws(EPError) {
    for (rank, contribution) in all.enumerated() {
      for (expected, found) in zip(all[0].terms, contribution.terms) where expected != found {
        throw .ranksDisagree(about: expected.name, rank: rank, expected: expected.value, found: found.value)
      }
    }
  }

  // MARK: This rank's part

  private func checkArguments() throws(EPError) {
    if plan.shape.rankCount != group.rankCount {
      throw .invalidArgument(
        rank: group.rank, argument: "plan.shape.rankCount", expected: "\(group.rankCount)",
        found: "\(plan.shape.rankCount)")
    }
    if !(1...1024).contains(workerCount) {
      throw .invalidArgument(rank: group.rank, argument: "workers", expected: "1 to 1024", found: "\(workerCount)")
    }
  }

  private var memoryNeed: MemoryNeed {
    // Threads share what is mapped.
    let needed = plan.systemByteCount(mappedArenaCount: group.isOfProcesses ? group.rankCount : 1)
    return MemoryNeed(neededByteCount: needed, limits: FileTree.host.memoryLimits)
  }

  private func makeArena() throws(EPError) -> RankArena {
    let control = ControlLayout(rankCount: Int32(plan.shape.rankCount), expertCount: Int32(plan.shape.expertCount))
    do throws(SystemCallError) {
      return try RankArena(
        rank: group.rank, controlByteCount: control.byteCount, byteCount: plan.arenaByteCount,
        byteCountMax: plan.arenaByteCountMax)
    } catch {
      throw .systemCall(rank: group.rank, name: error.call, code: error.code)
    }
  }

  private func makeDevice() throws(EPError) -> HostDevice {
    let tuning = HostTuning(threadCount: group.rankCount * workerCount, coreCount: coreCount)
    return try HostDevice(rank: group.rank, workerCount: workerCount, tuning: tuning)
  }

  /// Every rank's arena, mapped here.
  private func attach(
    _ all: [(contribution: Contribution, parcel: Parcel)], own: ArenaMemory
  ) throws(EPError) -> [ArenaMemory] {
    try all.enumerated().map { peer, gathered throws(EPError) in
      if peer == group.rank { return own }
      do throws(SystemCallError) {
        let arena = try gathered.parcel.attach(reservedByteCount: gathered.contribution.arenaReservedByteCount)
        // A descriptor that this process may not have more of is left out of the message that it came with.
        guard let arena else { throw SystemCallError(call: "recvmsg(SCM_RIGHTS)", code: EMFILE) }
        return arena
      } catch {
        throw .systemCall(rank: group.rank, name: error.call, code: error.code)
      }
    }
  }
}
