import CPlatform
import Foundation
import HostFacts
import SwiftEP

let doctorCommand = Command(
  name: "doctor", summary: "what a job finds on this host: what it can use, what is missing, how to get it",
  flags: JobSpec.flags + [
    Flag("json", nil, "print the result as JSON")
  ],
  notes: """
    The job is the one that the flags describe: whether it fits is said before it takes anything. What the system allows
    is tried rather than concluded from its version. Exits with 1 where something makes such a job impossible.
    """,
  body: { arguments in
    let job = try JobSpec(arguments)
    let doctor = Doctor(
      job: job, plan: try job.plan(staging: job.rowType.staging), files: .host,
      environment: ProcessInfo.processInfo.environment, probes: .tried(), user: geteuid(),
      allowedCoreCount: Int(swiftep_usable_core_count()))
    let report = DoctorReport(doctor)
    if arguments.has("json") {
      try printDocument(try report.json())
    } else {
      print("\(report.job)\n\n\(report.table())")
    }
    if !report.isPossible {
      throw CheckFailure(what: "such a job cannot run here: \(report.obstacles.joined(separator: ", "))")
    }
  })
