import SwiftEP

/// What ranks run on, as the flags say it.
struct MachineSpec: Equatable {
  let machine: Machine

  static let flags = [
    Flag("machine", "MACHINE", "what ranks run on: cpu or cuda (default cpu)"),
    Flag("gpus", "N", "GPUs that the ranks share (default 1; more than 1 is not there yet)"),
  ]

  private enum Kind: String, CaseIterable {
    case cpu, cuda
  }

  init(_ arguments: Arguments) throws(UsageError) {
    let kind = try arguments.choice("machine", Kind.self) ?? .cpu
    if kind == .cpu && arguments.has("gpus") {
      throw UsageError("--gpus", expected: "none with --machine cpu", found: "one")
    }
    _ = try arguments.integer("gpus", in: 1...1, default: 1)
    machine = kind == .cpu ? .cpu : .cuda(gpu: 0)
  }
}
