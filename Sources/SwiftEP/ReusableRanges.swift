import Arena
import EPKernels

/// What has to happen before memory can be used again.
package protocol ReuseFence: AnyObject, Sendable {
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
  /// Of a buffer's device, and of no other ever.
  let device: UInt64
  /// Of the call; as long as its buffer is there, the stream is, and no other has its handle.
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
    if fences.isEmpty || range.isEmpty { holes.give(range) } else { used.append(Used(range: range, fences: fences)) }
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

  /// A range of that size, as calls that repeat each other leave it, that is used until fences that the order's launches come
  /// behind. Nobody is asked whether they are passed.
  ///
  /// - Returns: with the fences, which it is to be given back behind where nothing has come behind them since.
  mutating func take(
    _ byteCount: Int64, for order: LaunchOrder
  ) -> (range: Range<Int64>, fences: [any ReuseFence])? {
    let size = HoleList.roundUp(byteCount)
    let index = used.firstIndex { used in
      Int64(used.range.count) == size && used.fences.allSatisfy { $0.comesBefore(order) }
    }
    return index.map { index in
      let taken = used.remove(at: index)
      return (taken.range, taken.fences)
    }
  }

  /// Also of all that is used, by who waits for the fences, as above.
  mutating func takeUsed(
    _ byteCount: Int64, from end: HoleList.End = .low
  ) -> (range: Range<Int64>, fences: [any ReuseFence])? {
    let lent = used
    used = []
    for lent in lent { holes.give(lent.range) }
    let taken = holes.take(byteCount, from: end)
    var fences: [any ReuseFence] = []
    for lent in lent {
      let overlap = lent.range.clamped(to: taken ?? 0..<0)
      if !overlap.isEmpty {
        // Parts of one range have the same ones.
        fences += lent.fences.filter { fence in !fence.isPassed && !fences.contains { $0 === fence } }
      }
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
