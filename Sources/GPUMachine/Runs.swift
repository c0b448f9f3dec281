import PTX

/// A warp's way over the pieces of rows that lie in runs, in turn with all other warps, whatever runs they lie in. Lane `l` knows
/// one run of 32.
struct RunWalk {
  private(set) var piece = Piece.none
  /// The row that the piece's row is copied to.
  private(set) var place: Int32 = 0
  private let runCount: Int32
  private var firstRun: Int32 = -32
  private var own = RowRun(first: 0, count: 0)
  /// Pieces of these runs up to this lane's and with it, and of them all the number of this one.
  private var upTo: Int32 = 0
  private var index: Int32

  @inline(__always)
  init(_ machine: GPUMachine, _ pieces: Pieces, _ runCount: Int32, _ run: (Int32) -> RowRun) {
    self.runCount = runCount
    // Neighbours go to different workers.
    index = machine.warp &* machine.workerCount &+ machine.workerIndex
    find(machine, pieces, run)
  }

  @inline(__always) var isOver: Bool { piece.isNone }

  @inline(__always)
  mutating func step(_ machine: GPUMachine, _ pieces: Pieces, _ run: (Int32) -> RowRun) {
    index = index &+ machine.workerCount &* GPUMachine.warpCount
    find(machine, pieces, run)
  }

  @inline(__always)
  private mutating func find(_ machine: GPUMachine, _ pieces: Pieces, _ run: (Int32) -> RowRun) {
    var count = machine.shuffle(upTo, from: 31)
    while index >= count {
      index = index &- count
      firstRun = firstRun &+ 32
      if firstRun >= runCount {
        piece = .none
        return
      }
      let number = firstRun &+ machine.lane
      own = number < runCount ? run(number) : RowRun(first: 0, count: 0)
      upTo = machine.sumOfLanes(max(0, own.count) &* pieces.piecesPerRow)
      count = machine.shuffle(upTo, from: 31)
    }
    let lane = Int32(truncatingIfNeeded: ptx_ballot(upTo > index ? 1 : 0).trailingZeroBitCount)
    let before = machine.shuffle(upTo &- max(0, own.count) &* pieces.piecesPerRow, from: lane)
    let row = (index &- before) / pieces.piecesPerRow
    piece = Piece(
      row: machine.shuffle(own.first, from: lane) &+ row,
      offset: (index &- before &- row &* pieces.piecesPerRow) &* pieces.pieceByteCount)
    place = machine.shuffle(own.place, from: lane) &+ row
  }
}

extension GPUMachine {
  @inline(__always)
  public func copyRows(_ job: CopyJob, runCount: Int32, run: (Int32) -> RowRun) {
    let cut = PieceCut(rowByteCount: job.rowByteCount, pieceByteCountMax: 4096, granule: 16)
    let pieces = Pieces(rowCount: 0, rowByteCount: job.rowByteCount, cut)
    var walk = RunWalk(self, pieces, runCount, run)
    if walk.isOver { return }
    #if BULK_COPIES
      let stages = Stages(self, count: 3)
      var use: Int32 = 0
      // Two are on their way while one is sent on.
      var (copy, following) = (PieceCopy.none, PieceCopy.none)
      repeat {
        if !copy.isNone {
          stages.wait(for: use &- 2)
          if lane == 0 {
            let stage = UInt32(bitPattern: stages.offset(of: use &- 2))
            ptx_bulk_store(copy.target.bits, stage, UInt32(bitPattern: copy.byteCount))
            ptx_bulk_commit()
            // The next one's stage is that of the piece before this one, whose stores must have read it.
            if !walk.isOver { ptx_bulk_wait_read_but_one() }
          }
        }
        copy = following
        following = .none
        if !walk.isOver {
          following = PieceCopy(job, pieces, walk)
          stages.load(use, from: following.source, following.byteCount, .null, 0)
          walk.step(self, pieces, run)
        }
        use = use &+ 1
      } while !copy.isNone || !following.isNone
      // Done, not only read: what follows tells others of the rows.
      if lane == 0 { ptx_bulk_wait() }
      stages.close(after: use &- 2)
    #else
      while !walk.isOver {
        let copy = PieceCopy(job, pieces, walk)
        self.copy(PieceContent(source: copy.source), copy.byteCount) { $0(copy.target) }
        walk.step(self, pieces, run)
      }
    #endif
  }
}

/// A piece of a row, from where to where it is copied.
private struct PieceCopy {
  let source: Address
  let target: Address
  let byteCount: Int32

  @inline(__always) static var none: PieceCopy { PieceCopy(source: .null, target: .null, byteCount: 0) }
  @inline(__always) var isNone: Bool { byteCount == 0 }

  @inline(__always)
  private init(source: Address, target: Address, byteCount: Int32) {
    (self.source, self.target, self.byteCount) = (source, target, byteCount)
  }

  @inline(__always)
  init(_ job: CopyJob, _ pieces: Pieces, _ walk: RunWalk) {
    let address = { (tensor: Address, row: Int32) in
      tensor.advanced(byBytes: Int64(row) &* Int64(job.rowByteCount) &+ Int64(walk.piece.offset))
    }
    self.init(
      source: address(job.source, walk.piece.row), target: address(job.target, walk.place),
      byteCount: pieces.byteCount(of: walk.piece))
  }
}
