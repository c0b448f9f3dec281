import Conformance
import SwiftEP

let verifyCommand = Command(
  name: "verify", summary: "random jobs against an oracle, until the time is over or one fails",
  flags: [processesFlag] + MachineSpec.flags + [
    Flag("seconds", "N", "how long (default 10)"),
    Flag("seed", "S", "of the first job; each further one counts up (default 1)"),
  ],
  notes: "A failure is printed with its job and the seed that repeats it.",
  body: { arguments in
    let seconds = try arguments.real("seconds", in: 0.1...1_000_000, default: 10)
    let seed = try arguments.seed("seed", default: 1)
    let machine = try MachineSpec(arguments).machine
    let status = StatusLine()
    try printNow("seed \(seed)")
    do {
      let report = { (job: Job, passedCount: Int) in
        status.show("verify: \(passedCount) jobs")
        if passedCount % 100 == 0 { try? printNow("\(passedCount) jobs passed, the last of seed \(job.seed)") }
      }
      let passedCount =
        arguments.has("processes")
        ? try verify(seconds: seconds, seed: seed, on: ProcessFabric(), report: report)
        : try verify(seconds: seconds, seed: seed, on: ThreadFabric(machine), report: report)
      status.clear()
      print("\(passedCount) jobs passed")
    } catch let failure as ConformanceFailure {
      status.clear()
      throw CheckFailure(what: failureText(failure, processes: arguments.has("processes"), machine))
    }
  })

/// What failed, with which job, and how to see it again.
func failureText(_ failure: ConformanceFailure, processes: Bool, _ machine: Machine = .cpu) -> String {
  let flags = (processes ? " --processes" : "") + (machine == .cpu ? "" : " --machine cuda")
  let place = failure.rank < 0 ? "" : "rank \(failure.rank), "
  return """
    \(place)\(failure.step): \(failure.what)
    job: \(failure.job)
    repeat: swiftep verify\(flags) --seconds 1 --seed \(failure.job.seed)
    """
}
