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
  private let runLength: Int32
  private let counter: Address
  /// Of all pieces, the number of this one, and where its run ends.
  private var index: Int32
  private var end: Int32
  /// Lane 0: the run to be taken next.
  private var next: Int32

  /// - Parameter counter: see `ScatterJob.counter`.
  @inline(__always)
  init(_ machine: GPUMachine, _ pieces: Pieces, runLength: Int32, counter: Address) {
    self.runLength = runLength
    // Neighbours in the order of workers, so that few pieces are spread over all multiprocessors.
    let warps = Int64(machine.workerCount &* GPUMachine.warpCount)
    let place = Int64(machine.warp &* machine.workerCount &+ machine.workerIndex)
    let isShort = Int64(pieces.count) < 4 &* warps &* Int64(runLength)
    self.counter = isShort ? .null : counter
    next = Int32(truncatingIfNeeded: place)
    if isShort || counter.isNull {
      index = Int32(truncatingIfNeeded: Int64(pieces.count) &* place / warps)
      end = Int32(truncatingIfNeeded: Int64(pieces.count) &* (place &+ 1) / warps)
      findPiece(pieces)
    } else {
      (index, end) = (0, 0)
      takeRun(machine, pieces)
    }
  }

  /// Behind the last piece.
  @inline(__always) var isOver: Bool { index >= end }

  @inline(__always)
  mutating func step(_ machine: GPUMachine, _ pieces: Pieces) {
    index = index &+ 1
    if index == end {
      if !counter.isNull { takeRun(machine, pieces) }
      return
    }
    piece.offset = piece.offset &+ pieces.pieceByteCount
    if piece.offset >= pieces.rowByteCount {
      piece.offset = 0
      piece.row = piece.row &+ 1
    }
  }

  @inline(__always)
  private mutating func takeRun(_ machine: GPUMachine, _ pieces: Pieces) {
    let run = ptx_shuffle(UInt32(bitPattern: next), 0)
    index = Int32(truncatingIfNeeded: min(Int64(pieces.count), Int64(run) &* Int64(runLength)))
    end = min(pieces.count, index &+ runLength)
    // Asked for now, needed a run later.
    if machine.lane == 0 {
      next = Int32(bitPattern: ptx_take(counter.bits)) &+ machine.workerCount &* GPUMachine.warpCount
    }
    findPiece(pieces)
  }

  @inline(__always)
  private mutating func findPiece(_ pieces: Pieces) {
    piece = Piece(
      row: pieces.firstRow &+ index / pieces.piecesPerRow,
      offset: index % pieces.piecesPerRow &* pieces.pieceByteCount)
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
