/// The free ranges of an arena, by offset. First fit; neighbours merge when a range comes back.
package struct HoleList: Sendable {
  /// Every range begins and ends at a multiple of this, a page.
  package static let granule: Int64 = 4096

  private var holes: [Range<Int64>] = []

  package init() {}

  /// Bytes free, over all holes.
  package var freeByteCount: Int64 { holes.reduce(0) { $0 + Int64($1.count) } }

  package static func roundUp(_ byteCount: Int64) -> Int64 { (byteCount + granule - 1) / granule * granule }

  /// Where a range is taken from: kinds of ranges that live differently long, taken from different ends, leave larger
  /// holes.
  package enum End: Sendable {
    case low, high
  }

  /// Takes `byteCount` bytes, rounded up to the granule, or returns nil where no hole is large enough. Zero bytes take
  /// nothing.
  package mutating func take(_ byteCount: Int64, from end: End = .low) -> Range<Int64>? {
    let size = Self.roundUp(byteCount)
    if size == 0 { return 0..<0 }
    let fits = { (hole: Range<Int64>) in Int64(hole.count) >= size }
    guard let index = end == .low ? holes.firstIndex(where: fits) : holes.lastIndex(where: fits) else { return nil }
    let hole = holes.remove(at: index)
    switch end {
    case .low:
      give(hole.lowerBound + size..<hole.upperBound)
      return hole.lowerBound..<hole.lowerBound + size
    case .high:
      give(hole.lowerBound..<hole.upperBound - size)
      return hole.upperBound - size..<hole.upperBound
    }
  }

  /// Takes the largest hole whole; empty where nothing is free.
  package mutating func takeLargest() -> Range<Int64> {
    guard let index = holes.indices.max(by: { holes[$0].count < holes[$1].count }) else { return 0..<0 }
    return holes.remove(at: index)
  }

  /// Takes this range, which lies in a hole.
  package mutating func remove(_ range: Range<Int64>) {
    guard let index = holes.firstIndex(where: { $0.upperBound >= range.upperBound }) else { return }
    let hole = holes.remove(at: index)
    give(hole.lowerBound..<range.lowerBound)
    give(range.upperBound..<hole.upperBound)
  }

  /// Gives a range back that was taken, or adds a new one. The range overlaps no hole.
  package mutating func give(_ range: Range<Int64>) {
    if range.isEmpty { return }
    let index = holes.firstIndex { $0.lowerBound >= range.upperBound } ?? holes.endIndex
    holes.insert(range, at: index)
    if index + 1 < holes.endIndex && holes[index].upperBound == holes[index + 1].lowerBound {
      holes[index] = holes[index].lowerBound..<holes[index + 1].upperBound
      holes.remove(at: index + 1)
    }
    if index > 0 && holes[index - 1].upperBound == holes[index].lowerBound {
      holes[index - 1] = holes[index - 1].lowerBound..<holes[index].upperBound
      holes.remove(at: index)
    }
  }

  /// The hole that ends at `offset`, if one does: growing the arena there extends it.
  package func hole(endingAt offset: Int64) -> Range<Int64>? { holes.last { $0.upperBound == offset } }
}
