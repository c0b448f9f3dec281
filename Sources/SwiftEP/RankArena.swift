import Arena
import EPKernels
import HostMachine

/// One rank's arena: the control words at its beginning, and blocks of rows behind them.
package final class RankArena: Sendable {
  package let memory: any SymmetricMemory
  package let byteCountMax: Int64
  package let controlByteCount: Int64
  private let rank: Int
  /// Has other processes map what was added.
  private let share: @Sendable (ArenaPiece) throws(EPError) -> Void
  private let quarantined = Guarded<[any Sendable]>([])
  private let ranges: Guarded<ReusableRanges>

  /// - Parameters:
  ///   - memory: with the bytes that are taken at once.
  ///   - controlByteCount: bytes at the beginning that are never handed out.
  ///   - share: returns when all other processes have mapped the piece.
  package init(
    rank: Int, memory: any SymmetricMemory, controlByteCount: Int64,
    share: @escaping @Sendable (ArenaPiece) throws(EPError) -> Void = { _ in }
  ) {
    self.rank = rank
    self.share = share
    self.memory = memory
    self.controlByteCount = controlByteCount
    byteCountMax = memory.reservedByteCount
    var ranges = ReusableRanges()
    ranges.give(controlByteCount..<memory.byteCount)
    self.ranges = Guarded(ranges)
  }

  package var base: Address { memory.address }

  /// Bytes that the arena takes now.
  package var byteCount: Int64 { ranges.withLock { _ in memory.byteCount } }

  /// A block of `byteCount` bytes; the arena grows for it if it must and may.
  ///
  /// - Parameters:
  ///   - order: of the launches that use the block; nil: others do, which come behind nothing.
  ///   - wait: called, where there is an order, with fences that those launches are to come behind, before the arena grows.
  package func take(
    _ byteCount: Int64, from end: HoleList.End, for order: LaunchOrder? = nil,
    behind wait: (any StreamFence) -> Void = { _ in }
  ) throws(EPError) -> ArenaBlock {
    // Not under the lock: a device that queues a wait may let go of blocks.
    var awaited: [any ReuseFence] = []
    defer { for case let fence as any StreamFence in awaited { wait(fence) } }
    return try ranges.withLock { ranges throws(EPError) in
      if let order, let (range, fences) = ranges.take(byteCount, for: order) {
        return ArenaBlock(arena: self, range: range, behind: fences)
      }
      if let range = ranges.take(byteCount, from: end) { return ArenaBlock(arena: self, range: range) }
      if order != nil, let (range, fences) = ranges.takeUsed(byteCount, from: end) {
        awaited = fences
        return ArenaBlock(arena: self, range: range, behind: fences)
      }
      let free = ranges.hole(endingAt: memory.byteCount)?.count ?? 0
      let size = memory.byteCount + roundUpToPages(byteCount) - Int64(free)
      guard size <= byteCountMax else {
        throw .outOfMemory(rank: rank, neededByteCount: size, availableByteCount: byteCountMax)
      }
      let before = memory.byteCount
      let pieces: [ArenaPiece]
      do throws(EPError) { pieces = try memory.extend(to: size) } catch {
        // The system has no more, whatever the plan allows.
        throw .outOfMemory(rank: rank, neededByteCount: size, availableByteCount: before)
      }
      for piece in pieces { try share(piece) }
      ranges.give(before..<size)
      return ArenaBlock(arena: self, range: ranges.take(byteCount, from: end)!)
    }
  }

  /// The largest hole, whole.
  package func takeLargest() -> ArenaBlock {
    ArenaBlock(arena: self, range: ranges.withLock { $0.takeLargest() })
  }

  /// Gives back all of `block`, a hole that nothing uses yet, but its first `byteCount` bytes.
  package func trim(_ block: ArenaBlock, to byteCount: Int64) {
    let end = block.range.lowerBound + roundUpToPages(byteCount)
    let rest = end..<block.range.upperBound
    block.shrink(to: block.range.lowerBound..<end)
    give(rest, behind: [])
  }

  /// Keeps `memory` from being handed out again, as long as the buffer lives.
  package func quarantine(_ memory: [any Sendable]) { quarantined.withLock { $0 += memory } }

  package func endQuarantine() { quarantined.withLock { $0 = [] } }

  fileprivate func give(_ range: Range<Int64>, behind fences: [any ReuseFence]) {
    ranges.withLock { $0.give(range, behind: fences) }
  }
}

/// A range of a rank's arena, given back when the last reference to it is gone.
package final class ArenaBlock: TensorStorage, @unchecked Sendable {
  package let arena: RankArena
  /// Changes only while the block's one user trims it, before it is shared.
  package private(set) var range: Range<Int64>
  private let uses = StreamUses()
  /// What others did with it before need not be over yet: its user comes behind that.
  private let earlier: [any ReuseFence]
  /// The end of the last operation of the buffer's own that has been told to use it, and does not keep it.
  private let lastUse = Guarded<(any StreamFence)?>(nil)

  fileprivate init(arena: RankArena, range: Range<Int64>, behind earlier: [any ReuseFence] = []) {
    self.arena = arena
    self.range = range
    self.earlier = earlier
  }

  deinit {
    let streams = arena.memory.gpu.flatMap { uses.fence(on: $0) }
    let lastUse = lastUse.withLock { $0 }
    let later: [any ReuseFence] = [lastUse, streams].compactMap { $0 }
    // The buffer's own calls come behind what was before.
    let isCalledWith = lastUse != nil || streams?.isOfCall == true
    arena.give(range, behind: isCalledWith ? later : earlier + later)
  }

  /// The block is in use until the fence, which comes behind those of earlier calls.
  func noteUse(until fence: any StreamFence) { lastUse.withLock { $0 = fence } }

  package func noteUse(on stream: CUDAStream) throws(EPError) {
    if let gpu = arena.memory.gpu { try uses.note(stream, on: gpu, of: self) }
  }

  package func noteUse(by call: CallStream) throws(EPError) {
    if let gpu = arena.memory.gpu { try uses.note(by: call, on: gpu, of: self) }
  }

  fileprivate func shrink(to range: Range<Int64>) { self.range = range }

  package var base: Address { arena.base.advanced(byBytes: range.lowerBound) }
  package var copier: (any MemoryCopier)? { arena.memory.copier }
  package var byteCount: Int64 { Int64(range.count) }
}
