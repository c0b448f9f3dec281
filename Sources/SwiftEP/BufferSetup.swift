import Arena
import EPKernels
import Glibc
import HostFacts
import HostMachine

/// The creation of one rank's buffer. In gathers, so that what goes wrong anywhere is the same error everywhere: what the
/// ranks want; between several GPUs, whether each reaches all; the arenas that they have made; and whether each could
/// reach all of those.
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

  private enum Step: Int, CaseIterable {
    case wishes, reach, arenas, attachment
  }

  static let stepCount = Step.allCases.count

  func run() throws(EPError) -> BufferCore {
    let wishes = try gather(.wishes) { contribution throws(EPError) in
      try checkArguments()
      contribution.terms = terms
      contribution.memory = try machine.memoryNeed(plan, group)
      contribution.blocks = try machine.blockNeed(workers: workers)
      contribution.arenaPlace = try machine.wantedArenaPlace(rank: group.rank)
      return nil
    }.map(\.contribution)
    try compare(wishes)
    let place = try agreeOnPlace(wishes)
    try MemoryNeed.check(wishes.map { $0.memory[place] })
    try BlockNeed.check(wishes.map(\.blocks))
    var made: (arena: RankArena, device: any Device)?
    let parcels = try gather(.arenas) { contribution throws(EPError) in
      let device = try machine.makeDevice(
        group, key, workers: workers, needs: wishes.map(\.blocks), arenaPlace: place)
      let mine = (try makeArena(on: device), device)
      contribution.arenaReservedByteCount = mine.0.memory.reservedByteCount
      contribution.arenaByteCount = mine.0.memory.byteCount
      made = mine
      return mine.0.memory
    }
    guard let (arena, device) = made else { preconditionFailure("nothing made and no failure") }
    var core: BufferCore?
    _ = try gather(.attachment) { _ throws(EPError) in
      core = try BufferCore(
        membership: Membership(group: group, key: key, timeout: timeout, arena: arena), plan: plan, device: device,
        arena: arena, arenas: try attach(parcels, own: arena.memory, to: device),
        sharesDevice: BlockNeed.areOfOneGPU(wishes.map(\.blocks)), timeout: timeout)
      return nil
    }
    return core!
  }

  /// Where all arenas lie: in host memory if some rank wants that, or does not reach the GPU of another.
  private func agreeOnPlace(_ wishes: [Contribution]) throws(EPError) -> ArenaPlace {
    if wishes.contains(where: { $0.arenaPlace == .host }) { return .host }
    let gpus = Set(wishes.compactMap { $0.blocks?.gpu })
    if gpus.count < 2 { return .machine }
    let found = try gather(.reach) { contribution throws(EPError) in
      contribution.arenaPlace = try machine.reaches(gpus, rank: group.rank) ? .machine : .host
      return nil
    }
    return found.contains { $0.contribution.arenaPlace == .host } ? .host : .machine
  }

  // MARK: Gathers

  /// Contributes what `prepare` makes, and throws what it or any other rank's has thrown.
  private func gather(
    _ step: Step, _ prepare: (inout Contribution) throws(EPError) -> (any SymmetricMemory)?
  ) throws(EPError) -> [(contribution: Contribution, parcel: Parcel)] {
    var contribution = Contribution()
    var memory: (any SymmetricMemory)?
    do {
      memory = try prepare(&contribution)
    } catch {
      contribution.failure = error
    }
    let all = try group.mesh.gather(contribution, memory: memory, for: key, step: step.rawValue, timeout: timeout)
    for (contribution, _) in all {
      if let failure = contribution.failure { throw failure }
    }
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
      .init(name: "masking", value: "\(plan.masking)"),
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
    guard group.isOfProcesses else {
      return RankArena(rank: group.rank, memory: memory, controlByteCount: control.byteCount)
    }
    return RankArena(rank: group.rank, memory: memory, controlByteCount: control.byteCount) {
      [mesh = group.mesh, key, timeout] piece throws(EPError) in
      try mesh.share(piece, of: key, timeout: timeout)
    }
  }

  /// Every rank's arena, mapped here.
  private func attach(
    _ all: [(contribution: Contribution, parcel: Parcel)], own: any SymmetricMemory, to device: any Device
  ) throws(EPError) -> [any SymmetricMemory] {
    try all.enumerated().map { peer, gathered throws(EPError) in
      if peer == group.rank { return own }
      // Ranks of one process pass the memory itself.
      if let memory = gathered.parcel.memory {
        try device.reach(memory)
        return memory
      }
      guard let file = gathered.parcel.file else { throw .receivedNoDescriptor(rank: group.rank) }
      let contribution = gathered.contribution
      return try device.attach(
        file, reservedByteCount: contribution.arenaReservedByteCount, byteCount: contribution.arenaByteCount)
    }
  }
}
