import CPlatform
import Foundation
import Glibc
import SwiftEP
import Testing

@testable import swiftep

/// A bench that goes on until it is ended.
private final class RunningBench {
  private let process = Process()
  var identifier: Int32 { process.processIdentifier }

  init(_ words: String...) throws {
    process.executableURL = Binary.url
    process.arguments =
      ["bench", "--tokens", "32", "--hidden", "128", "--experts", "16", "--iterations", "1000000"] + words
    process.standardOutput = FileHandle.nullDevice
    process.standardError = FileHandle.nullDevice
    try process.run()
    // Until its buffers are there and have been used.
    let deadline = Date(timeIntervalSinceNow: 60)
    while Date() < deadline {
      let records = try FlightRecord.records(ofProcess: identifier)
      if !records.isEmpty && records.allSatisfy({ $0.operations.count == 64 }) { return }
      usleep(10_000)
    }
    throw UsageError("bench", expected: "operations within a minute", found: "none")
  }

  func signal(_ number: Int32) { kill(identifier, number) }

  func waitUntilStopped() {
    while ProcessState(of: identifier) != .stopped { usleep(1000) }
  }

  deinit {
    signal(SIGKILL)
    process.waitUntilExit()
  }
}

@Suite(.serialized) struct InspectTests {
  private func inspect(_ words: String...) throws -> Binary.Run { try Binary.run(["inspect"] + words) }

  private func inspectJSON(_ words: String...) throws -> [InspectedProcess] {
    let run = try Binary.run(["inspect", "--json"] + words)
    #expect(run.status == 0, "\(run.errors)")
    return try JSONDecoder().decode([InspectedProcess].self, from: Data(run.output.utf8))
  }

  @Test func aRunningProcess() throws {
    let bench = try RunningBench("--ranks", "3")
    let found = try inspectJSON("\(bench.identifier)")
    #expect(found.map(\.process) == [bench.identifier] && found[0].ranks.map(\.rank) == [0, 1, 2])
    for record in found[0].ranks {
      #expect(record.process == Int(bench.identifier) && record.rankCount == 3 && record.expertCount == 16)
      #expect(!record.operations.isEmpty)
      for operation in record.operations {
        let isFirstOfTwo = operation.index % 2 == 1
        #expect(operation.kind == (isFirstOfTwo ? .dispatch : .combine) && operation.tokenCount == 32)
        #expect(operation.outcome == .ok || operation.outcome == .underWay)
      }
    }
    // It goes on.
    let later = try inspectJSON("\(bench.identifier)")
    #expect(later[0].ranks[0].operations.last!.index > found[0].ranks[0].operations.last!.index)

    let run = try inspect("\(bench.identifier)", "--operations", "3")
    #expect(run.status == 0 && run.errors.isEmpty)
    for rank in 0..<3 { #expect(run.output.contains("rank \(rank) of 3, process \(bench.identifier), buffer 0")) }
    #expect(run.output.contains("the last 3 operations:") && run.output.contains("longest wait of"))
    #expect(run.output.split(separator: "\n").last!.hasPrefix("rank 2 has "))
  }

  /// Nothing moves, and it can be seen where it stopped.
  @Test func aStoppedProcess() throws {
    let bench = try RunningBench("--ranks", "2")
    bench.signal(SIGSTOP)
    bench.waitUntilStopped()
    let found = try inspectJSON("\(bench.identifier)")
    #expect(found[0].state == .stopped && found[0].ranks.count == 2)
    usleep(20_000)
    let later = try inspectJSON("\(bench.identifier)")
    for (record, again) in zip(found[0].ranks, later[0].ranks) {
      #expect(record.operations == again.operations && record.current == again.current)
      #expect(again.readNanoseconds >= record.readNanoseconds + 20_000_000)
    }
    #expect(try inspect("\(bench.identifier)").output.hasPrefix("process \(bench.identifier), stopped: 2 ranks"))
    // And that it was looked at has changed nothing.
    bench.signal(SIGCONT)
    let deadline = Date(timeIntervalSinceNow: 30)
    while try inspectJSON("\(bench.identifier)")[0].ranks[0].operations.last!.index
      <= later[0].ranks[0].operations.last!.index + 64
    {
      try #require(Date() < deadline)
      usleep(10_000)
    }
  }

  /// Ranks of different jobs are not mixed; a process that cannot be inspected does not hide the others.
  @Test func severalProcesses() throws {
    let benches = [try RunningBench("--ranks", "2"), try RunningBench("--ranks", "2")]
    let identifiers = benches.map { "\($0.identifier)" }
    let run = try inspect(identifiers[0], identifiers[1], identifiers[0])
    #expect(run.status == 0)
    #expect(run.output.components(separatedBy: "longest wait of").count == 3)
    #expect(run.output.components(separatedBy: ": 2 ranks\n").count == 3)
    let mixed = try inspect("99999999", identifiers[1])
    #expect(mixed.status == 2 && mixed.output.contains("process \(identifiers[1]),"))
    #expect(mixed.errors == "swiftep: process 99999999: expected a running process, found no such process\n")
  }

  /// Until it ends.
  @Test func watching() throws {
    let bench = try RunningBench("--ranks", "2")
    let process = Process()
    let output = Pipe()
    process.executableURL = Binary.url
    process.arguments = ["inspect", "\(bench.identifier)", "--json", "--watch", "0.05"]
    process.standardOutput = output
    try process.run()
    var text = Data()
    while text.count(where: { $0 == UInt8(ascii: "\n") }) < 3 {
      let more = output.fileHandleForReading.availableData
      try #require(!more.isEmpty, "inspect ended early")
      text += more
    }
    bench.signal(SIGKILL)
    text += output.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    #expect(process.terminationReason == .exit && process.terminationStatus == 0)
    let documents = try text.split(separator: UInt8(ascii: "\n")).map {
      try JSONDecoder().decode([InspectedProcess].self, from: $0)
    }
    #expect(documents.count >= 3)
    #expect(documents.allSatisfy { $0[0].process == bench.identifier && $0[0].ranks.count == 2 })
  }

  @Test func aProcessWithoutBuffers() throws {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/bin/sleep")
    process.arguments = ["60"]
    try process.run()
    defer {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
    }
    let run = try inspect("\(process.processIdentifier)")
    #expect(run.status == 2 && run.output.isEmpty)
    let sentence = "swiftep: process \(process.processIdentifier): expected one with an ExpertBuffer, found none in it"
    #expect(run.errors.hasPrefix(sentence), "\(run.errors)")
  }

  /// Memory files that have an arena's name, and are none. Each in a process of its own, which looks at itself.
  @Test(arguments: [0, 1, 2, 3, 4, 5, 6])
  func strangeArenas(_ index: Int) async throws {
    let result = await #expect(processExitsWith: .success, observing: [\.standardOutputContent]) { [index] in
      let descriptor = StrangeArena.all[index].makeFile()
      defer { close(descriptor) }
      let run = try Binary.run(["inspect", "\(getpid())"])
      FileHandle.standardOutput.write(Data("<status \(run.status)>\(run.errors)".utf8))
    }
    let text = String(decoding: try #require(result).standardOutputContent, as: UTF8.self)
    #expect(text.contains("<status 2>swiftep: process "), "\(text)")
    #expect(text.contains(StrangeArena.all[index].complaint), "\(text)")
  }
}

/// A memory file that `inspect` must refuse.
private struct StrangeArena {
  let complaint: String
  var byteCount = 65536
  var isSealed = true
  var words: [Int: UInt64] = [:]

  /// "SwiftEP" and a zero.
  static let magic: UInt64 = 0x0050_4574_6669_7753

  static let all = [
    StrangeArena(complaint: "expected an arena of this library, found a file that can shrink", isSealed: false),
    StrangeArena(
      // One that is only being made.
      complaint: "expected one with an ExpertBuffer, found none in it", byteCount: 0),
    StrangeArena(complaint: "expected an arena of this library, found 100 bytes", byteCount: 100),
    StrangeArena(complaint: "expected an arena of this library, found other bytes (1234)", words: [8: 0x1234]),
    // A buffer that is only being made.
    StrangeArena(complaint: "expected one with an ExpertBuffer, found none in it"),
    StrangeArena(
      complaint: "(control words of version 9), found one of version 88", words: [8: magic, 9: 88, 10: 2 | 2 << 32]),
    StrangeArena(
      complaint: "expected an arena of this library, found rank 0 of 60000, 2 experts, 65536 bytes",
      words: [8: magic, 9: 9, 10: 60000 | 2 << 32]),
  ]

  func makeFile() -> Int32 {
    let descriptor = swiftep_memfd_create("swiftep-arena")
    ftruncate(descriptor, byteCount)
    for (index, word) in words {
      withUnsafeBytes(of: word) { _ = pwrite(descriptor, $0.baseAddress!, 8, 8 * index) }
    }

    if isSealed { _ = swiftep_seal_shrink(descriptor) }
    return descriptor
  }
}
