import Foundation
import SwiftEP

/// Input that was recorded elsewhere: rows, routing, or both. What it says overrides the flags' defaults.
struct RecordedInput {
  private(set) var rows: NPYFile?
  private(set) var routing: NPYFile?
  private(set) var tokenCount = 0

  /// - Parameter job: gets the files' sizes and dtype; a flag that says otherwise is an error.
  init?(_ arguments: Arguments, job: inout JobSpec) throws(UsageError) {
    if !arguments.has("input") && !arguments.has("routing") { return nil }
    if let path = arguments.string("input") { try readRows(path, arguments, &job) }
    if let path = arguments.string("routing") { try readRouting(path, arguments, &job) }
    let (share, rest) = tokenCount.quotientAndRemainder(dividingBy: job.rankCount)
    let tokensPerRank = share + (rest > 0 ? 1 : 0)
    if arguments.has("tokens") && job.tokensPerRank != tokensPerRank {
      throw UsageError(
        "--tokens", expected: "\(tokensPerRank), as recorded for \(job.rankCount) ranks",
        found: "\(job.tokensPerRank)")
    }
    job.tokensPerRank = tokensPerRank
  }

  private mutating func readRows(_ path: String, _ arguments: Arguments, _ job: inout JobSpec) throws(UsageError) {
    let subject = "--input \(path)"
    let file = try NPYFile.read(path, flag: "input")
    let rowTypes: [String: RowType] = ["f2": .fp16, "f4": .fp32, "u2": .bf16, "u1": .uint8]
    guard var rowType = rowTypes[file.element] else {
      throw UsageError(subject, expected: "dtype f2, f4, u2 (BF16) or u1", found: file.element)
    }
    if rowType == .bf16 && job.rowType.inputDType == .bf16 { rowType = job.rowType }
    if arguments.has("dtype") && rowType != job.rowType {
      throw UsageError(subject, expected: "rows for --dtype \(job.rowType.rawValue)", found: file.element)
    }
    let hidden = try Self.checkMatrix(file, subject, "[tokens, hidden]")
    if arguments.has("hidden") && hidden != job.hidden {
      throw UsageError(subject, expected: "hidden \(job.hidden) as in --hidden", found: "\(hidden)")
    }
    guard hidden <= 1 << 20 else {
      throw UsageError(subject, expected: "hidden of at most 1048576", found: "\(hidden)")
    }
    (job.rowType, job.hidden) = (rowType, hidden)
    (rows, tokenCount) = (file, file.shape[0])
  }

  private mutating func readRouting(_ path: String, _ arguments: Arguments, _ job: inout JobSpec) throws(UsageError) {
    let subject = "--routing \(path)"
    let file = try NPYFile.read(path, flag: "routing")
    guard file.element == "i4" || file.element == "i8" else {
      throw UsageError(subject, expected: "dtype i4 or i8", found: file.element)
    }
    let topK = try Self.checkMatrix(file, subject, "[tokens, topK]")
    if !(1...topKMax).contains(topK) {
      throw UsageError(subject, expected: "top-k of 1 to \(topKMax)", found: "\(topK)")
    }
    if arguments.has("top-k") && topK != job.topK {
      throw UsageError(subject, expected: "top-k \(job.topK) as in --top-k", found: "\(topK)")
    }
    if rows != nil && file.shape[0] != tokenCount {
      throw UsageError(subject, expected: "\(tokenCount) tokens as in --input", found: "\(file.shape[0])")
    }
    job.topK = topK
    (routing, tokenCount) = (file, file.shape[0])
    for token in 0..<tokenCount {
      let experts = self.experts(of: token)
      for (slot, expert) in experts.enumerated() {
        let cell = "\(subject) [\(token), \(slot)]"
        if expert < -1 || expert >= Int64(job.expertCount) {
          throw UsageError(cell, expected: "-1 or an expert of 0..<\(job.expertCount)", found: "\(expert)")
        }
        if expert >= 0 && experts[..<slot].contains(expert) {
          throw UsageError(cell, expected: "an expert that the token names once", found: "\(expert) again")
        }
      }
    }
  }

  /// The number of columns of a matrix with at least one row.
  private static func checkMatrix(_ file: NPYFile, _ subject: String, _ expected: String) throws(UsageError) -> Int {
    guard file.shape.count == 2 else {
      throw UsageError(subject, expected: "shape \(expected)", found: "\(file.shape)")
    }
    guard (1...(1 << 24)).contains(file.shape[0]) else {
      throw UsageError(subject, expected: "1 to \(1 << 24) tokens", found: "\(file.shape[0])")
    }
    return file.shape[1]
  }

  private func experts(of token: Int) -> [Int64] {
    guard let routing else { return [] }
    let topK = routing.shape[1]
    return routing.bytes.withUnsafeBytes { bytes in
      (token * topK..<(token + 1) * topK).map { cell in
        routing.element == "i8"
          ? bytes.loadUnaligned(fromByteOffset: 8 * cell, as: Int64.self)
          : Int64(bytes.loadUnaligned(fromByteOffset: 4 * cell, as: Int32.self))
      }
    }
  }

  /// What was not recorded is random.
  func workload(_ job: JobSpec, skew: Double, seed: UInt64) throws(EPError) -> Workload {
    let gate = RandomGate(expertCount: job.expertCount, topK: job.topK, skew: skew, seed: seed)
    return try Workload(
      job, tokenCount: tokenCount,
      fillRow: { token, row in
        if let rows {
          let start = rows.bytes.startIndex + token * row.count
          rows.bytes[start..<start + row.count].withUnsafeBytes { row.copyMemory(from: $0) }
        } else {
          fillRandomRow(row, job.rowType.inputDType, seed: seed, token: token)
        }
      },
      route: { routing == nil ? gate.route(token: $0) : GateChoice(experts: experts(of: $0)) })
  }
}
