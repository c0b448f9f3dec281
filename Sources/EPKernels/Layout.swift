/// Which token goes where, as the caller says it.
@frozen public struct RoutingView {
  public var tokenCount: Int32
  /// 0: routing is by `table`.
  public var topK: Int32
  /// Int32 or Int64 `[tokenCount, topK]`: experts, -1 for none.
  public var indices: Address
  public var indexByteCount: Int32
  /// Float `[tokenCount, topK]`, or null.
  public var weights: Address
  /// UInt8 `[tokenCount, rankCount]`: not zero where the token goes to the rank.
  public var table: Address

  @inlinable public init(
    tokenCount: Int32, topK: Int32, indices: Address, indexByteCount: Int32, weights: Address, table: Address
  ) {
    self.tokenCount = tokenCount
    self.topK = topK
    self.indices = indices
    self.indexByteCount = indexByteCount
    self.weights = weights
    self.table = table
  }

  @inlinable public func rawExpert(token: Int32, slot: Int32) -> Int64 {
    let cell = token &* topK &+ slot
    return indexByteCount == 8 ? indices.load(Int64.self, at: cell) : Int64(indices.load(Int32.self, at: cell))
  }

  /// An expert that `findFault` has let through.
  @inlinable public func expert(token: Int32, slot: Int32) -> Int32 {
    Int32(truncatingIfNeeded: rawExpert(token: token, slot: slot))
  }

  /// The first slot at which `token` names an expert that does not exist, or one that it has named already.
  @inlinable func fault(token: Int32, expertCount: Int32) -> (fault: InputFault, slot: Int32)? {
    // One bit for each remainder modulo 64: experts whose bits differ are different.
    var seen: UInt64 = 0
    let last = topK &- 1
    var slot: Int32 = 0
    while slot <= last {
      // Four at a time, so that no load waits for another.
      let (a, b) = (rawExpert(token: token, slot: slot), rawExpert(token: token, slot: min(last, slot &+ 1)))
      let c = rawExpert(token: token, slot: min(last, slot &+ 2))
      let d = rawExpert(token: token, slot: min(last, slot &+ 3))
      var group: Int32 = 0
      while group < 4 && slot &+ group <= last {
        let expert = group < 2 ? (group == 0 ? a : b) : (group == 2 ? c : d)
        if expert < -1 || expert >= Int64(expertCount) { return (.expertOutOfRange, slot &+ group) }
        if expert >= 0 {
          let bit: UInt64 = 1 &<< UInt64(truncatingIfNeeded: expert & 63)
          if seen & bit != 0 && isNamed(expert, by: token, before: slot &+ group) {
            return (.duplicateExpert, slot &+ group)
          }
          seen |= bit
        }
        group = group &+ 1
      }
      slot = slot &+ 4
    }
    return nil
  }

  @inlinable func isNamed(_ expert: Int64, by token: Int32, before end: Int32) -> Bool {
    var slot: Int32 = 0
    while slot < end {
      if rawExpert(token: token, slot: slot) == expert { return true }
      slot = slot &+ 1
    }
    return false
  }

  /// Bit `b`: `token` goes to rank `firstRank + b`.
  @inlinable func rankMembers(token: Int32, firstRank: Int32, _ view: RankView) -> UInt64 {
    var members: UInt64 = 0
    if topK == 0 {
      var rank = firstRank
      while rank < min(view.rankCount, firstRank &+ 64) {
        if table.load(UInt8.self, at: token &* view.rankCount &+ rank) != 0 {
          members |= 1 &<< UInt64(truncatingIfNeeded: rank &- firstRank)
        }
        rank = rank &+ 1
      }
      return members
    }
    let last = topK &- 1
    var slot: Int32 = 0
    while slot <= last {
      // Four at a time, so that no load waits for another.
      members |= member(token: token, slot: slot, firstRank: firstRank, view)
      members |= member(token: token, slot: min(last, slot &+ 1), firstRank: firstRank, view)
      members |= member(token: token, slot: min(last, slot &+ 2), firstRank: firstRank, view)
      members |= member(token: token, slot: min(last, slot &+ 3), firstRank: firstRank, view)
      slot = slot &+ 4
    }
    return members
  }

  @inlinable func member(token: Int32, slot: Int32, firstRank: Int32, _ view: RankView) -> UInt64 {
    let expert = expert(token: token, slot: slot)
    #if CHECKED
      guard view.check(.expert, expert, below: view.expertCount) else { return 0 }
    #endif
    let rank = view.owner(ofExpert: max(0, expert)) &- firstRank
    return expert >= 0 && rank >= 0 && rank < 64 ? 1 &<< UInt64(truncatingIfNeeded: rank) : 0
  }
}

/// Numbers the tokens of one chunk per rank and per expert, into the handle's slot tables and the operation's counters.
/// Bad input is recorded, not followed.
@inlinable func layOut<M: Machine>(
  _ machine: M, chunk: Int32, routing: RoutingView, view: RankView, handle: HandleView, operation: OperationView
) {
  let tokens = handle.layout.chunks.tokens(of: chunk)
  let counters = operation.counters(ofChunk: chunk)
  machine.fill(counters, byteCount: 4 &* Int64(operation.layout.counterCount), pattern: 0)
  let faultRecord = operation.fault(ofChunk: chunk)
  faultRecord.store(Int64(0), at: 0)
  let culprit = machine.first(of: tokens) { routing.fault(token: $0, expertCount: view.expertCount) != nil }
  if culprit >= 0 {
    if let (fault, slot) = routing.fault(token: culprit, expertCount: view.expertCount) {
      faultRecord.store(fault.rawValue, at: 0)
      faultRecord.store(Int64(culprit), at: 1)
      faultRecord.store(Int64(slot), at: 2)
      faultRecord.store(routing.rawExpert(token: culprit, slot: slot), at: 3)
    }
    return
  }

  let slotCount = handle.layout.slotCount
  let slotIndices = handle.at(handle.layout.slotIndices)
  let firstCell = Int64(tokens.lowerBound) &* Int64(slotCount)
  let cellCount = Int64(tokens.count) &* Int64(slotCount)
  machine.fill(slotIndices.advanced(byBytes: 4 &* firstCell), byteCount: 4 &* cellCount, pattern: UInt32.max)

  let bySource = handle.layout.layout == .bySource
  var firstRank: Int32 = 0
  while firstRank < view.rankCount {
    let first = firstRank
    machine.numberTokens(
      tokens, destinationCount: min(64, view.rankCount &- first),
      counters: counters.advanced(byBytes: 4 &* Int64(first)),
      members: { routing.rankMembers(token: $0, firstRank: first, view) },
      visit: { token, destination, index in
        #if CHECKED
          guard view.check(.slotIndex, index, below: tokens.upperBound &- tokens.lowerBound) else { return }
        #endif
        if bySource { slotIndices.store(index, at: token &* slotCount &+ first &+ destination) }
      })
    firstRank = firstRank &+ 64
  }
  if routing.topK == 0 { return }
  let expertCounters = counters.advanced(byBytes: 4 &* Int64(view.rankCount))
  if bySource {
    machine.countSlots(tokens, slotCount: routing.topK, counters: expertCounters) {
      let expert = routing.expert(token: $0, slot: $1)
      #if CHECKED
        guard view.check(.expert, expert, below: view.expertCount) else { return -1 }
      #endif
      return expert
    }
    return
  }
  let slotKeys = handle.at(handle.layout.slotKeys)
  machine.numberSlots(
    tokens, slotCount: routing.topK, keyCount: view.expertCount, counters: expertCounters,
    key: {
      let expert = routing.expert(token: $0, slot: $1)
      #if CHECKED
        guard view.check(.expert, expert, below: view.expertCount) else { return -1 }
      #endif
      return expert
    },
    visit: { token, slot, index in
      #if CHECKED
        guard view.check(.slotIndex, index, below: tokens.upperBound &- tokens.lowerBound) else { return }
      #endif
      let cell = token &* slotCount &+ slot
      slotIndices.store(index, at: cell)
      slotKeys.store(routing.expert(token: token, slot: slot), at: cell)
    })
}
