import Conformance
import HostFacts
import HostMachine
import Testing

@testable import SwiftEP

extension ConformanceTests {
  @Suite struct MemoryNeedTests {
    private func need(_ byteCount: Int64, _ domains: (String, Int64)...) -> MemoryNeed {
      MemoryNeed(
        neededByteCount: byteCount, domains: domains.map { MemoryNeed.Domain(name: $0.0, availableByteCount: $0.1) })
    }

    @Test func enough() throws {
      try MemoryNeed.check([])
      try MemoryNeed.check([nil, need(1000)])
      try MemoryNeed.check([need(100, ("host", 200)), need(100, ("host", 200))])
      try MemoryNeed.check([need(100, ("host", 200), ("a", 100)), need(100, ("host", 200), ("b", 100))])
    }

    /// Ranks that share a limit have to fit into it together.
    @Test func tooMuchTogether() {
      #expect(throws: EPError.outOfMemory(rank: 0, neededByteCount: 201, availableByteCount: 200)) {
        try MemoryNeed.check([need(100, ("host", 200)), need(101, ("host", 200))])
      }
      #expect(throws: EPError.outOfMemory(rank: 1, neededByteCount: 300, availableByteCount: 250)) {
        try MemoryNeed.check([
          need(500, ("host", 1000), ("a", 500)), need(100, ("host", 1000), ("b", 250)), nil,
          need(200, ("host", 1000), ("b", 260)),
        ])
      }
    }

    /// The first that does not fit is named, the limit that the others share notwithstanding.
    @Test func eachLimitCounts() {
      #expect(throws: EPError.outOfMemory(rank: 0, neededByteCount: 11, availableByteCount: 10)) {
        try MemoryNeed.check([need(11, ("host", 1000), ("group", 100), ("outer", 10))])
      }
      #expect(throws: EPError.outOfMemory(rank: 0, neededByteCount: 1, availableByteCount: 0)) {
        try MemoryNeed.check([need(1, ("host", 0))])
      }
    }

    /// What this host cannot give is refused on all ranks alike, before any is taken.
    @Test(arguments: [true, false])
    func thisHostsMemory(areProcesses: Bool) throws {
      let host = try #require(FileTree.host.memoryLimits.first)
      let rowByteCount: Int64 = 1 << 14
      let shape = JobShape(
        rankCount: 2, tokensPerRankMax: Int(2 * host.byteCount / rowByteCount), hidden: Int(rowByteCount / 2), topK: 1,
        expertCount: 2, dtype: .fp32)
      let plan = try ExpertBuffer.Plan(shape, receivedTokensMax: 1)
      #expect(plan.byteCount >= 2 * host.byteCount)
      let errors = Guarded<[EPError?]>([nil, nil])
      let meeting = Meeting(count: 2)
      let threads = areProcesses ? nil : try Communicator.threads(rankCount: 2)
      try inParallel(2) { rank in
        let communicator =
          try threads?[rank]
          ?? Communicator.processes(rank: rank, rankCount: 2) { try meeting.gather($0, from: rank) }
        do {
          _ = try TestBuffer(communicator, plan: plan)
        } catch let error as EPError {
          errors.withLock { $0[rank] = error }
        }
      }
      let found = errors.withLock { $0 }
      #expect(found[0] == found[1])
      guard case .outOfMemory(rank: 0, let needed, let available) = found[0] else {
        Issue.record("\(String(describing: found[0]))")
        return
      }
      #expect(needed >= 2 * plan.byteCount && available < host.byteCount)
    }
  }
}
