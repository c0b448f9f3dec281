import PTX

/// The protocol's machine on a GPU: one worker is one block of threads, which has a multiprocessor to itself.
///
/// Rows are moved by warps (`Scatter.swift`, `Runs.swift`, `Reduce.swift`), everything else by all threads. Shared memory begins
/// with words in which the block's threads meet; behind them lie the warps' stages.
@frozen public struct GPUMachine: Machine {
  let thread: Int32
  /// The launch's: nil of a kernel that tells no other rank anything.
  private let arguments: UnsafeRawPointer?

  /// The machine of a kernel that begins.
  @inline(__always) init(_ arguments: UnsafeRawPointer? = nil) {
    thread = ptx_thread_index()
    self.arguments = arguments
    #if BULK_COPIES
      Stages.prepare(self)
    #endif
  }

  /// Threads of a block; the kernels are launched with exactly as many.
  @inline(__always) static var threadCount: Int32 { 512 }
  @inline(__always) static var warpCount: Int32 { threadCount / 32 }

  @inline(__always) public var workerIndex: Int32 { ptx_block_index() }
  @inline(__always) public var workerCount: Int32 { ptx_block_count() }
  @inline(__always) public static var waitsBeside: Bool { true }
  @inline(__always) var lane: Int32 { thread & 31 }
  @inline(__always) var warp: Int32 { thread >> 5 }

  /// The last warp's are the first: where there is little to do, what else there is to do is done by the first ones.
  @inline(__always) var threadFromLast: Int32 { Self.threadCount &- 1 &- thread }

  /// All lanes below this one.
  @inline(__always) var lowerLanes: UInt32 { (1 &<< UInt32(truncatingIfNeeded: lane)) &- 1 }
}

/// The block's shared memory.
enum Shared {
  /// Words in which threads meet: for each warp, and for each warp and destination.
  @inline(__always) static var meetingOffset: Int32 { 0 }
  @inline(__always) static var destinationsOffset: Int32 { 256 }
  /// Barriers of the stages, 8 bytes each, and behind them a word for each warp.
  @inline(__always) static var phasesOffset: Int32 { 4608 }
  @inline(__always) static var paritiesOffset: Int32 { 5632 }
  @inline(__always) static var stagesOffset: Int32 { 6144 }
  /// Bytes of the stages of one warp.
  #if BULK_COPIES
    @inline(__always) static var stageByteCountOfWarp: Int32 { 12288 }
  #else
    // What every GPU has without being asked: nothing but numbers lies there.
    @inline(__always) static var stageByteCountOfWarp: Int32 { 2688 }
  #endif

  @inline(__always) static func word(_ offset: Int32) -> UnsafeMutablePointer<Int32> {
    // SAFETY: offsets are multiples of 4 inside the shared memory that a launch asks for.
    (ptx_shared().unsafelyUnwrapped + Int(offset)).assumingMemoryBound(to: Int32.self)
  }
}

// MARK: - Loops

extension GPUMachine {
  @inline(__always)
  public func firstOfLanes(from index: Int32) -> Int32 { (index &+ 31) & ~31 }

  @inline(__always)
  public func shareOut(_ count: Int32, _ body: (Int32) -> Void) {
    var index = workerIndex &* Self.threadCount &+ thread
    while index < count {
      body(index)
      index = index &+ workerCount &* Self.threadCount
    }
  }

  @inline(__always)
  public func forEach(_ count: Int32, _ body: (Int32) -> Void) {
    var index = thread
    while index < count {
      body(index)
      index = index &+ Self.threadCount
    }
    ptx_block_barrier()
  }

  @inline(__always)
  public func first(of indices: Range<Int32>, where predicate: (Int32) -> Bool) -> Int32 {
    var round = indices.lowerBound
    while round < indices.upperBound {
      let index = round &+ thread
      let holds = index < indices.upperBound && predicate(index)
      let found = ptx_ballot(holds ? 1 : 0)
      if lane == 0 {
        let place = round &+ (warp &<< 5) &+ Int32(truncatingIfNeeded: found.trailingZeroBitCount)
        Shared.word(Shared.meetingOffset)[Int(warp)] = found == 0 ? Int32.max : place
      }
      let first = meetForFirst()
      if first != Int32.max { return first }
      round = round &+ Self.threadCount
    }
    return -1
  }

  /// The first of the warps' words that is not `Int32.max`; that where there is none.
  @inline(__always)
  private func meetForFirst() -> Int32 {
    ptx_block_barrier()
    let words = Shared.word(Shared.meetingOffset)
    let found = ptx_ballot(lane < Self.warpCount && words[Int(lane)] != Int32.max ? 1 : 0)
    let first = found == 0 ? Int32.max : words[Int(found.trailingZeroBitCount)]
    ptx_block_barrier()
    return first
  }

  /// The sum of a warp's values up to this lane's.
  @inline(__always)
  func sumOfLanes(_ value: Int32) -> Int32 {
    var sum = value
    var distance: Int32 = 1
    while distance < 32 {
      let below = Int32(bitPattern: ptx_shuffle_up(UInt32(bitPattern: sum), UInt32(bitPattern: distance)))
      if lane >= distance { sum = sum &+ below }
      distance = distance &<< 1
    }
    return sum
  }

  @inline(__always)
  public func scan(_ count: Int32, value: (Int32) -> Int32, visit: (Int32, Int32, Int32) -> Void) {
    var carry: Int32 = 0
    var round: Int32 = 0
    while round < count {
      let index = round &+ thread
      let own = index < count ? value(index) : 0
      let sum = sumOfLanes(own)
      if lane == 31 { Shared.word(Shared.meetingOffset)[Int(warp)] = sum }
      ptx_block_barrier()
      let total = lane < Self.warpCount ? Shared.word(Shared.meetingOffset)[Int(lane)] : 0
      let upTo = sumOfLanes(total)
      let before = carry &+ shuffle(upTo &- total, from: warp)
      carry = carry &+ shuffle(upTo, from: 31)
      ptx_block_barrier()
      if index < count { visit(index, before &+ sum &- own, own) }
      round = round &+ Self.threadCount
    }
    ptx_block_barrier()
  }
}

// MARK: - Numbers

extension GPUMachine {
  @inline(__always)
  public func part(ofTotal count: Int32, _ value: (Int32) -> SIMD2<Int32>) -> SIMD2<Int32> {
    var part = SIMD2<Int32>(0, 0)
    var index = threadFromLast
    while index < count {
      part = part &+ value(index)
      index = index &+ Self.threadCount
    }
    return part
  }

  @inline(__always)
  public func total(_ part: SIMD2<Int32>) -> SIMD2<Int32> {
    let words = Shared.word(Shared.meetingOffset)
    let (x, y) = (ptx_sum(part.x), ptx_sum(part.y))
    if lane == 0 { (words[Int(2 &* warp)], words[Int(2 &* warp &+ 1)]) = (x, y) }
    ptx_block_barrier()
    let isWarp = lane < Self.warpCount
    let (a, b) = (isWarp ? words[Int(2 &* lane)] : 0, isWarp ? words[Int(2 &* lane &+ 1)] : 0)
    let total = SIMD2(ptx_sum(a), ptx_sum(b))
    ptx_block_barrier()
    return total
  }

  @inline(__always)
  public func sum(over count: Int32, _ value: (Int32) -> Int32, before: (Int32, Int32) -> Void) -> Int32 {
    var sum: Int32 = 0
    var index: Int32 = 0
    let last = count &- 1
    while index <= last {
      ptx_no_unroll()
      // Four at a time, so that no load waits for another, or for a store. All are added, there or not: what is needed in a branch
      // only, a compiler looks up there.
      let (a, x) = (value(index), value(min(last, index &+ 1)))
      let (y, z) = (value(min(last, index &+ 2)), value(min(last, index &+ 3)))
      let (b, c) = (index < last ? x : 0, index &+ 1 < last ? y : 0)
      let d = index &+ 2 < last ? z : 0
      before(index, sum)
      if index < last { before(index &+ 1, sum &+ a) }
      if index &+ 1 < last { before(index &+ 2, sum &+ a &+ b) }
      if index &+ 2 < last { before(index &+ 3, sum &+ a &+ b &+ c) }
      sum = sum &+ a &+ b &+ c &+ d
      index = index &+ 4
    }
    return sum
  }

  /// Four at a time, so that no look-up waits for another.
  @inline(__always)
  public func forEachPlace(_ count: Int32, at place: (Int32) -> Address, _ body: (Address) -> Void) {
    let last = count &- 1
    var index: Int32 = 0
    while index <= last {
      let (a, b) = (place(index), place(min(last, index &+ 1)))
      let (c, d) = (place(min(last, index &+ 2)), place(min(last, index &+ 3)))
      body(a)
      if index < last { body(b) }
      if index &+ 1 < last { body(c) }
      if index &+ 2 < last { body(d) }
      index = index &+ 4
    }
  }

  /// 512 tokens at a time: a ballot for each destination, then sums over the warps, unless one has all tokens.
  @inline(__always)
  public func numberTokens(
    _ tokens: Range<Int32>, destinationCount: Int32, counters: Address, members: (Int32) -> UInt64,
    visit: (Int32, Int32, Int32) -> Void
  ) {
    let isFew = tokens.upperBound &- tokens.lowerBound <= 32
    let counts = Shared.word(Shared.destinationsOffset)
    var round = tokens.lowerBound
    repeat {
      let token = round &+ thread
      let isToken = token < tokens.upperBound
      let own = isToken ? members(token) : 0
      if isFew {
        if warp == 0 { numberTokensByWarp(token, isToken, own, destinationCount, counters, visit: visit) }
        ptx_block_barrier()
        return
      }
      var left = own
      var destination: Int32 = 0
      while destination < destinationCount {
        let going = left.ballotOfNext()
        if lane == 0 {
          counts[Int(destination &* Self.warpCount &+ warp)] = Int32(truncatingIfNeeded: going.nonzeroBitCount)
        }
        destination = destination &+ 1
      }
      ptx_block_barrier()
      // A warp for each destination, a lane for each warp's count.
      destination = warp
      while destination < destinationCount {
        let before = round == tokens.lowerBound ? 0 : counters.load(Int32.self, at: destination)
        let cell = Int(destination &* Self.warpCount &+ lane)
        let count = lane < Self.warpCount ? counts[cell] : 0
        let upTo = before &+ sumOfLanes(count)
        if lane < Self.warpCount { counts[cell] = upTo &- count }
        if lane == 31 { counters.store(upTo, at: destination) }
        destination = destination &+ Self.warpCount
      }
      ptx_block_barrier()
      left = own
      destination = 0
      while destination < destinationCount {
        let isGoing = left & 1 != 0
        let going = left.ballotOfNext()
        let before = counts[Int(destination &* Self.warpCount &+ warp)]
        if isToken {
          let index = before &+ Int32(truncatingIfNeeded: (going & lowerLanes).nonzeroBitCount)
          visit(token, destination, isGoing ? index : -1)
        }
        destination = destination &+ 1
      }
      ptx_block_barrier()
      round = round &+ Self.threadCount
    } while round < tokens.upperBound
  }

  /// By one warp that has all tokens, one a lane.
  @inline(__always)
  private func numberTokensByWarp(
    _ token: Int32, _ isToken: Bool, _ members: UInt64, _ destinationCount: Int32, _ counters: Address,
    visit: (Int32, Int32, Int32) -> Void
  ) {
    var left = members
    var destination: Int32 = 0
    while destination < destinationCount {
      let isGoing = left & 1 != 0
      let going = left.ballotOfNext()
      if isToken {
        visit(token, destination, isGoing ? Int32(truncatingIfNeeded: (going & lowerLanes).nonzeroBitCount) : -1)
      }
      if lane == 0 { counters.store(Int32(truncatingIfNeeded: going.nonzeroBitCount), at: destination) }
      destination = destination &+ 1
    }
  }

  /// In shared memory, where there is room.
  @inline(__always)
  public func countCells(_ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (Int32) -> Int32) {
    let counts = Shared.word(Shared.stagesOffset)
    let isShared = keyCount <= Shared.stageByteCountOfWarp / 4 &* Self.warpCount
    forEach(keyCount) { if isShared { counts[Int($0)] = 0 } else { counters.store(Int32(0), at: $0) } }
    @inline(__always) func count(_ key: Int32) {
      if key < 0 { return }
      if isShared {
        _ = ptx_shared_add(UInt32(bitPattern: Shared.stagesOffset &+ 4 &* key), 1)
      } else {
        ptx_add_only(counters.advanced(byBytes: 4 &* Int64(key)).bits, 1)
      }
    }
    var cell = cells.lowerBound &+ thread
    @inline(__always) func keyBehind(_ rounds: Int32) -> Int32 {
      let other = cell &+ rounds &* Self.threadCount
      return other < cells.upperBound ? key(other) : -1
    }
    while cell < cells.upperBound {
      // Four at a time, so that no look-up waits for another.
      let (a, b, c, d) = (keyBehind(0), keyBehind(1), keyBehind(2), keyBehind(3))
      count(a)
      count(b)
      count(c)
      count(d)
      cell = cell &+ 4 &* Self.threadCount
    }
    ptx_block_barrier()
    if isShared { forEach(keyCount) { counters.store(counts[Int($0)], at: $0) } }
  }

  /// Each warp counts its part of the cells, in their order; then sums over the warps say where its numbers
  /// begin. Where there are few cells, or too many keys to count them apart, one warp does it all.
  @inline(__always)
  public func numberCells(
    _ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (Int32) -> Int32, visit: (Int32, Int32) -> Void
  ) {
    let countsOffset = Shared.stagesOffset
    let isApart = keyCount <= Shared.stageByteCountOfWarp / 4
    if cells.upperBound &- cells.lowerBound <= 128 || !isApart {
      let counts = isApart ? Shared.word(countsOffset) : counters.pointer.assumingMemoryBound(to: Int32.self)
      forEach(keyCount) { counts[Int($0)] = 0 }
      if warp == 0 { numberCellsByWarp(cells.lowerBound, cells.upperBound, counts, key: key, visit: visit) }
      ptx_block_barrier()
      if isApart { forEach(keyCount) { counters.store(counts[Int($0)], at: $0) } }
      return
    }
    forEach(keyCount &* Self.warpCount) { Shared.word(countsOffset)[Int($0)] = 0 }
    let steps = (cells.upperBound &- cells.lowerBound &+ 31) / 32
    let first = cells.lowerBound &+ (steps &* warp / Self.warpCount) &* 32
    let end = min(cells.upperBound, cells.lowerBound &+ (steps &* (warp &+ 1) / Self.warpCount) &* 32)
    let ownOffset = countsOffset &+ 4 &* warp &* keyCount
    var cell = first &+ lane
    while cell < end {
      let key = key(cell)
      if key >= 0 { _ = ptx_shared_add(UInt32(bitPattern: ownOffset &+ 4 &* key), 1) }
      cell = cell &+ 32
    }
    ptx_block_barrier()
    forEach(keyCount) { key in
      var sum: Int32 = 0
      var other: Int32 = 0
      while other < Self.warpCount {
        // Four at a time, so that no load waits for a store.
        let place = Shared.word(countsOffset &+ 4 &* (other &* keyCount &+ key))
        let next = Int(keyCount)
        let (a, b, c, d) = (place[0], place[next], place[2 &* next], place[3 &* next])
        place[0] = sum
        place[next] = sum &+ a
        place[2 &* next] = sum &+ a &+ b
        place[3 &* next] = sum &+ a &+ b &+ c
        sum = sum &+ a &+ b &+ c &+ d
        other = other &+ 4
      }
      counters.store(sum, at: key)
    }
    numberCellsByWarp(first, end, Shared.word(ownOffset), key: key, visit: visit)
    ptx_block_barrier()
  }

  /// By one warp: visits cells `first..<end`, 32 at a time; `counts` go on from what they are.
  @inline(__always)
  private func numberCellsByWarp(
    _ first: Int32, _ end: Int32, _ counts: UnsafeMutablePointer<Int32>, key: (Int32) -> Int32,
    visit: (Int32, Int32) -> Void
  ) {
    var round = first
    while round < end {
      let cell = round &+ lane
      let key = cell < end ? key(cell) : -1
      let alike = ptx_match(UInt32(bitPattern: key))
      if cell < end {
        let before = counts[Int(max(0, key))]
        visit(cell, key < 0 ? -1 : before &+ Int32(truncatingIfNeeded: (alike & lowerLanes).nonzeroBitCount))
      }
      ptx_warp_barrier()
      if key >= 0 && alike & lowerLanes == 0 {
        counts[Int(key)] = counts[Int(key)] &+ Int32(truncatingIfNeeded: alike.nonzeroBitCount)
      }
      ptx_warp_barrier()
      round = round &+ 32
    }
  }
}

extension UInt64 {
  /// Which lanes have the lowest bit, which goes.
  @inline(__always) fileprivate mutating func ballotOfNext() -> UInt32 {
    let lanes = ptx_ballot(UInt32(truncatingIfNeeded: self) & 1)
    self &>>= 1
    return lanes
  }
}

// MARK: - Small copies

extension GPUMachine {
  /// A lane a line.
  @inline(__always)
  public func expect(_ address: Address, byteCount: Int64) {
    if Int64(thread) &* 128 < byteCount { ptx_prefetch(address.bits &+ UInt64(truncatingIfNeeded: thread &* 128)) }
  }

  /// A warp a copy, a lane a word, from where the launch has its arguments: one thread for all takes over a microsecond.
  @inline(__always)
  public func forEachWord(
    of header: ExchangeHeader, copyCount: Int32, _ body: (Int32, Int32, Int64) -> Void
  ) {
    forEach(copyCount &<< 5) { place in
      let index = place & 31
      if index >= ExchangeHeader.wordCount { return }
      let offset = Int(ExchangeHeader.offsetInArguments) &+ 8 &* Int(index)
      body(place &>> 5, index, arguments.unsafelyUnwrapped.load(fromByteOffset: offset, as: Int64.self))
    }
  }

  /// In vectors where a record has whole ones, otherwise in words.
  @inline(__always)
  public func copyRecords(_ count: Int32, byteCount: Int32, route: (Int32) -> RecordRoute) {
    if byteCount % 16 == 0 {
      copyUnits(count, byteCount / 16, route, Vector(repeating: 0), load: { $0.unalignedVector(at: 16 &* $1) }) {
        $0.storeUnaligned($1, atByte: 16 &* $2)
      }
    } else {
      copyUnits(count, byteCount / 4, route, UInt32(0), load: { $0.load(UInt32.self, at: $1) }) { $0.store($1, at: $2) }
    }
  }

  /// As many lanes a record as it has units, a power of two; four records at a time, so that no load waits for another.
  @inline(__always)
  private func copyUnits<Unit>(
    _ count: Int32, _ unitCount: Int32, _ route: (Int32) -> RecordRoute, _ nothing: Unit,
    load: (Address, Int32) -> Unit, store: (Address, Unit, Int32) -> Void
  ) {
    var shift: Int32 = 0
    while shift < 5 && (1 &<< shift) < unitCount { shift = shift &+ 1 }
    let lanesPerRecord: Int32 = 1 &<< shift
    let step = (workerCount &* Self.threadCount) &>> shift
    @inline(__always) func routeOf(_ record: Int32) -> RecordRoute { record < count ? route(record) : .none }
    @inline(__always) func loaded(_ route: RecordRoute, _ unit: Int32) -> Unit {
      route.target.isNull ? nothing : load(route.source, unit)
    }
    var record = (workerIndex &* Self.threadCount &+ thread) &>> shift
    while record < count {
      let (a, b) = (routeOf(record), routeOf(record &+ step))
      let (c, d) = (routeOf(record &+ 2 &* step), routeOf(record &+ 3 &* step))
      var unit = thread & (lanesPerRecord &- 1)
      while unit < unitCount {
        let (w, x) = (loaded(a, unit), loaded(b, unit))
        let (y, z) = (loaded(c, unit), loaded(d, unit))
        if !a.target.isNull { store(a.target, w, unit) }
        if !b.target.isNull { store(b.target, x, unit) }
        if !c.target.isNull { store(c.target, y, unit) }
        if !d.target.isNull { store(d.target, z, unit) }
        unit = unit &+ lanesPerRecord
      }
      record = record &+ 4 &* step
    }
  }

  @inline(__always)
  public func fill(_ destination: Address, byteCount: Int64, pattern: UInt32) {
    let wordCount = byteCount / 4
    var word = Int64(threadFromLast)
    while word < wordCount {
      destination.advanced(byBytes: 4 &* word).store(pattern, at: 0)
      word = word &+ Int64(Self.threadCount)
    }
  }
}
