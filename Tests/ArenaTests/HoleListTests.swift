import Arena
import Testing

/// One Bool for each granule: whether it is free.
private struct NaiveHoles {
  var isFree: [Bool]

  /// Maximal runs of free granules, by offset.
  var runs: [Range<Int>] {
    var runs: [Range<Int>] = []
    for (index, free) in isFree.enumerated() where free {
      if let last = runs.last, last.upperBound == index {
        runs[runs.count - 1] = last.lowerBound..<index + 1
      } else {
        runs.append(index..<index + 1)
      }
    }
    return runs
  }

  mutating func set(_ range: Range<Int64>, free: Bool) {
    for index in Int(range.lowerBound / HoleList.granule)..<Int(range.upperBound / HoleList.granule) {
      precondition(isFree[index] != free, "granule \(index) is taken or given twice")
      isFree[index] = free
    }
  }
}

@Suite struct HoleListTests {
  private let granule = HoleList.granule

  @Test(arguments: UInt64(1)...8)
  func agreesWithANaiveModel(seed: UInt64) {
    var random = seed
    func next(_ count: Int) -> Int {
      random = random &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Int((random >> 33) % UInt64(count))
    }
    let count = 60
    var holes = HoleList()
    holes.give(0..<Int64(count) * granule)
    var naive = NaiveHoles(isFree: [Bool](repeating: true, count: count))
    var taken: [Range<Int64>] = []
    for step in 0..<3000 {
      switch next(10) {
      case 0..<5:
        let byteCount = Int64(1 + next(Int(granule) * 9))
        let needed = Int((byteCount + granule - 1) / granule)
        let range = holes.take(byteCount)
        let first = naive.runs.first { $0.count >= needed }
        let expected = first.map { Int64($0.lowerBound) * granule..<Int64($0.lowerBound + needed) * granule }
        #expect(range == expected, "seed \(seed), step \(step)")
        if let range {
          naive.set(range, free: false)
          taken.append(range)
        }
      case 5 where next(4) == 0:
        let range = holes.takeLargest()
        let longest = naive.runs.map(\.count).max() ?? 0
        #expect(range.count == longest * Int(granule), "seed \(seed), step \(step)")
        naive.set(range, free: false)
        if !range.isEmpty { taken.append(range) }
      case 6:
        guard let run = naive.runs.isEmpty ? nil : naive.runs[next(naive.runs.count)] else { continue }
        let first = run.lowerBound + next(run.count)
        let end = first + 1 + next(run.upperBound - first)
        let range = Int64(first) * granule..<Int64(end) * granule
        holes.remove(range)
        naive.set(range, free: false)
        taken.append(range)
      default:
        if taken.isEmpty { continue }
        let range = taken.remove(at: next(taken.count))
        holes.give(range)
        naive.set(range, free: true)
      }
      #expect(holes.freeByteCount == Int64(naive.isFree.count { $0 }) * granule, "seed \(seed), step \(step)")
      let last = naive.runs.last.flatMap { $0.upperBound == count ? $0 : nil }
      let expected = last.map { Int64($0.lowerBound) * granule..<Int64($0.upperBound) * granule }
      #expect(holes.hole(endingAt: Int64(count) * granule) == expected, "seed \(seed), step \(step)")
    }
    for range in taken { holes.give(range) }
    #expect(holes.takeLargest() == 0..<Int64(count) * granule)
    #expect(holes.freeByteCount == 0)
  }

  @Test func zeroBytesTakeNothing() {
    var holes = HoleList()
    #expect(holes.take(0) == 0..<0)
    #expect(holes.takeLargest() == 0..<0)
    #expect(holes.take(1) == nil)
    holes.give(0..<granule)
    #expect(holes.take(0) == 0..<0)
    #expect(holes.freeByteCount == granule)
  }

  @Test func sizesAreRoundedUp() {
    #expect(HoleList.roundUp(0) == 0)
    #expect(HoleList.roundUp(1) == granule)
    #expect(HoleList.roundUp(granule) == granule)
    #expect(HoleList.roundUp(granule + 1) == 2 * granule)
  }
}
