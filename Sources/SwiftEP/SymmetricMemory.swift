import Arena
import CUDADriver
import EPKernels
import Glibc
import HostMachine

/// One rank's memory that its peers reach: addresses reserved from the start, backed as far as it has grown.
package protocol SymmetricMemory: AnyObject, Sendable {
  /// Where this process's kernels find its first byte.
  var address: Address { get }
  var reservedByteCount: Int64 { get }
  /// Bytes that are there to be used.
  var byteCount: Int64 { get }
  /// What another process maps it by; nil where it cannot.
  var descriptor: Descriptor? { get }
  /// How the host reads and writes it; nil where it does so itself.
  var copier: (any MemoryCopier)? { get }
  /// What to add to the times that kernels note in it, to have the host's.
  var clockOffset: UInt64 { get }
  /// Whose streams use it; nil where none do.
  var gpu: GPU? { get }
  /// Called by the owning rank only.
  ///
  /// - Returns: the pieces that other processes have to map before anything there is used.
  func extend(to byteCount: Int64) throws(EPError) -> [ArenaPiece]
  /// Maps what the owner, in another process, has added. Called by other ranks only, piece by piece.
  func map(_ piece: ArenaPiece) throws(EPError)
}

/// Part of an arena that has come later than the rest.
package struct ArenaPiece: Sendable {
  let range: Range<Int64>
  /// What it is mapped by, where it has a file of its own.
  let file: Descriptor?
}

extension EPError {
  /// A descriptor that a process may not have more of is left out of the message that it came with.
  static func receivedNoDescriptor(rank: Int) -> EPError {
    .systemCall(rank: rank, name: "recvmsg(SCM_RIGHTS)", code: EMFILE)
  }
}

extension ArenaMemory: SymmetricMemory {
  package var address: Address { Address(base) }
  package var copier: (any MemoryCopier)? { nil }
  package var clockOffset: UInt64 { 0 }
  package var gpu: GPU? { nil }

  package func extend(to byteCount: Int64) throws(EPError) -> [ArenaPiece] {
    do throws(SystemCallError) { try grow(to: byteCount) } catch {
      throw .systemCall(rank: -1, name: error.call, code: error.code)
    }
    return []
  }

  /// A mapping spans what will be there, too.
  package func map(_ piece: ArenaPiece) {}
}

/// How the host reads and writes memory that is not its own. Both return when the bytes are there, and throw `driver`
/// where the memory is lost.
package protocol MemoryCopier: Sendable {
  func read(_ source: Address, into target: UnsafeMutableRawBufferPointer) throws(EPError)
  func write(_ source: UnsafeRawBufferPointer, to target: Address) throws(EPError)
}
