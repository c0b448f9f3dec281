import CPlatform
import EmulatedGPU
import Testing

/// LogFMT as a GPU's block codes and sums it: as on a CPU, to the bit.
@Suite struct LogFMTTests {
  /// Rows, some of whose blocks are sent as they are.
  private func makeRows(_ rowCount: Int, _ channelCount: Int, _ random: inout Random) -> [UInt16] {
    (0..<rowCount * channelCount / 128).flatMap { block in
      let kind = random.next() >> 32 % 8
      return (0..<128).map { channel in
        let bits = UInt16(truncatingIfNeeded: random.next() >> 32)
        switch kind {
        case 0: return bits  // All that there are.
        case 1: return 0x8000 & bits
        case 2: return channel == 77 ? bits : 0
        case 3: return 0x3f80 | bits & 1
        case 4: return channel % 5 == 0 ? 0 : bits & 0x87ff | 0x3800
        default: return bits & 0x83ff | 0x3c00
        }
      }
    }
  }

  /// Up to 2 to the power of 16 between the least and the largest.
  @Test(arguments: [
    (0x4780, 0x3f80, false), (0x4781, 0x3f80, true), (0x7f7f, 0x77ff, false), (0x7f80, 0x7f00, true),
    (0x80, 0x80, false),
    (0x81, 0x7f, true),
  ])
  func blocksThatAreSentAsTheyAre(largest: UInt32, least: UInt32, isApart: Bool) {
    #expect(LogFMTBlock(largest: largest, least: least - 1).isApart == isApart)
  }

  @Test func blocksOfZeros() {
    let block = LogFMTBlock(largest: 0, least: 0xffff)
    #expect(!block.isApart && block.code(0x8000, inverse: block.inverse) == 0x200)
    #expect(block.value(0, sign: 1).bitPattern == 0x8000_0000)
  }

  @Test(arguments: [1, 3], [false, true])
  func encodes(blockCount: Int, inPlace: Bool) {
    for (rowCount, channelCount) in [(1, 128), (3, 384), (20, 256), (2, 2944)] {
      var random = Random(UInt64(channelCount))
      let rows = makeRows(rowCount, channelCount, &random)
      let recordsByteCount = Int(LogFMT.byteCount(channelCount: Int32(channelCount)))
      let source = Memory(rows)
      let records = Memory(byteCount: rowCount * recordsByteCount)
      let exact = inPlace ? source : Memory(byteCount: 2 * rows.count)
      let job = EncodeJob(
        source: source.address, elementCount: Int32(channelCount), records: records.address, exact: exact.address)
      // A row a run, among runs of none, and more than a warp has lanes.
      let fault = emulate(blockCount: blockCount) { machine in
        machine.encodeRows(job, runCount: Int32(3 * rowCount)) {
          RowRun(first: $0 / 3, count: $0 % 3 == 1 ? 1 : $0 % 3 &- 2)
        }
      }
      #expect(fault == nil)

      let expected = Memory(byteCount: rowCount * recordsByteCount)
      let expectedExact = inPlace ? source : Memory(byteCount: 2 * rows.count)
      for row in 0..<rowCount {
        swiftep_encode_logfmt(
          expected.base + row * recordsByteCount, expectedExact.base + 2 * row * channelCount,
          source.base + 2 * row * channelCount, channelCount)
      }
      #expect(exact.bytes == expectedExact.bytes)
      for row in 0..<rowCount {
        for block in 0..<channelCount / 128 {
          let first = row * recordsByteCount + block * Int(LogFMT.recordByteCount)
          let isApart = expected.bytes[first + 4..<first + 8].allSatisfy { $0 == 0xff }
          let range = first..<first + (isApart ? 8 : Int(LogFMT.recordByteCount))
          #expect(records.bytes[range] == expected.bytes[range], "row \(row), block \(block)")
        }
      }
    }
  }

  @Test(arguments: [1, 3], [false, true])
  func reduces(blockCount: Int, isWeighted: Bool) {
    for (rowCount, channelCount, slotCount) in [(1, 128, 1), (3, 384, 2), (20, 256, 9), (2, 640, 33), (2, 2944, 4)] {
      var random = Random(UInt64(channelCount + slotCount))
      let rows = makeRows(rowCount * slotCount, channelCount, &random)
      let recordsByteCount = Int(LogFMT.byteCount(channelCount: Int32(channelCount)))
      let (source, bias) = (Memory(rows), Memory(makeRows(rowCount, channelCount, &random)))
      let records = Memory(byteCount: rowCount * slotCount * recordsByteCount)
      for row in 0..<rowCount * slotCount {
        let row0 = source.base + 2 * row * channelCount
        swiftep_encode_logfmt(records.base + row * recordsByteCount, row0, row0, channelCount)
      }
      let isThere = (0..<rowCount * slotCount).map { _ in random.next() >> 32 % 4 > 0 }
      let weights = (0..<rowCount * slotCount).map { _ in
        isWeighted ? Float(Int8(truncatingIfNeeded: random.next() >> 32)) / 16 : 1
      }
      let output = Memory(byteCount: 2 * rowCount * channelCount)
      let counter = Memory([UInt32(0)])
      let job = ReduceJob(
        output: output.address, rowCount: Int32(rowCount), elementCount: Int32(channelCount),
        slotCount: Int32(slotCount), format: .logFMT, isWeighted: isWeighted, biases: (bias.address, .null),
        counter: blockCount == 3 ? counter.address : .null)
      let fault = emulate(blockCount: blockCount) { machine in
        machine.reduceRows(job) { row, slot in
          let cell = Int(row) * slotCount + Int(slot)
          if !isThere[cell] { return .none }
          return RowSource(
            row: records.address.advanced(byBytes: Int64(cell * recordsByteCount)), weight: weights[cell],
            exact: source.address.advanced(byBytes: Int64(2 * cell * channelCount)))
        }
      }
      #expect(fault == nil)

      let expected = Memory(byteCount: 2 * rowCount * channelCount)
      for row in 0..<rowCount {
        let cells = (row * slotCount..<(row + 1) * slotCount).filter { isThere[$0] }
        let terms = cells.map { UnsafeRawPointer?(records.base + $0 * recordsByteCount) }
        let exact = cells.map { UnsafeRawPointer?(source.base + 2 * $0 * channelCount) }
        let factors = cells.map { weights[$0] }
        terms.withUnsafeBufferPointer { terms in
          exact.withUnsafeBufferPointer { exact in
            factors.withUnsafeBufferPointer { factors in
              var reduction = swiftep_reduction(
                format: RowFormat.logFMT.rawValue, row_count: Int32(cells.count), rows: terms.baseAddress,
                exact: exact.baseAddress, weights: isWeighted ? factors.baseAddress : nil,
                bias0: bias.base + 2 * row * channelCount, bias1: nil)
              swiftep_reduce(expected.base + 2 * row * channelCount, &reduction, 0, channelCount, false)
            }
          }
        }
      }
      let isEqual = output.bytes == expected.bytes
      #expect(isEqual, "\(rowCount) rows of \(channelCount) channels, \(slotCount) slots")
    }
  }
}
