import CUDADriver
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

  func makeDevice(rank: Int, rankCount: Int, workerCount: Int) throws(EPError) -> any Device {
    switch self {
    case .cpu:
      return try HostDevice(
        rank: rank, workerCount: workerCount,
        tuning: HostTuning(threadCount: rankCount * workerCount, coreCount: usableCoreCount()))
    case .cuda(let gpu): return try CUDADevice(rank: rank, on: try GPUHost.shared(gpu), workerCount: workerCount)
    }
  }
}
