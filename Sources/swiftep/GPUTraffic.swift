import Conformance
import EPKernels
import SwiftEP

/// What an operation moves where most is moved: what bounds ranks on GPUs. Rank r has GPU r modulo `gpuCount`.
struct GPUTraffic: Equatable {
  /// Read and written in one GPU's memory, by whichever GPU.
  private(set) var memoryByteCount = 0
  /// What leaves one GPU for others or comes from them, whichever is more.
  private(set) var linkByteCount = 0

  /// A dispatch: tokens are read once, rows written where they are to be.
  static func dispatch(_ job: JobSpec, _ workload: Workload, gpuCount: Int) -> GPUTraffic {
    let scaleByteCount = job.rowType.quantization?.byteCount(hidden: job.hidden) ?? 0
    let dtype = job.rowType.dispatchedDType
    let rowByteCount = job.hidden * dtype.byteCount / dtype.channelsPerElement + scaleByteCount
    return GPUTraffic(
      workload, gpuCount: gpuCount, rowByteCount: rowByteCount, linkRowByteCount: rowByteCount,
      tokensByteCounts: workload.tokens.map(\.x.byteCount))
  }

  /// A combine: rows are read where they lie, sums written once. Of coded rows, bytes on the link as if all blocks were.
  static func combine(_ job: JobSpec, _ workload: Workload, gpuCount: Int) -> GPUTraffic {
    let rowByteCount = job.hidden * job.rowType.combinedDType.byteCount
    let linkRowByteCount =
      job.encoding == .logFMT ? Int(LogFMT.byteCount(channelCount: Int32(job.hidden))) : rowByteCount
    return GPUTraffic(
      workload, gpuCount: gpuCount, rowByteCount: rowByteCount, linkRowByteCount: linkRowByteCount,
      tokensByteCounts: workload.tokens.map { $0.x.shape[0] * rowByteCount })
  }

  private init(
    _ workload: Workload, gpuCount: Int, rowByteCount: Int, linkRowByteCount: Int, tokensByteCounts: [Int]
  ) {
    var memory = [Int](repeating: 0, count: gpuCount)
    // Of rows, from the token's GPU to the expert's; a combine's go the other way.
    var (sent, received) = (memory, memory)
    for (source, rowCounts) in workload.sentRowCounts.enumerated() {
      memory[source % gpuCount] += tokensByteCounts[source]
      for (destination, rowCount) in rowCounts.enumerated() {
        memory[destination % gpuCount] += rowCount * rowByteCount
        if source % gpuCount == destination % gpuCount { continue }
        sent[source % gpuCount] += rowCount * linkRowByteCount
        received[destination % gpuCount] += rowCount * linkRowByteCount
      }
    }
    memoryByteCount = memory.max() ?? 0
    linkByteCount = max(sent.max() ?? 0, received.max() ?? 0)
  }
}
