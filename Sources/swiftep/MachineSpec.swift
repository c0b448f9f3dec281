import Conformance
import HostFacts
import SwiftEP

/// What ranks run on, as the flags say it.
struct MachineSpec: Equatable {
  /// Rank r runs on the one of index r modulo their number.
  let machines: [Machine]

  static let flags = [
    Flag("machine", "MACHINE", "what ranks run on: cpu or cuda (default cpu)"),
    Flag("gpus", "N", "GPUs that the ranks share: rank r has GPU r modulo N (default 1)"),
  ]

  private enum Kind: String, CaseIterable {
    case cpu, cuda
  }

  init(_ arguments: Arguments) throws(UsageError) {
    let kind = try arguments.choice("machine", Kind.self) ?? .cpu
    if kind == .cpu && arguments.has("gpus") {
      throw UsageError("--gpus", expected: "none with --machine cpu", found: "one")
    }
    let gpuCount = try arguments.integer("gpus", in: 1...64, default: 1)
    machines = kind == .cpu ? [.cpu] : (0..<gpuCount).map { .cuda(gpu: $0) }
  }

  var isGPU: Bool { machines != [.cpu] }

  var gpuCountText: String { machines.count == 1 ? "one GPU" : "\(machines.count) GPUs" }

  /// A rank's share of the cores, or of its GPU's multiprocessors. Asks for those in a process of its own: ranks that are
  /// forked from one that uses a driver could not.
  func workerCount(rankCount: Int) throws -> Int {
    if !isGPU { return max(1, usableCoreCount() / rankCount) }
    let multiprocessorCount = try processValues(1, patience: .seconds(60)) { _, _ in
      try GPUHost.shared(0).gpu.multiprocessorCount
    }[0]
    let ranksPerGPU = (rankCount + machines.count - 1) / machines.count
    return max(1, multiprocessorCount / ranksPerGPU)
  }

  /// The flags that say the same.
  var flagText: String {
    isGPU ? " --machine cuda" + (machines.count == 1 ? "" : " --gpus \(machines.count)") : ""
  }
}
