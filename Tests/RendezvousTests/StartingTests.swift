import Conformance
import Glibc
import SwiftEP
import Testing

/// Communicators that start by a rendezvous. The ranks are threads that reach each other as processes do.
@Suite(.serialized) struct StartingTests {
  /// Each test's own.
  let token: JobToken
  let point: MeetingPoint

  init() throws {
    token = try JobToken.random()
    point = try MeetingPoint(token: token)
  }

  func environment(rank: Int, of count: Int) -> [String: String] {
    ["SWIFTEP_RANK": "\(rank)", "SWIFTEP_RANK_COUNT": "\(count)", "SWIFTEP_TOKEN": token.secretText]
  }

  /// A dispatch and a combine: each rank's one token goes to all ranks, and comes back as their sum.
  static func work(with communicator: Communicator) throws(EPError) -> [Float] {
    let count = communicator.rankCount
    let shape = JobShape(rankCount: count, tokensPerRankMax: 1, hidden: 8, topK: count, expertCount: count)
    let buffer = try ExpertBuffer(communicator, plan: try ExpertBuffer.Plan(shape))
    defer { buffer.close() }
    let x = try Tensor(copying: [Float](repeating: Float(communicator.rank + 1), count: 8), shape: [1, 8], .fp32)
    let indices = try Tensor(copying: (0..<count).map { Int64($0) }, shape: [1, count], .int64)
    let received = try buffer.dispatch(x, to: .topK(indices: indices))
    return try buffer.combine(received.rows, with: received.handle).tokens.elements(Float.self)
  }

  @Test(arguments: [1, 2, 4])
  func fromEnvironment(count: Int) throws {
    let results = outcomes(count) { [self] rank throws(EPError) in
      let communicator = try Communicator.fromEnvironment(environment(rank: rank, of: count), timeout: .seconds(60))
      guard communicator.rank == rank, communicator.rankCount == count else { throw .bufferClosed }
      return try Self.work(with: communicator)
    }
    for (rank, result) in results.enumerated() {
      #expect(result == .success([Float](repeating: Float(count * (rank + 1)), count: 8)))
    }
  }

  /// The listener goes, the others go on, and somebody new comes in its place; then that happens again.
  @Test func replacements() throws {
    let results = outcomes(5) { [self] number throws(EPError) -> [Float] in
      var communicator: Communicator
      if number < 3 {
        communicator = try .processes(rank: number, rankCount: 3, at: point, timeout: .seconds(60))
        // Its communicator goes with it.
        if number == 0 { return [] }
      } else {
        // Both are there from the beginning: they are told that the group starts yet, and one that the other joins.
        while true {
          do throws(EPError) {
            communicator = try .joinFromEnvironment(["SWIFTEP_TOKEN": token.secretText], timeout: .seconds(60))
            break
          } catch {
            guard case .rendezvousFailed(let why) = error, why.contains("the only one") || why.contains("to start")
            else {
              throw error
            }
            usleep(20_000)
          }
        }
      }
      while communicator.rankCount < 4 || communicator.generation < 2 {
        let (next, refusal) = try communicator.admit(timeout: .seconds(60))
        if let refusal { throw refusal }
        communicator = next
      }
      return try Self.work(with: communicator)
    }
    for (number, result) in results.enumerated() {
      if case .failure(let error) = result { Issue.record("process \(number): \(error)") }
    }
    #expect(results[0] == .success([]))
    let sums = try results.dropFirst().map { try $0.get()[0] }
    #expect(Array(sums[..<2]) == [4, 8])
    #expect(sums[2...].sorted() == [12, 16])
  }

  @Test func nobodyToAdmitAndNobodyToJoin() throws {
    let results = outcomes(2) { [self] rank throws(EPError) -> EPError? in
      let communicator = try Communicator.processes(rank: rank, rankCount: 2, at: point, timeout: .seconds(60))
      let (next, refusal) = try communicator.admit(timeout: .milliseconds(700))
      guard next.rankCount == 2 else { throw .bufferClosed }
      _ = try Self.work(with: next)
      return refusal
    }
    let absent = EPError.rankMissing(rank: 2, step: .regrouping, because: .silent(.milliseconds(700)))
    #expect(results == [.success(absent), .success(absent)])
    let alone = EPError.rankMissing(rank: 0, step: .regrouping, because: .silent(.milliseconds(300)))
    #expect(throws: alone) { try Communicator.join(at: point, timeout: .milliseconds(300)) }
  }

  @Test func errorsNameRanks() throws {
    let results = outcomes(3) { [self] number throws(EPError) -> Int in
      // Rank 1 does not come, rank 3 is wrong about the number of ranks.
      let (rank, count) = [(0, 4), (2, 4), (3, 5)][number]
      return try Communicator.processes(rank: rank, rankCount: count, at: point, timeout: .seconds(2)).rank
    }
    let missing = EPError.rankMissing(rank: 1, step: .setup, because: .silent(.seconds(2)))
    #expect(results[0] == .failure(missing) && results[1] == .failure(missing))
    #expect(results[2] == .failure(.ranksDisagree(about: "the number of ranks", rank: 3, expected: "4", found: "5")))
  }

  @Test func arguments() throws {
    let wrongRank = EPError.invalidArgument(rank: 2, argument: "rank", expected: "one of 0..<2", found: "2")
    #expect(throws: wrongRank) { try Communicator.processes(rank: 2, rankCount: 2, at: point) }
    let tooMany = EPError.invalidArgument(rank: -1, argument: "rankCount", expected: "at most 4096", found: "4097")
    #expect(throws: tooMany) { try Communicator.processes(rank: 2, rankCount: 4097, at: point) }
    let noVariable = EPError.invalidArgument(
      rank: -1, argument: "SWIFTEP_RANK_COUNT", expected: "an integer of 1 to 4096", found: "none")
    #expect(throws: noVariable) { try Communicator.fromEnvironment(["SWIFTEP_RANK": "0"]) }
    let noToken = #expect(throws: EPError.self) { try Communicator.joinFromEnvironment([:]) }
    #expect(noToken?.description.contains("export SWIFTEP_TOKEN=$(swiftep token)") == true)
    #expect(throws: EPError.self) { try MeetingPoint(token: token, address: "nowhere") }
    #expect(throws: EPError.self) { try JobToken("short") }
    #expect(throws: EPError.self) { try JobToken(contentsOfFile: "/dev/null") }
    #expect(try JobToken(" \(token.secretText)\n") == token)
  }

  @Test func tokensDoNotPrintThemselves() {
    var dumped = ""
    dump(token, to: &dumped)
    dump(point, to: &dumped)
    for text in ["\(token)", String(reflecting: token), "\(point)", dumped] {
      #expect(!text.contains(token.secretText) && !text.contains(token.secretText.prefix(8)))
    }
    #expect("\(token)" == "(secret)")
  }
}
