import CUDADriver
import Conformance
import Foundation
import HostFacts
import SwiftEP

/// Of `bench` and `verify`.
let processesFlag = Flag("processes", nil, "make each rank a process of its own rather than a thread")

let benchCommand = Command(
  name: "bench", summary: "dispatch and combine, checked against an oracle, then timed against a copy",
  flags: JobSpec.flags + [processesFlag] + MachineSpec.flags + [
    Flag(
      "workers", "N",
      "threads, or multiprocessors, of each rank (default: cores or\nmultiprocessors / ranks, at least 1)"),
    Flag(
      "mode", "MODE",
      "throughput; or latency: 1, 2, 4 ... tokens up to --tokens (default\n512), 10,000 iterations each (default throughput)"
    ),
    Flag("iterations", "N", "timed iterations (default 20; 10,000 of latency)"),
    Flag(
      "replays", "N",
      "on a GPU: record each operation as a graph that runs it N times in\na row (default 0: call it once)"),
    Flag(
      "waiting", "WHO",
      "on a GPU: workers, or stream, so that waits hold no multiprocessor\n(default workers)"),
    .tokensPerStep,
    Flag("seed", "S", "of everything random (default 1)"),
    Flag("skew", "S", "Zipf exponent of the experts' popularity, 0: uniform (default 0)"),
    Flag("text", "FILE", "take the tokens from a text: seeded embeddings, routed by a seeded gate"),
    Flag("routing", "FILE.npy", "recorded experts, i4 or i8 [tokens, topK], divided over the ranks"),
    Flag("input", "FILE.npy", "recorded rows, f2, f4, u2 (BF16) or u1 [tokens, hidden], divided over\nthe ranks"),
    Flag("svg", "FILE", "of latency: write a plot"),
    Flag("json", "FILE", "write the result as JSON; -: to stdout, instead of the table"),
    Flag("trace", "FILE", "write what every rank did in the timed iterations, for Perfetto or\nchrome://tracing"),
  ],
  notes: """
    On GPUs, rows are also combined from an ordinary tensor, which peers cannot read where it lies.

    An operation's time is from when the last rank is ready until the last rank has finished; on GPUs, the longest
    of the ranks' own, from where it begins there, by the GPU's clock. GB/s are the bytes of rows that a rank
    received (its own tokens' included) over the median time.

    The floor is (rows read once + rows written once) / the bandwidth of a copy: memcpy or streaming stores,
    the better, by as many threads over the same sizes, measured in the same run; on a GPU, the driver's own copy
    of 512 MiB. With several GPUs, of the one whose memory has most to do; or, if that takes longer, what crosses its
    link / the link's limit: what each GPU writes to its peers' memory (dispatch) or reads there (combine) by the
    driver's own copies, all GPUs at once.

    A trace has an event for each operation of each rank, with its steps, counts, and the peer that came last;
    and the longest wait of each rank for each peer. About 2.5 KB an iteration and rank.
    """,
  body: { arguments in
    let settings = try BenchSettings(arguments)
    if settings.mode == .latency { return try settings.runLatency() }
    let (report, flights) = try settings.run(link: settings.measureLink())
    if settings.jsonPath == "-" {
      try printDocument(try report.json())
    } else {
      print("\(settings.summary)\n")
      print(report.table())
      if settings.tracePath != nil { print("\n\(WaitMatrix(flights).table)") }
      if let path = settings.jsonPath { try writeFile(try report.json(), path, flag: "json") }
    }
    if let path = settings.tracePath {
      try writeFile(try Trace(flights, job: settings.job.summary).json(), path, flag: "trace")
    }
  })

struct BenchSettings {
  enum Mode: String, CaseIterable {
    case throughput, latency
  }

  let mode: Mode
  private(set) var job: JobSpec
  let machines: MachineSpec
  let workerCount: Int
  let iterationCount: Int
  let replayCount: Int
  let waiting: Waiting
  /// Of rows that do not lie in the arena, on GPUs.
  let staging: ExpertBuffer.Staging
  let seed: UInt64
  let skew: Double
  let jsonPath: String?
  let svgPath: String?
  let tracePath: String?
  let processes: Bool
  private let recorded: RecordedInput?
  private let text: TokenizedText?

  init(_ arguments: Arguments) throws {
    mode = try arguments.choice("mode", Mode.self) ?? .throughput
    job = try JobSpec(arguments)
    if mode == .latency && !arguments.has("tokens") { job.tokensPerRank = 512 }
    for flag in ["routing", "input", "trace"] where mode == .latency && arguments.has(flag) {
      throw UsageError("--\(flag)", expected: "none with --mode latency", found: "one")
    }
    if mode != .latency && arguments.has("svg") {
      throw UsageError("--svg", expected: "none without --mode latency", found: "one")
    }
    machines = try MachineSpec(arguments)
    processes = arguments.has("processes")
    workerCount = try arguments.integer("workers", in: 1...256) ?? machines.workerCount(rankCount: job.rankCount)
    let threadCountMax = 1024
    if job.rankCount * workerCount > threadCountMax {
      throw UsageError(
        "--workers", expected: "at most \(threadCountMax) workers of all ranks", found: "\(job.rankCount * workerCount)"
      )
    }
    iterationCount = try arguments.integer("iterations", in: 1...1_000_000, default: mode == .latency ? 10_000 : 20)
    for flag in ["replays", "waiting", "tokens-per-step"] where !machines.isGPU && arguments.has(flag) {
      throw UsageError("--\(flag)", expected: "none with --machine cpu", found: "one")
    }
    waiting = try arguments.choice("waiting", Waiting.self) ?? .workers
    staging = try arguments.stagingInSteps() ?? .whole
    replayCount = try arguments.integer("replays", in: 0...1000, default: 0)
    seed = try arguments.seed("seed", default: 1)
    skew = try arguments.real("skew", in: 0...10, default: 0)
    jsonPath = arguments.string("json")
    if let jsonPath, jsonPath != "-" { try checkWritable(jsonPath, flag: "json") }
    svgPath = arguments.string("svg")
    if let svgPath { try checkWritable(svgPath, flag: "svg") }
    tracePath = arguments.string("trace")
    if let tracePath { try checkWritable(tracePath, flag: "trace") }
    for other in ["routing", "input", "skew"] where arguments.has("text") && arguments.has(other) {
      throw UsageError("--\(other)", expected: "none with --text", found: "one")
    }
    if arguments.has("routing") && arguments.has("skew") {
      throw UsageError("--skew", expected: "none with --routing", found: "one")
    }
    text = try arguments.string("text").map { path in
      try TokenizedText(try readFile(path, flag: "text"), subject: "--text \(path)")
    }
    recorded = try RecordedInput(arguments, job: &job)
    // Says what is wrong with the job before anything is allocated.
    try checkMemory(
      try job.plan(receivedTokensMax: receivedTokensMax(0), workers: workerCount, staging: job.rowType.staging))
  }

  /// The job, and who runs it.
  var summary: String {
    let gpus = machines.isGPU ? " on \(machines.gpuCountText)" : ""
    let kind = (processes ? "processes" : "threads") + gpus
    let workers = "\(workerCount) \(workerCount == 1 ? "worker" : "workers") a rank"
    let waits = waiting == .stream ? ", streams wait" : ""
    let tokens = mode == .latency ? "1 to \(job.tokensPerRank)" : "\(job.tokensPerRank)"
    return "\(job.summary(tokens: tokens)); \(kind), \(workers)\(waits), \(iterationCount) iterations"
  }

  func runLatency() throws {
    var report = LatencyReport(sizes: [])
    let link = try measureLink()
    for tokenCount in LatencyReport.tokenCounts(upTo: job.tokensPerRank) {
      var settings = self
      settings.job.tokensPerRank = tokenCount
      report.sizes.append(try settings.run(link: link).report)
    }
    if jsonPath == "-" {
      try printDocument(try report.json())
    } else {
      print("\(summary)\n\n\(report.table)")
      if let jsonPath { try writeFile(try report.json(), jsonPath, flag: "json") }
    }
    if let svgPath { try writeFile(Data(LatencyPlot(report, title: summary).svg.utf8), svgPath, flag: "svg") }
  }

  /// In a process of its own: ranks that are forked from one that uses a driver could not.
  ///
  /// - Returns: nil of one GPU, and where arenas do not lie in GPUs' memory.
  func measureLink() throws -> PeerCopies? {
    let gpuCount = min(machines.machines.count, job.rankCount)
    let arenaPlace = ProcessInfo.processInfo.environment["SWIFTEP_GPU_ARENAS"] ?? ""
    if !machines.isGPU || gpuCount == 1 || !arenaPlace.isEmpty { return nil }
    return try processValues(1, patience: .seconds(120)) { _, _ in
      // Ranks say what is missing, in the words that they have for it.
      guard case .success(let driver) = Driver.shared, gpuCount <= driver.gpuCount else { return nil }
      return try PeerCopies.measured(on: (0..<gpuCount).map { try GPU(driver, index: $0) })
    }[0]
  }

  /// - Returns: what was found, and the ranks' flight records where a trace is wanted.
  func run(link: PeerCopies?) throws -> (report: BenchReport, flights: [FlightRecord]) {
    let workload: Workload
    if let text {
      workload = try .text(job, text, seed: seed)
    } else if let recorded {
      workload = try recorded.workload(job, skew: skew, seed: seed)
    } else {
      workload = try .random(job, skew: skew, seed: seed)
    }
    let rowsPerToken = job.layout == .bySource ? 1 : job.topK
    let receivedTokens = ((workload.receivedRowCounts.max() ?? 0) + rowsPerToken - 1) / rowsPerToken
    let plan = try job.plan(
      receivedTokensMax: receivedTokensMax(receivedTokens), workers: workerCount, staging: job.rowType.staging)
    if machines.isGPU { return try runOnGPU(workload, link: link) }
    let (bar, status) = (ProgressBar(title: "bench", count: iterationCount), StatusLine())
    let bench = try Bench(
      job, workload, plan: plan, workerCount: workerCount, iterationCount: iterationCount,
      isTraced: tracePath != nil, progress: { status.show(bar.text($0)) })
    defer { status.clear() }
    let all = processes ? try bench.run(on: ProcessFabric()) : try bench.run(on: ThreadFabric())
    return (BenchReport(bench, all, processes: processes), all.compactMap(\.flight))
  }

  /// Groups of fixed size have room for all tokens.
  private func receivedTokensMax(_ count: Int) -> Int? {
    job.layout == .grouped || job.masking != .none ? nil : count
  }

  private func runOnGPU(_ workload: Workload, link: PeerCopies?) throws -> (BenchReport, [FlightRecord]) {
    // Worst-case sizes, though what arrives is known.
    let plan = try job.plan(workers: workerCount, staging: staging)
    let bench = try GPUBench(
      job, workload, plan: plan, workerCount: workerCount, iterationCount: iterationCount, replayCount: replayCount,
      waiting: waiting, isTraced: tracePath != nil)
    let all =
      processes
      ? try bench.run(on: ProcessFabric(machines: machines.machines))
      : try bench.run(on: ThreadFabric(machines.machines))
    let report = BenchReport(bench, all, gpuCount: machines.machines.count, link: link, processes: processes)
    return (report, all.compactMap(\.flight))
  }

  /// Inputs, what is received, copies of both, and what the oracle expects; where a token goes to as many ranks as it
  /// can.
  private func checkMemory(_ plan: ExpertBuffer.Plan) throws {
    guard let available = FileTree.host.grantableByteCount.map(Int.init) else { return }
    let rowByteCount = job.hidden * job.rowType.inputDType.byteCount
    let receivedPerToken =
      switch job.layout {
      case .bySource: min(job.topK, job.rankCount)
      case .byExpert: job.topK
      case .grouped: job.expertCount
      }
    // A token's routing: the caller's, the gate's, the oracle's and what arrives with its rows.
    let routingByteCount = job.topK * (64 + 48 * receivedPerToken)
    let perToken = rowByteCount * (3 + 3 * receivedPerToken) + routingByteCount
    let perRank = job.tokensPerRank * perToken + Int(plan.byteCount)
    let needed = perRank * job.rankCount
    if needed > available {
      throw UsageError(
        "memory", expected: "a job of at most \(available.grouped) bytes on this host",
        found: "one that takes about \(needed.grouped)")
    }
  }
}
