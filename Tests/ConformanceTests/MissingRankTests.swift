import Conformance
import Glibc
import SwiftEP
import Testing

extension ConformanceTests {
  /// Ranks that do not come, or come too late.
  @Suite struct MissingRankTests {
    private static let timeout = Duration.milliseconds(300)

    /// Whoever calls learns in time who is missing, and from then on that the buffer is lost.
    @Test(arguments: [0, 1, 2], [(false, Waiting.workers), (true, .workers), (true, .stream)])
    func aRankThatNeverCalls(missing: Int, how: (isAsynchronous: Bool, waiting: Waiting)) throws {
      let job = smallJob().with { $0.isAsynchronous = how.isAsynchronous }
      let reports = try onEachRank(try job.makePlan(), timeout: Self.timeout) { buffer in
        if buffer.rank == missing {
          // Alive, and not calling, until the others have given up.
          usleep(600_000)
          return [EPError]()
        }
        let clock = ContinuousClock()
        let begin = clock.now
        var options = job.dispatchOptions
        options.waiting = how.waiting
        let first = try error { () throws(EPError) in try job.dispatch(on: buffer, options: options).event.wait() }
        let elapsed = clock.now - begin
        // Who gives up first tells the others.
        try require(elapsed >= Self.timeout / 2, "gave up after \(elapsed)")
        try require(elapsed < .seconds(5), "gave up only after \(elapsed)")
        let later = try error { () throws(EPError) in try job.dispatch(on: buffer).event.wait() }
        return [first, later]
      }
      let expected = EPError.rankMissing(rank: missing, step: .exchange, because: .silent(Self.timeout))
      for (rank, errors) in reports.enumerated() where rank != missing {
        #expect(errors == [expected, .bufferLost(cause: expected)])
      }
    }

    /// A late rank finds everyone's beginning, but nobody who finishes with it: it was given up, and learns so at once.
    @Test func aRankThatComesTooLate() throws {
      let job = smallJob(rankCount: 2).with { $0.sizing = .worstCase }
      let errors = try onEachRank(try job.makePlan(), timeout: Self.timeout) { buffer in
        if buffer.rank == 1 { usleep(900_000) }
        let clock = ContinuousClock()
        let begin = clock.now
        let first = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) }
        if buffer.rank == 1 { try require(clock.now - begin < Self.timeout / 2, "waited for \(clock.now - begin)") }
        if buffer.rank == 0 { usleep(900_000) }
        return first
      }
      let expected = EPError.rankMissing(rank: 1, step: .exchange, because: .silent(Self.timeout))
      #expect(errors == [expected, expected])
    }

    /// The same in every other operation; that a buffer is closed is known at once.
    @Test(arguments: ["combine", "cached dispatch"], Waiting.allCases)
    func laterOperations(_ operation: String, waiting: Waiting) throws {
      let job = smallJob()
      let errors = try onEachRank(try job.makePlan(), timeout: .seconds(30)) { buffer -> EPError? in
        let result = try job.dispatch(on: buffer)
        if buffer.rank == 2 {
          buffer.close()
          return nil
        }
        let clock = ContinuousClock()
        let begin = clock.now
        let found = try error { () throws(EPError) in
          if operation == "combine" {
            var options = CombineOptions()
            options.waiting = waiting
            _ = try buffer.combine(result.rows, with: result.handle, options: options)
          } else {
            var options = job.dispatchOptions
            options.waiting = waiting
            _ = try job.dispatch(on: buffer, handle: result.handle, options: options)
          }
        }
        try require(clock.now - begin < .seconds(10), "learnt it after \(clock.now - begin)")
        return found
      }
      let expected = EPError.rankMissing(rank: 2, step: .exchange, because: .closed)
      #expect(errors[..<2] == [expected, expected])
    }

    /// Rows that are never ready: the rank itself is the missing one, and says so to itself.
    @Test func anEventThatNeverComes() throws {
      let job = smallJob(rankCount: 2).with { ($0.sizing, $0.isAsynchronous) = (.worstCase, true) }
      let errors = try onEachRank(try job.makePlan(), timeout: Self.timeout) { buffer in
        var options = job.dispatchOptions
        if buffer.rank == 1 { options.after = [Event()] }
        let result = try job.dispatch(on: buffer, options: options)
        return try error { () throws(EPError) in try result.event.wait() }
      }
      let missing = EPError.rankMissing(rank: 1, step: .exchange, because: .silent(Self.timeout))
      let own = EPError.rankMissing(rank: 1, step: .input, because: .silent(Self.timeout))
      // Whoever's time is over first tells the other.
      #expect(errors[0] == missing || errors[0] == own)
      #expect(errors[1] == .bufferLost(cause: own))
    }

    /// A lost buffer still closes, and its results stay readable.
    @Test func aLostBufferKeepsItsResults() throws {
      let job = smallJob(rankCount: 2)
      let kept = try onEachRank(try job.makePlan(), timeout: Self.timeout) { buffer in
        let result = try job.dispatch(on: buffer)
        let before = result.bytes
        if buffer.rank == 0 { _ = try error { () throws(EPError) in _ = try job.dispatch(on: buffer) } }
        if buffer.rank == 1 { usleep(600_000) }
        buffer.close()
        return result.bytes == before
      }
      #expect(kept == [true, true])
    }
  }
}
