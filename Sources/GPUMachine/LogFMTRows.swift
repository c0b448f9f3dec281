import PTX

extension GPUMachine {
  /// Half a warp has a block, each lane eight channels.
  @inline(__always)
  public func encodeRows(_ job: EncodeJob, runCount: Int32, run: (Int32) -> RowRun) {
    let rowByteCount = 2 &* job.elementCount
    let cut = PieceCut(rowByteCount: rowByteCount, pieceByteCountMax: 2048, granule: 512)
    let pieces = Pieces(rowCount: 0, rowByteCount: rowByteCount, cut)
    let recordsByteCount = Int64(LogFMT.byteCount(channelCount: job.elementCount))
    var walk = RunWalk(self, pieces, runCount, run)
    while !walk.isOver {
      let piece = walk.piece
      let byteCount = pieces.byteCount(of: piece)
      let offset = Int64(piece.row) &* Int64(pieces.rowByteCount) &+ Int64(piece.offset)
      let source = job.source.advanced(byBytes: offset)
      let exact = job.exact == job.source ? .null : job.exact.advanced(byBytes: offset)
      let records = job.records.advanced(
        byBytes: Int64(piece.row) &* recordsByteCount &+ Int64(LogFMT.byteCount(channelCount: piece.offset / 2)))
      let first = lane &* 16
      // All loads under way at once.
      let (a, b) = (vector(source, first, below: byteCount), vector(source, first &+ 512, below: byteCount))
      let c = vector(source, first &+ 1024, below: byteCount)
      let d = vector(source, first &+ 1536, below: byteCount)
      encode(a, first, below: byteCount, records, exact)
      encode(b, first &+ 512, below: byteCount, records, exact)
      encode(c, first &+ 1024, below: byteCount, records, exact)
      encode(d, first &+ 1536, below: byteCount, records, exact)
      walk.step(self, pieces, run)
    }
  }

  @inline(__always)
  private func vector(_ row: Address, _ byteOffset: Int32, below end: Int32) -> Vector {
    byteOffset < end ? row.vector(at: byteOffset) : Vector(repeating: 0)
  }

  /// Codes this lane's channels, which lie `byteOffset` bytes into the piece, and its block's header.
  ///
  /// - Parameter exact: where the piece goes if it is sent as it is; null: it lies there.
  @inline(__always)
  private func encode(
    _ vector: Vector, _ byteOffset: Int32, below end: Int32, _ records: Address, _ exact: Address
  ) {
    let block = LogFMTBlock(rangeOf: vector)
    if byteOffset >= end { return }
    let record = records.advanced(byBytes: Int64(byteOffset &>> 8) &* Int64(LogFMT.recordByteCount))
    let part = lane & 15
    if part == 0 { record.store(SIMD2(block.start, block.step), at: 0) }
    if block.isApart {
      if !exact.isNull { exact.store(vector, atByte: byteOffset) }
      return
    }
    let (low, high) = block.codes(vector)
    record.advanced(byBytes: Int64(LogFMT.lowBitsOffset &+ 8 &* part)).store(low, at: 0)
    record.advanced(byBytes: Int64(LogFMT.highBitsOffset &+ 2 &* part)).store(high, at: 0)
  }
}

extension LogFMTBlock {
  /// Of the channels that 16 neighbouring lanes have.
  @inline(__always)
  fileprivate init(rangeOf vector: Vector) {
    let magnitudes = vector & Vector(repeating: 0x7fff_7fff)
    // Each magnitude less one, taken from 0xffff: the least comes last, and zero first.
    let inverted =
      ((magnitudes | Vector(repeating: 0x8000_8000)) &- Vector(repeating: 0x1_0001)) ^ Vector(repeating: 0x7fff_7fff)
    let largest = BlockScale.top(BlockScale.largest(magnitudes), laneCount: 16)
    let last = ptx_max_pair(ptx_max_pair(inverted.x, inverted.y), ptx_max_pair(inverted.z, inverted.w))
    self.init(largest: largest, least: 0xffff &- BlockScale.top(last, laneCount: 16))
  }

  /// Of eight channels: the lower bits of their codes, and for each the ninth bit and the sign.
  @inline(__always)
  fileprivate func codes(_ vector: Vector) -> (low: SIMD2<UInt32>, high: UInt16) {
    let inverse = inverse
    let (a, b) = (codes(vector.x, inverse), codes(vector.y, inverse))
    let (c, d) = (codes(vector.z, inverse), codes(vector.w, inverse))
    let low = SIMD2(a.low | b.low &<< 16, c.low | d.low &<< 16)
    return (low, UInt16(truncatingIfNeeded: a.high | b.high &<< 4 | c.high &<< 8 | d.high &<< 12))
  }

  @inline(__always)
  private func codes(_ pair: UInt32, _ inverse: Float) -> (low: UInt32, high: UInt32) {
    let (first, second) = (code(pair & 0xffff, inverse: inverse), code(pair &>> 16, inverse: inverse))
    return (first & 0xff | (second & 0xff) &<< 8, first &>> 8 | (second &>> 8) &<< 2)
  }

  /// Eight channels.
  @inline(__always)
  func values(_ low: SIMD2<UInt32>, _ high: UInt16) -> (SIMD4<Float>, SIMD4<Float>) {
    let high = UInt32(high)
    return (four(low.x, high), four(low.y, high &>> 8))
  }

  @inline(__always)
  private func four(_ low: UInt32, _ high: UInt32) -> SIMD4<Float> {
    SIMD4(channel(low, high, 0), channel(low, high, 1), channel(low, high, 2), channel(low, high, 3))
  }

  @inline(__always)
  private func channel(_ low: UInt32, _ high: UInt32, _ index: UInt32) -> Float {
    let bits = high &>> (2 &* index)
    return value(low &>> (8 &* index) & 0xff | (bits & 1) &<< 8, sign: bits &>> 1 & 1)
  }
}

/// Where LogFMT records lie.
protocol RecordMemory {
  /// - Parameter offset: in bytes, a multiple of the type's alignment.
  func load<Element: BitwiseCopyable>(_ type: Element.Type, atByte offset: Int32) -> Element
}

extension RecordMemory {
  /// Eight channels, `byteOffset` BF16 bytes into the piece.
  @inline(__always)
  func values(at byteOffset: Int32, _ exact: Address) -> (SIMD4<Float>, SIMD4<Float>) {
    let record = byteOffset &>> 8 &* LogFMT.recordByteCount
    let part = byteOffset &>> 4 & 15
    let header = load(SIMD2<UInt32>.self, atByte: record)
    let block = LogFMTBlock(start: header.x, step: header.y)
    if block.isApart { return BF16.widened(exact.vector(at: byteOffset)) }
    let low = load(SIMD2<UInt32>.self, atByte: record &+ LogFMT.lowBitsOffset &+ 8 &* part)
    return block.values(low, load(UInt16.self, atByte: record &+ LogFMT.highBitsOffset &+ 2 &* part))
  }
}

extension Address: RecordMemory {
  @inline(__always)
  func load<Element: BitwiseCopyable>(_ type: Element.Type, atByte offset: Int32) -> Element {
    advanced(byBytes: Int64(offset)).load(type, at: 0)
  }
}

#if BULK_COPIES
  /// Of shared memory.
  struct StageOffset: RecordMemory {
    let offset: Int32

    @inline(__always)
    func load<Element: BitwiseCopyable>(_ type: Element.Type, atByte offset: Int32) -> Element {
      // SAFETY: a stage's records lie in it, aligned as elements are.
      (ptx_shared().unsafelyUnwrapped + Int(self.offset &+ offset)).assumingMemoryBound(to: type).pointee
    }
  }
#endif
