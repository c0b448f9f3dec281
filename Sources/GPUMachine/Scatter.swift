import PTX

/// A warp's pieces. The first one may be on its way into the first stage.
public struct ScatterStart {
  fileprivate let cut: PieceCut
  fileprivate let walk: Walk
  /// None where the warp has no piece.
  fileprivate let piece: Piece
}

extension ScatterJob {
  @inline(__always) fileprivate func pieces(_ cut: PieceCut) -> Pieces {
    Pieces(rowCount: rowCount, rowByteCount: rowByteCount, cut)
  }
}

extension GPUMachine {
  @inline(__always)
  public var noScatter: ScatterStart { ScatterStart(cut: .none, walk: Walk(), piece: .none) }

  @inline(__always)
  public func startScatter(_ job: ScatterJob) -> ScatterStart {
    let quantizes = job.transform != .copy
    let cut = PieceCut(
      rowByteCount: job.rowByteCount,
      pieceByteCountMax: job.beside.isNull ? 4096 : 4096 &- ScatterJob.besideByteCountMax,
      granule: quantizes ? Self.quantizedGranule(job.rowByteCount) : 16)
    let pieces = job.pieces(cut)
    // Where many multiprocessors share the memory, that is what bounds them, and it is fastest where all of them are at neighbours.
    // Few are faster the less often they find out where a row goes, the more so the more they have to do with it.
    let isCrowd = workerCount &* job.sharerCount >= 64
    let runLength = isCrowd ? 1 : quantizes ? pieces.piecesPerRow : (pieces.piecesPerRow &+ 1) &>> 1
    let walk = Walk(self, pieces, runLength: runLength, counter: job.counter)
    if walk.isOver { return ScatterStart(cut: cut, walk: walk, piece: .none) }
    #if BULK_COPIES
      load(0, Stages(self, count: Self.scatterStageCount), job, pieces, walk.piece)
    #endif
    return ScatterStart(cut: cut, walk: walk, piece: walk.piece)
  }

  @inline(__always)
  public func abandon(_ start: ScatterStart) {
    #if BULK_COPIES
      if start.piece.isNone { return }
      let stages = Stages(self, count: Self.scatterStageCount)
      stages.wait(for: 0)
      stages.close(after: 1)
    #endif
  }

  @inline(__always) private static var scatterStageCount: Int32 { 3 }

  @inline(__always)
  public func scatterRows<Content, Label>(
    _ job: ScatterJob, from start: ScatterStart, route: (Int32, Int32) -> RowTarget, labelCount: Int32,
    content contentOfPart: (Int32, Int32, Int32) -> Content, label: (Int32, Int32) -> Label?,
    write: (Label, Content, Int32) -> Void
  ) {
    let quantizes = job.transform != .copy
    let (pieces, globalScale) = (job.pieces(start.cut), GlobalScale(job.globalScale, lane: lane))
    var (piece, walk) = (start.piece, start.walk)
    if piece.isNone { return }
    walk.ask(self)
    var targets = Targets(slotCount: job.slotCount)
    // A lane for each part of each label, 32 at a time.
    let partCount = max(1, labelCount)
    let (firstSlot, slotStep) = (lane.over(partCount), Int32(32).over(partCount))
    let (firstPart, partStep) = (lane &- firstSlot &* partCount, 32 &- slotStep &* partCount)
    #if BULK_COPIES
      let stages = Stages(self, count: Self.scatterStageCount)
      var use: Int32 = 0
      // Two are on their way while one is sent on.
      walk.step(self, pieces)
      var following = loadNext(1, stages, job, pieces, walk)
    #endif
    while !piece.isNone {
      #if BULK_COPIES
        let content = PieceContent(stage: stages.offset(of: use))
        stages.wait(for: use)
        let scales =
          quantizes ? quantize(content, job, globalScale, &targets, pieces, piece, route) : PieceScales.none
        let shift = job.transform.narrowing
        let byteCount = UInt32(bitPattern: pieces.byteCount(of: piece) &>> shift)
        let offset = Int64(piece.offset &>> shift)
        targets.forEachLane(self, piece.row, route) { target in
          ptx_bulk_store(target.row.advanced(byBytes: offset).bits, UInt32(bitPattern: content.stage), byteCount)
          if piece.offset == 0 && !job.beside.isNull {
            let record = stages.endOffset(of: use) &- job.besideByteCount
            ptx_bulk_store(target.scales.bits, UInt32(bitPattern: record), UInt32(bitPattern: job.besideByteCount))
          }
        } behind: { targets in
          if quantizes { targets.forEachScales(self) { scales.store(at: $0, lane: lane) } }
        }
        ptx_bulk_commit()
        // The next one's stage is that of the piece before this one, whose stores must have read it.
        if !walk.isOver { walk.step(self, pieces) }
        if !walk.isOver { ptx_bulk_wait_read_but_one() }
        ptx_warp_barrier()
        let third = loadNext(use &+ 2, stages, job, pieces, walk)
        use = use &+ 1
      #else
        let content = PieceContent(source: source(of: job, piece))
        if quantizes {
          let scales = quantize(content, job, globalScale, &targets, pieces, piece, route)
          targets.forEach(self, piece.row, route) { scales.store(at: $0.scales, lane: lane) }
        } else {
          copy(content, pieces.byteCount(of: piece)) { store in
            targets.forEach(self, piece.row, route) { store($0.row.advanced(byBytes: Int64(piece.offset))) }
          }
          if piece.offset == 0 && !job.beside.isNull { copyBeside(job, piece.row, targets) }
        }
      #endif
      // Meanwhile, rows are on their way.
      if piece.offset == 0 {
        var (slot, part) = (firstSlot, firstPart)
        while slot < job.slotCount && labelCount > 0 {
          let text = contentOfPart(piece.row, slot, part)
          if let label = label(piece.row, slot) { write(label, text, part) }
          (slot, part) = (slot &+ slotStep, part &+ partStep)
          if part >= labelCount { (slot, part) = (slot &+ 1, part &- labelCount) }
        }
      }
      #if BULK_COPIES
        (piece, following) = (following, third)
      #else
        walk.step(self, pieces)
        piece = walk.isOver ? .none : walk.piece
      #endif
    }
    #if BULK_COPIES
      // Done, not only read: what follows tells others of the rows.
      ptx_bulk_wait()
      stages.close(after: use)
    #endif
  }

  /// Bytes of BF16 that all lanes quantize at a time to FP8.
  @inline(__always) private static var roundByteCount: Int32 { 2048 }

  /// What pieces that are quantized are multiples of: whole rounds, where rows are, or blocks.
  @inline(__always)
  private static func quantizedGranule(_ rowByteCount: Int32) -> Int32 {
    rowByteCount % roundByteCount == 0 ? roundByteCount : 2 &* channelsPerScale
  }

  @inline(__always)
  private func source(of job: ScatterJob, _ piece: Piece) -> Address {
    job.source.advanced(byBytes: Int64(piece.row) &* Int64(job.rowByteCount) &+ Int64(piece.offset))
  }

  #if BULK_COPIES
    /// Starts to fill a stage with a piece and, if it is the first of its row, with what is copied beside that, at the stage's
    /// end.
    @inline(__always)
    private func load(_ use: Int32, _ stages: Stages, _ job: ScatterJob, _ pieces: Pieces, _ piece: Piece) {
      let isFirst = piece.offset == 0 && !job.beside.isNull
      let record = job.beside.advanced(byBytes: Int64(piece.row) &* Int64(job.besideByteCount))
      stages.load(
        use, from: source(of: job, piece), pieces.byteCount(of: piece), isFirst ? record : .null, job.besideByteCount)
    }

    /// The same with the piece that a walk has come to, if there is one. Returns that.
    @inline(__always)
    private func loadNext(
      _ use: Int32, _ stages: Stages, _ job: ScatterJob, _ pieces: Pieces, _ walk: Walk
    ) -> Piece {
      if walk.isOver { return .none }
      load(use, stages, job, pieces, walk.piece)
      return walk.piece
    }
  #else
    /// A vector a lane, to the destinations that the row has just been sent to.
    @inline(__always)
    private func copyBeside(_ job: ScatterJob, _ row: Int32, _ targets: Targets) {
      let offset = lane &* 16
      let record = PieceContent(
        source: job.beside.advanced(byBytes: Int64(row) &* Int64(job.besideByteCount)))
      let vector = record.vector(at: offset, below: job.besideByteCount)
      targets.forEachKnown(self) { target in
        if offset < job.besideByteCount { target.scales.store(vector, atByte: offset) }
      }
    }

    /// Copies a piece to each place that `forEachTarget` calls what it is given with.
    @inline(__always)
    func copy(_ content: PieceContent, _ byteCount: Int32, forEachTarget: ((Address) -> Void) -> Void) {
      var round: Int32 = 0
      while round < byteCount {
        // Four loads under way at a time.
        let first = round &+ lane &* 16
        let a = content.vector(at: first, below: byteCount)
        let b = content.vector(at: first &+ 512, below: byteCount)
        let c = content.vector(at: first &+ 1024, below: byteCount)
        let d = content.vector(at: first &+ 1536, below: byteCount)
        forEachTarget { target in
          if first < byteCount { target.store(a, atByte: first) }
          if first &+ 512 < byteCount { target.store(b, atByte: first &+ 512) }
          if first &+ 1024 < byteCount { target.store(c, atByte: first &+ 1024) }
          if first &+ 1536 < byteCount { target.store(d, atByte: first &+ 1536) }
        }
        round = round &+ 2048
      }
    }
  #endif

  /// Quantizes a piece, at most 2048 channels, and writes its codes, unless they are to be copied in bulk: then they lie where
  /// the channels lay. Returns the scales, which are still to be written.
  @inline(__always)
  private func quantize(
    _ content: PieceContent, _ job: ScatterJob, _ globalScale: GlobalScale, _ targets: inout Targets,
    _ pieces: Pieces, _ piece: Piece, _ route: (Int32, Int32) -> RowTarget
  ) -> PieceScales {
    let byteCount = pieces.byteCount(of: piece)
    let isPowerOfTwo = job.transform.hasPowerOfTwoScales
    let isPacked = job.transform == .quantizeUE8M0Scales
    // Lane `b` keeps the scale of block `b`, or the scales of four.
    var scale =
      job.transform == .quantizeNVFP4
      ? quantizeNVFP4(content, globalScale, &targets, byteCount, piece, route)
      : quantizeFP8(content, isPowerOfTwo, &targets, byteCount, piece, route)
    // A block has 2 to the power of this in bytes, or four have.
    let shift: Int32 = job.transform == .quantizeNVFP4 ? 7 : 8
    let firstBlock = piece.offset &>> shift
    let blockCount = (byteCount &+ (1 &<< shift) &- 1) &>> shift
    // UE8M0 scales are packed by four: the bytes behind the last are zero.
    let isLast = piece.offset &+ byteCount == pieces.rowByteCount
    let packedCount = isPacked && isLast ? (firstBlock &+ blockCount &+ 3) / 4 &* 4 &- firstBlock : blockCount
    if lane >= blockCount { scale = 0 }
    if isPowerOfTwo && !isPacked { scale = scale == 255 ? 0x7fc0_0000 : scale &<< 23 }
    #if BULK_COPIES
      // The codes were written by ordinary stores, and are read by bulk copies.
      ptx_fence_proxy_shared()
      ptx_warp_barrier()
    #endif
    let block = firstBlock &+ lane
    var offset = Int64(isPacked ? block &>> 2 : block) &* Int64(job.scaleStride)
    if isPacked { offset = offset &+ Int64(block & 3) }
    return PieceScales(own: scale, count: packedCount, offset: offset, isPacked: isPacked)
  }

  /// In blocks of 128 channels. Lane `b` returns the scale of block `b`.
  @inline(__always)
  private func quantizeFP8(
    _ content: PieceContent, _ isPowerOfTwo: Bool, _ targets: inout Targets, _ byteCount: Int32, _ piece: Piece,
    _ route: (Int32, Int32) -> RowTarget
  ) -> UInt32 {
    var scale: UInt32 = 0
    var round: Int32 = 0
    #if BULK_COPIES
      clearRest(of: content, byteCount)
      while round &* Self.roundByteCount < byteCount {
        // Four lanes have a block, four vectors each. They take them in turns, so that neighbours read from other banks.
        let place = { (index: Int32) -> Int32 in
          round &* Self.roundByteCount &+ lane &* 64 &+ ((index &+ lane &>> 1) & 3) &* 16
        }
        // Behind the piece's blocks, too, where nobody looks at what becomes of it.
        let (a, b) = (Shared.vector(content.stage &+ place(0)), Shared.vector(content.stage &+ place(1)))
        let (c, d) = (Shared.vector(content.stage &+ place(2)), Shared.vector(content.stage &+ place(3)))
        let block = BlockScale(
          largest: BlockScale.largest(a, b, c, d), laneCount: 4, isPowerOfTwo: isPowerOfTwo)
        let found = ptx_shuffle(block.scale, UInt32(bitPattern: (lane & 7) &<< 2))
        if lane &>> 3 == round { scale = found }
        // All have read before any writes: codes lie where channels lay that have been read.
        ptx_warp_barrier()
        content.store(block.codes(a), at: place(0) &>> 1)
        content.store(block.codes(b), at: place(1) &>> 1)
        content.store(block.codes(c), at: place(2) &>> 1)
        content.store(block.codes(d), at: place(3) &>> 1)
        round = round &+ 1
      }
    #else
      while round &* 512 < byteCount {
        let first = round &* 512 &+ lane &* 16
        let vector = content.vector(at: first, below: byteCount)
        let block = BlockScale(
          largest: BlockScale.largest(vector), laneCount: 16, isPowerOfTwo: isPowerOfTwo)
        let found = ptx_shuffle(block.scale, UInt32(bitPattern: (lane & 1) &<< 4))
        if lane &>> 1 == round { scale = found }
        let codes = block.codes(vector)
        targets.forEach(self, piece.row, route) { target in
          let place = target.row.advanced(byBytes: Int64((piece.offset &+ first) &>> 1))
          if first < byteCount { place.store(SIMD2(codes.0, codes.1), at: 0) }
        }
        round = round &+ 1
      }
    #endif
    return scale
  }

  #if BULK_COPIES
    /// Zeroes what the last block of a piece lacks.
    @inline(__always)
    private func clearRest(of content: PieceContent, _ byteCount: Int32) {
      let wordCount = ((0 &- byteCount) & (2 &* channelsPerScale &- 1)) &>> 2
      if wordCount == 0 { return }
      var word = lane
      while word < wordCount {
        Shared.word(content.stage &+ byteCount)[Int(word)] = 0
        word = word &+ 32
      }
      ptx_warp_barrier()
    }
  #endif

  /// In blocks of 16 channels. Lane `b` returns the scales of four blocks, from `4 * b` on.
  @inline(__always)
  private func quantizeNVFP4(
    _ content: PieceContent, _ globalScale: GlobalScale, _ targets: inout Targets, _ byteCount: Int32, _ piece: Piece,
    _ route: (Int32, Int32) -> RowTarget
  ) -> UInt32 {
    var scales: UInt32 = 0
    var round: Int32 = 0
    #if BULK_COPIES
      while round &* 1024 < byteCount {
        // A lane has a block of two vectors. Neighbours read from other banks.
        let place = (round &* 1024 &+ lane &* 32) ^ ((lane & 4) &<< 2)
        let a = content.vector(at: place, below: byteCount)
        let b = content.vector(at: place ^ 16, below: byteCount)
        let block = NVFP4Block(largest: BlockScale.largest(a, b), laneCount: 1, globalScale)
        let two = block.scale | ptx_shuffle_xor(block.scale, 1) &<< 8
        let four = two | ptx_shuffle_xor(two, 2) &<< 16
        let found = ptx_shuffle(four, UInt32(bitPattern: (lane & 7) &<< 2))
        if lane &>> 3 == round { scales = found }
        // All have read before any writes: codes lie where channels lay that have been read.
        ptx_warp_barrier()
        content.store(block.codes(a), at: place &>> 2)
        content.store(block.codes(b), at: (place ^ 16) &>> 2)
        round = round &+ 1
      }
    #else
      while round &* 512 < byteCount {
        let first = round &* 512 &+ lane &* 16
        let vector = content.vector(at: first, below: byteCount)
        let block = NVFP4Block(largest: BlockScale.largest(vector), laneCount: 2, globalScale)
        // Two lanes have a block.
        let two = block.scale | ptx_shuffle_xor(block.scale, 2) &<< 8
        let four = two | ptx_shuffle_xor(two, 4) &<< 16
        let found = ptx_shuffle(four, UInt32(bitPattern: (lane & 3) &<< 3))
        if lane &>> 2 == round { scales = found }
        let codes = block.codes(vector)
        targets.forEach(self, piece.row, route) { target in
          if first < byteCount { target.row.store(codes, at: (piece.offset &+ first) &>> 4) }
        }
        round = round &+ 1
      }
    #endif
    return scales
  }
}

/// The scales of a piece: each lane has one, or four in columns of words.
struct PieceScales {
  let own: UInt32
  /// Of lanes that have one.
  let count: Int32
  /// Bytes from the first of the row to this lane's.
  let offset: Int64
  /// In bytes, four in a word.
  let isPacked: Bool

  @inline(__always) static var none: PieceScales { PieceScales(own: 0, count: 0, offset: 0, isPacked: false) }

  /// Beside one of the destinations, by all lanes.
  @inline(__always)
  func store(at scales: Address, lane: Int32) {
    if lane >= count { return }
    let place = scales.advanced(byBytes: offset)
    if isPacked { place.store(UInt8(truncatingIfNeeded: own), at: 0) } else { place.store(own, at: 0) }
  }
}

/// A piece of a row, where a warp reads it.
struct PieceContent {
  #if BULK_COPIES
    let stage: Int32

    @inline(__always)
    func vector(at byteOffset: Int32, below end: Int32) -> Vector {
      byteOffset < end ? Shared.vector(stage &+ byteOffset) : Vector(repeating: 0)
    }

    @inline(__always)
    func store(_ codes: (UInt32, UInt32), at byteOffset: Int32) {
      let words = Shared.word(stage &+ byteOffset)
      words[0] = Int32(bitPattern: codes.0)
      words[1] = Int32(bitPattern: codes.1)
    }

    @inline(__always)
    func store(_ codes: UInt32, at byteOffset: Int32) {
      Shared.word(stage &+ byteOffset)[0] = Int32(bitPattern: codes)
    }
  #else
    let source: Address

    @inline(__always)
    func vector(at byteOffset: Int32, below end: Int32) -> Vector {
      byteOffset < end ? source.vector(at: byteOffset) : Vector(repeating: 0)
    }
  #endif
}

/// The destinations of one row, found by all lanes at once and kept while pieces of the row go there.
struct Targets {
  private let slotCount: Int32
  private var row: Int32 = -1
  private var own = RowTarget.none
  private var present: UInt32 = 0

  @inline(__always) init(slotCount: Int32) { self.slotCount = slotCount }

  #if BULK_COPIES
    /// Calls `body` on each lane that has a destination, and then `behind` on all lanes, so often as 32 slots have them all.
    @inline(__always)
    mutating func forEachLane(
      _ machine: GPUMachine, _ row: Int32, _ route: (Int32, Int32) -> RowTarget, _ body: (RowTarget) -> Void,
      behind: (Targets) -> Void
    ) {
      var firstSlot: Int32 = 0
      repeat {
        find(machine, row, firstSlot, route)
        if !own.row.isNull { body(own) }
        behind(self)
        firstSlot = firstSlot &+ 32
      } while firstSlot < slotCount
    }

    /// Of the slots that were looked at last: calls `body` on all lanes with where the scales go, for one destination after
    /// another.
    @inline(__always)
    func forEachScales(_ machine: GPUMachine, _ body: (Address) -> Void) {
      var slots = LaneSlots(present: present)
      while slots.present != 0 { body(machine.shuffle(own.scales, from: slots.removeFirst())) }
    }
  #endif

  /// Calls `body` on all lanes, for one destination after another.
  @inline(__always)
  mutating func forEach(
    _ machine: GPUMachine, _ row: Int32, _ route: (Int32, Int32) -> RowTarget, _ body: (RowTarget) -> Void
  ) {
    var firstSlot: Int32 = 0
    repeat {
      find(machine, row, firstSlot, route)
      forEachKnown(machine, body)
      firstSlot = firstSlot &+ 32
    } while firstSlot < slotCount
  }

  @inline(__always)
  private mutating func find(
    _ machine: GPUMachine, _ row: Int32, _ firstSlot: Int32, _ route: (Int32, Int32) -> RowTarget
  ) {
    if row == self.row && slotCount <= 32 { return }
    let slot = firstSlot &+ machine.lane
    own = slot < slotCount ? route(row, slot) : .none
    present = ptx_ballot(own.row.isNull ? 0 : 1)
    self.row = row
  }

  /// Of the slots that were looked at last: all, where there are at most 32.
  @inline(__always)
  func forEachKnown(_ machine: GPUMachine, _ body: (RowTarget) -> Void) {
    var slots = LaneSlots(present: present)
    while slots.present != 0 {
      let lane = slots.removeFirst()
      body(RowTarget(row: machine.shuffle(own.row, from: lane), scales: machine.shuffle(own.scales, from: lane)))
    }
  }
}
