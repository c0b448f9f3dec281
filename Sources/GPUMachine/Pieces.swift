import PTX

/// Rows cut into equal pieces, all but the last of a row.
struct Pieces {
  let firstRow: Int32
  let rowByteCount: Int32
  let pieceByteCount: Int32
  let piecesPerRow: Int32
  /// Of all rows.
  let count: Int32

  /// - Parameter granule: bytes that pieces are multiples of, except for the last of a row.
  @inline(__always)
  init(firstRow: Int32 = 0, rowCount: Int32, rowByteCount: Int32, pieceByteCountMax: Int32, granule: Int32) {
    self.firstRow = firstRow
    self.rowByteCount = rowByteCount
    let wanted = max(1, (rowByteCount &+ pieceByteCountMax &- 1) / pieceByteCountMax)
    let even = (rowByteCount &+ wanted &- 1) / wanted
    pieceByteCount = max(granule, (even &+ granule &- 1) / granule &* granule)
    piecesPerRow = (rowByteCount &+ pieceByteCount &- 1) / pieceByteCount
    count = rowCount &* piecesPerRow
  }

  @inline(__always) func byteCount(of piece: Piece) -> Int32 { min(pieceByteCount, rowByteCount &- piece.offset) }
}

/// One of them, as a place in rows: to go to the next takes no division.
struct Piece {
  var index: Int32
  var row: Int32
  /// Bytes into the row.
  var offset: Int32
}

/// Which pieces a warp takes: runs of neighbours, so that it finds out once where a row goes. Where there are many, warps
/// take one run after the other as they get done with them, since some are faster than others; a warp then keeps in its
/// lanes which ones it has taken last.
struct Runs {
  private let pieceCount: Int32
  private let runLength: Int32
  private let counter: Address
  private var takenCount: Int32 = 0
  /// Lane `l`: where the last run began whose number is `l` modulo 32. Without a counter: where the one run begins.
  private var starts: Int32
  /// Lane 0: the run to be taken next. Without a counter: where the one run ends.
  private var next: Int32

  @inline(__always)
  init(_ machine: GPUMachine, _ pieces: Pieces, runLength: Int32, counter: Address) {
    pieceCount = pieces.count
    self.runLength = runLength
    // Neighbours in the order of workers, so that few pieces are spread over all multiprocessors.
    let warps = Int64(machine.workerCount &* GPUMachine.warpCount)
    let index = Int64(machine.warp &* machine.workerCount &+ machine.workerIndex)
    let isShort = Int64(pieces.count) < 4 &* warps &* Int64(runLength)
    self.counter = isShort ? .null : counter
    if isShort || counter.isNull {
      starts = Int32(truncatingIfNeeded: Int64(pieces.count) &* index / warps)
      next = Int32(truncatingIfNeeded: Int64(pieces.count) &* (index &+ 1) / warps)
    } else {
      (starts, next) = (0, Int32(truncatingIfNeeded: index))
    }
  }

  /// Pieces of this warp's run number `number`; empty behind the last.
  @inline(__always)
  mutating func run(_ number: Int32, _ machine: GPUMachine) -> (first: Int32, end: Int32) {
    if counter.isNull { return number == 0 ? (starts, next) : (pieceCount, pieceCount) }
    if number == takenCount {
      takenCount = takenCount &+ 1
      let run = ptx_shuffle(UInt32(bitPattern: next), 0)
      let start = min(Int64(pieceCount), Int64(run) &* Int64(runLength))
      if machine.lane == number & 31 { starts = Int32(truncatingIfNeeded: start) }
      // Asked for now, needed a run later.
      if machine.lane == 0 {
        next = Int32(bitPattern: ptx_take(counter.bits)) &+ machine.workerCount &* GPUMachine.warpCount
      }
    }
    let start = Int32(bitPattern: ptx_shuffle(UInt32(bitPattern: starts), UInt32(bitPattern: number & 31)))
    return (start, min(pieceCount, start &+ runLength))
  }
}

/// A way over a warp's pieces.
struct Walk {
  private(set) var piece = Piece(index: 0, row: 0, offset: 0)
  private(set) var run: Int32 = -1
  private var end: Int32 = 0

  @inline(__always)
  init(_ machine: GPUMachine, _ pieces: Pieces, _ runs: inout Runs) { goToNextRun(machine, pieces, &runs) }

  /// Behind the last piece.
  @inline(__always) var isOver: Bool { piece.index >= end }

  @inline(__always)
  mutating func step(_ machine: GPUMachine, _ pieces: Pieces, _ runs: inout Runs) {
    piece.index = piece.index &+ 1
    if piece.index == end { return goToNextRun(machine, pieces, &runs) }
    piece.offset = piece.offset &+ pieces.pieceByteCount
    if piece.offset >= pieces.rowByteCount {
      piece.offset = 0
      piece.row = piece.row &+ 1
    }
  }

  @inline(__always)
  private mutating func goToNextRun(_ machine: GPUMachine, _ pieces: Pieces, _ runs: inout Runs) {
    run = run &+ 1
    let (first, end) = runs.run(run, machine)
    self.end = end
    piece = Piece(
      index: first, row: pieces.firstRow &+ first / pieces.piecesPerRow,
      offset: first % pieces.piecesPerRow &* pieces.pieceByteCount)
  }
}

extension GPUMachine {
  /// An address that lane `source` has.
  @inline(__always)
  func shuffle(_ address: Address, from source: Int32) -> Address {
    let low = ptx_shuffle(UInt32(truncatingIfNeeded: address.bits), UInt32(bitPattern: source))
    let high = ptx_shuffle(UInt32(truncatingIfNeeded: address.bits &>> 32), UInt32(bitPattern: source))
    return Address(bits: UInt64(high) &<< 32 | UInt64(low))
  }

  @inline(__always)
  func shuffle(_ value: Float, from source: Int32) -> Float {
    Float(bitPattern: ptx_shuffle(value.bitPattern, UInt32(bitPattern: source)))
  }
}

/// Where the row of one token goes, or comes from: lane `l` of the warp knows slot `firstSlot + l`.
struct LaneSlots {
  /// Bit `l`: lane `l` has an address.
  var present: UInt32 = 0

  /// Removes the first slot and returns its lane.
  @inline(__always)
  mutating func removeFirst() -> Int32 {
    let lane = Int32(truncatingIfNeeded: present.trailingZeroBitCount)
    present &= present &- 1
    return lane
  }
}
