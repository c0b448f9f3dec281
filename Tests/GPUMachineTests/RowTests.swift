import CPlatform
import EmulatedGPU
import Testing

/// How a GPU's block moves and sums rows, on emulated lanes.
@Suite struct RowTests {
  /// Rows go where they should, with their labels; quantized as on a CPU, to the bit.
  @Test(
    arguments: [
      RowTransform.copy, .quantizeFloatScales, .quantizeUE8M0Scales, .quantizePowerOfTwoScales, .quantizeNVFP4,
    ], [1, 3])
  func scatters(_ transform: RowTransform, blockCount: Int) {
    for (rowCount, someCount, slotCount) in [
      (1, 16, 1), (3, 144, 2), (40, 272, 3), (5, 2880, 33), (9, 7168, 2), (200, 272, 2), (70, 5120, 2),
      // Pieces that end within a block, where longer ones have been.
      (70, 2880, 1),
    ] {
      let channelCount = transform == .quantizeNVFP4 ? (someCount + 63) / 64 * 64 : someCount
      var random = Random(UInt64(channelCount))
      var work = ScatterWork(rowCount, channelCount, slotCount, transform, &random)
      for isCounted in [false, true] {
        let (fault, found) = work.done(blockCount: blockCount, isCounted: isCounted)
        #expect(fault == nil)
        #expect(found == work.expected, "\(rowCount) rows of \(channelCount) channels, counted: \(isCounted)")
      }
      if transform == .copy { continue }
      work.hasScaleColumns = true
      let (fault, found) = work.done(blockCount: blockCount, isCounted: false)
      #expect(fault == nil)
      #expect(found == work.expected, "\(rowCount) rows of \(channelCount) channels, scales in columns")
    }
  }

  /// In a crowd, pieces are taken one by one: of rows of 3, 4, 5 and 7.
  @Test(
    arguments: [RowTransform.copy, .quantizeFloatScales, .quantizeUE8M0Scales],
    [(22, 5120), (17, 7168), (13, 9216), (10, 13312)])
  func scattersPieces(_ transform: RowTransform, _ shape: (rowCount: Int, channelCount: Int)) {
    var random = Random(UInt64(shape.channelCount))
    let work = ScatterWork(shape.rowCount, shape.channelCount, 1, transform, &random)
    let (fault, found) = work.done(blockCount: 1, isCounted: true, sharerCount: 64)
    #expect(fault == nil)
    #expect(found == work.expected, "\(shape)")
    // Each warp asks before it begins its first run, and again for each one that it begins.
    let pieceCount = shape.rowCount * ((2 * shape.channelCount + 4095) / 4096)
    #expect(work.counter.elements(UInt32.self) == [UInt32(pieceCount + 16)])
  }

  @Test(arguments: [1, 3], [16, 256])
  func copiesBeside(blockCount: Int, byteCount: Int) {
    for (rowCount, channelCount, slotCount) in [(1, 16, 1), (40, 272, 3), (3, 7168, 2), (2, 2880, 32)] {
      var random = Random(UInt64(channelCount))
      var work = ScatterWork(rowCount, channelCount, slotCount, .copy, &random)
      work.records = Memory((0..<rowCount * byteCount).map { _ in UInt8(truncatingIfNeeded: random.next() >> 32) })
      work.besideByteCount = byteCount
      let (fault, found) = work.done(blockCount: blockCount, isCounted: true)
      #expect(fault == nil)
      #expect(found == work.expected, "\(rowCount) rows of \(channelCount) channels")
    }
  }

  /// Of every eighth magnitude, NaN and infinity included, a block in which it is the largest: scales are divided, and divided by,
  /// as a CPU does it.
  @Test(arguments: [false, true])
  func quantizesFP8(isPowerOfTwo: Bool) {
    let patterns = (0..<0x1000 * 128).map { cell in
      let (magnitude, channel) = (8 * (cell / 128) + cell / 128 % 8, cell % 128)
      let isLargest = channel == magnitude / 8 % 128
      let sign: UInt16 = channel % 3 == 1 ? 0x8000 : 0
      return UInt16(isLargest ? magnitude : magnitude * channel / 128) | sign
    }
    let (rowByteCount, blockCount) = (2048, patterns.count / 128)
    let source = Memory(patterns)
    let (rows, scales) = (Memory(byteCount: patterns.count), Memory(byteCount: 4 * blockCount))
    let job = ScatterJob(
      source: source.address, rowCount: Int32(2 * patterns.count / rowByteCount), rowByteCount: Int32(rowByteCount),
      slotCount: 1, transform: isPowerOfTwo ? .quantizePowerOfTwoScales : .quantizeFloatScales, writtenByteCount: 1)
    let fault = emulate(blockCount: 3) { machine in
      machine.scatterRows(
        job, from: machine.startScatter(job),
        route: { row, _ in
          RowTarget(
            row: rows.address.advanced(byBytes: Int64(row) * 1024),
            scales: scales.address.advanced(byBytes: Int64(row) * 32))
        },
        labelCount: 0, content: { row, _, _ in row }, label: { row, _ in row }, write: { _, _, _ in })
    }
    let (codes, expected) = (Memory(byteCount: patterns.count), Memory(byteCount: 4 * blockCount))
    swiftep_quantize_e4m3(
      codes.base.assumingMemoryBound(to: UInt8.self), expected.base, source.base.assumingMemoryBound(to: UInt16.self),
      patterns.count, isPowerOfTwo)
    #expect(fault == nil)
    #expect(rows.bytes == codes.bytes)
    if isPowerOfTwo {
      let exponents = expected.bytes.prefix(blockCount).map { $0 == 255 ? Float.nan.bitPattern : UInt32($0) << 23 }
      #expect(scales.elements(UInt32.self) == exponents)
    } else {
      #expect(scales.bytes == expected.bytes)
    }
  }

  @Test(arguments: nvfp4GlobalScales)
  func quantizesNVFP4(globalScale: Float) {
    let channelCount = nvfp4Patterns.count / 64 * 64
    let source = Memory(Array(nvfp4Patterns.suffix(channelCount)))
    let rows = Memory(byteCount: channelCount / 2)
    let scales = Memory(byteCount: channelCount / 16)
    let job = ScatterJob(
      source: source.address, rowCount: 1, rowByteCount: Int32(2 * channelCount), slotCount: 1,
      transform: .quantizeNVFP4, globalScale: globalScale, writtenByteCount: 1)
    let fault = emulate(blockCount: 1) { machine in
      machine.scatterRows(
        job, from: machine.startScatter(job),
        route: { _, _ in RowTarget(row: rows.address, scales: scales.address) }, labelCount: 0,
        content: { row, _, _ in row }, label: { row, _ in row }, write: { _, _, _ in })
    }
    let expected = nvfp4(Array(nvfp4Patterns.suffix(channelCount)), globalScale: globalScale)
    #expect(fault == nil)
    #expect(rows.bytes == expected.values)
    #expect(scales.bytes == expected.scales)
  }

  /// In the order of slots, then biases, rounded once.
  @Test(arguments: [RowFormat.bf16, .fp16, .fp32], [false, true])
  func reduces(_ format: RowFormat, isWeighted: Bool) {
    for (rowCount, elementCount, slotCount, biasCount) in [
      (1, 8, 1, 0), (3, 136, 2, 1), (40, 8, 9, 2), (5, 2880, 8, 0), (3, 7168, 40, 1), (200, 16, 5, 0),
    ] {
      var random = Random(UInt64(elementCount + slotCount))
      let work = ReduceWork(rowCount, elementCount, slotCount, format, isWeighted, biasCount, &random)
      for (blockCount, isCounted) in [(1, false), (3, true)] {
        let (fault, found) = work.done(blockCount: blockCount, isCounted: isCounted)
        #expect(fault == nil)
        #expect(found == work.expected, "\(rowCount) rows of \(elementCount) elements, \(slotCount) slots")
      }
    }
  }
}

extension RowTests {
  /// More runs than a warp has lanes, some of them empty, to other places.
  @Test(arguments: [1, 3], [0, 1, 40, 70])
  func copiesRuns(blockCount: Int, runCount: Int) {
    for rowByteCount in [16, 256, 4112, 9008] {
      var random = Random(UInt64(runCount + rowByteCount))
      let counts = (0..<runCount).map { _ in Int(random.next() % 9) - 2 }
      var runs: [RowRun] = []
      var place = 1
      for count in counts {
        runs.append(RowRun(first: Int32(runs.count * 6), count: Int32(count), place: Int32(place)))
        // A row stays as it was between any two runs.
        place += max(0, count) + 1
      }
      let source = Memory(random.bytes(max(1, runCount * 6) * rowByteCount))
      let target = Memory(byteCount: place * rowByteCount)
      var expected = target.bytes
      for run in runs where run.count > 0 {
        let (first, place, count) = (Int(run.first), Int(run.place), Int(run.count) * rowByteCount)
        expected.replaceSubrange(
          place * rowByteCount..<place * rowByteCount + count,
          with: source.bytes[first * rowByteCount..<first * rowByteCount + count])
      }
      let job = CopyJob(source: source.address, target: target.address, rowByteCount: Int32(rowByteCount))
      let fault = emulate(blockCount: blockCount) { machine in
        machine.copyRows(job, runCount: Int32(runCount)) { runs[Int($0)] }
      }
      #expect(fault == nil && target.bytes == expected, "\(rowByteCount) bytes a row")
    }
  }

  /// Rings of three stages, some of them abandoned, and of two, used differently often by each warp, one after the other in one
  /// kernel: every ring goes on where the last one has left a warp's barriers.
  @Test func ringsFollowEachOther() {
    let (rowCounts, elementCount) = ([Int32(1), 35, 18, 129, 3, 64, 200], Int32(256))
    let source = Memory((0..<200 * elementCount).map { UInt16(truncatingIfNeeded: 0x3f80 + $0 % 97) })
    let copies = rowCounts.map { _ in Memory(byteCount: source.bytes.count) }
    let sums = rowCounts.map { _ in Memory(byteCount: source.bytes.count) }
    let fault = emulate(blockCount: 1) { machine in
      for (index, rowCount) in rowCounts.enumerated() {
        // Rows that are begun and do not move.
        let abandoned = ScatterJob(
          source: source.address, rowCount: rowCount, rowByteCount: 2 * elementCount, slotCount: 1, transform: .copy,
          writtenByteCount: 1)
        machine.abandon(machine.startScatter(abandoned))
        let copy = CopyJob(source: source.address, target: copies[index].address, rowByteCount: 2 * elementCount)
        machine.copyRows(copy, runCount: 1) { _ in RowRun(first: 0, count: rowCount) }
        let sum = ReduceJob(
          output: sums[index].address, rowCount: rowCount, elementCount: elementCount, slotCount: 1, format: .bf16,
          isWeighted: false, biases: (.null, .null))
        machine.reduceRows(sum) { row, _ in
          RowSource(row: source.address.advanced(byBytes: Int64(2 * row * elementCount)), weight: 1)
        }
      }
    }
    #expect(fault == nil)
    for (index, rowCount) in rowCounts.enumerated() {
      let expected = source.bytes.prefix(Int(2 * rowCount * elementCount))
      #expect(copies[index].bytes.starts(with: expected), "copied by ring \(2 * index)")
      #expect(sums[index].bytes.starts(with: expected), "summed by ring \(2 * index + 1)")
    }
  }
}

/// What is written at the destinations of rows, one behind the other.
private struct Written: Equatable {
  var rows: [UInt8]
  var scales: [UInt8]
  var labels: [UInt8]
}

private struct ScatterWork {
  /// Of the last job, if that was counted.
  let counter = Memory([UInt32(0)])
  let rowCount: Int
  let channelCount: Int
  let slotCount: Int
  let transform: RowTransform
  let source: Memory
  /// `[rowCount, slotCount]`, -1 for nowhere.
  var places: [Int]
  var hasScaleColumns = false
  /// What is copied beside rows, to where scales go.
  var records: Memory?
  var besideByteCount = 0

  static let labelCount = 3
  static let globalScale: Float = 1.7
  var targetByteCount: Int { 2 * channelCount >> Int(transform.narrowing) }
  var blockCount: Int { (channelCount + 127) / 128 }
  var scalesByteCount: Int {
    switch transform {
    case .copy where besideByteCount > 0: besideByteCount
    case .quantizeNVFP4: channelCount / 16
    case .quantizeUE8M0Scales: (blockCount + 3) / 4 * 4
    default: 4 * blockCount
    }
  }

  init(
    _ rowCount: Int, _ channelCount: Int, _ slotCount: Int, _ transform: RowTransform, _ random: inout Random
  ) {
    (self.rowCount, self.channelCount, self.slotCount) = (rowCount, channelCount, slotCount)
    self.transform = transform
    // Blocks of every kind: any patterns, small numbers, subnormal ones, numbers near one.
    let masks: [(UInt16, UInt16)] = [(0xffff, 0), (0xbfff, 0), (0x807f, 0), (0x83ff, 0x3c00)]
    var patterns: [UInt16] = []
    for channel in 0..<rowCount * channelCount {
      let (mask, base) = masks[channel / 128 % masks.count]
      patterns.append(UInt16(truncatingIfNeeded: random.next() >> 16) & mask | base)
    }
    source = Memory(patterns)
    places = Array(0..<rowCount * slotCount)
    for index in places.indices.dropFirst() { places.swapAt(index, Int(random.next() >> 32) % (index + 1)) }
    for index in places.indices where random.next() >> 32 % 4 == 0 { places[index] = -1 }
  }

  var empty: Written {
    let count = rowCount * slotCount
    let bytes = { [UInt8](repeating: Memory.untouched, count: count * $0) }
    return Written(rows: bytes(targetByteCount), scales: bytes(scalesByteCount), labels: bytes(4 * Self.labelCount))
  }

  var expected: Written {
    var expected = empty
    for row in 0..<rowCount {
      let values = Memory(byteCount: targetByteCount)
      let scales = Memory(byteCount: scalesByteCount)
      let channels = source.base + 2 * row * channelCount
      if transform == .copy {
        values.base.copyMemory(from: channels, byteCount: targetByteCount)
        if let records {
          scales.base.copyMemory(from: records.base + row * besideByteCount, byteCount: besideByteCount)
        }
      } else if transform == .quantizeNVFP4 {
        swiftep_quantize_nvfp4(
          values.base.assumingMemoryBound(to: UInt8.self), scales.base.assumingMemoryBound(to: UInt8.self),
          channels.assumingMemoryBound(to: UInt16.self), channelCount, Self.globalScale)
      } else {
        scales.base.initializeMemory(as: UInt8.self, repeating: 0, count: scalesByteCount)
        swiftep_quantize_e4m3(
          values.base.assumingMemoryBound(to: UInt8.self), scales.base, channels.assumingMemoryBound(to: UInt16.self),
          channelCount, transform != .quantizeFloatScales)
        if transform == .quantizePowerOfTwoScales {
          for block in (0..<blockCount).reversed() {
            let exponent = UInt32(scales.base.load(fromByteOffset: block, as: UInt8.self))
            scales.base.storeBytes(
              of: exponent == 255 ? Float.nan.bitPattern : exponent << 23, toByteOffset: 4 * block, as: UInt32.self)
          }
        }
      }
      for slot in 0..<slotCount {
        let place = places[row * slotCount + slot]
        if place < 0 { continue }
        let labels = (0..<Self.labelCount).flatMap { Self.label(row: row, slot: slot, part: $0).bytes }
        expected.rows.replaceSubrange(place * targetByteCount..<(place + 1) * targetByteCount, with: values.bytes)
        if transform != .copy || records != nil {
          expected.scales.replaceSubrange(place * scalesByteCount..<(place + 1) * scalesByteCount, with: scales.bytes)
        }
        expected.labels.replaceSubrange(place * labels.count..<(place + 1) * labels.count, with: labels)
      }
    }
    if hasScaleColumns {
      let (rows, placeCount) = (expected.scales, rowCount * slotCount)
      for index in rows.indices {
        let (place, byte) = (index / scalesByteCount, index % scalesByteCount)
        expected.scales[(byte / 4 * placeCount + place) * 4 + byte % 4] = rows[index]
      }
    }
    return expected
  }

  private static func label(row: Int, slot: Int, part: Int) -> Int32 { Int32(row * 1_000 + slot * 10 + part) }

  func done(blockCount: Int, isCounted: Bool, sharerCount: Int = 1) -> (fault: String?, Written) {
    let rows = Memory(byteCount: empty.rows.count)
    let scales = Memory(byteCount: empty.scales.count)
    let labels = Memory(byteCount: empty.labels.count)
    counter.address.store(UInt32(0), at: 0)
    let job = ScatterJob(
      source: source.address, rowCount: Int32(rowCount), rowByteCount: Int32(2 * channelCount),
      slotCount: Int32(slotCount), transform: transform,
      scaleStride: Int32(hasScaleColumns ? 4 * rowCount * slotCount : 4), globalScale: Self.globalScale,
      beside: records?.address ?? .null, besideByteCount: Int32(besideByteCount), writtenByteCount: 1,
      counter: isCounted ? counter.address : .null, sharerCount: Int32(sharerCount))
    let fault = emulate(blockCount: blockCount) { machine in
      machine.scatterRows(
        job, from: machine.startScatter(job),
        route: { row, slot in
          let place = Int64(places[Int(row) * slotCount + Int(slot)])
          if place < 0 { return .none }
          return RowTarget(
            row: rows.address.advanced(byBytes: place * Int64(targetByteCount)),
            scales: scales.address.advanced(byBytes: place * Int64(hasScaleColumns ? 4 : scalesByteCount)))
        },
        labelCount: Int32(Self.labelCount), content: { Self.label(row: Int($0), slot: Int($1), part: Int($2)) },
        label: { ($0, $1) },
        write: { label, text, part in
          let place = places[Int(label.0) * slotCount + Int(label.1)]
          if place < 0 { return }
          labels.address.store(text, at: Int32(place * Self.labelCount) + part)
        })
    }
    return (fault, Written(rows: rows.bytes, scales: scales.bytes, labels: labels.bytes))
  }
}

private struct ReduceWork {
  let rowCount: Int
  let elementCount: Int
  let slotCount: Int
  let format: RowFormat
  let isWeighted: Bool
  let content: [UInt8]
  let biases: [[UInt8]]
  /// `[rowCount, slotCount]`: whether there is such a row, and its weight.
  var isThere: [Bool] = []
  var weights: [Float] = []

  private var elements: Elements { Elements(format: format == .bf16 ? .bf16 : format == .fp16 ? .fp16 : .fp32) }
  private var rowByteCount: Int { elementCount * elements.size }

  init(
    _ rowCount: Int, _ elementCount: Int, _ slotCount: Int, _ format: RowFormat, _ isWeighted: Bool, _ biasCount: Int,
    _ random: inout Random
  ) {
    (self.rowCount, self.elementCount, self.slotCount) = (rowCount, elementCount, slotCount)
    (self.format, self.isWeighted) = (format, isWeighted)
    let byteCount = rowCount * elementCount * (format == .fp32 ? 4 : 2)
    content = random.bytes(byteCount * slotCount)
    var biases: [[UInt8]] = []
    for _ in 0..<biasCount { biases.append(random.bytes(byteCount)) }
    self.biases = biases
    for _ in 0..<rowCount * slotCount {
      isThere.append(random.next() >> 32 % 4 > 0)
      weights.append(isWeighted ? Float(Int8(truncatingIfNeeded: random.next() >> 32)) / 16 : 1)
    }
  }

  var expected: [UInt8] {
    var expected: [UInt8] = []
    for index in 0..<rowCount * elementCount {
      let (row, element) = (index / elementCount, index % elementCount)
      var sum: Float = 0
      for slot in 0..<slotCount where isThere[row * slotCount + slot] {
        let value = elements.load(content, (row * slotCount + slot) * elementCount + element)
        sum += value * weights[row * slotCount + slot]
      }
      for bias in biases { sum += elements.load(bias, index) }
      expected += elements.pattern(sum)
    }
    return expected
  }

  func done(blockCount: Int, isCounted: Bool) -> (fault: String?, [UInt8]) {
    let (rows, output) = (Memory(content), Memory(byteCount: rowCount * rowByteCount))
    let biases = biases.map { Memory($0) }
    let counter = Memory([UInt32(0)])
    let job = ReduceJob(
      output: output.address, rowCount: Int32(rowCount), elementCount: Int32(elementCount), slotCount: Int32(slotCount),
      format: format, isWeighted: isWeighted,
      biases: (biases.count > 0 ? biases[0].address : .null, biases.count > 1 ? biases[1].address : .null),
      counter: isCounted ? counter.address : .null)
    let fault = emulate(blockCount: blockCount) { machine in
      machine.reduceRows(job) { row, slot in
        let cell = Int(row) * slotCount + Int(slot)
        if !isThere[cell] { return .none }
        return RowSource(row: rows.address.advanced(byBytes: Int64(cell * rowByteCount)), weight: weights[cell])
      }
    }
    return (fault, output.bytes)
  }
}
