import Conformance
import SwiftEP

let verifyCommand = Command(
  name: "verify", summary: "random jobs against an oracle, until the time is over or one fails",
  flags: [processesFlag] + MachineSpec.flags + [
    Flag("seconds", "N", "how long (default 10)"),
    Flag("seed", "S", "of the first job; each further one counts up (default 1)"),
    Flag("ranks", "N", "ranks of each job (default: 1 to 8, at random)"),
    Flag(
      "replays", "N",
      "instead: a dispatch and a combine, recorded as graphs and run N times\nwith changing routing, in each layout;\non GPUs, on streams of the caller's too"
    ),
    Flag(
      "checks", nil,
      "instead: rows are led astray, and kernels that check themselves must say so\n(of a debug build; on a GPU those of SWIFTEP_KERNELS)"
    ),
    Flag(
      "one-launch", nil,
      "with --machine cuda and checked kernels (SWIFTEP_KERNELS): one launch for\nall ranks' kernels of an operation, as compute-sanitizer needs it"
    ),
  ],
  notes: "A failure is printed with its job and the seed that repeats it.",
  body: { arguments in
    let seconds = try arguments.real("seconds", in: 0.1...1_000_000, default: 10)
    let seed = try arguments.seed("seed", default: 1)
    let spec = try MachineSpec(arguments)
    let replayCount = try arguments.integer("replays", in: 0...100_000_000, default: 0)
    let ranks = try arguments.integer("ranks", in: 1...64)
    if ranks != nil && (replayCount > 0 || arguments.has("checks")) {
      throw UsageError("--ranks", expected: "none with --replays or --checks", found: "one")
    }
    let sharesLaunches = arguments.has("one-launch")
    if sharesLaunches && (!spec.isGPU || arguments.has("processes") || replayCount > 0) {
      throw UsageError(
        "--one-launch", expected: "with --machine cuda, without --processes and --replays", found: "otherwise")
    }
    if sharesLaunches { GPUHost.sharesLaunches.withLock { $0 = true } }
    let fabric: any Fabric =
      arguments.has("processes") ? ProcessFabric(machines: spec.machines) : ThreadFabric(spec.machines)
    let status = StatusLine()
    try printNow("seed \(seed)")
    do {
      if arguments.has("checks") {
        try checkBrokenPlaces(on: fabric)
        return print("rows that were led astray were all found")
      }
      if replayCount > 0 { return try verifyReplays(replayCount, seed: seed, on: fabric, spec) }
      let report = { (job: Job, passedCount: Int) in
        status.show("verify: \(passedCount) jobs")
        if passedCount % 100 == 0 { try? printNow("\(passedCount) jobs passed, the last of seed \(job.seed)") }
      }
      let passedCount = try verify(
        seconds: seconds, seed: seed, ranks: ranks, allCall: sharesLaunches, on: fabric, report: report)
      status.clear()
      print("\(passedCount) jobs passed")
    } catch let failure as ConformanceFailure {
      status.clear()
      throw CheckFailure(
        what: failureText(
          failure, processes: arguments.has("processes"), spec, replays: replayCount, ranks: ranks,
          sharesLaunches: sharesLaunches))
    }
  })

private func verifyReplays(_ count: Int, seed: UInt64, on fabric: any Fabric, _ machines: MachineSpec) throws {
  for layout in RowLayout.allCases {
    for (how, waiting, receivesLater) in [
      ("workers wait", Waiting.workers, false), ("streams wait", .stream, false), ("received later", .workers, true),
    ] {
      var job = Job(rankCount: 4, tokenCount: 64, hidden: 512, topK: 4, expertCount: 16)
      (job.layout, job.seed, job.workers, job.skew) = (layout, seed, 2, 0.5)
      job.receivesLater = receivesLater
      if waiting == .stream { job.ranksOfWaitingStreams = Set(0..<job.rankCount) }
      let how = "rows \(layout), \(how)"
      try checkReplays(job, count: count, on: fabric)
      try printNow("\(count) runs of graphs passed, \(how)")
      if !machines.isGPU || receivesLater { continue }
      try checkStreams(job, count: count, on: fabric)
      try printNow("\(count) calls on streams and \(count) runs of graphs captured there passed, \(how)")
    }
  }
}

/// What failed, with which job, and how to see it again.
func failureText(
  _ failure: ConformanceFailure, processes: Bool, _ machines: MachineSpec? = nil, replays: Int = 0,
  ranks: Int? = nil, sharesLaunches: Bool = false
) -> String {
  let flags =
    (processes ? " --processes" : "") + (machines?.flagText ?? "") + (ranks.map { " --ranks \($0)" } ?? "")
    + (sharesLaunches ? " --one-launch" : "")
  let place = failure.rank < 0 ? "" : "rank \(failure.rank), "
  return """
    \(place)\(failure.step): \(failure.what)
    job: \(failure.job)
    repeat: swiftep verify\(flags) \(replays == 0 ? "--seconds 1" : "--replays \(replays)") --seed \(failure.job.seed)
    """
}
