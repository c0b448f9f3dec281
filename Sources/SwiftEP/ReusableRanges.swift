import Arena
import EPKernels

/// What has to happen before memory can be used again.
package protocol ReuseFence: Sendable {
  /// May ask a GPU.
  var isPassed: Bool { get }
  /// Whether launches of this order come behind it anyway.
  func comesBefore(_ order: LaunchOrder) -> Bool
}

extension ReuseFence {
  package func comesBefore(_ order: LaunchOrder) -> Bool { false }
}

/// Behind what a launch comes without being told to: earlier ones of its lane, and what is queued on the caller's stream.
package struct LaunchOrder: Sendable {
  /// The word that the lane's launches end with.
  let lane: Address
  let stream: CUDAStream?
}

/// Ranges of memory that can be taken, and those that somebody still uses who has been told to do so.
struct ReusableRanges {
  private var holes = HoleList()
  private var used: [Used] = []

  private struct Used {
    let range: Range<Int64>
    let fences: [any ReuseFence]
  }

  mutating func give(_ range: Range<Int64>, behind fences: [any ReuseFence] = []) {
    if fences.isEmpty { holes.give(range) } else { used.append(Used(range: range, fences: fences)) }
  }

  /// Of what nobody uses.
  mutating func take(_ byteCount: Int64, from end: HoleList.End = .low) -> Range<Int64>? {
    reclaim()
    return holes.take(byteCount, from: end)
  }

  mutating func takeLargest() -> Range<Int64> {
    reclaim()
    return holes.takeLargest()
  }

  /// Also of what is still used until fences that whoever takes it comes behind. Nobody is asked whether they are passed.
  ///
  /// - Returns: the range, and the fences of all of it: to be given back behind them, if nothing has come behind them since.
  mutating func take(
    _ byteCount: Int64, from end: HoleList.End = .low, behind isBehind: (any ReuseFence) -> Bool
  ) -> (range: Range<Int64>, fences: [any ReuseFence])? {
    let split = used.partition { $0.fences.allSatisfy(isBehind) }
    let lent = used[split...]
    used.removeSubrange(split...)
    for lent in lent { holes.give(lent.range) }
    let taken = holes.take(byteCount, from: end)
    var fences: [any ReuseFence] = []
    for lent in lent {
      let overlap = lent.range.clamped(to: taken ?? 0..<0)
      if !overlap.isEmpty { fences += lent.fences }
      // What is left of it is used as before.
      let (begin, end) = (lent.range.lowerBound, lent.range.upperBound)
      let rest = overlap.isEmpty ? [lent.range] : [begin..<overlap.lowerBound, overlap.upperBound..<end]
      for range in rest where !range.isEmpty {
        holes.remove(range)
        used.append(Used(range: range, fences: lent.fences))
      }
    }
    return taken.map { ($0, fences) }
  }

  mutating func hole(endingAt end: Int64) -> Range<Int64>? { holes.hole(endingAt: end) }

  private mutating func reclaim() {
    if used.isEmpty { return }
    used.removeAll { used in
      if !used.fences.allSatisfy(\.isPassed) { return false }
      holes.give(used.range)
      return true
    }
  }
}
