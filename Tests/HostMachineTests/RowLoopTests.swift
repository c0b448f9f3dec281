import CPlatform
import EPKernels
import Testing

@testable import HostMachine

/// Memory between two guards, whose bytes no test may change. Aligned to 64, plus `skew`.
private final class Guarding {
  let base: UnsafeMutableRawPointer
  private let block: UnsafeMutableRawPointer
  private let byteCount: Int
  private let skew: Int
  private static var guardSize: Int { 128 }

  init(byteCount: Int, skew: Int = 0) {
    self.byteCount = byteCount
    self.skew = skew
    block = .allocate(byteCount: byteCount + skew + 2 * Self.guardSize, alignment: 64)
    block.initializeMemory(as: UInt8.self, repeating: 0xa5, count: byteCount + skew + 2 * Self.guardSize)
    base = block + Self.guardSize + skew
  }
  deinit { block.deallocate() }

  func fill(_ bytes: [UInt8]) { bytes.withUnsafeBytes { base.copyMemory(from: $0.baseAddress!, byteCount: $0.count) } }
  var bytes: [UInt8] { Array(UnsafeRawBufferPointer(start: base, count: byteCount)) }
  var isIntact: Bool {
    let all = UnsafeRawBufferPointer(start: block, count: byteCount + skew + 2 * Self.guardSize)
    return all.prefix(Self.guardSize + skew).allSatisfy { $0 == 0xa5 }
      && all.suffix(Self.guardSize).allSatisfy { $0 == 0xa5 }
  }
}

/// The workers of a rank, one after another.
private func workers(_ count: Int32, streaming: Bool) -> [HostMachine] {
  let tuning = HostTuning(spinNanoseconds: 0, streamingByteCountMin: streaming ? 0 : .max)
  return (0..<count).map { HostMachine(workerIndex: $0, workerCount: count, tuning: tuning) }
}

@Suite struct RowLoopTests {
  @Test(arguments: [RowFormat.bf16, .fp16, .fp32], [false, true])
  func sumsOfEverySize(_ format: RowFormat, streaming: Bool) {
    let elements = Elements(format: format)
    var random = Random(3)
    for count in Array(1...40) + [63, 64, 65, 128, 200] {
      for (rowCount, isWeighted, biasCount) in [
        (0, false, 0), (1, false, 1), (3, true, 0), (2, true, 2), (9, false, 2),
      ] {
        let first = count % 3 * 8
        let rows = (0..<rowCount + biasCount).map { _ in random.bytes((first + count) * elements.size) }
        let weights = (0..<rowCount).map { _ in Float(Int8(truncatingIfNeeded: random.next())) / 16 }
        // Elsewhere than where vectors like to be, in some.
        let output = Guarding(byteCount: (first + count) * elements.size, skew: count % 2 * elements.size)
        reduce(format, rows, weights: isWeighted ? weights : nil, biasCount, output, first, count, streaming)
        var expected = [UInt8](repeating: 0xa5, count: first * elements.size)
        for index in first..<first + count {
          var sum: Float = 0
          for (row, bytes) in rows.enumerated() {
            var value = elements.load(bytes, index)
            if isWeighted && row < rowCount { value *= weights[row] }
            sum += value
          }
          expected += elements.pattern(sum)
        }
        #expect(output.bytes == expected, "\(count) elements, \(rowCount) rows, \(biasCount) biases")
        #expect(output.isIntact)
      }
    }
  }

  private func reduce(
    _ format: RowFormat, _ rows: [[UInt8]], weights: [Float]?, _ biasCount: Int, _ output: Guarding, _ first: Int,
    _ count: Int, _ streaming: Bool
  ) {
    let copies = rows.map { bytes in
      let copy = Guarding(byteCount: bytes.count, skew: 2)
      copy.fill(bytes)
      return copy
    }
    let pointers = copies.map { UnsafeRawPointer($0.base) as UnsafeRawPointer? }
    let rowCount = rows.count - biasCount
    pointers.withUnsafeBufferPointer { pointers in
      (weights ?? []).withUnsafeBufferPointer { values in
        var reduction = swiftep_reduction(
          format: format.rawValue, row_count: Int32(rowCount), rows: pointers.baseAddress, exact: nil,
          weights: weights == nil ? nil : values.baseAddress, bias0: biasCount > 0 ? pointers[rowCount] : nil,
          bias1: biasCount > 1 ? pointers[rowCount + 1] : nil)
        swiftep_reduce(output.base, &reduction, first, count, streaming)
      }
    }
    if streaming { swiftep_store_fence() }
    withExtendedLifetime(copies) {}
  }

  /// One row and nothing else: every 16-bit pattern comes back, but -0 (added to 0) and NaNs, which are canonical.
  @Test(arguments: [RowFormat.bf16, .fp16])
  func everyPattern(_ format: RowFormat) {
    let patterns = (0...UInt16.max).map { $0 }
    let output = Guarding(byteCount: 2 * patterns.count)
    reduce(format, [patterns.withUnsafeBytes { Array($0) }], weights: nil, 0, output, 0, patterns.count, false)
    let found = output.bytes.withUnsafeBytes { Array($0.bindMemory(to: UInt16.self)) }
    let infinity: UInt16 = format == .bf16 ? 0x7f80 : 0x7c00
    for pattern in patterns {
      var expected = pattern
      if pattern & 0x7fff > infinity { expected = 0x7fff }
      if pattern == 0x8000 { expected = 0 }
      if found[Int(pattern)] != expected {
        Issue.record("\(pattern) became \(found[Int(pattern)]), not \(expected)")
        return
      }
    }
  }

  /// Sums that round up, down, to even, into infinity and below the smallest normal value.
  @Test(arguments: [RowFormat.bf16, .fp16, .fp32])
  func hardSums(_ format: RowFormat) {
    let elements = Elements(format: format)
    let bytes: [[UInt8]] = (0..<2).map { seed in
      var random = Random(UInt64(40 + seed))
      let hard: [Float] = [
        0, -0.0, 1, -1, 0x1p-8, 0x1p-9, 0x1p-11, 0x1p-12, 65504, -65504, 16, 0x1p-14, 0x1p-24, 0x1p-25, 0x1p-126,
        0x1p-133,
        .greatestFiniteMagnitude, .infinity, -.infinity, .nan, 1.0078125, 0x1.ffp15, 0x1.ffep15,
      ]
      return (0..<2000).flatMap { _ in elements.pattern(hard[Int(random.next() % UInt64(hard.count))]) }
    }
    let output = Guarding(byteCount: bytes[0].count)
    let weights: [Float] = [1, 0.75]
    reduce(format, bytes, weights: weights, 0, output, 0, 2000, true)
    var expected: [UInt8] = []
    for index in 0..<2000 {
      var sum: Float = 0
      for row in 0..<2 { sum += elements.load(bytes[row], index) * weights[row] }
      expected += elements.pattern(sum)
    }
    #expect(output.bytes == expected)
  }

  /// All BF16 patterns, shuffled over blocks: blocks with infinities, with NaNs, and blocks of subnormals alone.
  @Test(arguments: [false, true], [65536, 16, 144, 1008])
  func quantizes(powerOfTwo: Bool, channelCount: Int) {
    var random = Random(11)
    let source: [UInt16] = (0..<channelCount).map { channel in
      let pattern = UInt16(truncatingIfNeeded: random.next() >> 16)
      switch channel / 128 % 4 {
      case 0: return pattern & 0xbfff  // below 2
      case 1: return pattern & 0x807f  // subnormal
      case 2: return (pattern & 0x83ff) | 0x3c00  // near 1
      default: return pattern
      }
    }
    let blockCount = (channelCount + 127) / 128
    let values = Guarding(byteCount: channelCount)
    let scales = Guarding(byteCount: blockCount * (powerOfTwo ? 1 : 4))
    source.withUnsafeBufferPointer {
      swiftep_quantize_e4m3(
        values.base.assumingMemoryBound(to: UInt8.self), scales.base, $0.baseAddress!, channelCount, powerOfTwo)
    }
    var expectedValues: [UInt8] = []
    var expectedScales: [UInt8] = []
    for block in 0..<blockCount {
      let patterns = source[128 * block..<min(channelCount, 128 * block + 128)]
      let amax = max(float(bf16: patterns.map { $0 & 0x7fff }.max()!), 1e-4)
      let top = patterns.map { $0 & 0x7fff }.max()!
      let largest = top > 0x7f80 ? float(bf16: top) : amax
      var inverse = 448 / largest
      let scale = largest / 448
      if powerOfTwo {
        var exponent = -126
        while scale.isFinite && Float(sign: .plus, exponent: exponent, significand: 1) < scale { exponent += 1 }
        expectedScales.append(scale.isFinite ? UInt8(exponent + 127) : 255)
        inverse = scale.isFinite ? Float(sign: .plus, exponent: -exponent, significand: 1) : .nan
      } else {
        expectedScales += withUnsafeBytes(of: scale) { Array($0) }
      }
      expectedValues += patterns.map { e4m3(float(bf16: $0) * inverse) }
    }
    #expect(values.bytes == expectedValues)
    #expect(scales.bytes == expectedScales)
    #expect(values.isIntact && scales.isIntact)
  }

  @Test(arguments: nvfp4GlobalScales)
  func quantizesNVFP4(globalScale: Float) {
    for channelCount in [nvfp4Patterns.count / 64 * 64, 64, 192] {
      let source = Array(nvfp4Patterns.suffix(channelCount))
      let values = Guarding(byteCount: channelCount / 2)
      let scales = Guarding(byteCount: channelCount / 16)
      source.withUnsafeBufferPointer {
        swiftep_quantize_nvfp4(
          values.base.assumingMemoryBound(to: UInt8.self), scales.base.assumingMemoryBound(to: UInt8.self),
          $0.baseAddress!, channelCount, globalScale)
      }
      let expected = nvfp4(source, globalScale: globalScale)
      #expect(values.bytes == expected.values)
      #expect(scales.bytes == expected.scales)
      #expect(values.isIntact && scales.isIntact)
    }
  }

  /// What lies half way between two goes to the even one, and what lies behind that does not.
  @Test func roundsToE2M1() {
    // 6 makes the scale one.
    let channels: [Float] = [
      6, 1.25, 0, 1.7578125, -0.0, -0.25, 0.75, 5.03125, 2.5, 3.5, 5, 2.515625, 3.484375, -5, 1.75, 0.2578125,
    ]
    let block = channels.map { bf16($0) } + [UInt16](repeating: 0, count: 48)
    let values = Guarding(byteCount: 32)
    let scales = Guarding(byteCount: 4)
    swiftep_quantize_nvfp4(
      values.base.assumingMemoryBound(to: UInt8.self), scales.base.assumingMemoryBound(to: UInt8.self), block, 64, 1)
    #expect(Array(values.bytes.prefix(8)) == [0x27, 0x40, 0x88, 0x72, 0x64, 0x56, 0xe5, 0x14])
    #expect(scales.bytes == [0x38, 0, 0, 0])
  }

  // MARK: Whole jobs, cut among workers

  @Test(arguments: [Int32(1), 2, 5], [false, true])
  func scatters(workerCount: Int32, streaming: Bool) {
    var random = Random(5)
    for (rowCount, rowByteCount) in [(0, 16), (1, 16), (3, 48), (1, 65536), (2, 14336), (17, 5760), (50, 4112)] {
      let bytes = random.bytes(rowCount * rowByteCount)
      let source = Guarding(byteCount: bytes.count, skew: 3)
      source.fill(bytes)
      let targets = (0..<3).map { _ in Guarding(byteCount: bytes.count) }
      // Slot 0 takes all rows backwards, slot 1 the even ones, slot 2 none.
      let job = ScatterJob(
        source: Address(source.base), rowCount: Int32(rowCount), rowByteCount: Int32(rowByteCount), slotCount: 3,
        transform: .copy, writtenByteCount: Int64(bytes.count))
      for worker in workers(workerCount, streaming: streaming) {
        worker.scatterRows(job) { row, slot in
          if slot == 2 || (slot == 1 && row % 2 == 1) { return .none }
          let place = slot == 0 ? rowCount - 1 - Int(row) : Int(row)
          return RowTarget(row: Address(targets[Int(slot)].base + place * rowByteCount), scales: .null)
        }
      }
      for row in 0..<rowCount {
        let expected = Array(bytes[row * rowByteCount..<(row + 1) * rowByteCount])
        let mirrored = rowCount - 1 - row
        #expect(Array(targets[0].bytes[mirrored * rowByteCount..<(mirrored + 1) * rowByteCount]) == expected)
        let untouched = [UInt8](repeating: 0xa5, count: rowByteCount)
        #expect(
          Array(targets[1].bytes[row * rowByteCount..<(row + 1) * rowByteCount])
            == (row % 2 == 0 ? expected : untouched))
      }
      #expect(targets.allSatisfy { $0.isIntact })
      #expect(targets[2].bytes.allSatisfy { $0 == 0xa5 })
    }
  }

  /// Every run to its place, and nothing between.
  @Test(arguments: [Int32(1), 2, 5])
  func copiesRuns(workerCount: Int32) {
    let runs = [
      RowRun(first: 3, count: 4, place: 1), RowRun(first: 0, count: 0), RowRun(first: 9, count: -1, place: 6),
      RowRun(first: 12, count: 1, place: 7), RowRun(first: 7, count: 3, place: 10),
    ]
    for rowByteCount in [16, 4112, 14336] {
      var random = Random(UInt64(rowByteCount))
      let source = Guarding(byteCount: 13 * rowByteCount)
      source.fill(random.bytes(13 * rowByteCount))
      let target = Guarding(byteCount: 14 * rowByteCount)
      let job = CopyJob(
        source: Address(source.base), target: Address(target.base), rowByteCount: Int32(rowByteCount))
      for worker in workers(workerCount, streaming: false) {
        worker.copyRows(job, runCount: Int32(runs.count)) { runs[Int($0)] }
      }
      let row = { (memory: Guarding, row: Int) in Array(memory.bytes[row * rowByteCount..<(row + 1) * rowByteCount]) }
      let sources = [nil, 3, 4, 5, 6, nil, nil, 12, nil, nil, 7, 8, 9, nil]
      for (place, from) in sources.enumerated() {
        #expect(row(target, place) == from.map { row(source, $0) } ?? [UInt8](repeating: 0xa5, count: rowByteCount))
      }
      #expect(target.isIntact)
    }
  }

  /// Rows of runs are coded once each, whoever codes them, and none between.
  @Test(arguments: [Int32(1), 2, 5])
  func encodesRuns(workerCount: Int32) {
    let (channelCount, rowCount) = (256, 24)
    let runs = [(1, 3), (5, 0), (7, -2), (9, 7), (17, 1), (20, 2)].map { RowRun(first: $0, count: $1) }
    let recordsByteCount = Int(LogFMT.byteCount(channelCount: Int32(channelCount)))
    var random = Random(3)
    let source = Guarding(byteCount: 2 * rowCount * channelCount)
    source.fill(random.bytes(2 * rowCount * channelCount))
    let (records, exact) = (Guarding(byteCount: rowCount * recordsByteCount), Guarding(byteCount: source.bytes.count))
    let (expected, expectedExact) = (Guarding(byteCount: records.bytes.count), Guarding(byteCount: exact.bytes.count))
    let job = EncodeJob(
      source: Address(source.base), elementCount: Int32(channelCount), records: Address(records.base),
      exact: Address(exact.base))
    for worker in workers(workerCount, streaming: false) {
      worker.encodeRows(job, runCount: Int32(runs.count)) { runs[Int($0)] }
    }
    for row in runs.flatMap({ Int($0.first)..<Int($0.first + max(0, $0.count)) }) {
      let offset = 2 * row * channelCount
      swiftep_encode_logfmt(
        expected.base + row * recordsByteCount, expectedExact.base + offset, source.base + offset, channelCount)
    }
    #expect(Array(records.bytes) == Array(expected.bytes) && Array(exact.bytes) == Array(expectedExact.bytes))
    #expect(records.isIntact && exact.isIntact)
  }

  /// However rows are cut, the values are those of the row as a whole; packed scales end in zeros.
  @Test(arguments: [Int32(1), 2, 5], [RowTransform.quantizeFloatScales, .quantizeUE8M0Scales, .quantizeNVFP4])
  func scattersQuantized(workerCount: Int32, _ transform: RowTransform) {
    let isPowerOfTwo = transform == .quantizeUE8M0Scales
    let isNVFP4 = transform == .quantizeNVFP4
    for (rowCount, someCount) in [(1, 16), (2, 7168), (3, 2880), (1, 20000), (40, 144)] {
      let channelCount = isNVFP4 ? (someCount + 63) / 64 * 64 : someCount
      var random = Random(UInt64(channelCount))
      let bytes = random.bytes(2 * rowCount * channelCount)
      let source = Guarding(byteCount: bytes.count)
      source.fill(bytes)
      let blockCount = (channelCount + 127) / 128
      let scaleByteCount =
        isNVFP4 ? channelCount / 16 : isPowerOfTwo ? (blockCount + 3) / 4 * 4 : 4 * blockCount
      let width = isNVFP4 ? channelCount / 2 : channelCount
      let values = Guarding(byteCount: rowCount * width)
      let scales = Guarding(byteCount: rowCount * scaleByteCount)
      let job = ScatterJob(
        source: Address(source.base), rowCount: Int32(rowCount), rowByteCount: Int32(2 * channelCount), slotCount: 1,
        transform: transform, globalScale: 0.25, writtenByteCount: 1)
      for worker in workers(workerCount, streaming: workerCount == 2) {
        worker.scatterRows(job) { row, _ in
          RowTarget(
            row: Address(values.base + Int(row) * width),
            scales: Address(scales.base + Int(row) * scaleByteCount))
        }
      }
      for row in 0..<rowCount {
        let whole = Guarding(byteCount: width)
        let wholeScales = Guarding(byteCount: scaleByteCount)
        wholeScales.fill([UInt8](repeating: 0, count: scaleByteCount))
        let wholeValues = whole.base.assumingMemoryBound(to: UInt8.self)
        let channels = (source.base + 2 * row * channelCount).assumingMemoryBound(to: UInt16.self)
        if isNVFP4 {
          swiftep_quantize_nvfp4(
            wholeValues, wholeScales.base.assumingMemoryBound(to: UInt8.self), channels, channelCount, 0.25)
        } else {
          swiftep_quantize_e4m3(wholeValues, wholeScales.base, channels, channelCount, isPowerOfTwo)
        }
        #expect(Array(values.bytes[row * width..<(row + 1) * width]) == whole.bytes)
        #expect(Array(scales.bytes[row * scaleByteCount..<(row + 1) * scaleByteCount]) == wholeScales.bytes)
      }
      #expect(values.isIntact && scales.isIntact)
    }
  }

  @Test(arguments: [Int32(1), 2, 5], [false, true])
  func reduces(workerCount: Int32, streaming: Bool) {
    let elements = Elements(format: .bf16)
    for (rowCount, elementCount) in [(0, 8), (1, 8), (1, 20000), (3, 2880), (40, 136)] {
      var random = Random(UInt64(elementCount))
      let width = 2 * elementCount
      let bytes = (0..<2).map { _ in random.bytes(rowCount * width) }
      let inputs = bytes.map { bytes in
        let input = Guarding(byteCount: bytes.count)
        input.fill(bytes)
        return input
      }
      let output = Guarding(byteCount: rowCount * width)
      // Odd rows have no first source; each row adds itself as the bias.
      let job = ReduceJob(
        output: Address(output.base), rowCount: Int32(rowCount), elementCount: Int32(elementCount), slotCount: 2,
        format: .bf16, isWeighted: true, biases: (Address(inputs[0].base), .null))
      for worker in workers(workerCount, streaming: streaming) {
        worker.reduceRows(job) { row, slot in
          if slot == 0 && row % 2 == 1 { return .none }
          return RowSource(row: Address(inputs[Int(slot)].base + Int(row) * width), weight: Float(slot) + 0.5)
        }
      }
      var expected: [UInt8] = []
      for row in 0..<rowCount {
        for index in row * elementCount..<(row + 1) * elementCount {
          var sum: Float = 0
          if row % 2 == 0 { sum += elements.load(bytes[0], index) * 0.5 }
          sum += elements.load(bytes[1], index) * 1.5
          sum += elements.load(bytes[0], index)
          expected += elements.pattern(sum)
        }
      }
      #expect(output.bytes == expected, "\(rowCount) rows of \(elementCount)")
      #expect(output.isIntact)
    }
  }
}

extension HostMachine {
  /// Rows without labels.
  fileprivate func scatterRows(_ job: ScatterJob, route: (Int32, Int32) -> RowTarget) {
    scatterRows(
      job, from: noScatter, route: route, labelCount: 0, content: { row, _, _ in row }, label: { row, _ in row },
      write: { _, _, _ in })
  }

  /// - Parameter source: of each row and slot.
  fileprivate func reduceRows(_ job: ReduceJob, source: (_ row: Int32, _ slot: Int32) -> RowSource) {
    reduceRows(job) {
      WeightedPlace(Place(rank: $1, row: $0), weight: 1)
    } source: {
      $0.place.isNone ? .none : source($0.place.row, $0.place.rank)
    }
  }
}
