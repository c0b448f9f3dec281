/// Which token goes where, as the caller says it.
@frozen public struct RoutingView {
  public var tokenCount: Int32
  /// 0: routing is by `table`. Of a cached call, the handle's, though it names no experts.
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

  @inlinable public func rawExpert(token: Int32, slot: Int32) -> Int64 { rawExpert(cell: token &* topK &+ slot) }

  /// By its words, so that there is no branch for each type.
  @inlinable func rawExpert(cell: Int32) -> Int64 {
    let wordCount = indexByteCount &>> 2
    let first = cell &* wordCount
    let low = indices.load(UInt32.self, at: first)
    let last = Int64(indices.load(Int32.self, at: first &+ wordCount &- 1))
    return wordCount == 1 ? last : last &<< 32 | Int64(low)
  }

  /// An expert that `fault` has let through.
  ///
  /// - Parameter cell: of `indices`.
  @inlinable public func expert(cell: Int32) -> Int32 {
    // Of eight bytes the first four: little-endian.
    indices.load(Int32.self, at: cell &* (indexByteCount &>> 2))
  }

  /// An expert that nothing has been asked about; -1 also for one that does not exist.
  @inlinable func expert(cell: Int32, below expertCount: Int32) -> Int32 {
    let expert = expert(cell: cell)
    return UInt32(bitPattern: expert) < UInt32(bitPattern: expertCount) ? expert : -1
  }

  /// The first slot at which `token` names an expert that does not exist, or one that it has named already.
  @inlinable func fault(token: Int32, expertCount: Int32) -> (fault: InputFault, slot: Int32)? {
    var slot: Int32 = 0
    while slot < topK {
      let expert = rawExpert(token: token, slot: slot)
      if expert < -1 || expert >= Int64(expertCount) { return (.expertOutOfRange, slot) }
      if expert >= 0 && isNamed(expert, by: token, before: slot) { return (.duplicateExpert, slot) }
      slot = slot &+ 1
    }
    return nil
  }

  /// Loaded together, so that no load waits for another; -1 behind the last slot. In vectors, where they lie so: of lanes that
  /// have a token each, every load is from as many lines of memory.
  @inlinable func fourExperts(token: Int32, firstSlot slot: Int32) -> FourExperts {
    if topK & 3 == 0 && indices.bits & 15 == 0 {
      let place = indices.advanced(byBytes: Int64(indexByteCount) &* Int64(token &* topK &+ slot))
      let words = place.load(SIMD4<UInt32>.self, at: 0)
      if indexByteCount == 8 { return FourExperts(words, place.load(SIMD4<UInt32>.self, at: 1)) }
      return FourExperts(words)
    }
    let last = topK &- 1
    let expert = { (slot: Int32) in
      let found = rawExpert(token: token, slot: min(last, slot))
      return slot <= last ? found : -1
    }
    return FourExperts(expert(slot), expert(slot &+ 1), expert(slot &+ 2), expert(slot &+ 3))
  }

  @inlinable func isNamed(_ expert: Int64, by token: Int32, before end: Int32) -> Bool {
    var slot: Int32 = 0
    while slot < end {
      if rawExpert(token: token, slot: slot) == expert { return true }
      slot = slot &+ 1
    }
    return false
  }

  /// Bit `b`: `token` goes to rank `firstRank + b`. Nil where it has a fault: all experts are looked at, side by side.
  @inlinable func rankMembers(token: Int32, firstRank: Int32, _ view: RankView) -> UInt64? {
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
    var sign: Int32 = 0
    var slot: Int32 = 0
    var last = FourExperts.none
    while slot < topK {
      let four = fourExperts(token: token, firstSlot: slot)
      members |= member(four.a, firstRank: firstRank, view) | member(four.b, firstRank: firstRank, view)
      members |= member(four.c, firstRank: firstRank, view) | member(four.d, firstRank: firstRank, view)
      sign |= four.faultSign(expertCount: view.expertCount) | four.pairSign(with: last)
      var earlier = slot &- 8
      while earlier >= 0 {
        sign |= four.pairSign(with: fourExperts(token: token, firstSlot: earlier))
        earlier = earlier &- 4
      }
      last = four
      slot = slot &+ 4
    }
    return sign < 0 ? nil : members
  }

  @inlinable func member(_ expert: Int32, firstRank: Int32, _ view: RankView) -> UInt64 {
    let isExpert = view.hasExpert(expert)
    let rank = view.owner(ofExpert: isExpert ? expert : 0) &- firstRank
    return isExpert && UInt32(bitPattern: rank) < 64 ? 1 &<< UInt64(truncatingIfNeeded: rank) : 0
  }
}

/// What a token names in four slots.
@frozen @usableFromInline struct FourExperts {
  @usableFromInline let a, b, c, d: Int32
  /// Negative where one of eight bytes is beyond four.
  @usableFromInline let wideSign: Int32

  @inlinable static var none: FourExperts { FourExperts(SIMD4(repeating: UInt32.max)) }

  @inlinable init(_ a: Int64, _ b: Int64, _ c: Int64, _ d: Int64) {
    let word = { (expert: Int64, shift: Int64) in UInt32(truncatingIfNeeded: expert &>> shift) }
    self.init(
      SIMD4(word(a, 0), word(a, 32), word(b, 0), word(b, 32)), SIMD4(word(c, 0), word(c, 32), word(d, 0), word(d, 32)))
  }

  @inlinable init(_ words: SIMD4<UInt32>) {
    let expert = { (index: Int) in Int32(bitPattern: words[index]) }
    (a, b, c, d, wideSign) = (expert(0), expert(1), expert(2), expert(3), 0)
  }

  @inlinable init(_ first: SIMD4<UInt32>, _ second: SIMD4<UInt32>) {
    (a, b) = (Int32(bitPattern: first[0]), Int32(bitPattern: first[2]))
    (c, d) = (Int32(bitPattern: second[0]), Int32(bitPattern: second[2]))
    // What is above the lower four bytes is their sign, or this is not zero.
    let wide = { (low: Int32, high: UInt32) in (low &>> 31) ^ Int32(bitPattern: high) }
    let all = wide(a, first[1]) | wide(b, first[3]) | wide(c, second[1]) | wide(d, second[3])
    wideSign = all | (0 &- all)
  }

  // Compared by signs of differences: dozens of branches would take longer.

  /// Negative where one does not exist, or two are equal.
  @inlinable func faultSign(expertCount: Int32) -> Int32 {
    let last = expertCount &- 1
    let isOutside = { (expert: Int32) in (expert &+ 1) | (last &- expert) }
    return wideSign | isOutside(a) | isOutside(b) | isOutside(c) | isOutside(d) | pairSign(a, b, c, d)
      | equalitySign(b, c) | equalitySign(b, d) | equalitySign(c, d)
  }

  /// Negative where one of these is one of those.
  @inlinable func pairSign(with other: FourExperts) -> Int32 {
    pairSign(other.a, a, b, c) | pairSign(other.b, a, b, c) | pairSign(other.c, a, b, c) | pairSign(other.d, a, b, c)
      | pairSign(d, other.a, other.b, other.c) | equalitySign(d, other.d)
  }

  @inlinable func pairSign(_ one: Int32, _ x: Int32, _ y: Int32, _ z: Int32) -> Int32 {
    equalitySign(one, x) | equalitySign(one, y) | equalitySign(one, z)
  }

  /// Negative for two that are equal and name an expert.
  @inlinable func equalitySign(_ one: Int32, _ other: Int32) -> Int32 {
    let difference = one ^ other
    return ~(difference | (0 &- difference) | one)
  }
}

/// Numbers the tokens of one chunk per rank and per expert, into the handle's slot tables and the operation's counters.
/// Tokens with a fault go nowhere, and are noted (`reportFault`).
@inlinable func layOut<M: Machine>(
  _ machine: M, chunk: Int32, routing: RoutingView, view: RankView, handle: HandleView, operation: OperationView
) {
  let tokens = handle.layout.chunks.tokens(of: chunk)
  let counters = operation.counters(ofChunk: chunk)
  let slotCount = handle.layout.slotCount
  let slotIndices = handle.at(handle.layout.slotIndices)
  let bySource = handle.layout.layout == .bySource
  var firstRank: Int32 = 0
  while firstRank < view.rankCount {
    let first = firstRank
    machine.numberTokens(
      tokens, destinationCount: min(64, view.rankCount &- first),
      counters: counters.advanced(byBytes: 4 &* Int64(first)),
      members: { token in
        if let members = routing.rankMembers(token: token, firstRank: first, view) { return members }
        counters.store(view.faultMark, at: operation.layout.faultIndex)
        return 0
      },
      visit: { token, destination, index in
        #if CHECKED
          guard index == -1 || view.check(.slotIndex, index, below: tokens.upperBound &- tokens.lowerBound) else {
            return
          }
        #endif
        if bySource { slotIndices.store(index, at: token &* slotCount &+ first &+ destination) }
      })
    firstRank = firstRank &+ 64
  }
  let expertCounters = counters.advanced(byBytes: 4 &* Int64(view.rankCount))
  if routing.topK == 0 {
    return machine.fill(expertCounters, byteCount: 4 &* Int64(view.expertCount), pattern: 0)
  }
  let cells = Range(uncheckedBounds: (tokens.lowerBound &* routing.topK, tokens.upperBound &* routing.topK))
  if bySource {
    return machine.countCells(cells, keyCount: view.expertCount, counters: expertCounters) {
      routing.expert(cell: $0, below: view.expertCount)
    }
  }
  let slotKeys = handle.at(handle.layout.slotKeys)
  machine.numberCells(
    cells, keyCount: view.expertCount, counters: expertCounters,
    key: { routing.expert(cell: $0, below: view.expertCount) },
    visit: { cell, index in
      #if CHECKED
        guard index == -1 || view.check(.slotIndex, index, below: cells.upperBound &- cells.lowerBound) else { return }
      #endif
      slotIndices.store(index, at: cell)
      slotKeys.store(routing.expert(cell: cell), at: cell)
    })
}

extension RankView {
  /// What a chunk's counter of faults is where this operation has found one. It need not be cleared: what lay there before rarely
  /// looks like it, and then costs a look at the tokens (`reportFault`).
  @inlinable var faultMark: UInt32 { UInt32(truncatingIfNeeded: epoch) &* 0x9e37_79b1 }
}

/// The fault of the first token that has one becomes this rank's, if there is one.
///
/// - Parameter chunk: no token before it has one.
@inlinable func reportFault<M: Machine>(
  _ machine: M, fromChunk chunk: Int32, in pages: ExchangePages, routing: RoutingView, handle: HandleView,
  expertCount: Int32
) {
  var token = handle.layout.chunks.tokens(of: chunk).lowerBound
  while token < handle.layout.chunks.tokenCount {
    if let (fault, slot) = routing.fault(token: token, expertCount: expertCount) {
      let index = ExchangeHeader.faultIndex
      pages.store(machine, fault.rawValue, at: index)
      pages.store(machine, Int64(token), at: index &+ 1)
      pages.store(machine, Int64(slot), at: index &+ 2)
      return pages.store(machine, routing.rawExpert(token: token, slot: slot), at: index &+ 3)
    }
    token = token &+ 1
  }
}
