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

  /// Who waits for the leader's decision loses patience with the leader only when it has waited for that.
  @Test func patienceBeginsAnew() {
    let ids = (0..<3).map { MemberID(100 + $0) }
    var member = Regrouping(own: ids[2], members: ids)
    member.begin()
    member.receive(.report(absent: []), from: ids[0])
    let knowledge = member.knowledge
    member.receive(.report(absent: [ids[1]]), from: ids[0])
    member.losePatience(since: knowledge)
    #expect(member.absent == [ids[1]])
    member.losePatience(since: member.knowledge)
    #expect(member.absent == [ids[0], ids[1]])
  }
}
