import Arena
import EPKernels

/// What has to happen before memory can be used again.
package protocol ReuseFence: Sendable {
  /// Cheap only where launches do not come behind it anyway.
  var isPassed: Bool { get }
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
  private var used: [(range: Range<Int64>, fence: any ReuseFence)] = []

  mutating func give(_ range: Range<Int64>, behind fence: (any ReuseFence)? = nil) {
    if let fence { used.append((range, fence)) } else { holes.give(range) }
  }

  /// - Parameter order: of the launches that are the first to use it; nil: others use it.
  mutating func take(
    _ byteCount: Int64, from end: HoleList.End = .low, for order: LaunchOrder? = nil
  ) -> Range<Int64>? {
    reclaim(for: order)
    return holes.take(byteCount, from: end)
  }

  mutating func takeLargest(for order: LaunchOrder? = nil) -> Range<Int64> {
    reclaim(for: order)
    return holes.takeLargest()
  }

  mutating func hole(endingAt end: Int64) -> Range<Int64>? { holes.hole(endingAt: end) }

  private mutating func reclaim(for order: LaunchOrder?) {
    if used.isEmpty { return }
    used.removeAll { range, fence in
      let isBehind = order.map { fence.comesBefore($0) } ?? false
      if !isBehind && !fence.isPassed { return false }
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
