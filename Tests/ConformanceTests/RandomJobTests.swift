import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  @Suite struct RandomJobTests {
    @Test(arguments: UInt64(1)...24)
    func agreesWithTheOracle(seed: UInt64) throws {
      try check(Job.random(seed: seed), on: fabric)
    }

    @Test func verifiesUntilTheTimeIsOver() throws {
      var reported: [Int] = []
      let passed = try verify(seconds: 0.2, seed: 1000, on: fabric) { _, count in reported.append(count) }
      #expect(passed > 0)
      #expect(reported == Array(1...passed))
    }

    @Test func jobsFollowFromTheirSeeds() {
      #expect(Job.random(seed: 5) == Job.random(seed: 5))
      #expect(Job.random(seed: 5) != Job.random(seed: 6))
      #expect(Job.random(seed: 5, ranks: 12).rankCount == 12)
      let job = Job.random(seed: 9)
      let (first, second) = (job.makeTokens(rank: 0), job.makeTokens(rank: 0))
      #expect(first.x.bytes == second.x.bytes)
    }
  }
}
