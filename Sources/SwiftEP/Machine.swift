import CUDADriver
import EPKernels
import Glibc
import HostFacts
import HostMachine

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

  /// Workers of one rank where the caller says nothing: its share of the cores, or of half of the GPU's multiprocessors, so
  /// that computation and another buffer have room.
  func workerCount(rankCount: Int) throws(EPError) -> Int {
    switch self {
    case .cpu: max(1, usableCoreCount() / rankCount)
    case .cuda(let gpu): max(1, try GPUHost.shared(gpu).gpu.multiprocessorCount / (2 * rankCount))
    }
  }

  func workerCountMax() throws(EPError) -> Int {
    switch self {
    case .cpu: 1024
    case .cuda(let gpu): try GPUHost.shared(gpu).gpu.multiprocessorCount
    }
  }

  /// Throws unless `rankCount` ranks can run at the same time.
  func check(rank: Int, rankCount: Int) throws(EPError) {
    guard case .cuda(let index) = self else { return }
    let host = try GPUHost.shared(index)
    let blocksPerMultiprocessor: Int
    do throws(DriverError) {
      blocksPerMultiprocessor = try host.module.blocksPerMultiprocessor()
    } catch {
      throw EPError(error, rank: rank)
    }
    // One block of each rank waits for the others, which need room to arrive; and each rank has a stream.
    let room = min(blocksPerMultiprocessor * host.gpu.multiprocessorCount - 1, Driver.streamCountMax)
    if rankCount > room {
      throw .invalidArgument(
        rank: rank, argument: "rankCount", expected: "at most \(room) ranks on one \(host.gpu.name)",
        found: "\(rankCount)")
    }
  }

  func memoryNeed(_ plan: ExpertBuffer.Plan, _ group: Group) throws(EPError) -> MemoryNeed {
    switch self {
    case .cpu:
      // Threads share what is mapped.
      let needed = plan.systemByteCount(mappedArenaCount: group.isOfProcesses ? group.rankCount : 1)
      return MemoryNeed(neededByteCount: needed, limits: FileTree.host.memoryLimits)
    case .cuda(let index):
      let gpu = try GPUHost.shared(index).gpu
      do throws(DriverError) {
        let free = MemoryNeed.Domain(name: "GPU \(index)", availableByteCount: Int64(try gpu.freeByteCount()))
        return MemoryNeed(neededByteCount: plan.byteCount, domains: [free])
      } catch {
        throw EPError(error, rank: group.rank)
      }
    }
  }

  /// What must run at the same time of this rank's kernels; nil where threads take turns.
  func blockNeed(workerCount: Int) throws(EPError) -> BlockNeed? {
    guard case .cuda(let index) = self else { return nil }
    let host = try GPUHost.shared(index)
    // MPS can give each process a part of the GPU: then they do not add up.
    let isPart = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") != nil
    let gpu = "\(host.gpu.name) \(index)" + (isPart ? ", the part of process \(getpid())" : "")
    return BlockNeed(gpu: gpu, blockCount: workerCount, room: try host.room())
  }

  /// For a rank of the group's buffer `key`.
  func makeDevice(_ group: Group, _ key: BufferKey, workerCount: Int) throws(EPError) -> any Device {
    let (rank, rankCount) = (group.rank, group.rankCount)
    switch self {
    case .cpu:
      return try HostDevice(
        rank: rank, workerCount: workerCount,
        tuning: HostTuning(threadCount: rankCount * workerCount, coreCount: usableCoreCount()))
    case .cuda(let gpu):
      let host = try GPUHost.shared(gpu)
      return try CUDADevice(
        rank: rank, on: host, workerCount: workerCount, sharing: try host.sharedLaunches(group, key))
    }
  }
}

/// Blocks that a rank's kernels have on a GPU, and those that its process may have there.
struct BlockNeed: Codable, Sendable {
  let gpu: String
  let blockCount: Int
  let room: Int

  /// Throws unless the blocks of all ranks of each GPU can run at the same time. `needs` are by rank.
  static func check(_ needs: [BlockNeed?]) throws(EPError) {
    var taken: [String: Int] = [:]
    for (rank, need) in needs.enumerated() {
      guard let need else { continue }
      let before = taken[need.gpu] ?? 0
      if before + need.blockCount > need.room {
        throw .invalidArgument(
          rank: rank, argument: "workers",
          expected:
            "at most \(need.room - before): \(need.gpu) has room for \(need.room) blocks, \(before) of them of other ranks",
          found: "\(need.blockCount)")
      }
      taken[need.gpu] = before + need.blockCount
    }
  }
}
