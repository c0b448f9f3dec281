import CPlatform
import EPKernels

/// The loops over rows. A *piece* is part of a row: rows are cut when there are too few of them to keep all workers
/// busy.
extension HostMachine {
  @inline(__always)
  package func scatterRows<Content, Label>(
    _ job: ScatterJob, from start: NothingStarted, route: (Int32, Int32) -> RowTarget, labelCount: Int32,
    content: (Int32, Int32, Int32) -> Content, label: (Int32, Int32) -> Label?, write: (Label, Content, Int32) -> Void
  ) {
    moveRows(job, route: route)
    shareOut(job.rowCount * job.slotCount) { cell in
      let (row, slot) = (cell / job.slotCount, cell % job.slotCount)
      guard let label = label(row, slot) else { return }
      forEach(labelCount) { write(label, content(row, slot, $0), $0) }
    }
  }

  private func moveRows(_ job: ScatterJob, route: (Int32, Int32) -> RowTarget) {
    let streams = job.writtenByteCount >= tuning.streamingByteCountMin
    if job.transform == .copy {
      let pieces = Pieces(rowCount: job.rowCount, rowSize: job.rowByteCount, granule: 64, workerCount: workerCount)
      forEachTarget(job, pieces, route: route) { row, bytes, targets in
        if bytes.lowerBound == 0 && !job.beside.isNull { copyBeside(job, row, targets) }
        for index in targets.indices { targets[index].row += Int(bytes.lowerBound) }
        let source = job.source.hostPointer + Int(row) * Int(job.rowByteCount) + Int(bytes.lowerBound)
        scatter(source, byteCount: bytes.count, to: targets, streams: streams)
      }
    } else {
      quantizeRows(job, streams: streams, route: route)
    }
    if streams { swiftep_store_fence() }
  }

  private func copyBeside(_ job: ScatterJob, _ row: Int32, _ targets: UnsafeMutableBufferPointer<Target>) {
    let byteCount = Int(job.besideByteCount)
    let record = job.beside.hostPointer + Int(row) * byteCount
    for target in targets { target.scales!.copyMemory(from: record, byteCount: byteCount) }
  }

  private func scatter(
    _ source: UnsafeRawPointer, byteCount: Int, to targets: UnsafeMutableBufferPointer<Target>, streams: Bool
  ) {
    withUnsafeTemporaryAllocation(of: UnsafeMutableRawPointer?.self, capacity: targets.count) { rows in
      for index in targets.indices { rows.initializeElement(at: index, to: targets[index].row) }
      swiftep_scatter(rows.baseAddress!, Int32(targets.count), source, byteCount, streams)
    }
  }

  struct Target {
    var row: UnsafeMutableRawPointer
    var scales: UnsafeMutableRawPointer?
  }

  /// Calls `body` with each piece of this worker's share and the places where its row goes; pieces that go nowhere are
  /// skipped.
  @inline(__always)
  private func forEachTarget(
    _ job: ScatterJob, _ pieces: Pieces, route: (Int32, Int32) -> RowTarget,
    _ body: (_ row: Int32, _ part: Range<Int32>, _ targets: UnsafeMutableBufferPointer<Target>) -> Void
  ) {
    withUnsafeTemporaryAllocation(of: Target.self, capacity: Int(job.slotCount)) { targets in
      shareOut(pieces.count) { piece in
        let (row, part) = pieces[piece]
        var count = 0
        forEach(job.slotCount) { slot in
          let target = route(row, slot)
          if target.row.isNull { return }
          targets[count] = Target(
            row: target.row.hostPointer, scales: target.scales.isNull ? nil : target.scales.hostPointer)
          count += 1
        }
        if count > 0 { body(row, part, UnsafeMutableBufferPointer(rebasing: targets[..<count])) }
      }
    }
  }

  /// Channels that are quantized before they are written out: they stay in the first-level cache.
  private static var quantizedChannelCount: Int { 4096 }

  private func quantizeRows(_ job: ScatterJob, streams: Bool, route: (Int32, Int32) -> RowTarget) {
    let step = Int(job.transform.scaleStep)
    let pieces = Pieces(
      rowCount: job.rowCount, rowSize: job.rowByteCount / 2, granule: channelsPerScale, workerCount: workerCount)
    let bufferSize = Self.quantizedChannelCount
    withUnsafeTemporaryAllocation(byteCount: 2 * bufferSize, alignment: 64) { buffer in
      let values = buffer.baseAddress!
      let scales = values + bufferSize
      forEachTarget(job, pieces, route: route) { row, channels, targets in
        for first in stride(from: Int(channels.lowerBound), to: Int(channels.upperBound), by: bufferSize) {
          let count = min(bufferSize, Int(channels.upperBound) - first)
          let source = job.source.hostPointer + Int(row) * Int(job.rowByteCount) + 2 * first
          quantize(source.assumingMemoryBound(to: UInt16.self), count, job, to: values, scales)
          for target in targets {
            for index in 0..<(count + step - 1) / step {
              storeScale(index, of: scales, job, at: first / step + index, target.scales!)
            }
          }
          // Shifted for the scatter, then back, since a row may take several rounds.
          let offset = (2 * first) >> Int(job.transform.narrowing)
          for index in targets.indices { targets[index].row += offset }
          scatter(values, byteCount: (2 * count) >> Int(job.transform.narrowing), to: targets, streams: streams)
          for index in targets.indices { targets[index].row -= offset }
        }
        if job.transform == .quantizeUE8M0Scales && channels.upperBound == job.rowByteCount / 2 {
          padPackedScales(job, targets)
        }
      }
    }
  }

  private func quantize(
    _ channels: UnsafePointer<UInt16>, _ count: Int, _ job: ScatterJob, to values: UnsafeMutableRawPointer,
    _ scales: UnsafeMutableRawPointer
  ) {
    let values = values.assumingMemoryBound(to: UInt8.self)
    if job.transform == .quantizeNVFP4 {
      let scales = scales.assumingMemoryBound(to: UInt8.self)
      swiftep_quantize_nvfp4(values, scales, channels, count, job.globalScale)
    } else {
      swiftep_quantize_e4m3(values, scales, channels, count, job.transform.hasPowerOfTwoScales)
    }
  }

  /// Stores the scale of a row's block, which is among `scales` the one number `index`: Floats, exponents of powers of
  /// two, or four bytes at a time.
  private func storeScale(
    _ index: Int, of scales: UnsafeMutableRawPointer, _ job: ScatterJob, at block: Int,
    _ target: UnsafeMutableRawPointer
  ) {
    if job.transform == .quantizeUE8M0Scales {
      target.storePacked(scales.load(fromByteOffset: index, as: UInt8.self), at: block, stride: Int(job.scaleStride))
      return
    }
    var bits: UInt32
    if !job.transform.hasPowerOfTwoScales {
      bits = scales.load(fromByteOffset: 4 * index, as: UInt32.self)
    } else {
      bits = UInt32(scales.load(fromByteOffset: index, as: UInt8.self))
      bits = bits == 255 ? 0x7fc0_0000 : bits << 23
    }
    target.storeBytes(of: bits, toByteOffset: block * Int(job.scaleStride), as: UInt32.self)
  }

  /// UE8M0 scales are packed by four: the bytes behind the last are zero.
  private func padPackedScales(_ job: ScatterJob, _ targets: UnsafeMutableBufferPointer<Target>) {
    let blockCount = Int((job.rowByteCount / 2 + channelsPerScale - 1) / channelsPerScale)
    for target in targets {
      for byte in blockCount..<(blockCount + 3) / 4 * 4 {
        target.scales!.storePacked(0, at: byte, stride: Int(job.scaleStride))
      }
    }
  }

  package func copyRows(_ job: CopyJob, runCount: Int32, run: (Int32) -> RowRun) {
    let rowByteCount = Int64(job.rowByteCount)
    for index in 0..<runCount {
      let run = run(index)
      if run.count <= 0 { continue }
      let copy = ScatterJob(
        source: job.source.advanced(byBytes: Int64(run.first) * rowByteCount), rowCount: run.count,
        rowByteCount: job.rowByteCount, slotCount: 1, transform: .copy,
        writtenByteCount: Int64(run.count) * rowByteCount)
      moveRows(copy) { row, _ in
        RowTarget(row: job.target.advanced(byBytes: Int64(run.place + row) * rowByteCount), scales: .null)
      }
    }
  }

  package func encodeRows(_ job: EncodeJob, runCount: Int32, run: (Int32) -> RowRun) {
    let (rowByteCount, recordsByteCount) = (2 * job.elementCount, LogFMT.byteCount(channelCount: job.elementCount))
    // Of all rows in turn, whatever runs they lie in.
    var before: Int32 = 0
    for index in 0..<runCount {
      let run = run(index)
      if run.count <= 0 { continue }
      let own = (workerIndex + workerCount - before % workerCount) % workerCount
      for row in stride(from: run.first + own, to: run.first + run.count, by: Int(workerCount)) {
        let offset = Int(row) * Int(rowByteCount)
        swiftep_encode_logfmt(
          job.records.hostPointer + Int(row) * Int(recordsByteCount), job.exact.hostPointer + offset,
          job.source.hostPointer + offset, Int(job.elementCount))
      }
      before += run.count
    }
  }

  package func reduceRows(
    _ job: ReduceJob, from start: NothingStarted, meanwhile: () -> Void, place: (Int32, Int32) -> WeightedPlace,
    source: (WeightedPlace) -> RowSource
  ) {
    meanwhile()
    let elementSize: Int32 = job.format == .fp32 ? 4 : 2
    let pieces = Pieces(
      rowCount: job.rowCount, rowSize: job.elementCount, granule: 64, workerCount: workerCount)
    let slotCount = Int(job.slotCount)
    let rowByteCount = Int(job.elementCount * elementSize)
    let streams = Int64(rowByteCount) * Int64(job.rowCount) >= tuning.streamingByteCountMin
    withUnsafeTemporaryAllocation(of: UnsafeRawPointer?.self, capacity: 2 * slotCount) { rows in
      let exact = rows.baseAddress! + slotCount
      withUnsafeTemporaryAllocation(of: Float.self, capacity: slotCount) { weights in
        shareOut(pieces.count) { piece in
          let (index, elements) = pieces[piece]
          let row = job.firstRow &+ index
          var count = 0
          forEach(job.slotCount) { slot in
            let term = source(place(row, slot))
            if term.row.isNull { return }
            rows[count] = UnsafeRawPointer(term.row.hostPointer)
            if job.format == .logFMT { exact[count] = UnsafeRawPointer(term.exact.hostPointer) }
            weights[count] = term.weight
            count += 1
          }
          let offset = Int(row) * rowByteCount
          var reduction = swiftep_reduction(
            format: job.format.rawValue, row_count: Int32(count), rows: UnsafePointer(rows.baseAddress), exact: exact,
            weights: job.isWeighted ? UnsafePointer(weights.baseAddress) : nil, bias0: job.biases.0.rowPointer(offset),
            bias1: job.biases.1.rowPointer(offset))
          swiftep_reduce(
            job.output.hostPointer + offset, &reduction, Int(elements.lowerBound), elements.count, streams)
        }
      }
    }
    if streams { swiftep_store_fence() }
  }

  @inline(__always)
  package func copyRecords(_ count: Int32, byteCount: Int32, route: (Int32) -> RecordRoute) {
    shareOut(count) { record in
      let route = route(record)
      if route.target.isNull { return }
      var word: Int32 = 0
      while word < byteCount / 4 {
        route.target.store(route.source.load(UInt32.self, at: word), at: word)
        word &+= 1
      }
    }
  }

  package func fill(_ destination: Address, byteCount: Int64, pattern: UInt32) {
    if byteCount == 0 { return }
    UnsafeMutableBufferPointer(
      start: destination.hostPointer.assumingMemoryBound(to: UInt32.self), count: Int(byteCount / 4)
    ).update(repeating: pattern)
  }
}

extension UnsafeMutableRawPointer {
  /// Byte `index` of what is packed by four, four bytes every `stride`.
  fileprivate func storePacked(_ byte: UInt8, at index: Int, stride: Int) {
    storeBytes(of: byte, toByteOffset: index / 4 * stride + index % 4, as: UInt8.self)
  }
}

extension Address {
  fileprivate func rowPointer(_ offset: Int) -> UnsafeRawPointer? {
    isNull ? nil : UnsafeRawPointer(hostPointer + offset)
  }
}

/// Rows cut into equal pieces, so many that all workers have some.
private struct Pieces {
  private let piecesPerRow: Int32
  private let rowSize: Int32
  private let pieceSize: Int32
  let count: Int32

  /// - Parameter granule: what sizes of pieces are multiples of, except for the last of a row.
  init(rowCount: Int32, rowSize: Int32, granule: Int32, workerCount: Int32) {
    self.rowSize = rowSize
    // Below eight rows a worker, whole rows leave some idle at the end.
    let isScarce = workerCount > 1 && rowCount < 8 * workerCount
    let wanted = isScarce ? min(8, max(1, rowSize / 2048)) : 1
    let pieceSize = max(granule, (rowSize / wanted + granule - 1) / granule * granule)
    self.pieceSize = pieceSize
    piecesPerRow = max(1, (rowSize + pieceSize - 1) / pieceSize)
    count = rowCount * piecesPerRow
  }

  subscript(piece: Int32) -> (row: Int32, part: Range<Int32>) {
    let row = piece / piecesPerRow
    let first = (piece % piecesPerRow) * pieceSize
    return (row, first..<min(rowSize, first + pieceSize))
  }
}
