import Conformance
import Foundation
import SwiftEP
import Testing

@testable import swiftep

@Suite struct GPUTrafficTests {
  /// Three ranks, of which the first and the last share a GPU.
  private static let words = [
    "--ranks", "3", "--tokens", "5", "--hidden", "128", "--experts", "6", "--top-k", "2", "--dtype", "fp8",
  ]

  @Test(arguments: ["source", "expert"])
  func countsWhatCrosses(_ layout: String) throws {
    let job = try JobSpec(try Arguments(parsing: Self.words + ["--layout", layout], flags: JobSpec.flags))
    let workload = try Workload.random(job, skew: 0.5, seed: 3)
    // From the routing: rows of each source for each destination, a token once to a rank or once to an expert.
    var rows = [[Int]](repeating: [0, 0, 0], count: 3)
    for (source, tokens) in workload.tokens.enumerated() {
      let experts = indices(tokens)
      for token in 0..<5 {
        let ranks = experts[2 * token..<2 * token + 2].map { $0 / 2 }
        for rank in layout == "source" ? Array(Set(ranks)) : ranks { rows[source][rank] += 1 }
      }
    }
    let toOther = rows[0][1] + rows[2][1]
    let fromOther = rows[1][0] + rows[1][2]
    // 128 bytes and a scale; 128 BF16 values.
    let dispatch = GPUTraffic.dispatch(job, workload, gpuCount: 2)
    #expect(dispatch.linkByteCount == 132 * max(toOther, fromOther))
    let combine = GPUTraffic.combine(job, workload, gpuCount: 2)
    #expect(combine.linkByteCount == 256 * max(toOther, fromOther))
    let received = (0..<3).map { rank in rows.reduce(0) { $0 + $1[rank] } }
    #expect(dispatch.memoryByteCount == max(10 * 256 + 132 * (received[0] + received[2]), 5 * 256 + 132 * received[1]))
    #expect(combine.memoryByteCount == max(10 * 256 + 256 * (received[0] + received[2]), 5 * 256 + 256 * received[1]))
  }

  @Test func oneGPUHasNoLink() throws {
    let job = try JobSpec(try Arguments(parsing: Self.words, flags: JobSpec.flags))
    let workload = try Workload.random(job, skew: 0, seed: 4)
    let traffic = GPUTraffic.combine(job, workload, gpuCount: 1)
    #expect(traffic.linkByteCount == 0)
    let sizes = CopyFloor.combineSizes(job, workload)
    #expect(traffic.memoryByteCount == sizes.reduce(0) { $0 + $1.readByteCount + $1.writtenByteCount })
  }

  @Test func theLongerBoundIsTheFloor() throws {
    let job = try JobSpec(try Arguments(parsing: Self.words, flags: JobSpec.flags))
    let traffic = GPUTraffic.dispatch(job, try .random(job, skew: 0, seed: 5), gpuCount: 2)
    let (memory, link) = (Double(traffic.memoryByteCount), Double(traffic.linkByteCount))
    let operation = { (linkBytesPerNanosecond: Double?) in
      BenchReport.Operation(
        "dispatch", [2000, 4000, 6000], traffic, memoryBytesPerNanosecond: 10,
        linkBytesPerNanosecond: linkBytesPerNanosecond, bytesReceivedPerRank: 1)
    }
    #expect(abs(operation(1).floorMicroseconds - link / 1000) < 1e-9)
    #expect(abs(operation(1).linkShare! - link / 4000) < 1e-9)
    #expect(operation(1).linkBytesPerGPU == traffic.linkByteCount)
    #expect(abs(operation(1e6).floorMicroseconds - memory / 10_000) < 1e-9)
    #expect(operation(nil).linkShare == nil && operation(nil).linkBytesPerGPU == nil)
  }

  @Test func tablesSayWhatTheLinkBounds() throws {
    let run = try Binary.run(BinaryTests.tiny + ["--json", "-"])
    var report = try JSONDecoder().decode(BenchReport.self, from: Data(run.output.utf8))
    #expect(!report.table().contains("link"))
    report.gpus = 2
    #expect(report.table().contains("link: none; arenas lie in the host's memory"))
    (report.linkWriteGigabytesPerSecond, report.linkReadGigabytesPerSecond) = (400, 375.25)
    (report.operations[0].linkShare, report.operations[1].linkShare) = (0.951, 0.9)
    report.operations[0].linkBytesPerGPU = 7
    // As `Python/benchmarks/gpus` reads it.
    let json = String(decoding: try report.json(), as: UTF8.self)
    #expect(
      json.contains("\"linkWriteGigabytesPerSecond\" : 400") && json.contains("\"linkReadGigabytesPerSecond\" : 375.25")
    )
    #expect(json.contains("\"linkBytesPerGPU\" : 7"))
    let table = report.table()
    #expect(table.contains("95.1% of writes") && table.contains("90.0% of reads"))
    #expect(table.contains("writes 400.0 GB/s to its peers' memory and reads 375.3 GB/s from there"))
  }
}
