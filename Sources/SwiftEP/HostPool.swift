import EPKernels
import HostMachine

/// Memory of this process for what operations use again and again: a small one would spend as long on asking the system for it
/// as on what it does. Keeps a few pieces that are not in use, and gives them to whoever asks for as many bytes.
final class HostPool: Sendable {
  private static let pieceCountMax = 32
  private static let byteCountMax: Int64 = 1 << 20

  private struct Piece {
    let byteCount: Int64
    let memory: HostMemory
  }

  private let unused = Guarded<[Piece]>([])

  /// Holds what used it before, or zeros. It comes back when the last reference to it goes.
  ///
  /// - Throws: `systemCall` where the system has no more memory.
  func take(_ byteCount: Int64) throws(EPError) -> PooledMemory {
    let memory = unused.withLock { pieces -> HostMemory? in
      guard let index = pieces.lastIndex(where: { $0.byteCount == byteCount }) else { return nil }
      return pieces.remove(at: index).memory
    }
    if let memory { return PooledMemory(memory, byteCount: byteCount, of: self) }
    return PooledMemory(try HostMemory(byteCount: byteCount), byteCount: byteCount, of: self)
  }

  var unusedByteCount: Int64 { unused.withLock { $0.reduce(0) { $0 + $1.byteCount } } }

  fileprivate func giveBack(_ memory: HostMemory, byteCount: Int64) {
    if byteCount > Self.byteCountMax / Int64(Self.pieceCountMax) { return }
    // The oldest goes behind the lock, if there are too many.
    let oldest = unused.withLock { pieces -> Piece? in
      pieces.append(Piece(byteCount: byteCount, memory: memory))
      return pieces.count > Self.pieceCountMax ? pieces.removeFirst() : nil
    }
    withExtendedLifetime(oldest) {}
  }
}

/// A piece of a pool that is in use.
final class PooledMemory: TensorStorage {
  private let memory: HostMemory
  private let byteCount: Int64
  private let pool: HostPool

  fileprivate init(_ memory: HostMemory, byteCount: Int64, of pool: HostPool) {
    (self.memory, self.byteCount, self.pool) = (memory, byteCount, pool)
  }

  package var base: Address { memory.base }

  deinit { pool.giveBack(memory, byteCount: byteCount) }
}
