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
  let machine: Machine
  private let key: BufferKey

  init(group: Group, plan: ExpertBuffer.Plan, workers: Int?, timeout: Duration, machine: Machine) {
    (self.group, self.plan, self.workers, self.timeout) = (group, plan, workers, timeout)
    self.machine = machine
    key = group.mesh.nextBuffer(of: group.generation)
  }

  func run() throws(EPError) -> BufferCore {
    _ = try gather(0) { contribution throws(EPError) in
      try checkArguments()
      contribution.terms = terms
      contribution.memory = try machine.memoryNeed(plan, group)
      contribution.blocks = try machine.blockNeed(workerCount: workerCount())
      return nil
    } checkingAll: { all throws(EPError) in
      try compare(all)
      try MemoryNeed.check(all.map(\.memory))
      try BlockNeed.check(all.map(\.blocks))
    }
    var made: (arena: RankArena, device: any Device)?
    let parcels = try gather(1) { contribution throws(EPError) in
      let device = try makeDevice()
      let mine = (try makeArena(on: device), device)
      contribution.arenaReservedByteCount = mine.0.memory.reservedByteCount
      contribution.arenaByteCount = mine.0.memory.byteCount
      made = mine
      return mine.0.memory
    }
    guard let (arena, device) = made else { preconditionFailure("nothing made and no failure") }
    var core: BufferCore?
    _ = try gather(2) { _ throws(EPError) in
      core = try BufferCore(
        membership: Membership(group: group, key: key, timeout: timeout, arena: arena), plan: plan, device: device,
        arena: arena, arenas: try attach(parcels, own: arena.memory, to: device), timeout: timeout)
      return nil
    }
    return core!
  }

  // MARK: Gathers

  /// Contributes what `prepare` makes, and throws what it or any other rank's has thrown.
  private func gather(
    _ step: Int, _ prepare: (inout Contribution) throws(EPError) -> (any SymmetricMemory)?,
    checkingAll check: ([Contribution]) throws(EPError) -> Void = { _ in }
  ) throws(EPError) -> [(contribution: Contribution, parcel: Parcel)] {
    var contribution = Contribution()
    var memory: (any SymmetricMemory)?
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
      .init(name: "machine", value: machine.name),
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
    try machine.check(rank: group.rank, rankCount: group.rankCount)
    let workerCountMax = try machine.workerCountMax()
    if let workers, !(1...workerCountMax).contains(workers) {
      throw .invalidArgument(
        rank: group.rank, argument: "workers", expected: "1 to \(workerCountMax)", found: "\(workers)")
    }
  }

  private func makeArena(on device: any Device) throws(EPError) -> RankArena {
    let control = ControlLayout(rankCount: Int32(plan.shape.rankCount), expertCount: Int32(plan.shape.expertCount))
    let memory = try device.makeArena(
      byteCountMax: plan.arenaByteCountMax, clearing: roundUpToPages(plan.arenaByteCount))
    return RankArena(rank: group.rank, memory: memory, controlByteCount: control.byteCount)
  }

  private func makeDevice() throws(EPError) -> any Device {
    try machine.makeDevice(group, key, workerCount: workerCount())
  }

  private func workerCount() throws(EPError) -> Int {
    if let workers { return workers }
    return try machine.workerCount(rankCount: group.rankCount)
  }

  /// Every rank's arena, mapped here.
  private func attach(
    _ all: [(contribution: Contribution, parcel: Parcel)], own: any SymmetricMemory, to device: any Device
  ) throws(EPError) -> [any SymmetricMemory] {
    try all.enumerated().map { peer, gathered throws(EPError) in
      if peer == group.rank { return own }
      // Ranks of one process pass the memory itself.
      if let memory = gathered.parcel.memory { return memory }
      guard let file = gathered.parcel.file else {
        // A descriptor that this process may not have more of is left out of the message that it came with.
        throw .systemCall(rank: group.rank, name: "recvmsg(SCM_RIGHTS)", code: EMFILE)
      }
      let contribution = gathered.contribution
      return try device.attach(
        file, reservedByteCount: contribution.arenaReservedByteCount, byteCount: contribution.arenaByteCount)
    }
  }
}
