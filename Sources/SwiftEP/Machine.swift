import CUDADriver
import EPKernels
import Glibc
import HostFacts
import HostMachine

/// Where the arenas of a buffer lie.
enum ArenaPlace: String, Codable, CodingKeyRepresentable, Sendable {
  /// In the memory of each rank's machine.
  case machine
  /// In the host's memory, which GPUs reach that do not reach each other's.
  case host
}

/// What a rank's operations run on.
public enum Machine: Equatable, Sendable {
  /// Threads of this host.
  case cpu
  /// A GPU, by its index among those that the driver shows.
  case cuda(gpu: Int)

  var name: String {
    switch self {
    case .cpu: "cpu"
    case .cuda: "cuda"
    }
  }
}

extension Machine {
  /// Whether its kernels check themselves.
  package var isChecked: Bool {
    get throws(EPError) {
      switch self {
      case .cpu: EPKernels.isChecked
      case .cuda(let gpu): try GPUHost.shared(gpu).module.isChecked
      }
    }
  }

  /// Host memory, whatever GPUs reach, if the environment says so.
  ///
  /// - Throws: `invalidArgument` where it says something else.
  func wantedArenaPlace(rank: Int) throws(EPError) -> ArenaPlace {
    guard self != .cpu, let wish = getenv("SWIFTEP_GPU_ARENAS").map({ String(cString: $0) }), !wish.isEmpty else {
      return .machine
    }
    if wish == "host" { return .host }
    throw .invalidArgument(rank: rank, argument: "SWIFTEP_GPU_ARENAS", expected: "host, or nothing", found: wish)
  }

  /// Whether this rank's kernels would reach arenas in the memory of these GPUs.
  ///
  /// - Parameter uuids: of all ranks' GPUs.
  func reaches(_ uuids: Set<String>, rank: Int) throws(EPError) -> Bool {
    guard case .cuda(let index) = self else { return true }
    let gpu = try GPUHost.shared(index).gpu
    do throws(DriverError) {
      for uuid in uuids where try !gpu.reaches(uuid: uuid) { return false }
    } catch {
      throw EPError(error, rank: rank)
    }
    return true
  }

  func workerCountMax() throws(EPError) -> Int {
    switch self {
    case .cpu: 1024
    case .cuda(let gpu): try GPUHost.shared(gpu).gpu.multiprocessorCount
    }
  }

  /// What a rank takes of the memory of either place.
  func memoryNeed(_ plan: ExpertBuffer.Plan, _ group: Group) throws(EPError) -> [ArenaPlace: MemoryNeed] {
    // Threads share what is mapped.
    let onHost = MemoryNeed(
      neededByteCount: plan.systemByteCount(mappedArenaCount: group.isOfProcesses ? group.rankCount : 1),
      limits: FileTree.host.memoryLimits)
    guard case .cuda(let index) = self else { return [.machine: onHost] }
    let gpu = try GPUHost.shared(index).gpu
    do throws(DriverError) {
      let free = MemoryNeed.Domain(name: "GPU \(gpu.uuid)", availableByteCount: Int64(try gpu.freeByteCount()))
      return [.machine: MemoryNeed(neededByteCount: plan.byteCount, domains: [free]), .host: onHost]
    } catch {
      throw EPError(error, rank: group.rank)
    }
  }

  /// What must run at the same time of this rank's kernels; nil where threads take turns.
  ///
  /// - Parameter workers: what the caller wants; nil: nothing.
  func blockNeed(workers: Int?) throws(EPError) -> BlockNeed? {
    guard case .cuda(let index) = self else { return nil }
    let host = try GPUHost.shared(index)
    // MPS can give each process a part of the GPU: then they do not add up.
    let isPart = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") != nil
    return BlockNeed(
      gpu: host.gpu.uuid, name: "\(host.gpu.name) \(index)" + (isPart ? ", the part of process \(getpid())" : ""),
      process: isPart ? getpid() : nil, blockCount: workers, multiprocessorCount: host.gpu.multiprocessorCount,
      room: try host.room())
  }

  /// For a rank of the group's buffer `key`.
  func makeDevice(
    _ group: Group, _ key: BufferKey, workers: Int?, needs: [BlockNeed?], arenaPlace: ArenaPlace
  ) throws(EPError) -> any Device {
    let (rank, rankCount) = (group.rank, group.rankCount)
    switch self {
    case .cpu:
      let workerCount = workers ?? max(1, usableCoreCount() / rankCount)
      return try HostDevice(
        rank: rank, workerCount: workerCount,
        tuning: HostTuning(threadCount: rankCount * workerCount, coreCount: usableCoreCount()))
    case .cuda(let gpu):
      let host = try GPUHost.shared(gpu)
      let shared = try host.sharedLaunches(group, key, needs)
      return try CUDADevice(
        rank: rank, on: host, workerCount: BlockNeed.blockCount(of: rank, in: needs), arenaPlace: arenaPlace,
        sharing: shared)
    }
  }
}

/// Blocks that a rank's kernels have on a GPU, and those that its process may have there.
struct BlockNeed: Codable, Sendable {
  /// Its UUID.
  let gpu: String
  let name: String
  /// What the room is for: all that runs on the GPU, or this process alone.
  let process: Int32?
  /// As the caller wants it.
  let blockCount: Int?
  let multiprocessorCount: Int
  let room: Int

  private struct Room: Hashable {
    let gpu: String
    let process: Int32?
  }

  /// Where the caller says nothing, a rank has its share of half of the GPU's multiprocessors, so that computation and
  /// another buffer have room.
  static func blockCount(of rank: Int, in needs: [BlockNeed?]) -> Int {
    let need = needs[rank]!
    if let count = need.blockCount { return count }
    return max(1, need.multiprocessorCount / (2 * needs.count { $0?.gpu == need.gpu }))
  }

  /// Whether all ranks have the same GPU: then their signals are ordered for it alone.
  static func areOfOneGPU(_ needs: [BlockNeed?]) -> Bool {
    guard let gpu = needs[0]?.gpu else { return false }
    return needs.allSatisfy { $0?.gpu == gpu }
  }

  /// Throws unless the blocks of all ranks of each GPU can run at the same time. `needs` are by rank.
  static func check(_ needs: [BlockNeed?]) throws(EPError) {
    var taken: [Room: Int] = [:]
    for (rank, need) in needs.enumerated() {
      guard let need else { continue }
      let rankCount = needs.count { $0?.gpu == need.gpu }
      // One block of each rank waits for the others, which need room to arrive; and each rank has a stream.
      let rankCountMax = min(need.room - 1, Driver.streamCountMax)
      if rankCount > rankCountMax {
        throw .invalidArgument(
          rank: rank, argument: "rankCount", expected: "at most \(rankCountMax) ranks on one \(need.name)",
          found: "\(rankCount)")
      }
      let room = Room(gpu: need.gpu, process: need.process)
      let (before, blockCount) = (taken[room] ?? 0, blockCount(of: rank, in: needs))
      if before + blockCount > need.room {
        throw .invalidArgument(
          rank: rank, argument: "workers",
          expected:
            "at most \(need.room - before): \(need.name) has room for \(need.room) blocks, \(before) of them of other ranks",
          found: "\(blockCount)")
      }
      taken[room] = before + blockCount
    }
  }
}
