import Arena
import HostMachine
import SwiftEP

/// A tensor for each rank that all ranks can read, whether they are threads or processes.
final class SharedRows: Sendable {
  private let tensors: Guarded<[Tensor]?>

  init(rowCounts: [Int], hidden: Int, dtype: DType) throws {
    let tensors = try rowCounts.map { rowCount in
      let region = try SharedRegion(byteCount: rowCount * hidden * dtype.byteCount)
      return try Tensor(unsafeMemory: region.base, shape: [rowCount, hidden], dtype, owner: region)
    }
    self.tensors = Guarded(tensors)
  }

  /// By rank; nil once they are released.
  var rows: [Tensor]? { tensors.withLock { $0 } }

  /// Gives this process's part of the memory back.
  func release() { tensors.withLock { $0 = nil } }
}
