import Foundation
import SwiftEP

let planCommand = Command(
  name: "plan", summary: "the bytes that a buffer for a job takes, part by part",
  flags: JobSpec.flags + [
    Flag("results", "N", "dispatch results and combined outputs alive at the same time (default 1)"),
    Flag("received-tokens-max", "N", "tokens that one rank receives at most (default: all of all ranks)"),
    Flag("workers", "N", "threads that one call uses (default 1)"),
    Flag("staged", nil, "plan for combining rows that do not lie in the arena"), .tokensPerStep,
    Flag("json", "FILE", "write the plan as JSON; -: to stdout, instead of the table"),
  ],
  body: { arguments in
    let job = try JobSpec(arguments)
    let resultCount = try arguments.integer("results", in: 1...64, default: 1)
    let receivedTokensMax = try arguments.integer("received-tokens-max", in: 0...Int(Int32.max))
    let plan = try job.plan(
      resultCount: resultCount, receivedTokensMax: receivedTokensMax,
      workers: try arguments.integer("workers", in: 1...1024, default: 1),
      staging: try arguments.stagingInSteps() ?? (arguments.has("staged") ? .whole : .unplanned))
    let report = PlanReport(job, plan)
    let path = arguments.string("json")
    if path == "-" { return try printDocument(try report.json()) }
    if let path { try checkWritable(path, flag: "json") }
    print("\(job.summary); bytes of one rank\n")
    print(report.table())
    if let path { try writeFile(try report.json(), path, flag: "json") }
  })

struct PlanReport: Codable, Equatable {
  struct Part: Codable, Equatable {
    let name: String
    let bytes: Int64
  }

  let ranks: Int
  let rowsPerResult: Int
  let parts: [Part]
  let bytesPerRank: Int64
  let arenaBytesMax: Int64

  init(_ job: JobSpec, _ plan: ExpertBuffer.Plan) {
    ranks = job.rankCount
    rowsPerResult = plan.rowsPerResult
    parts = plan.parts.map { Part(name: $0.name, bytes: $0.byteCount) }
    bytesPerRank = plan.byteCount
    arenaBytesMax = plan.arenaByteCountMax
  }

  func json() throws -> Data {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    return try encoder.encode(self) + Data("\n".utf8)
  }

  func table() -> String {
    var table = TextTable(["part", "bytes"])
    for part in parts { table.append([part.name, part.bytes.grouped]) }
    table.append(["sum", bytesPerRank.grouped])
    return """
      \(table)

      \(rowsPerResult.grouped) rows a result; the arena may grow to \(arenaBytesMax.grouped) bytes
      """
  }
}
