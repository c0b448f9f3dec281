import EPKernels
import Foundation
import FoundationXML
import SwiftEP
import Testing

@testable import swiftep

/// The built tool, run as a user runs it.
enum Binary {
  struct Run {
    let status: Int32
    let output: String
    let errors: String
  }

  /// Beside the test bundle.
  static var url: URL {
    URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
      .appendingPathComponent("swiftep")
  }

  /// A negative status is the signal that ended it.
  static func run(_ words: [String]) throws -> Run {
    let process = Process()
    process.executableURL = url
    process.arguments = words
    let (output, errors) = (Pipe(), Pipe())
    (process.standardOutput, process.standardError) = (output, errors)
    try process.run()
    let outputText = output.fileHandleForReading.readDataToEndOfFile()
    let errorText = errors.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return Run(
      status: process.terminationReason == .exit ? process.terminationStatus : -process.terminationStatus,
      output: String(decoding: outputText, as: UTF8.self), errors: String(decoding: errorText, as: UTF8.self))
  }
}

@Suite(.serialized) struct BinaryTests {
  static let tiny = ["bench", "--ranks", "2", "--tokens", "64", "--hidden", "256", "--iterations", "2"]

  func bench(_ more: String...) throws -> BenchReport {
    let run = try Binary.run(Self.tiny + more + ["--json", "-"])
    #expect(run.status == 0, "\(run.errors)")
    return try JSONDecoder().decode(BenchReport.self, from: Data(run.output.utf8))
  }

  @Test(arguments: RowType.allCases.map(\.rawValue), RowLayout.allCases.map(\.rawValue))
  func everyTypeAndLayout(_ dtype: String, _ layout: String) throws {
    let report = try bench("--dtype", dtype, "--layout", layout)
    #expect(report.verified && report.dtype == dtype && report.layout == layout)
    #expect(report.operations.map(\.name) == ["dispatch", "combine"])
    for operation in report.operations {
      #expect(operation.minMicroseconds > 0)
      #expect(operation.minMicroseconds <= operation.medianMicroseconds)
      #expect(operation.medianMicroseconds <= operation.maxMicroseconds)
      #expect(operation.bytesReceivedPerRank > 0 && operation.floorMicroseconds > 0)
      let ratio = operation.medianMicroseconds / operation.floorMicroseconds
      #expect(abs(operation.floorRatio - ratio) < 1e-6 * ratio)
    }
  }

  @Test func resultsRepeatWhateverTheWorkers() throws {
    let first = try bench("--seed", "9", "--workers", "1")
    #expect(try bench("--seed", "9", "--workers", "3").resultHash == first.resultHash)
    #expect(try bench("--seed", "10").resultHash != first.resultHash)
  }

  /// The same from processes, which share no memory but what the library shares.
  @Test(arguments: ["bf16", "fp8", "nvfp4"])
  func processesGetTheSame(_ dtype: String) throws {
    let threads = try bench("--dtype", dtype, "--layout", "expert")
    let processes = try bench("--dtype", dtype, "--layout", "expert", "--processes")
    #expect(processes.processes && !threads.processes)
    #expect(processes.resultHash == threads.resultHash)
    #expect(processes.flagRoundTripNanoseconds ?? 0 > 0)
    #expect(processes.residentBytes > 0)
  }

  @Test func textAndSkew() throws {
    let file = try TemporaryFile(Data("Some words, and some more words than that.".utf8))
    let text = try bench("--text", file.path)
    #expect(try bench("--text", file.path).resultHash == text.resultHash)
    #expect(try bench("--skew", "1.5").resultHash != bench().resultHash)
  }

  @Test func recordedInput() throws {
    let rows = try TemporaryFile(npyFile("<u2", [7, 32], (0..<224).map { UInt16(0x3f00 + $0) }))
    let routing = try TemporaryFile(npyFile("<i8", [7, 2], (0..<14).map { Int64($0 % 5) }))
    let words = [
      "bench", "--ranks", "3", "--experts", "5", "--iterations", "1", "--input", rows.path, "--routing", routing.path,
    ]
    for layout in ["source", "expert"] {
      let run = try Binary.run(words + ["--layout", layout])
      #expect(run.status == 0, "\(run.errors)")
      #expect(run.output.hasPrefix("3 ranks, 3 tokens each, hidden 32, top-2 of 5 experts, bf16, by \(layout)"))
    }
    #expect(try Binary.run(words + ["--hidden", "64"]).status == 2)
  }

  @Test func jsonKeys() throws {
    let file = try TemporaryFile()
    let run = try Binary.run(Self.tiny + ["--json", file.path])
    #expect(run.status == 0)
    #expect(run.output.contains("x floor"))
    let value = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: file.path)))
    let object = try #require(value as? [String: Any])
    let keys = [
      "machine", "ranks", "tokens", "hidden", "topK", "experts", "dtype", "workersPerRank", "verified", "resultHash",
      "operations",
    ]
    for key in keys { #expect(object[key] != nil, "\(key)") }
    #expect(object["machine"] as? String == "cpu")
    #expect(object["verified"] as? Bool == true)
    #expect((object["resultHash"] as? String)?.count == 16)
    let operations = try #require(object["operations"] as? [[String: Any]])
    let operationKeys: Set = [
      "name", "medianMicroseconds", "minMicroseconds", "p99Microseconds", "maxMicroseconds", "bytesReceivedPerRank",
      "gigabytesPerSecond", "floorMicroseconds", "floorRatio",
    ]
    #expect(operations.map { Set($0.keys) } == [operationKeys, operationKeys])
  }

  @Test func latency() throws {
    let plot = try TemporaryFile(Data())
    let words = [
      "bench", "--mode", "latency", "--tokens", "5", "--hidden", "256", "--iterations", "3", "--svg", plot.path,
    ]
    let run = try Binary.run(words + ["--json", "-"])
    #expect(run.status == 0, "\(run.errors)")
    let report = try JSONDecoder().decode(LatencyReport.self, from: Data(run.output.utf8))
    #expect(report.sizes.map(\.tokens) == [1, 2, 4, 5])
    for operation in report.sizes.flatMap(\.operations) {
      #expect(operation.medianMicroseconds <= operation.p99Microseconds)
      #expect(operation.p99Microseconds <= operation.maxMicroseconds)
    }
    // Median, percentile and floor of both operations, a point for each size.
    let curves = Curves()
    let parser = try #require(XMLParser(contentsOf: URL(fileURLWithPath: plot.path)))
    parser.delegate = curves
    #expect(parser.parse())
    #expect(curves.pointCounts == [Int](repeating: 4, count: 6))
    let table = try Binary.run(words)
    #expect(table.output.hasPrefix("2 ranks, 1 to 5 tokens each, hidden 256"))
    #expect(table.output.split(separator: "\n").count == 3 + 4 * 2)
  }

  @Test(arguments: [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (512, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])])
  func tokensOfLatency(last: Int, expected: [Int]) { #expect(LatencyReport.tokenCounts(upTo: last) == expected) }

  @Test func tableAndSilence() throws {
    let run = try Binary.run(Self.tiny)
    #expect(run.status == 0)
    #expect(run.errors.isEmpty)
    for word in ["dispatch", "combine", "median us", "bytes planned a rank", "result hash"] {
      #expect(run.output.contains(word), "\(word)")
    }
  }

  @Test(arguments: [
    ["--help"], ["bench", "--help"], ["verify", "--help"], ["plan", "--help"], ["launch", "--help"],
    ["token", "--help"], ["doctor", "--help"], ["inspect", "--help"], ["chaos", "--help"],
  ])
  func help(_ words: [String]) throws {
    let run = try Binary.run(words + ["--help"])
    #expect(run.status == 0)
    #expect(run.output.contains("usage: swiftep") && run.output.contains("exit codes"))
  }

  static let commandNames = Tool.commands.map(\.name).joined(separator: ", ")

  static let usageErrors: [([String], String)] = [
    ([], "command: expected one of \(commandNames) (see swiftep --help), found none"),
    (["dance"], "command: expected one of \(commandNames), found 'dance'"),
    (["bench", "--ranks", "0"], "--ranks: expected an integer of 1 to 256, found '0'"),
    (["bench", "--tokens", "-1"], "--tokens: expected an integer of 1 to 16777216, found '-1'"),
    (["bench", "--top-k", "300"], "--top-k: expected an integer of 1 to 32, found '300'"),
    (["bench", "--top-k", "9", "--experts", "8"], "--top-k: expected at most the number of experts, 8, found 9"),
    (["bench", "--hidden", "7"], "--hidden: expected rows of a multiple of 16 bytes, found 7 x bf16 = 14 bytes"),
    (["bench", "--hidden", "9223372036854775807"], "--hidden: expected an integer of 1 to"),
    (["bench", "--dtype", "fp8", "--hidden", "24"], "--hidden: expected rows of a multiple of 16 bytes, found 24"),
    (["bench", "--dtype", "nvfp4", "--hidden", "96"], "--hidden: expected a multiple of 64 with NVFP4 rows, found 96"),
    (["bench", "--dtype", "bf8"], "--dtype: expected one of bf16, fp16, fp32, fp8, nvfp4, uint8, found 'bf8'"),
    (
      ["bench", "--text", "/nonexistent"],
      "--text /nonexistent: expected a regular file that can be read, found no such file"
    ),
    (["bench", "--text", "/"], "--text /: expected a regular file that can be read, found something else"),
    (["bench", "--text", "/dev/null", "--skew", "1"], "--skew: expected none with --text, found one"),
    (["bench", "--tokens-per-step", "4"], "--tokens-per-step: expected none with --machine cpu, found one"),
    (["plan", "--tokens-per-step", "0"], "--tokens-per-step: expected an integer of 1 to 16777216, found '0'"),
    (["bench", "--waiting", "stream"], "--waiting: expected none with --machine cpu, found one"),
    (["bench", "--mode", "speed"], "--mode: expected one of throughput, latency, found 'speed'"),
    (["bench", "--svg", "x.svg"], "--svg: expected none without --mode latency, found one"),
    (["bench", "--mode", "latency", "--trace", "x"], "--trace: expected none with --mode latency, found one"),
    (["bench", "--mode", "latency", "--svg", "/nonexistent/x"], "--svg /nonexistent/x: expected a file that can be"),
    (["bench", "--json", "/nonexistent/file"], "--json /nonexistent/file: expected a file that can be written"),
    (["bench", "--ranks", "256", "--tokens", "1000000"], "memory: expected a job of at most"),
    (["bench", "--workers", "256", "--ranks", "8"], "--workers: expected at most 1024 workers of all ranks"),
    (["plan", "--ranks", "256", "--tokens", "16777216"], "--tokens: expected fewer rows than an Int32 counts"),
    (["plan", "--results", "0"], "--results: expected an integer of 1 to 64, found '0'"),
    (["launch", "--", "true"], "-n: expected how many ranks to start, found none"),
    (["launch", "-n", "0", "--", "true"], "-n: expected an integer of 1 to 65536, found '0'"),
    (["launch", "-n", "2"], "argument: expected -- PROGRAM [ARGUMENT]..., found none"),
    (["launch", "-n", "2", "--"], "argument: expected -- PROGRAM [ARGUMENT]..., found none"),
    (
      ["launch", "-n", "2", "true"],
      "argument: expected a flag (--name), or -- before PROGRAM [ARGUMENT]..., found 'true'"
    ),
    (["launch", "-n", "2", "--grace", "-1", "--", "true"], "--grace: expected a number of 0.0 to 86400.0, found '-1'"),
    (["launch", "-n", "2", "-x", "--", "true"], "flag: expected one of -n, --grace, --keep-going, --tag, found -x"),
    (["doctor", "--ranks", "257"], "--ranks: expected an integer of 1 to 256, found '257'"),
    (["doctor", "--json=-"], "--json: expected no value, found '-'"),
    (["bench", "--", "true"], "flag: expected one of --ranks"),
    (["verify", "--seconds", "0"], "--seconds: expected a number of"),
    (["verify", "--ranks", "65"], "--ranks: expected an integer of 1 to 64, found '65'"),
    (["verify", "--ranks", "4", "--checks"], "--ranks: expected none with --replays or --checks, found one"),
    (["inspect"], "PID: expected the number of a process, found none"),
    (["inspect", "-1"], "PID: expected the number of a process, found '-1'"),
    (["inspect", "99999999"], "process 99999999: expected a running process, found no such process"),
    (["inspect", "1", "--operations", "65"], "--operations: expected an integer of 0 to 64, found '65'"),
    (["bench", "--trace", "/nonexistent/file"], "--trace /nonexistent/file: expected a file that can be written"),
  ]

  @Test(arguments: usageErrors)
  func badInput(_ words: [String], _ sentence: String) throws {
    let run = try Binary.run(words)
    #expect(run.status == 2)
    #expect(run.output.isEmpty)
    #expect(run.errors.hasPrefix("swiftep: \(sentence)"), "\(run.errors)")
  }

  @Test func emptyFiles() throws {
    let file = try TemporaryFile(Data())
    for (flag, sentence) in [("text", "a text with at least one word"), ("input", "a npy file")] {
      let run = try Binary.run(["bench", "--\(flag)", file.path])
      #expect(run.status == 2)
      #expect(run.errors.hasPrefix("swiftep: --\(flag) \(file.path): expected \(sentence)"), "\(run.errors)")
    }
  }

  @Test func plan() throws {
    let words = ["plan", "--dtype", "fp8", "--results", "2", "--received-tokens-max", "100", "--staged"]
    let table = try Binary.run(words)
    #expect(table.status == 0)
    let json = try Binary.run(words + ["--json", "-"])
    let report = try JSONDecoder().decode(PlanReport.self, from: Data(json.output.utf8))
    let names = [
      "control", "dispatch results", "combine outputs", "combine staging", "handles", "operations", "tables",
    ]
    #expect(report.parts.map(\.name) == names)
    #expect(report.rowsPerResult == 100)
    #expect(report.bytesPerRank == report.parts.reduce(0) { $0 + $1.bytes })
    #expect(table.output.contains(report.bytesPerRank.grouped))
    for part in report.parts { #expect(table.output.contains(part.bytes.grouped)) }
  }

  @Test(arguments: [[], ["--processes"], ["--ranks", "12"]])
  func verify(_ more: [String]) throws {
    let run = try Binary.run(["verify", "--seconds", "1", "--seed", "1"] + more)
    #expect(run.status == 0, "\(run.errors)")
    #expect(run.output.hasPrefix("seed 1\n"))
    #expect(run.output.hasSuffix("jobs passed\n"))
    #expect(!run.output.contains("\n0 jobs"))
  }

  @Test(.enabled(if: isChecked), arguments: [[], ["--processes"]])
  func verifyChecks(_ more: [String]) throws {
    let run = try Binary.run(["verify", "--checks"] + more)
    #expect(run.status == 0, "\(run.errors)")
    #expect(run.output.hasSuffix("rows that were led astray were all found\n"))
  }

  /// On stdout alone, and another each time.
  @Test func token() throws {
    let runs = try (0..<2).map { _ in try Binary.run(["token"]) }
    for run in runs {
      #expect(run.status == 0 && run.errors.isEmpty)
      #expect(run.output.count == 65 && run.output.hasSuffix("\n") && run.output.dropLast().allSatisfy(\.isHexDigit))
    }
    #expect(runs[0].output != runs[1].output)
  }
}

/// Points of the curves of an SVG.
private final class Curves: NSObject, XMLParserDelegate {
  var pointCounts: [Int] = []

  func parser(
    _ parser: XMLParser, didStartElement name: String, namespaceURI: String?, qualifiedName: String?,
    attributes: [String: String]
  ) {
    if name == "polyline" { pointCounts.append((attributes["points"] ?? "").split(separator: " ").count) }
  }
}
