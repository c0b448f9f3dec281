import EmulatedGPU
import Testing

/// What a GPU's block does with numbers, on emulated lanes.
@Suite struct NumberTests {
  @Test(arguments: [0..<1, 5..<5, 5..<37, 3..<36, 3..<200, 100..<1300] as [Range<Int32>], [Int32(1), 8, 64])
  func numberTokens(_ tokens: Range<Int32>, destinationCount: Int32) {
    var random = Random(UInt64(tokens.upperBound))
    let members = (0..<tokens.upperBound).map { _ in
      random.next() & random.next() & (UInt64.max >> UInt64(64 - destinationCount))
    }
    // Whatever lay there before.
    let counters = Memory([Int32](repeating: 7, count: Int(destinationCount)))
    let found = Memory([Int32](repeating: 7, count: Int(tokens.upperBound * destinationCount)))
    let fault = emulate(blockCount: 1) { machine in
      machine.numberTokens(
        tokens, destinationCount: destinationCount, counters: counters.address, members: { members[Int($0)] },
        visit: { found.address.store($2, at: $0 * destinationCount + $1) })
    }
    var counts = [Int32](repeating: 0, count: Int(destinationCount))
    var expected = [Int32](repeating: 7, count: Int(tokens.upperBound * destinationCount))
    for token in tokens {
      for destination in 0..<destinationCount {
        let isGoing = members[Int(token)] >> UInt64(destination) & 1 != 0
        expected[Int(token * destinationCount + destination)] = isGoing ? counts[Int(destination)] : -1
        counts[Int(destination)] += isGoing ? 1 : 0
      }
    }
    #expect(fault == nil)
    #expect(found.elements(Int32.self) == expected)
    #expect(counters.elements(Int32.self) == counts)
  }

  /// With keys that each warp counts apart, and with more than that, also more than fit into shared memory; and with so few
  /// cells that one warp has them all.
  @Test(
    arguments: [0..<8, 5..<5, 3..<131, 3..<132, 24..<1600, 9..<606] as [Range<Int32>],
    [256, 7, 4000, 50_000] as [Int32])
  func numberCells(_ cells: Range<Int32>, keyCount: Int32) {
    var random = Random(UInt64(cells.upperBound + keyCount))
    let keys = (0..<cells.upperBound).map { _ in max(-1, Int32(random.next() >> 33) % (keyCount + 1) - 1) }
    let key = { (cell: Int32) in keys[Int(cell)] }
    // Whatever lay there before.
    let numbered = Memory([Int32](repeating: 7, count: Int(keyCount)))
    let counted = Memory([Int32](repeating: 7, count: Int(keyCount)))
    let found = Memory([Int32](repeating: 7, count: keys.count))
    let fault = emulate(blockCount: 1) { machine in
      machine.numberCells(
        cells, keyCount: keyCount, counters: numbered.address, key: key, visit: { found.address.store($1, at: $0) })
      machine.countCells(cells, keyCount: keyCount, counters: counted.address, key: key)
    }
    var expectedCounts = [Int32](repeating: 0, count: Int(keyCount))
    var expected = [Int32](repeating: 7, count: keys.count)
    for cell in cells { expected[Int(cell)] = -1 }
    for cell in cells where key(cell) >= 0 {
      expected[Int(cell)] = expectedCounts[Int(key(cell))]
      expectedCounts[Int(key(cell))] += 1
    }
    #expect(fault == nil)
    #expect(found.elements(Int32.self) == expected)
    #expect(numbered.elements(Int32.self) == expectedCounts)
    #expect(counted.elements(Int32.self) == expectedCounts)
  }

  @Test(arguments: [Int32(0), 1, 31, 512, 1300])
  func totals(count: Int32) {
    var random = Random(UInt64(count))
    let values = (0..<count).map { _ in
      SIMD2(Int32(random.next() >> 33) % 1000, Int32(random.next() >> 33) % 1000 - 500)
    }
    let found = Memory([SIMD2<Int32>](repeating: SIMD2(-1, -1), count: 512))
    let asked = Memory([Int32](repeating: 0, count: Int(count)))
    let fault = emulate(blockCount: 1) { machine in
      let part = machine.part(ofTotal: count) {
        asked.address.store(asked.address.load(Int32.self, at: $0) + 1, at: $0)
        return values[Int($0)]
      }
      let total = machine.total(part)
      machine.forEach(512) { found.address.store(total, at: $0) }
    }
    let total = values.reduce(SIMD2(0, 0), &+)
    #expect(fault == nil)
    #expect(found.elements(SIMD2<Int32>.self) == [SIMD2<Int32>](repeating: total, count: 512))
    #expect(asked.elements(Int32.self).allSatisfy { $0 == 1 })
  }

  @Test(arguments: [Int32(1), 31, 512, 1300])
  func scansAndFinds(count: Int32) {
    var random = Random(UInt64(count))
    let values = (0..<count).map { _ in Int32(random.next() >> 33) % 100 }
    let sums = Memory([Int32](repeating: -1, count: Int(count)))
    let places = Memory([Int32](repeating: -9, count: 3))
    let fault = emulate(blockCount: 1) { machine in
      machine.scan(count, value: { values[Int($0)] }, visit: { sums.address.store($1 &+ $2, at: $0) })
      let last = machine.first(of: 0..<count) { $0 >= count - 1 }
      let none = machine.first(of: 0..<count) { $0 >= count }
      let some = machine.first(of: count / 2..<count) { values[Int($0)] >= 50 }
      machine.forEach(1) { _ in
        places.address.store(last, at: 0)
        places.address.store(none, at: 1)
        places.address.store(some, at: 2)
      }
    }
    var sum: Int32 = 0
    let expected = values.map { value in
      sum += value
      return sum
    }
    let some = (count / 2..<count).first { values[Int($0)] >= 50 } ?? -1
    #expect(fault == nil)
    #expect(sums.elements(Int32.self) == expected)
    #expect(places.elements(Int32.self) == [count - 1, -1, some])
  }

  /// More than the lanes take at once, in words and in vectors, also of addresses that are no multiples of 16.
  @Test(arguments: [(Int32(4), 0, 0), (12, 0, 0), (64, 0, 0), (64, 4, 0), (64, 0, 8), (64, 12, 12), (260, 0, 4)])
  func copiesRecordsAndFills(byteCount: Int32, sourceShift: Int, targetShift: Int) {
    let count: Int32 = 4000
    let source = Memory((0..<count * byteCount + 16).map { UInt8(truncatingIfNeeded: $0 % 251) })
    let target = Memory(byteCount: Int(count * byteCount) + 16)
    let filled = Memory(byteCount: 4 * 700)
    let fault = emulate(blockCount: 3) { machine in
      machine.copyRecords(count, byteCount: byteCount) { record in
        if record % 5 == 0 { return .none }
        return RecordRoute(
          source: source.address.advanced(byBytes: Int64(sourceShift) + Int64(record * byteCount)),
          target: target.address.advanced(byBytes: Int64(targetShift) + Int64((count - 1 - record) * byteCount)))
      }
      machine.fill(filled.address, byteCount: 4 * 699, pattern: 0x0102_0304)
    }
    var expected = [UInt8](repeating: Memory.untouched, count: Int(count * byteCount) + 16)
    for record in 0..<count where record % 5 != 0 {
      let from = sourceShift + Int(record * byteCount)
      let to = targetShift + Int((count - 1 - record) * byteCount)
      expected.replaceSubrange(
        to..<to + Int(byteCount), with: source.bytes[from..<from + Int(byteCount)])
    }
    #expect(fault == nil)
    // How they differ would take minutes to say.
    let isCopied = target.bytes == expected
    #expect(isCopied)
    #expect(filled.elements(UInt32.self) == [UInt32](repeating: 0x0102_0304, count: 699) + [0xeeee_eeee])
  }
}
