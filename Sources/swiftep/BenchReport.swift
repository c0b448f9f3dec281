import CUDADriver
import Foundation
import HostFacts
import SwiftEP

/// What a bench found, as JSON and as a table.
struct BenchReport: Codable, Equatable {
  struct Operation: Codable, Equatable {
    var name: String
    var medianMicroseconds: Double
    var minMicroseconds: Double
    /// Not exceeded by 99 of 100.
    var p99Microseconds: Double
    var maxMicroseconds: Double
    /// Rows and scales, from this rank's own tokens too; the mean over the ranks.
    var bytesReceivedPerRank: Int
    var gigabytesPerSecond: Double
    var floorMicroseconds: Double
    /// The median over the floor.
    var floorRatio: Double
    /// Into one GPU from others or out of it, where that is most; nil of one GPU.
    var linkBytesPerGPU: Int?
    /// How much of the median those bytes would take at the link's limit: writes of a dispatch, reads of a combine.
    var linkShare: Double?
  }

  var machine = "cpu"
  /// That the ranks share; nil on CPUs.
  var gpus: Int?
  var ranks: Int
  var tokens: Int
  var hidden: Int
  var topK: Int
  var experts: Int
  var dtype: String
  var workersPerRank: Int
  var verified = true
  var resultHash: String
  var operations: [Operation]
  var layout: String
  var iterations: Int
  var processor: String
  var cores: Int
  /// The better of both kinds of copy, bytes read and written.
  var copyGigabytesPerSecond: Double
  var copyKind: String
  /// What the slowest of several GPUs stores into its peers' memory, and loads from there, all at once, by the driver's
  /// copies; nil where GPUs do not reach each other's memory.
  var linkWriteGigabytesPerSecond: Double?
  var linkReadGigabytesPerSecond: Double?
  var plannedBytesPerRank: Int64
  var residentBytes: Int
  /// Whether each rank is a process.
  var processes: Bool
  /// Who waits for peers, as `--waiting` says it; nil on CPUs.
  var waiting: String?
  /// From a signal of rank 0 to rank 1's answer; nil of one rank.
  var flagRoundTripNanoseconds: Double?

  init(_ bench: Bench, _ all: [Bench.Measurements], processes: Bool) {
    let measurements = all[0]
    let job = bench.job
    (ranks, tokens, hidden) = (job.rankCount, job.tokensPerRank, job.hidden)
    (topK, experts, dtype) = (job.topK, job.expertCount, job.rowType.rawValue)
    (workersPerRank, layout, iterations) = (bench.workerCount, job.layout.rawValue, bench.iterationCount)
    var hash = FNVHash()
    for rank in all { hash.add(rank.resultHash) }
    (resultHash, residentBytes) = (hash.text, all.reduce(0) { $0 + $1.residentByteCount })
    (self.processes, flagRoundTripNanoseconds) = (processes, measurements.flagRoundTripNanoseconds)
    plannedBytesPerRank = bench.plan.byteCount
    (processor, cores) = (FileTree.host.processorName, usableCoreCount())
    let copies = zip(bench.floorSizes, measurements.copies).map { sizes, times in CopyBandwidth(sizes, times) }
    (copyGigabytesPerSecond, copyKind) = (copies[0].bytesPerNanosecond, copies[0].kind.rawValue)
    let dispatchSizes = CopyFloor.dispatchSizes(job, bench.workload)
    let combineSizes = CopyFloor.combineSizes(job, bench.workload)
    operations = [
      Operation(
        "dispatch", measurements.dispatch, dispatchSizes, copies[0],
        receivedByteCount: dispatchSizes.reduce(0) { $0 + $1.writtenByteCount }),
      Operation(
        "combine", measurements.combine, combineSizes, copies[copies.count - 1],
        receivedByteCount: combineSizes.reduce(0) { $0 + $1.readByteCount }),
    ]
  }

  init(_ bench: GPUBench, _ all: [GPUBench.Measurements], gpuCount: Int, link: PeerCopies?, processes: Bool) {
    let job = bench.job
    (machine, gpus, waiting) = ("cuda", gpuCount, bench.waiting.rawValue)
    (ranks, tokens, hidden) = (job.rankCount, job.tokensPerRank, job.hidden)
    (topK, experts, dtype) = (job.topK, job.expertCount, job.rowType.rawValue)
    (workersPerRank, layout, iterations) = (bench.workerCount, job.layout.rawValue, bench.iterationCount)
    var hash = FNVHash()
    for rank in all { hash.add(rank.resultHash) }
    (resultHash, residentBytes) = (hash.text, all.reduce(0) { $0 + $1.takenByteCount })
    self.processes = processes
    plannedBytesPerRank = bench.plan.byteCount
    (processor, cores) = (all[0].gpuName, all[0].multiprocessorCount)
    (copyGigabytesPerSecond, copyKind) = (all[0].copyBytesPerNanosecond, "the driver's")
    linkWriteGigabytesPerSecond = link?.writtenBytesPerNanosecond
    linkReadGigabytesPerSecond = link?.readBytesPerNanosecond
    let copy = copyGigabytesPerSecond
    let operation = { (name: String, times: KeyPath<GPUBench.Measurements, [UInt64]>, isDispatch: Bool) in
      let sizes = (isDispatch ? CopyFloor.dispatchSizes : CopyFloor.combineSizes)(job, bench.workload)
      let traffic = (isDispatch ? GPUTraffic.dispatch : GPUTraffic.combine)(job, bench.workload, gpuCount)
      let received = sizes.reduce(0) { $0 + (isDispatch ? $1.writtenByteCount : $1.readByteCount) }
      return Operation(
        name, all.map { $0[keyPath: times] }.maxima, traffic, memoryBytesPerNanosecond: copy,
        linkBytesPerNanosecond: isDispatch ? link?.writtenBytesPerNanosecond : link?.readBytesPerNanosecond,
        bytesReceivedPerRank: received / sizes.count)
    }
    operations = [
      operation("dispatch", \.dispatch, true), operation("combine", \.combine, false),
      operation("combine of an ordinary tensor", \.stagedCombine, false),
    ]
  }

  func table() -> String {
    let crossesLink = operations.contains { $0.linkShare != nil }
    var table = TextTable(
      ["operation", "median us", "min us", "max us", "bytes received/rank", "GB/s", "floor us", "x floor"]
        + (crossesLink ? ["of the link's limit"] : []))
    for operation in operations {
      var cells = [
        operation.name, operation.medianMicroseconds.rounded(toPlaces: 1),
        operation.minMicroseconds.rounded(toPlaces: 1), operation.maxMicroseconds.rounded(toPlaces: 1),
        operation.bytesReceivedPerRank.grouped, operation.gigabytesPerSecond.rounded(toPlaces: 2),
        operation.floorMicroseconds.rounded(toPlaces: 1), operation.floorRatio.rounded(toPlaces: 2),
      ]
      if crossesLink {
        let share = (100 * (operation.linkShare ?? 0)).rounded(toPlaces: 1)
        cells.append("\(share)% of \(operation.name == "dispatch" ? "writes" : "reads")")
      }
      table.append(cells)
    }
    let planned = plannedBytesPerRank * Int64(ranks)
    let residentRatio = planned == 0 ? 0 : Double(residentBytes) / Double(planned)
    return """
      \(table)

      \(flagRoundTripNanoseconds.map { "flag: \($0.rounded(toPlaces: 0)) ns from rank 0 to rank 1 and back\n" } ?? "")\
      copy: \(copyGigabytesPerSecond.rounded(toPlaces: 2)) GB/s read and written (\(copyKind))
      \(linkText)\
      memory: \(plannedBytesPerRank.grouped) bytes planned a rank, \(planned.grouped) in all; \
      \(residentBytes.grouped) became resident (\(residentRatio.rounded(toPlaces: 2)) of the plan)
      verified against the oracle; result hash \(resultHash)
      """
  }

  /// A line, of several GPUs.
  private var linkText: String {
    guard gpus ?? 1 > 1 else { return "" }
    guard let writes = linkWriteGigabytesPerSecond, let reads = linkReadGigabytesPerSecond else {
      return "link: none; arenas lie in the host's memory\n"
    }
    return """
      link: each GPU writes \(writes.rounded(toPlaces: 1)) GB/s to its peers' memory and reads \
      \(reads.rounded(toPlaces: 1)) GB/s from there, all at once (\(copyKind))

      """
  }
}

extension Encodable {
  /// As a document that is read by people, too.
  func json() throws -> Data {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    return try encoder.encode(self) + Data("\n".utf8)
  }
}

extension BenchReport.Operation {
  fileprivate init(
    _ name: String, _ nanoseconds: [UInt64], _ sizes: [CopyFloor.Sizes], _ copy: CopyBandwidth, receivedByteCount: Int
  ) {
    let movedByteCount = sizes.reduce(0) { $0 + $1.readByteCount + $1.writtenByteCount }
    self.init(
      name, nanoseconds, bytesReceivedPerRank: receivedByteCount / sizes.count,
      floor: Self.time(movedByteCount, copy.bytesPerNanosecond))
  }

  /// - Parameter linkBytesPerNanosecond: nil where nothing crosses a link.
  init(
    _ name: String, _ nanoseconds: [UInt64], _ traffic: GPUTraffic, memoryBytesPerNanosecond: Double,
    linkBytesPerNanosecond: Double?, bytesReceivedPerRank: Int
  ) {
    let memoryTime = Self.time(traffic.memoryByteCount, memoryBytesPerNanosecond)
    let linkTime = linkBytesPerNanosecond.map { Self.time(traffic.linkByteCount, $0) }
    self.init(
      name, nanoseconds, bytesReceivedPerRank: bytesReceivedPerRank, floor: max(memoryTime, linkTime ?? 0))
    if let linkTime {
      linkBytesPerGPU = traffic.linkByteCount
      linkShare = linkTime / max(1, nanoseconds.median)
    }
  }

  /// - Parameter floor: in nanoseconds.
  private init(_ name: String, _ nanoseconds: [UInt64], bytesReceivedPerRank: Int, floor: Double) {
    self.name = name
    medianMicroseconds = nanoseconds.median / 1000
    minMicroseconds = Double(nanoseconds.min() ?? 0) / 1000
    p99Microseconds = Double(nanoseconds.percentile(99)) / 1000
    maxMicroseconds = Double(nanoseconds.max() ?? 0) / 1000
    self.bytesReceivedPerRank = bytesReceivedPerRank
    gigabytesPerSecond = Double(bytesReceivedPerRank) / max(1, nanoseconds.median)
    floorMicroseconds = floor / 1000
    floorRatio = floor == 0 ? 0 : nanoseconds.median / floor
  }

  private static func time(_ byteCount: Int, _ bytesPerNanosecond: Double) -> Double {
    bytesPerNanosecond == 0 ? 0 : Double(byteCount) / bytesPerNanosecond
  }
}

/// The better of both kinds of copy, by their medians.
private struct CopyBandwidth {
  let kind: CopyFloor.Kind
  let bytesPerNanosecond: Double

  init(_ sizes: [CopyFloor.Sizes], _ times: [CopyFloor.Kind: [UInt64]]) {
    let medians = CopyFloor.Kind.allCases.map { (kind: $0, time: (times[$0] ?? []).median) }
    let best = medians.min { $0.time < $1.time }!
    kind = best.kind
    bytesPerNanosecond = best.time == 0 ? 0 : Double(sizes.movedByteCount) / best.time
  }
}

extension [[UInt64]] {
  /// The greatest of each column.
  var maxima: [UInt64] {
    (0..<(first?.count ?? 0)).map { column in self.map { $0[column] }.max()! }
  }
}

extension [UInt64] {
  /// The least that so many of a hundred do not exceed; 0 of none.
  func percentile(_ percent: Int) -> UInt64 {
    isEmpty ? 0 : sorted()[Swift.max(0, (count * percent + 99) / 100 - 1)]
  }

  /// 0 of none.
  var median: Double {
    if isEmpty { return 0 }
    let sorted = self.sorted()
    return (Double(sorted[(count - 1) / 2]) + Double(sorted[count / 2])) / 2
  }
}
