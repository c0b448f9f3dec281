import Glibc

/// What a launcher does about ranks that end, signals that come and time that passes: a state machine without processes
/// or a clock of its own. Times are nanoseconds.
///
/// A rank has ended when its program has; it is *gone* when nothing of its process group is left. What a program leaves
/// behind in its group is ended as the rank of a failed job would be: SIGTERM, and SIGKILL after the grace time.
struct Supervision {
  enum Action: Equatable {
    /// To the rank's process group.
    case send(Int32, rank: Int)
    case say(String)
  }

  private enum Phase: Equatable {
    case running
    /// Has got a signal to end by; is killed at the deadline.
    case ending(deadline: UInt64)
    /// Has got SIGKILL; nothing more can be done at the deadline.
    case killed(deadline: UInt64)
    case gone
    /// Could not be killed.
    case abandoned
  }

  /// The signals by which a user or a system ends a job; passed on, then escalated.
  static let endingSignals = [SIGINT, SIGTERM, SIGHUP, SIGQUIT]
  /// Passed on, and nothing else.
  static let otherSignals = [SIGUSR1, SIGUSR2, SIGCONT, SIGTSTP]
  /// What SIGKILL may take: a process that writes a core, or waits for a disk.
  static let killPatience: UInt64 = 10_000_000_000

  private let grace: UInt64
  private let keepsGoing: Bool
  private var phases: [Phase]
  private var ends: [RankEnd?]
  /// When those that are left of a failed job are ended.
  private var endOfGrace: UInt64?
  private var wasSignalled = false
  /// The first rank that failed.
  private(set) var failure: RankFailure?

  init(rankCount: Int, grace: UInt64, keepsGoing: Bool) {
    self.grace = grace
    self.keepsGoing = keepsGoing
    phases = Array(repeating: .running, count: rankCount)
    ends = Array(repeating: nil, count: rankCount)
  }

  // MARK: State

  /// Whether nothing is left to supervise.
  var isOver: Bool { phases.allSatisfy { $0 == .gone || $0 == .abandoned } }

  /// When `timePassed` is to be called at the latest.
  var deadline: UInt64? {
    let own = phases.compactMap { phase -> UInt64? in
      switch phase {
      case .ending(let deadline), .killed(let deadline): deadline
      default: nil
      }
    }
    return (own + (endOfGrace.map { [$0] } ?? [])).min()
  }

  /// Whether the rank's program has ended, and something of its group may be left.
  func isLingering(_ rank: Int) -> Bool {
    ends[rank] != nil && phases[rank] != .gone && phases[rank] != .abandoned
  }

  // MARK: Events

  /// The rank's program has ended; `isGone`: with all of its group.
  mutating func ended(_ rank: Int, _ end: RankEnd, isGone: Bool, now: UInt64) -> [Action] {
    ends[rank] = end
    let wasRunning = phases[rank] == .running
    var actions: [Action] = []
    if isGone {
      phases[rank] = .gone
    } else if wasRunning {
      actions += endGroup(rank, by: SIGTERM, now)
    }
    guard end.isFailure else { return actions }
    let isFirst = failure == nil
    if isFirst { failure = RankFailure(rank: rank, end: end, failureCount: 0) }
    // Those that have been told to end do so.
    if !wasRunning { return actions }
    failure!.failureCount += 1
    var sentence = "rank \(rank) \(end)"
    let runningCount = phases.count { $0 == .running }
    // Said at the end, which this is.
    if isFirst && present.isEmpty { return actions }
    if isFirst && runningCount > 0 && !keepsGoing && !wasSignalled {
      endOfGrace = now &+ grace
      sentence += "; the others have \(seconds(grace)) to end by themselves"
    }
    return actions + [.say(sentence)]
  }

  /// Nothing is left of the group of a rank that has ended.
  mutating func left(_ rank: Int) { phases[rank] = .gone }

  /// The launcher has got a signal.
  mutating func received(_ signal: Int32, now: UInt64) -> [Action] {
    guard Self.endingSignals.contains(signal) else {
      return present.map { .send(signal, rank: $0) }
    }
    if wasSignalled { return [.say("\(signalName(signal)): killing what is left")] + kill(present, now) }
    wasSignalled = true
    endOfGrace = nil
    let running = phases.indices.filter { phases[$0] == .running }
    let sentence = "\(signalName(signal)): passed on; what is left in \(seconds(grace)), or at another one, is killed"
    return [.say(sentence)] + running.flatMap { endGroup($0, by: signal, now) }
  }

  mutating func timePassed(now: UInt64) -> [Action] {
    var actions: [Action] = []
    if let endOfGrace, endOfGrace <= now {
      self.endOfGrace = nil
      let running = phases.indices.filter { phases[$0] == .running }
      if !running.isEmpty { actions.append(.say("ending \(names(running))")) }
      actions += running.flatMap { endGroup($0, by: SIGTERM, now) }
    }
    var stubborn: [Int] = []
    for rank in phases.indices {
      if case .ending(let deadline) = phases[rank], deadline <= now { stubborn.append(rank) }
      if case .killed(let deadline) = phases[rank], deadline <= now {
        phases[rank] = .abandoned
        actions.append(.say("rank \(rank) cannot be killed"))
      }
    }
    if !stubborn.isEmpty { actions.append(.say("killing \(names(stubborn))")) }
    return actions + kill(stubborn, now)
  }

  /// Kills everything: the job is not to be.
  mutating func giveUp(now: UInt64) -> [Action] { kill(present, now) }

  // MARK: Parts

  private var present: [Int] { phases.indices.filter { phases[$0] != .gone && phases[$0] != .abandoned } }

  private mutating func endGroup(_ rank: Int, by signal: Int32, _ now: UInt64) -> [Action] {
    phases[rank] = .ending(deadline: now &+ grace)
    // A stopped process takes nothing but SIGKILL.
    return [.send(signal, rank: rank), .send(SIGCONT, rank: rank)]
  }

  private mutating func kill(_ ranks: [Int], _ now: UInt64) -> [Action] {
    for rank in ranks {
      if case .killed = phases[rank] { continue }
      phases[rank] = .killed(deadline: now &+ Self.killPatience)
    }
    return ranks.map { .send(SIGKILL, rank: $0) }
  }

  private func names(_ ranks: [Int]) -> String {
    (ranks.count == 1 ? "rank " : "ranks ") + ranks.map(String.init).joined(separator: ", ")
  }

  private func seconds(_ nanoseconds: UInt64) -> String {
    let value = Double(nanoseconds) / 1e9
    return (value == value.rounded() ? value.rounded(toPlaces: 0) : value.rounded(toPlaces: 1)) + " s"
  }
}
