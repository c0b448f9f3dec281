import Arena

/// What has to happen before memory can be used again.
package protocol ReuseFence: Sendable {
  var isPassed: Bool { get }
}

/// Ranges of memory that can be taken, and those that somebody still uses who has been told to do so.
struct ReusableRanges {
  private var holes = HoleList()
  private var used: [(range: Range<Int64>, fence: any ReuseFence)] = []

  mutating func give(_ range: Range<Int64>, behind fence: (any ReuseFence)? = nil) {
    if let fence { used.append((range, fence)) } else { holes.give(range) }
  }

  mutating func take(_ byteCount: Int64, from end: HoleList.End = .low) -> Range<Int64>? {
    reclaim()
    return holes.take(byteCount, from: end)
  }

  mutating func takeLargest() -> Range<Int64> {
    reclaim()
    return holes.takeLargest()
  }

  mutating func hole(endingAt end: Int64) -> Range<Int64>? { holes.hole(endingAt: end) }

  private mutating func reclaim() {
    if used.isEmpty { return }
    used.removeAll { range, fence in
      if !fence.isPassed { return false }
      holes.give(range)
      return true
    }
  }

  /// Takes ranges whose fences are not passed yet for free, since whoever uses them next comes behind those.
  ///
  /// - Returns: the fences.
  mutating func reclaimAll() -> [any ReuseFence] {
    defer { used = [] }
    for (range, _) in used { holes.give(range) }
    return used.map(\.fence)
  }
}
