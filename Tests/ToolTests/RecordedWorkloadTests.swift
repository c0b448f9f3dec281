import Foundation
import SwiftEP
import Testing

@testable import swiftep

/// A file that is gone with this object.
final class TemporaryFile {
  let path: String

  init(_ data: Data? = nil) throws {
    path = NSTemporaryDirectory() + "swiftep-\(UUID().uuidString)"
    try data?.write(to: URL(fileURLWithPath: path))
  }

  deinit { unlink(path) }
}

@Suite struct RecordedWorkloadTests {
  func read(_ words: [String]) throws -> (job: JobSpec, input: RecordedInput?) {
    let arguments = try Arguments(parsing: words, flags: benchCommand.flags)
    var job = try JobSpec(arguments)
    let input = try RecordedInput(arguments, job: &job)
    return (job, input)
  }

  @Test func rowsAndRouting() throws {
    let rows = try TemporaryFile(npyFile("<f4", [5, 4], (0..<20).map { Float($0) }))
    let routing = try TemporaryFile(npyFile("<i4", [5, 2], [Int32]([0, 1, 1, 2, -1, 3, 3, 0, 2, -1])))
    let (job, input) = try read(["--input", rows.path, "--routing", routing.path, "--experts", "4"])
    #expect(job.rowType == .fp32 && job.hidden == 4 && job.topK == 2 && job.tokensPerRank == 3)
    let workload = try #require(input).workload(job, skew: 0, seed: 1)
    #expect(workload.tokens.flatMap { try! $0.x.elements(Float.self) } == (0..<20).map { Float($0) })
    #expect(workload.tokens.flatMap { indices($0) } == [0, 1, 1, 2, -1, 3, 3, 0, 2, -1])
    #expect(workload.weights.flatMap { try! $0.elements(Float.self) } == [0.5, 0.5, 0.5, 0.5, 0, 1, 0.5, 0.5, 1, 0])
  }

  @Test(arguments: [("<u2", RowType.bf16), ("<u2", .fp8), ("<u2", .nvfp4), ("<f2", .fp16)])
  func rowTypes(_ element: String, _ rowType: RowType) throws {
    let rows = try TemporaryFile(npyFile(element, [2, 16], [UInt16](repeating: 0x3f80, count: 32)))
    let (job, input) = try read(["--input", rows.path, "--dtype", rowType.rawValue])
    #expect(job.rowType == rowType)
    #expect(try #require(input).workload(job, skew: 0, seed: 1).tokens[1].x.elements(UInt16.self)[15] == 0x3f80)
  }

  @Test(arguments: [
    ([0, 4], [], "[0, 1]: expected -1 or an expert of 0..<4, found 4"),
    ([-2, 0], [], "[0, 0]: expected -1 or an expert of 0..<4, found -2"),
    ([1, 1], [], "[0, 1]: expected an expert that the token names once, found 1 again"),
    ([0, 1], ["--top-k", "3"], "expected top-k 3 as in --top-k, found 2"),
    ([0, 1], ["--tokens", "7"], "--tokens: expected 1, as recorded for 2 ranks, found 7"),
  ])
  func badRouting(_ experts: [Int64], _ more: [String], _ sentence: String) throws {
    let routing = try TemporaryFile(npyFile("<i8", [1, 2], experts))
    let error = #expect(throws: UsageError.self) { try read(["--routing", routing.path, "--experts", "4"] + more) }
    #expect(error?.description.contains(sentence) == true, "\(error.map { "\($0)" } ?? "no error")")
  }

  static let zeros = [Float](repeating: 0, count: 16)

  static let badFiles: [(Data, [String], String)] = [
    (npyFile("<i4", [2, 8], [Int32](repeating: 0, count: 16)), [], "expected dtype f2, f4, u2 (BF16) or u1, found i4"),
    (npyFile("<f4", [16], zeros), [], "expected shape [tokens, hidden], found [16]"),
    (npyFile("<f4", [0, 8], [Float]()), [], "tokens, found 0"),
    (npyFile("<f4", [2, 8], zeros), ["--dtype", "fp16"], "rows for --dtype fp16, found f4"),
    (npyFile("<f4", [2, 8], zeros), ["--hidden", "9"], "hidden 9 as in --hidden, found 8"),
  ]

  @Test(arguments: badFiles)
  func badRows(_ file: Data, _ more: [String], _ sentence: String) throws {
    let rows = try TemporaryFile(file)
    let error = #expect(throws: UsageError.self) { try read(["--input", rows.path] + more) }
    #expect(error?.description.contains(sentence) == true, "\(error.map { "\($0)" } ?? "no error")")
  }

  @Test func rowsAndRoutingOfDifferentLengths() throws {
    let rows = try TemporaryFile(npyFile("<f4", [2, 8], Self.zeros))
    let routing = try TemporaryFile(npyFile("<i8", [3, 1], [Int64]([0, 1, 2])))
    let error = #expect(throws: UsageError.self) { try read(["--input", rows.path, "--routing", routing.path]) }
    #expect(error?.description.hasSuffix("expected 2 tokens as in --input, found 3") == true)
  }
}
