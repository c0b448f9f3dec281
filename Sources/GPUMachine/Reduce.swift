import PTX

extension GPUMachine {
  @inline(__always)
  public func reduceRows(_ job: ReduceJob, source: (Int32, Int32) -> RowSource) {
    switch job.format {
    case .bf16: reduce(job, BF16.self, source)
    case .fp16: reduce(job, FP16.self, source)
    default: reduce(job, FP32.self, source)
    }
  }

  @inline(__always)
  private func reduce<Format: SumFormat>(_ job: ReduceJob, _ format: Format.Type, _ source: (Int32, Int32) -> RowSource)
  {
    let rowByteCount = job.elementCount &* Format.elementByteCount
    if rowByteCount % 16 != 0 {
      reduceElements(job, format, source)
    } else {
      reduceVectors(job, format, rowByteCount, source)
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
    _ job: ReduceJob, _ format: Format.Type, _ rowByteCount: Int32, _ source: (Int32, Int32) -> RowSource
  ) {
    let pieces = Pieces(
      firstRow: job.firstRow, rowCount: job.rowCount, rowByteCount: rowByteCount, pieceByteCountMax: 2048, granule: 16)
    var runs = Runs(self, pieces, runLength: pieces.piecesPerRow, counter: job.counter)
    let start = Walk(self, pieces, &runs)
    if start.isOver { return }
    #if BULK_COPIES
      let stages = Stages(self, count: 6)
      stages.open()
      var ahead = TermCursor(start, slotCount: job.slotCount)
      var (issued, used) = (Int32(0), Int32(0))
      while issued < stages.count &- 1 && ahead.advance(self, pieces, &runs, through: Runs.aheadMax, source) {
        stages.load(issued, from: ahead.address(self), pieces.byteCount(of: ahead.walk.piece))
        issued = issued &+ 1
      }
    #endif
    var terms = TermCursor(start, slotCount: job.slotCount)
    while !terms.walk.isOver {
      let piece = terms.walk.piece
      let byteCount = pieces.byteCount(of: piece)
      var sums = PieceSums()
      while terms.advanceInPiece(self, pieces, &runs, source) {
        #if BULK_COPIES
          // Into the stage that was read last. Where this warp had to wait with looking ahead, it is this term's.
          let lastRun = terms.walk.run &+ Runs.aheadMax
          if ahead.advance(self, pieces, &runs, through: lastRun, source) {
            stages.load(issued, from: ahead.address(self), pieces.byteCount(of: ahead.walk.piece))
            issued = issued &+ 1
          }
          let stage = stages.offset(of: used)
          stages.wait(for: used)
          if job.isWeighted {
            sums.add(format, weight: terms.weight(self), lane: lane, byteCount) { Shared.vector(stage &+ $0) }
          } else {
            sums.add(format, weight: 1, lane: lane, byteCount) { Shared.vector(stage &+ $0) }
          }
          used = used &+ 1
          // All lanes have read the stage.
          ptx_warp_barrier()
        #else
          let row = terms.address(self)
          sums.add(format, weight: terms.weight(self), lane: lane, byteCount) { row.vector(at: $0) }
        #endif
      }
      let offset = Int64(piece.row) &* Int64(rowByteCount) &+ Int64(piece.offset)
      if !job.biases.0.isNull {
        let row = job.biases.0.advanced(byBytes: offset)
        sums.add(format, weight: 1, lane: lane, byteCount) { row.vector(at: $0) }
      }
      if !job.biases.1.isNull {
        let row = job.biases.1.advanced(byBytes: offset)
        sums.add(format, weight: 1, lane: lane, byteCount) { row.vector(at: $0) }
      }
      sums.store(format, job.output.advanced(byBytes: offset), lane: lane, byteCount)
    }
    #if BULK_COPIES
      stages.close()
    #endif
  }
}

/// A lane's part of a piece of at most 2048 bytes.
private struct PieceSums {
  private var a = Sums()
  private var b = Sums()
  private var c = Sums()
  private var d = Sums()

  @inline(__always)
  mutating func add<Format: SumFormat>(
    _ format: Format.Type, weight: Float, lane: Int32, _ byteCount: Int32, load: (_ byteOffset: Int32) -> Vector
  ) {
    let first = lane &* 16
    let zero = Vector(repeating: 0)
    let (w, x) = (first < byteCount ? load(first) : zero, first &+ 512 < byteCount ? load(first &+ 512) : zero)
    let y = first &+ 1024 < byteCount ? load(first &+ 1024) : zero
    let z = first &+ 1536 < byteCount ? load(first &+ 1536) : zero
    Format.add(w, weight: weight, to: &a)
    Format.add(x, weight: weight, to: &b)
    Format.add(y, weight: weight, to: &c)
    Format.add(z, weight: weight, to: &d)
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

/// Walks over the terms of a warp's pieces: piece by piece, in the order of slots. All lanes find the sources of 32
/// slots at once, and keep them while pieces of one row follow each other.
private struct TermCursor {
  private(set) var walk: Walk
  private let slotCount: Int32
  private var firstSlot: Int32 = -32
  private var knownRow: Int32 = -1
  private var own = RowSource.none
  private var present: UInt32 = 0
  private var left = LaneSlots()
  private var lane: Int32 = 0

  @inline(__always) init(_ walk: Walk, slotCount: Int32) {
    self.walk = walk
    self.slotCount = slotCount
  }

  /// Goes to the next term of all pieces; false behind the last, and behind the run `lastRun`.
  @inline(__always)
  mutating func advance(
    _ machine: GPUMachine, _ pieces: Pieces, _ runs: inout Runs, through lastRun: Int32,
    _ source: (Int32, Int32) -> RowSource
  ) -> Bool {
    while !walk.isOver && walk.run <= lastRun {
      if advanceInPiece(machine, pieces, &runs, source) { return true }
    }
    return false
  }

  /// Goes to the next term of the walk's piece. Behind its last, goes before the next piece's first and returns false.
  @inline(__always)
  mutating func advanceInPiece(
    _ machine: GPUMachine, _ pieces: Pieces, _ runs: inout Runs, _ source: (Int32, Int32) -> RowSource
  ) -> Bool {
    while left.present == 0 {
      firstSlot = firstSlot &+ 32
      if firstSlot >= slotCount {
        firstSlot = -32
        walk.step(machine, pieces, &runs)
        return false
      }
      if walk.piece.row != knownRow || slotCount > 32 {
        let slot = firstSlot &+ machine.lane
        own = slot < slotCount ? source(walk.piece.row, slot) : .none
        present = ptx_ballot(own.row.isNull ? 0 : 1)
        knownRow = walk.piece.row
      }
      left = LaneSlots(present: present)
    }
    lane = left.removeFirst()
    return true
  }

  @inline(__always) func address(_ machine: GPUMachine) -> Address {
    machine.shuffle(own.row, from: lane).advanced(byBytes: Int64(walk.piece.offset))
  }

  @inline(__always) func weight(_ machine: GPUMachine) -> Float { machine.shuffle(own.weight, from: lane) }
}
