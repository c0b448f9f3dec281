import Testing

@testable import SwiftEP

@Suite struct RegroupingTests {
  /// What must be true when nothing moves any more, however it came to that.
  @Test(arguments: 0..<20) func membersAreOfOneMind(_ part: Int) {
    var wholeCount = 0
    for seed in part * 1000..<(part + 1) * 1000 {
      var schedule = Schedule(seed: seed)
      guard schedule.run() else {
        Issue.record("seed \(seed): no end")
        continue
      }
      let members = schedule.members
      let remaining = members.filter { !$0.isGone && !$0.isStopped }
      for member in remaining {
        #expect(member.decision != nil, "seed \(seed): \(member.regrouping.own) has stopped without a decision")
        #expect(member.decision == remaining[0].decision, "seed \(seed): two decisions")
      }
      for (index, member) in members.enumerated() where !schedule.doubted.contains(index) {
        #expect(!member.isGone, "seed \(seed): \(member.regrouping.own) is out, whom nobody doubted")
      }
      // Nobody has gone on beside others: of two decisions, one at least is not all its members'.
      let decisions = members.compactMap(\.decision).filter { decision in
        members.filter { decision.members.contains($0.regrouping.own) }.allSatisfy { $0.decision == decision }
      }
      #expect(decisions.allSatisfy { $0 == decisions[0] }, "seed \(seed): two groups have gone on")
      if !decisions.isEmpty { wholeCount += 1 }
    }
    // Otherwise nothing was tested.
    #expect(wholeCount > 300)
  }
}
