import Glibc
import Testing

@testable import swiftep

@Suite struct SupervisionTests {
  private let second: UInt64 = 1_000_000_000

  private func supervision(_ count: Int, keepsGoing: Bool = false) -> Supervision {
    Supervision(rankCount: count, grace: 5 * second, keepsGoing: keepsGoing)
  }

  private func signals(_ actions: [Supervision.Action]) -> [Supervision.Action] {
    actions.filter { if case .send = $0 { true } else { false } }
  }

  private func sends(_ signal: Int32, to ranks: Int...) -> [Supervision.Action] {
    ranks.flatMap { rank -> [Supervision.Action] in
      signal == SIGKILL
        ? [.send(signal, rank: rank)] : [.send(signal, rank: rank), .send(SIGCONT, rank: rank)]
    }
  }

  @Test func allEndWell() {
    var job = supervision(2)
    #expect(job.ended(1, .exited(code: 0), isGone: true, now: 0) == [])
    #expect(!job.isOver && job.deadline == nil)
    #expect(job.ended(0, .exited(code: 0), isGone: true, now: second) == [])
    #expect(job.isOver && job.failure == nil)
  }

  @Test func theRestHasTheGraceTimeTwice() {
    var job = supervision(3)
    let actions = job.ended(1, .exited(code: 4), isGone: true, now: second)
    #expect(actions == [.say("rank 1 exited with code 4; the others have 5 s to end by themselves")])
    #expect(job.deadline == 6 * second)
    #expect(job.timePassed(now: 6 * second - 1) == [])
    #expect(signals(job.timePassed(now: 6 * second)) == sends(SIGTERM, to: 0, 2))
    #expect(job.ended(0, .signalled(SIGTERM, dumpedCore: false), isGone: true, now: 7 * second) == [])
    #expect(job.deadline == 11 * second)
    #expect(job.timePassed(now: 11 * second) == [.say("killing rank 2"), .send(SIGKILL, rank: 2)])
    #expect(!job.isOver)
    #expect(job.ended(2, .signalled(SIGKILL, dumpedCore: false), isGone: true, now: 11 * second) == [])
    #expect(job.isOver)
    #expect(job.failure == RankFailure(rank: 1, end: .exited(code: 4), failureCount: 1))
  }

  @Test func whatCannotBeKilledIsLeft() {
    var job = supervision(1)
    #expect(signals(job.received(SIGTERM, now: 0)) == sends(SIGTERM, to: 0))
    #expect(signals(job.timePassed(now: 5 * second)) == sends(SIGKILL, to: 0))
    #expect(job.timePassed(now: 5 * second + Supervision.killPatience) == [.say("rank 0 cannot be killed")])
    #expect(job.isOver && job.deadline == nil)
  }

  @Test func aProgramThatLeavesSomethingBehind() {
    var job = supervision(2)
    #expect(job.ended(0, .exited(code: 0), isGone: false, now: 0) == sends(SIGTERM, to: 0))
    #expect(job.isLingering(0) && !job.isLingering(1))
    #expect(job.timePassed(now: 5 * second) == [.say("killing rank 0"), .send(SIGKILL, rank: 0)])
    job.left(0)
    #expect(!job.isLingering(0) && !job.isOver)
    #expect(job.ended(1, .exited(code: 0), isGone: true, now: 6 * second) == [])
    #expect(job.isOver && job.failure == nil)
  }

  @Test func keepGoing() {
    var job = supervision(3, keepsGoing: true)
    #expect(
      job.ended(2, .signalled(SIGSEGV, dumpedCore: true), isGone: true, now: 0) == [
        .say("rank 2 was ended by SIGSEGV (core dumped)")
      ])
    #expect(job.deadline == nil)
    #expect(job.timePassed(now: 100 * second) == [])
    #expect(job.ended(0, .exited(code: 9), isGone: true, now: second) == [.say("rank 0 exited with code 9")])
    #expect(job.ended(1, .exited(code: 0), isGone: true, now: second) == [])
    #expect(job.failure?.end.code == 139 && job.failure?.rank == 2 && job.failure?.failureCount == 2)
  }

  @Test func signals() {
    var job = supervision(2)
    #expect(job.received(SIGUSR1, now: 0) == [.send(SIGUSR1, rank: 0), .send(SIGUSR1, rank: 1)])
    #expect(signals(job.received(SIGINT, now: 0)) == sends(SIGINT, to: 0, 1))
    // By the signal: nothing to speak of, and no further grace.
    #expect(job.ended(0, .signalled(SIGINT, dumpedCore: false), isGone: true, now: 0) == [])
    #expect(job.deadline == 5 * second)
    #expect(signals(job.received(SIGTERM, now: 1)) == sends(SIGKILL, to: 1))
    #expect(job.failure?.end.code == 130)
  }

  /// A signal in the grace time does not wait for its end.
  @Test func aSignalAfterAFailure() {
    var job = supervision(2)
    _ = job.ended(0, .exited(code: 1), isGone: true, now: 0)
    #expect(signals(job.received(SIGINT, now: second)) == sends(SIGINT, to: 1))
    #expect(job.deadline == 6 * second)
    #expect(signals(job.timePassed(now: 5 * second)) == [])
    #expect(signals(job.timePassed(now: 6 * second)) == sends(SIGKILL, to: 1))
  }

  @Test func giveUp() {
    var job = supervision(3)
    job.left(2)
    #expect(job.giveUp(now: 0) == sends(SIGKILL, to: 0, 1))
  }

  @Test func lines() {
    var tagger = LineTagger(rank: 12)
    #expect(tagger.tagged(Array("one\ntw".utf8)[...]) == Array("[12] one\n".utf8))
    #expect(tagger.tagged(Array("o\n\nthree".utf8)[...]) == Array("[12] two\n[12] \n".utf8))
    #expect(tagger.rest() == Array("[12] three\n".utf8))
    #expect(tagger.rest().isEmpty)
    let endless = [UInt8](repeating: 65, count: LineTagger.lineByteCountMax)
    #expect(tagger.tagged(endless[...]).count == endless.count + 6)
  }
}
