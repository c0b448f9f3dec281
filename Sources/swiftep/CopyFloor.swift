import CPlatform
import Glibc
import SwiftEP

/// How fast this host copies, with the threads and the sizes of an operation: what an operation is measured against.
///
/// One rank's part: it copies from its tokens, or a buffer as large as what the operation reads there, to one as large as
/// what it writes; the smaller of the two is gone through again until the larger is done.
final class CopyFloor: @unchecked Sendable {
  enum Kind: String, CaseIterable, Codable, CodingKeyRepresentable, Sendable {
    /// `memcpy`.
    case cached
    /// Stores that go around the caches.
    case streaming
  }

  struct Sizes: Equatable, Sendable {
    let readByteCount: Int
    let writtenByteCount: Int

    /// Rounded up to what streaming stores write at once.
    init(readByteCount: Int, writtenByteCount: Int) {
      self.readByteCount = (readByteCount + 15) / 16 * 16
      self.writtenByteCount = (writtenByteCount + 15) / 16 * 16
    }

    var copiedByteCount: Int {
      min(readByteCount, writtenByteCount) == 0 ? 0 : max(readByteCount, writtenByteCount)
    }
  }

  private let size: Sizes
  private let workerCount: Int
  private let source: Tensor
  let destination: Tensor

  /// Allocates and touches the buffers.
  ///
  /// - Parameter source: of the size that is read; nil: a buffer of its own.
  init(_ size: Sizes, source: Tensor? = nil, workerCount: Int) throws(EPError) {
    self.size = size
    self.workerCount = workerCount
    self.source = if let source { source } else { try Tensor(zeros: [size.readByteCount], .uint8) }
    destination = try Tensor(zeros: [size.writtenByteCount], .uint8)
  }

  /// One worker's part of the copy.
  func copy(_ kind: Kind, worker: Int) {
    let lineCount = size.copiedByteCount / 16
    var position = 16 * (lineCount * worker / workerCount)
    let end = 16 * (lineCount * (worker + 1) / workerCount)
    // SAFETY: pieces end where the smaller buffer does, and workers' parts do not overlap in the larger; in the smaller
    // they may, where equal zero bytes are written.
    source.withUnsafeBytes { source in
      destination.withUnsafeMutableBytes { destination in
        while position < end {
          let from = position % size.readByteCount
          let to = position % size.writtenByteCount
          let byteCount = min(end - position, size.readByteCount - from, size.writtenByteCount - to)
          let target = destination.baseAddress! + to
          switch kind {
          case .cached: memcpy(target, source.baseAddress! + from, byteCount)
          case .streaming:
            var targets: UnsafeMutableRawPointer? = target
            swiftep_scatter(&targets, 1, source.baseAddress! + from, byteCount, true)
          }
          position += byteCount
        }
      }
    }
    if kind == .streaming { swiftep_store_fence() }
  }
}

extension [CopyFloor.Sizes] {
  /// Bytes read and written by all ranks in one copy.
  var movedByteCount: Int { 2 * reduce(0) { $0 + $1.copiedByteCount } }

  /// Copies per iteration. One, as an operation runs once: repeated, they would find in the caches what an operation
  /// does not. Only those that take little longer than a clock's and a barrier's noise are repeated.
  var repetitionCount: Int { Swift.min(16, Swift.max(1, (256 << 10) / Swift.max(1, movedByteCount))) }
}

extension CopyFloor {
  /// What a dispatch reads and writes at each rank: its tokens once, what it receives once.
  static func dispatchSizes(_ job: JobSpec, _ workload: Workload) -> [Sizes] {
    let scaleByteCount = job.rowType.quantization?.byteCount(hidden: job.hidden) ?? 0
    let dtype = job.rowType.dispatchedDType
    let receivedRowByteCount = job.hidden * dtype.byteCount / dtype.channelsPerElement + scaleByteCount
    return zip(workload.tokens, workload.receivedRowCounts).map { tokens, rowCount in
      Sizes(readByteCount: tokens.x.byteCount, writtenByteCount: rowCount * receivedRowByteCount)
    }
  }

  /// What a combine reads and writes at each rank: the rows that it sums once, the sums once.
  static func combineSizes(_ job: JobSpec, _ workload: Workload) -> [Sizes] {
    let rowByteCount = job.hidden * job.rowType.combinedDType.byteCount
    return zip(workload.tokens, workload.sentRowCounts).map { tokens, rowCounts in
      Sizes(
        readByteCount: rowCounts.reduce(0, +) * rowByteCount, writtenByteCount: tokens.x.shape[0] * rowByteCount)
    }
  }
}
