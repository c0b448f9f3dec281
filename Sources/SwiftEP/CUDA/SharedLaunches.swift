import CUDADriver
import EPKernels
import HostMachine

/// Makes one launch of what the ranks of a buffer launch at a time, for tools that let a GPU run one launch after the
/// other, as compute-sanitizer does: ranks wait for each other. All ranks are threads of this process, on one GPU.
final class SharedLaunches: Sendable {
  /// Which buffer, of those of this process.
  struct Key: Hashable, Sendable {
    let members: [MemberID]
    let buffer: BufferKey
  }

  /// What one rank launches.
  struct Part: Sendable {
    let launch: KernelLaunch
    let end: KernelModule.End
    let workerCount: Int
    let stream: CUDADriver.Stream
  }

  private let host: GPUHost
  private let gathering: Gathering<Part>
  /// `RankLaunch` of each rank, then their arguments.
  private let memory: any TensorStorage
  private let byteCount: Int64

  init(_ host: GPUHost, rankCount: Int) throws(EPError) {
    if !host.module.isChecked {
      throw .machineUnavailable(
        "one launch for all ranks: the kernels are not checked ones (see scripts/build-kernels --checked and \(KernelText.variable))"
      )
    }
    self.host = host
    gathering = Gathering(rankCount: rankCount)
    byteCount = Int64(rankCount) * (Self.headByteCount + Self.argumentsByteCount)
    memory = try host.pool.take(byteCount, rank: -1)
  }

  private static var headByteCount: Int64 { Int64(MemoryLayout<RankLaunch>.stride) }
  private static var argumentsByteCount: Int64 {
    alignUp(Int64(max(MemoryLayout<DispatchArguments>.size, MemoryLayout<CombineArguments>.size)), to: 64)
  }

  /// Returns when all ranks have come here and everything is launched: behind what any of them has queued before, and
  /// before what it queues from then on.
  func launch(_ part: Part, as rank: Int) throws(EPError) {
    try gathering.meet(as: rank, with: part) { parts throws(EPError) in
      if let other = parts.firstIndex(where: { $0.workerCount != parts[0].workerCount }) {
        throw .ranksDisagree(
          about: "workers, in one launch for all ranks", rank: other, expected: "\(parts[0].workerCount)",
          found: "\(parts[other].workerCount)")
      }
      let image = try image(of: parts)
      do throws(DriverError) { try start(image, parts, on: part.stream) } catch { throw EPError(error, rank: rank) }
    }
  }

  func leave(_ rank: Int) { gathering.leave(rank) }

  private func start(
    _ image: HostMemory, _ parts: [Part], on stream: CUDADriver.Stream
  ) throws(DriverError) {
    let others = parts.map(\.stream).filter { $0 !== stream }
    for other in others {
      let queued = try StreamEvent(host.gpu, isTimed: false)
      try queued.record(on: other)
      try stream.wait(for: queued)
    }
    let launches = DeviceAddress(bits: memory.base.bits)
    try stream.copy(from: image.base.hostPointer, to: launches, byteCount: Int(byteCount))
    try host.module.launchRanks(launches, rankCount: parts.count, blockCount: parts[0].workerCount, on: stream)
    let launched = try StreamEvent(host.gpu, isTimed: false)
    try launched.record(on: stream)
    for other in others { try other.wait(for: launched) }
  }

  /// What is to lie in `memory`.
  private func image(of parts: [Part]) throws(EPError) -> HostMemory {
    let image = try HostMemory(byteCount: byteCount)
    for (rank, part) in parts.enumerated() {
      let offset = Int64(parts.count) * Self.headByteCount + Int64(rank) * Self.argumentsByteCount
      let launch = RankLaunch(
        kernel: part.launch.index, arguments: memory.base.advanced(byBytes: offset),
        counter: Address(bits: part.end.counter), word: Address(bits: part.end.word), ticket: part.end.ticket)
      image.base.store(launch, at: Int32(rank))
      part.launch.withArguments {
        (image.base.hostPointer + Int(offset)).copyMemory(from: $0.baseAddress!, byteCount: $0.count)
      }
    }
    return image
  }
}

extension GPUHost {
  /// Whether buffers that are made from now on launch for all their ranks at once. Graphs are refused then.
  package static let sharesLaunches = Guarded(false)

  /// What the ranks of a buffer have in common, if they launch together; the last of them to ask takes it along.
  func sharedLaunches(_ group: Group, _ key: BufferKey, _ needs: [BlockNeed?]) throws(EPError) -> SharedLaunches? {
    if !Self.sharesLaunches.withLock({ $0 }) { return nil }
    if group.isOfProcesses { throw .machineUnavailable("one launch for all ranks, with ranks that are processes") }
    if Set(needs.map { $0?.gpu }).count > 1 { throw .machineUnavailable("one launch for all ranks, on several GPUs") }
    return try openLaunches.withLock { open throws(EPError) in
      let buffer = SharedLaunches.Key(members: group.members, buffer: key)
      let launches =
        if let found = open[buffer] { found.launches } else {
          try SharedLaunches(self, rankCount: group.rankCount)
        }
      let askedCount = (open[buffer]?.askedCount ?? 0) + 1
      open[buffer] = askedCount == group.rankCount ? nil : (launches, askedCount)
      return launches
    }
  }
}
