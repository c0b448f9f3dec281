import PTX

/// A warp's pieces, and where the first one's terms lie: each lane knows one.
public struct ReduceStart {
  fileprivate let cut: PieceCut
  fileprivate let walk: Walk
  fileprivate let own: WeightedPlace
}

extension ReduceJob {
  @inline(__always) fileprivate var rowByteCount: Int32 { elementCount &* (format == .fp32 ? 4 : 2) }

  @inline(__always) fileprivate func pieces(_ cut: PieceCut) -> Pieces {
    Pieces(firstRow: firstRow, rowCount: rowCount, rowByteCount: rowByteCount, cut)
  }
}

extension GPUMachine {
  @inline(__always)
  public var noReduce: ReduceStart { ReduceStart(cut: .none, walk: Walk(), own: .none) }

  @inline(__always)
  public func startReduce(_ job: ReduceJob, place: (Int32, Int32) -> WeightedPlace) -> ReduceStart {
    let isCoded = job.format == .logFMT
    let cut = PieceCut(
      rowByteCount: job.rowByteCount,
      // Terms that are coded take more registers.
      pieceByteCountMax: isCoded ? 1024 : TermCursor.termByteCountMax, granule: isCoded ? 512 : 16)
    let pieces = job.pieces(cut)
    let walk = Walk(self, pieces, runLength: pieces.piecesPerRow, counter: job.counter)
    let isTerm = lane < job.slotCount && !walk.isOver
    return ReduceStart(cut: cut, walk: walk, own: isTerm ? place(walk.piece.row, lane) : .none)
  }

  @inline(__always)
  public func reduceRows(
    _ job: ReduceJob, from start: ReduceStart, meanwhile: () -> Void, place: (Int32, Int32) -> WeightedPlace,
    source: (WeightedPlace) -> RowSource
  ) {
    switch job.format {
    case .bf16: reduce(job, start, BF16.self, meanwhile, place, source)
    case .fp16: reduce(job, start, FP16.self, meanwhile, place, source)
    case .logFMT: reduceVectors(job, start, BF16.self, isCoded: true, meanwhile, place, source)
    default: reduce(job, start, FP32.self, meanwhile, place, source)
    }
  }

  @inline(__always)
  private func reduce<Format: SumFormat>(
    _ job: ReduceJob, _ start: ReduceStart, _ format: Format.Type, _ meanwhile: () -> Void,
    _ place: (Int32, Int32) -> WeightedPlace, _ source: (WeightedPlace) -> RowSource
  ) {
    if job.rowByteCount % 16 != 0 {
      meanwhile()
      reduceElements(job, format) { source(place($0, $1)) }
    } else {
      reduceVectors(job, start, format, isCoded: false, meanwhile, place, source)
    }
  }

  /// Rows too short or too odd for vectors: an element a lane.
  @inline(__always)
  private func reduceElements<Format: SumFormat>(
    _ job: ReduceJob, _ format: Format.Type, _ source: (Int32, Int32) -> RowSource
  ) {
    shareOut(job.rowCount &* job.elementCount) { index in
      let cell = job.firstRow &* job.elementCount &+ index
      let (row, element) = (cell / job.elementCount, cell % job.elementCount)
      var sum: Float = 0
      var slot: Int32 = 0
      while slot < job.slotCount {
        let term = source(row, slot)
        if !term.row.isNull { sum = sum + Format.element(element, of: term.row) * term.weight }
        slot = slot &+ 1
      }
      if !job.biases.0.isNull { sum = sum + Format.element(cell, of: job.biases.0) }
      if !job.biases.1.isNull { sum = sum + Format.element(cell, of: job.biases.1) }
      Format.store(sum, job.output, at: cell)
    }
  }

  @inline(__always)
  private func reduceVectors<Format: SumFormat>(
    _ job: ReduceJob, _ start: ReduceStart, _ format: Format.Type, isCoded: Bool, _ meanwhile: () -> Void,
    _ place: (Int32, Int32) -> WeightedPlace, _ source: (WeightedPlace) -> RowSource
  ) {
    let (pieces, rowByteCount) = (job.pieces(start.cut), job.rowByteCount)
    if start.walk.isOver { return meanwhile() }
    var terms = TermCursor(self, start, isCoded: isCoded, slotCount: job.slotCount, source)
    var sums = PieceSums(isEmpty: 1)
    #if BULK_COPIES
      let stages = Stages(self, count: 2)
      var (issued, used) = (Int32(0), Int32(0))
      if terms.lanes != 0 { terms.load(&issued, stages, pieces) }
      meanwhile()
      var isOver: Bool
      repeat {
        // While these are on their way or added, the next ones are, too: into the stage that was read last.
        let (lanes, weight, piece, isLast) = (terms.lanes, terms.weight, terms.walk.piece, terms.isLast)
        let exact = terms.exact
        terms.advance(self, pieces, place, source)
        isOver = terms.isOver
        if !isOver && terms.lanes != 0 { terms.load(&issued, stages, pieces) }
        let byteCount = pieces.byteCount(of: piece)
        if lanes != 0 {
          var stage = stages.offset(of: used)
          stages.wait(for: used)
          var slots = LaneSlots(present: lanes)
          // A piece's first term apart: what it is added to takes no registers that would have to be cleared.
          if sums.isEmpty != 0 {
            sums = PieceSums(isEmpty: 0)
            addNext(&slots, at: &stage, to: &sums, job, format, isCoded: isCoded, weight, exact, piece, byteCount)
          }
          while slots.present != 0 {
            addNext(&slots, at: &stage, to: &sums, job, format, isCoded: isCoded, weight, exact, piece, byteCount)
          }
          used = used &+ 1
          // All lanes have read the stage.
          ptx_warp_barrier()
        }
        if isLast { finish(&sums, job, format, piece, rowByteCount, byteCount) }
      } while !isOver
      stages.close(after: used)
    #else
      meanwhile()
      while !terms.isOver {
        let piece = terms.walk.piece
        let byteCount = pieces.byteCount(of: piece)
        var slots = LaneSlots(present: terms.lanes)
        sums.clearIfEmpty()
        while slots.present != 0 {
          let slot = slots.removeFirst()
          let weight = shuffle(terms.weight, from: slot)
          let row = terms.address(self, of: slot)
          if isCoded {
            let exact = shuffle(terms.exact, from: slot).advanced(byBytes: Int64(piece.offset))
            sums.add(recordsAt: row, exact: exact, weight: weight, lane: lane, byteCount)
          } else {
            sums.add(format, weight: weight, lane: lane, row, byteCount)
          }
        }
        if terms.isLast { finish(&sums, job, format, piece, rowByteCount, byteCount) }
        terms.advance(self, pieces, place, source)
      }
    #endif
  }

  #if BULK_COPIES
    /// Adds the next of the terms that lie one behind the other in a stage.
    @inline(__always)
    private func addNext<Format: SumFormat>(
      _ slots: inout LaneSlots, at stage: inout Int32, to sums: inout PieceSums, _ job: ReduceJob,
      _ format: Format.Type, isCoded: Bool, _ weight: Float, _ exact: Address, _ piece: Piece, _ byteCount: Int32
    ) {
      let (slot, place) = (slots.removeFirst(), stage)
      let factor = job.isWeighted ? shuffle(weight, from: slot) : 1
      if isCoded {
        let row = shuffle(exact, from: slot).advanced(byBytes: Int64(piece.offset))
        sums.add(recordsAt: StageOffset(offset: place), exact: row, weight: factor, lane: lane, byteCount)
      } else if job.isWeighted {
        sums.add(format, weight: factor, lane: lane) { Shared.vector(place &+ $0) }
      } else {
        sums.add(format, weight: 1, lane: lane) { Shared.vector(place &+ $0) }
      }
      stage = stage &+ TermCursor.termByteCountMax
    }
  #endif

  /// Adds the biases and stores a piece.
  @inline(__always)
  private func finish<Format: SumFormat>(
    _ sums: inout PieceSums, _ job: ReduceJob, _ format: Format.Type, _ piece: Piece, _ rowByteCount: Int32,
    _ byteCount: Int32
  ) {
    let offset = Int64(piece.row) &* Int64(rowByteCount) &+ Int64(piece.offset)
    sums.clearIfEmpty()
    if !job.biases.0.isNull {
      sums.add(format, weight: 1, lane: lane, job.biases.0.advanced(byBytes: offset), byteCount)
    }
    if !job.biases.1.isNull {
      sums.add(format, weight: 1, lane: lane, job.biases.1.advanced(byBytes: offset), byteCount)
    }
    sums.store(format, job.output.advanced(byBytes: offset), lane: lane, byteCount)
    sums.isEmpty = 1
  }
}

/// A lane's part of a piece of at most 2048 bytes.
private struct PieceSums {
  private var a = Sums()
  private var b = Sums()
  private var c = Sums()
  private var d = Sums()
  /// Not zero: nothing has been added, and the others say nothing. An integer, since kernels keep those in registers.
  var isEmpty: Int32

  @inline(__always) init(isEmpty: Int32) { self.isEmpty = isEmpty }

  /// Before something is added.
  @inline(__always) mutating func clearIfEmpty() {
    if isEmpty != 0 { self = PieceSums(isEmpty: 0) }
  }

  /// Adds what `load` finds, all of 2048 bytes: behind the end of a piece, sums are not stored.
  @inline(__always)
  mutating func add<Format: SumFormat>(
    _ format: Format.Type, weight: Float, lane: Int32, load: (_ byteOffset: Int32) -> Vector
  ) {
    let first = lane &* 16
    let (w, x, y, z) = (load(first), load(first &+ 512), load(first &+ 1024), load(first &+ 1536))
    Format.add(w, weight: weight, to: &a)
    Format.add(x, weight: weight, to: &b)
    Format.add(y, weight: weight, to: &c)
    Format.add(z, weight: weight, to: &d)
  }

  /// Adds so many bytes of a row.
  @inline(__always)
  mutating func add<Format: SumFormat>(
    _ format: Format.Type, weight: Float, lane: Int32, _ row: Address, _ byteCount: Int32
  ) {
    add(format, weight: weight, lane: lane) { $0 < byteCount ? row.vector(at: $0) : Vector(repeating: 0) }
  }

  /// Adds LogFMT records of at most 512 channels, from shared memory or an address.
  ///
  /// - Parameter exact: where the piece's channels lie of blocks that are sent as they are.
  @inline(__always)
  mutating func add<Records: RecordMemory>(
    recordsAt records: Records, exact: Address, weight: Float, lane: Int32, _ byteCount: Int32
  ) {
    let first = lane &* 16
    if first < byteCount { a.add(records.values(at: first, exact), weight: weight) }
    if first &+ 512 < byteCount { b.add(records.values(at: first &+ 512, exact), weight: weight) }
  }

  @inline(__always)
  func store<Format: SumFormat>(_ format: Format.Type, _ row: Address, lane: Int32, _ byteCount: Int32) {
    let first = lane &* 16
    if first < byteCount { row.store(Format.rounded(a), atByte: first) }
    if first &+ 512 < byteCount { row.store(Format.rounded(b), atByte: first &+ 512) }
    if first &+ 1024 < byteCount { row.store(Format.rounded(c), atByte: first &+ 1024) }
    if first &+ 1536 < byteCount { row.store(Format.rounded(d), atByte: first &+ 1536) }
  }
}

/// Walks over the terms of a warp's pieces: piece by piece, a few terms at a time, in the order of slots. All lanes find
/// the sources of 32 slots at once, and keep them while pieces of one row follow each other.
private struct TermCursor {
  @inline(__always) static var termByteCountMax: Int32 { 2048 }

  private(set) var walk: Walk
  /// Those whose terms it is at, three at most; none where a piece has no terms.
  private(set) var lanes: UInt32 = 0
  private let isCoded: Bool
  private let slotCount: Int32
  private var firstSlot: Int32 = 0
  private var own = RowSource.none
  private var present: UInt32 = 0
  private var left: UInt32 = 0

  @inline(__always)
  init(
    _ machine: GPUMachine, _ start: ReduceStart, isCoded: Bool, slotCount: Int32, _ source: (WeightedPlace) -> RowSource
  ) {
    self.isCoded = isCoded
    self.slotCount = slotCount
    walk = start.walk
    walk.ask(machine)
    setSources(source(start.own))
  }

  @inline(__always) var isOver: Bool { walk.isOver }
  /// These are the last terms of the piece.
  @inline(__always) var isLast: Bool { left == 0 && firstSlot &+ 32 >= slotCount }
  /// Of this lane's term.
  @inline(__always) var weight: Float { own.weight }
  @inline(__always) var exact: Address { own.exact }

  @inline(__always)
  mutating func advance(
    _ machine: GPUMachine, _ pieces: Pieces, _ place: (Int32, Int32) -> WeightedPlace,
    _ source: (WeightedPlace) -> RowSource
  ) {
    if left != 0 { return takeLanes() }
    let row = walk.piece.row
    if firstSlot &+ 32 < slotCount {
      firstSlot = firstSlot &+ 32
    } else {
      firstSlot = 0
      walk.step(machine, pieces)
      if walk.piece.row == row && slotCount <= 32 {
        left = present
        return takeLanes()
      }
    }
    let slot = firstSlot &+ machine.lane
    setSources(slot < slotCount && !walk.isOver ? source(place(walk.piece.row, slot)) : .none)
  }

  @inline(__always)
  private mutating func setSources(_ source: RowSource) {
    own = source
    present = ptx_ballot(own.row.isNull ? 0 : 1)
    left = present
    takeLanes()
  }

  @inline(__always)
  private mutating func takeLanes() {
    let withoutOne = left & (left &- 1)
    let withoutTwo = withoutOne & (withoutOne &- 1)
    let rest = withoutTwo & (withoutTwo &- 1)
    lanes = left & ~rest
    left = rest
  }

  #if BULK_COPIES
    /// Starts to fill a stage with these terms.
    @inline(__always) func load(_ issued: inout Int32, _ stages: Stages, _ pieces: Pieces) {
      stages.load(
        issued, from: own.row.advanced(byBytes: Int64(termByteCount(walk.piece.offset))),
        termByteCount(pieces.byteCount(of: walk.piece)), of: lanes, distance: Self.termByteCountMax)
      issued = issued &+ 1
    }
  #else
    @inline(__always) func address(_ machine: GPUMachine, of lane: Int32) -> Address {
      machine.shuffle(own.row, from: lane).advanced(byBytes: Int64(termByteCount(walk.piece.offset)))
    }
  #endif

  /// Bytes of a term for so many of the sum.
  @inline(__always) private func termByteCount(_ byteCount: Int32) -> Int32 {
    isCoded ? LogFMT.byteCount(channelCount: byteCount / 2) : byteCount
  }
}
