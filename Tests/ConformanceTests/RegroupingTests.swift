import CPlatform
import Conformance
import Foundation
import HostMachine
import SwiftEP
import Testing

extension ConformanceTests {
  /// Groups that change, and what else may come to their sockets. Ranks are threads that reach each other as processes
  /// do.
  @Suite struct RegroupingTests {
    private static func communicator(_ rank: Int, _ meeting: Meeting) throws -> Communicator {
      try Communicator.processes(rank: rank, rankCount: meeting.count, timeout: .seconds(30)) { bytes in
        try meeting.gather(bytes, from: rank)
      }
    }

    /// One checked dispatch among the ranks of `communicator`.
    private static func work(_ communicator: Communicator) throws {
      let job = smallJob(rankCount: communicator.rankCount)
      let buffer = try TestBuffer(communicator, plan: try job.makePlan(), workers: 1, timeout: .seconds(30))
      defer { buffer.close() }
      try job.checkDispatch(on: buffer)
      // Nobody closes before all have theirs.
      _ = try job.dispatch(on: buffer, step: 1)
    }

    /// Who does not know the secret, says nothing or nonsense, is not noticed by the ranks.
    @Test func strangersAreDropped() throws {
      let meeting = Meeting(count: 3)
      let strangers = Guarded<[Int32]>([])
      try inParallel(3) { rank in
        let communicator = try Communicator.processes(rank: rank, rankCount: 3, timeout: .seconds(30)) { bytes in
          let cards = try meeting.gather(bytes, from: rank)
          let names = try cards.map { try JSONDecoder().decode(SocketName.self, from: Data($0)).socketName }
          for (index, name) in names.enumerated() {
            let socket = swiftep_connect_abstract(name)
            try require(socket >= 0, "no connection to \(name)")
            var random = SplitMix64(seed: UInt64(rank), index)
            let nonsense = (0..<random.pick(0...300)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            if !nonsense.isEmpty { _ = swiftep_send(socket, nonsense, nonsense.count, -1) }
            strangers.withLock { $0.append(socket) }
          }
          return cards
        }
        try Self.work(communicator)
      }
      for socket in strangers.withLock({ $0 }) { close(socket) }
    }

    private struct SocketName: Decodable { let socketName: String }

    /// A rank lets go of its group; the others go on without it, in order.
    @Test(arguments: [0, 1, 2])
    func shrinking(gone: Int) throws {
      let meeting = Meeting(count: 3)
      let places = try valuesInParallel(3) { rank in
        let communicator = try Self.communicator(rank, meeting)
        if rank == gone { return [rank, -1, -1] }
        let next = try communicator.shrink(timeout: .seconds(30))
        try Self.work(next)
        return [next.generation, next.rank, next.rankCount]
      }
      let others = (0..<3).filter { $0 != gone }
      for (rank, old) in others.enumerated() { #expect(places[old] == [1, rank, 2]) }
    }

    /// Newcomers become the last ranks, one after another; when nobody comes, all learn the same.
    @Test func joining() throws {
      let meeting = Meeting(count: 2)
      let joins = [Meeting(count: 2), Meeting(count: 2)]
      let counts = try valuesInParallel(4) { thread in
        var communicator: Communicator
        if thread < 2 {
          communicator = try Self.communicator(thread, meeting)
        } else {
          communicator = try Communicator.join { try joins[thread - 2].gather($0, from: 1) }
        }
        while communicator.rankCount < 4 {
          let next = joins[communicator.rankCount - 2]
          communicator = try communicator.admit { try next.gather($0, from: 0) }.communicator
        }
        try Self.work(communicator)
        struct Nobody: Error {}
        let (last, refusal) = try communicator.admit { _ in throw Nobody() }
        try require(refusal == .rendezvousFailed("Nobody()"), "\(refusal.map { "\($0)" } ?? "no refusal")")
        try Self.work(last)
        return last.rank
      }
      #expect(counts == [0, 1, 2, 3])
    }

    /// Threads of one process take nobody in.
    @Test func threadsAdmitNobody() throws {
      let communicator = try Communicator.threads(rankCount: 1)[0]
      let found = try error { () throws(EPError) in _ = try communicator.admit { [$0] } }
      #expect(
        found
          == .invalidArgument(
            rank: 0, argument: "communicator", expected: "one of processes", found: "one of threads"))
    }

    /// A rank that is alive but does not come is left out, and told so.
    @Test func theSilentAreLeftOut() throws {
      let meeting = Meeting(count: 3)
      let doneCount = Guarded(0)
      let ranks = try valuesInParallel(3) { rank in
        let communicator = try Self.communicator(rank, meeting)
        let deadline = monotonicNow() &+ 60_000_000_000
        while rank == 1 && doneCount.withLock({ $0 }) < 2 && monotonicNow() < deadline { usleep(1000) }
        defer { doneCount.withLock { $0 += 1 } }
        do {
          let next = try communicator.shrink(timeout: .seconds(2))
          try Self.work(next)
          return next.rank
        } catch {
          guard case .rankMissing(let rank, .regrouping, .silent)? = error as? EPError, rank == 1 else { throw error }
          return -1
        }
      }
      #expect(ranks == [0, -1, 1])
    }
  }
}
