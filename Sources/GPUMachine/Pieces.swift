import PTX

/// How rows are cut into equal pieces, all but the last of a row.
struct PieceCut {
  let pieceByteCount: Int32
  let piecesPerRow: Int32

  @inline(__always) static var none: PieceCut { PieceCut(pieceByteCount: 0, piecesPerRow: 0) }

  @inline(__always)
  private init(pieceByteCount: Int32, piecesPerRow: Int32) {
    self.pieceByteCount = pieceByteCount
    self.piecesPerRow = piecesPerRow
  }

  /// - Parameters:
  ///   - pieceByteCountMax: a multiple of `granule`.
  ///   - granule: bytes that pieces are multiples of, except for the last of a row; a power of two.
  @inline(__always)
  init(rowByteCount: Int32, pieceByteCountMax: Int32, granule: Int32) {
    piecesPerRow = max(1, (rowByteCount &+ pieceByteCountMax &- 1).over(pieceByteCountMax))
    let even = (rowByteCount &+ piecesPerRow &- 1).over(piecesPerRow)
    pieceByteCount = max(granule, (even &+ granule &- 1) & (0 &- granule))
  }
}

/// Rows that are cut so.
struct Pieces {
  let firstRow: Int32
  let rowCount: Int32
  let rowByteCount: Int32
  private let cut: PieceCut

  @inline(__always)
  init(firstRow: Int32 = 0, rowCount: Int32, rowByteCount: Int32, _ cut: PieceCut) {
    self.firstRow = firstRow
    self.rowCount = rowCount
    self.rowByteCount = rowByteCount
    self.cut = cut
  }

  @inline(__always) var pieceByteCount: Int32 { cut.pieceByteCount }
  @inline(__always) var piecesPerRow: Int32 { cut.piecesPerRow }

  /// Of all rows.
  @inline(__always) var count: Int32 { rowCount &* piecesPerRow }

  @inline(__always) func byteCount(of piece: Piece) -> Int32 { min(pieceByteCount, rowByteCount &- piece.offset) }
}

/// One of them.
struct Piece {
  /// -1: none.
  var row: Int32
  /// Bytes into the row.
  var offset: Int32

  @inline(__always) static var none: Piece { Piece(row: -1, offset: 0) }
  @inline(__always) var isNone: Bool { row < 0 }
}

/// A warp's way over pieces: runs of neighbours, so that it finds out once where a row goes. Where there are many, warps
/// take one run after the other as they get done with them, since some are faster than others.
struct Walk {
  private(set) var piece = Piece(row: 0, offset: 0)
  private let counter: Address
  /// Of its run's pieces, the number of this one, and where the run ends.
  private var index: Int32
  private var end: Int32
  private let runLength: Int32
  private let runsPerRow: Int32
  /// Lane 0: how many runs had been taken, but for each warp's first, when this warp asked.
  private var taken: Int32

  /// - Parameters:
  ///   - runLength: pieces of a row that are taken at a time.
  ///   - counter: see `ScatterJob.counter`.
  @inline(__always)
  init(_ machine: GPUMachine, _ pieces: Pieces, runLength: Int32, counter: Address) {
    self.runLength = runLength
    runsPerRow = (pieces.piecesPerRow &+ runLength &- 1).over(runLength)
    // Neighbours in the order of workers, so that few pieces are spread over all multiprocessors.
    let warps = machine.workerCount &* GPUMachine.warpCount
    let place = machine.warp &* machine.workerCount &+ machine.workerIndex
    let isShort = Int64(pieces.count) < 4 &* Int64(warps) &* Int64(runLength)
    self.counter = isShort ? .null : counter
    taken = place &- warps
    if isShort || counter.isNull {
      // Equal shares; the first warps have one more.
      let share = pieces.count.over(warps)
      let rest = pieces.count &- share &* warps
      index = share &* place &+ min(place, rest)
      end = index &+ share &+ (place < rest ? 1 : 0)
      let row = index.over(pieces.piecesPerRow)
      piece = Piece(
        row: pieces.firstRow &+ row, offset: (index &- row &* pieces.piecesPerRow) &* pieces.pieceByteCount)
    } else {
      (index, end) = (0, 0)
      setRun(machine, pieces)
    }
  }

  /// Asks for the run behind this one: before the first step, since a warp's first run is its own, and then whenever one is begun.
  @inline(__always)
  mutating func ask(_ machine: GPUMachine) {
    // Needed a run later: nothing is done with it before, which would wait for it.
    if !counter.isNull && machine.lane == 0 { taken = Int32(bitPattern: ptx_take(counter.bits)) }
  }

  /// Over no pieces.
  @inline(__always) init() {
    (counter, index, end, runLength, runsPerRow, taken) = (.null, 0, 0, 0, 0, 0)
  }

  /// Behind the last piece.
  @inline(__always) var isOver: Bool { index >= end }

  /// Not behind the last piece.
  @inline(__always)
  mutating func step(_ machine: GPUMachine, _ pieces: Pieces) {
    index = index &+ 1
    if index == end {
      if !counter.isNull {
        setRun(machine, pieces)
        ask(machine)
      }
      return
    }
    piece.offset = piece.offset &+ pieces.pieceByteCount
    if piece.offset >= pieces.rowByteCount {
      piece.offset = 0
      piece.row = piece.row &+ 1
    }
  }

  @inline(__always)
  private mutating func setRun(_ machine: GPUMachine, _ pieces: Pieces) {
    let run = machine.shuffle(taken, from: 0) &+ machine.workerCount &* GPUMachine.warpCount
    let row = runsPerRow == 1 ? run : run.over(runsPerRow)
    let first = (run &- row &* runsPerRow) &* runLength
    index = 0
    end = row < pieces.rowCount ? min(runLength, pieces.piecesPerRow &- first) : 0
    piece = Piece(row: pieces.firstRow &+ row, offset: first &* pieces.pieceByteCount)
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
  func shuffle(_ value: Int32, from source: Int32) -> Int32 {
    Int32(bitPattern: ptx_shuffle(UInt32(bitPattern: value), UInt32(bitPattern: source)))
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
