import PTX

/// Rows cut into equal pieces, all but the last of a row, and divided over all warps of all workers: each warp has
/// neighbours, so that it finds out once where a row goes.
struct Pieces {
  let rowByteCount: Int32
  let pieceByteCount: Int32
  let piecesPerRow: Int32
  /// This warp's.
  let first: Int32
  let end: Int32

  /// - Parameter granule: bytes that pieces are multiples of, except for the last of a row.
  @inline(__always)
  init(_ machine: GPUMachine, rowCount: Int32, rowByteCount: Int32, pieceByteCountMax: Int32, granule: Int32) {
    self.rowByteCount = rowByteCount
    let wanted = max(1, (rowByteCount &+ pieceByteCountMax &- 1) / pieceByteCountMax)
    let even = (rowByteCount &+ wanted &- 1) / wanted
    pieceByteCount = max(granule, (even &+ granule &- 1) / granule &* granule)
    piecesPerRow = (rowByteCount &+ pieceByteCount &- 1) / pieceByteCount
    let count = Int64(rowCount) &* Int64(piecesPerRow)
    // Neighbours in the order of workers, so that few pieces are spread over all multiprocessors.
    let warps = Int64(machine.workerCount &* GPUMachine.warpCount)
    let index = Int64(machine.warp &* machine.workerCount &+ machine.workerIndex)
    first = Int32(truncatingIfNeeded: count &* index / warps)
    end = Int32(truncatingIfNeeded: count &* (index &+ 1) / warps)
  }

  /// This warp's first piece.
  @inline(__always) var start: Piece {
    Piece(index: first, row: first / piecesPerRow, offset: first % piecesPerRow &* pieceByteCount)
  }

  @inline(__always) func byteCount(of piece: Piece) -> Int32 { min(pieceByteCount, rowByteCount &- piece.offset) }

  @inline(__always) func step(_ piece: inout Piece) {
    piece.index = piece.index &+ 1
    piece.offset = piece.offset &+ pieceByteCount
    if piece.offset >= rowByteCount {
      piece.offset = 0
      piece.row = piece.row &+ 1
    }
  }
}

/// One of them, as a place in rows: to go to the next takes no division.
struct Piece {
  var index: Int32
  var row: Int32
  /// Bytes into the row.
  var offset: Int32
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
