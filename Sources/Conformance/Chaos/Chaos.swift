import Arena
import Glibc
import HostMachine
import SwiftEP

/// What a run of faults is made of.
package struct ChaosSettings: Sendable {
  package var rankCount: Int
  package var faultCount: Int
  package var seed: UInt64
  /// After which a silent rank is given up.
  package var timeout = Duration.milliseconds(1500)

  package init(rankCount: Int, faultCount: Int, seed: UInt64) {
    (self.rankCount, self.faultCount, self.seed) = (rankCount, faultCount, seed)
  }
}

/// Something that must not happen, whatever the faults.
package struct ChaosFailure: Error, CustomStringConvertible {
  package let fault: Int
  package let seed: UInt64
  package let what: String
  package var description: String { "fault \(fault) of seed \(seed): \(what)" }
}

/// Does harm to ranks at random moments while they work, and demands that all others learn who is missing, within the
/// deadline; that they go on without it, with right results; and that nothing is left behind.
package struct Chaos: ~Copyable {
  private let settings: ChaosSettings
  private var random: SplitMix64
  /// Those that nothing has happened to.
  private var members: [ChaosMember] = []
  private var processCount = 0
  private var report = ChaosSummary()

  package init(_ settings: ChaosSettings) {
    self.settings = settings
    random = SplitMix64(seed: settings.seed)
  }

  /// To be called in a process without other threads. `progress` is called with the number of faults so far.
  package mutating func run(progress: (Int) -> Void) throws -> ChaosSummary {
    try start()
    while report.faultCount < settings.faultCount {
      do {
        try round()
      } catch let error as ChaosFailure {
        throw error
      } catch {
        throw failure("\(error)")
      }
      progress(report.faultCount)
    }
    try end()
    return report
  }

  private func failure(_ what: String) -> ChaosFailure {
    let states = members.map(\.description).joined(separator: "\n  ")
    return ChaosFailure(fault: report.faultCount, seed: settings.seed, what: "\(what)\n  \(states)")
  }

  // MARK: Processes

  private mutating func makeMember() throws -> ChaosMember {
    processCount += 1
    let (seed, timeout) = (settings.seed, settings.timeout)
    let process = try ForkedProcess { channel in
      var rank = ChaosRank(channel, seed: seed, timeout: timeout)
      return rank.run()
    }
    return ChaosMember(processCount, process)
  }

  private mutating func start() throws {
    members = try (0..<settings.rankCount).map { _ in try makeMember() }
    for (rank, member) in members.enumerated() {
      try member.order(.start(rank: rank, rankCount: settings.rankCount))
    }
    try wait("start") { [rankCount = settings.rankCount] members in members.allSatisfy { $0.works(in: rankCount) } }
  }

  private mutating func end() throws {
    for member in members { try? member.order(.leave(closing: true)) }
    let deadline = monotonicNow() + 20_000_000_000
    for member in members {
      while monotonicNow() < deadline, member.process.wait(until: monotonicNow()) == nil {
        // One that has noticed others leave waits for what to do.
        if (try? member.receive(until: monotonicNow() + 10_000_000)) == true, case .failed = member.state {
          try? member.order(.leave(closing: true))
        }
      }
      let end = member.process.wait(until: deadline)
      guard end == .exit(code: 0) else {
        throw failure("process \(member.number) was to leave: \(end.map { "\($0)" } ?? "it did not")")
      }
    }
    members = []
    if waitpid(-1, nil, WNOHANG) != -1 || errno != ECHILD { throw failure("a process is left") }
  }

  // MARK: Faults

  private mutating func round() throws {
    var fault = ChaosFault.random(&random)
    if fault == .killTwo && members.count < 4 || fault == .killRegrouping && members.count < 4 { fault = .kill }
    if members.count < 3 && (fault == .descriptors || fault == .memory) { fault = .kill }
    // At any step of a job.
    usleep(UInt32(random.pick(0...12_000)))
    report.faultCount += 1
    switch fault {
    case .kill, .killRegrouping: try strike(fault, [removeVictim()])
    case .killTwo: try strike(fault, [removeVictim(), removeVictim()])
    case .exit, .close:
      let victim = removeVictim()
      try victim.order(.leave(closing: fault == .close))
      try settle(fault, since: monotonicNow(), victims: [victim])
    case .stop: try stop(removeVictim())
    case .descriptors, .memory: try starve(fault)
    }
  }

  private mutating func removeVictim() -> ChaosMember { members.remove(at: random.pick(0...members.count - 1)) }

  private mutating func strike(_ fault: ChaosFault, _ victims: [ChaosMember]) throws {
    let moment = monotonicNow()
    for victim in victims { victim.process.kill(SIGKILL) }
    try settle(fault, since: moment, victims: victims)
  }

  private mutating func stop(_ victim: ChaosMember) throws {
    let moment = monotonicNow()
    victim.process.kill(SIGSTOP)
    try settle(.stop, since: moment, victims: [victim]) {
      // Back when all others have given it up: it must notice, and end by itself.
      victim.process.kill(SIGCONT)
    }
    let deadline = monotonicNow() + 20_000_000_000
    while victim.process.wait(until: monotonicNow()) == nil {
      if monotonicNow() > deadline {
        throw failure("process \(victim.number) was stopped, and does not end: \(victim.state)")
      }
      if (try? victim.receive(until: monotonicNow() + 20_000_000)) != true { continue }
      if case .works = victim.state { continue }
      // It asks what to do: it tries to go on, and is told that it cannot.
      if case .failed = victim.state { try? victim.order(.shrink) }
    }
    while (try? victim.receive(until: 0)) == true {}
    guard case .out = victim.state, victim.process.wait(until: 0) == .exit(code: 0) else {
      throw failure("process \(victim.number) was given up, and found: \(victim.state)")
    }
  }

  /// A kill brings the others to make a new buffer; one of them may not take what it needs for that.
  private mutating func starve(_ fault: ChaosFault) throws {
    let victim = removeVictim()
    victim.process.kill(SIGKILL)
    let starved = random.pick(0...members.count - 1)
    let shortage: Shortage = fault == .memory ? .memory : .descriptors(spare: random.pick(0...3))
    try settle(fault, since: monotonicNow(), victims: [victim], starving: (members[starved], shortage))
  }

  // MARK: What must follow

  /// All others fail, naming no innocent rank, and go on together, until they work.
  private mutating func settle(
    _ fault: ChaosFault, since moment: UInt64, victims: [ChaosMember],
    starving: (member: ChaosMember, shortage: Shortage)? = nil, whenGivenUp: () -> Void = {}
  ) throws {
    var victims = victims
    var (isFirst, admits) = (true, false)
    var starved: ChaosMember?
    while true {
      try wait("to notice a \(fault.rawValue)") { members in
        let isSettled = members.allSatisfy { $0.works(in: members.count) } && members.haveOneGeneration
        return (isSettled && !isFirst) || members.allSatisfy { $0.hasFailed } && members.haveOneGeneration
      }
      if members.allSatisfy({ !$0.hasFailed }) { break }
      try checkErrors(starved: starved, isSilent: fault == .stop)
      if isFirst { whenGivenUp() }
      if isFirst, let starving {
        try starving.member.order(.starve(starving.shortage))
        starved = starving.member
      } else {
        starved = nil
      }
      admits = try regroup() || admits
      if isFirst && fault == .killRegrouping {
        usleep(UInt32(random.pick(0...6_000)))
        report.faultCount += 1
        let victim = removeVictim()
        victim.process.kill(SIGKILL)
        victims.append(victim)
      }
      isFirst = false
    }
    for victim in victims where fault != .stop {
      guard let end = victim.process.wait(until: monotonicNow() + 20_000_000_000) else {
        throw failure("process \(victim.number) does not end")
      }
      let isExpected =
        [.kill, .exit, .close].contains(fault) == false || end == (fault == .kill ? .signal(SIGKILL) : .exit(code: 0))
      if !isExpected { throw failure("process \(victim.number) ended with \(end)") }
    }
    let end = members.map(\.workedAt).max() ?? moment
    report.add(fault, nanoseconds: end &- moment, joined: admits)
  }

  /// Orders all to go on; in more than half of the cases with newcomers. Returns whether there are any.
  private mutating func regroup() throws -> Bool {
    let missing = settings.rankCount - members.count
    guard missing > 0 && (members.count < 3 || random.chance(0.6)) else {
      for member in members { try member.order(.shrink) }
      return false
    }
    let generation = members[0].place!.generation + missing
    for member in members { try member.order(.admit(untilGeneration: generation)) }
    for _ in 0..<missing {
      let member = try makeMember()
      try member.order(.join(untilGeneration: generation))
      member.isNew = true
      members.append(member)
    }
    return true
  }

  private func checkErrors(starved: ChaosMember?, isSilent: Bool) throws {
    for member in members {
      guard case .failed(let error, let place) = member.state else { continue }
      switch error {
      case .rankMissing(let rank, _, let absence):
        let innocent = members.first {
          $0.place == ChaosPlace(generation: place.generation, rank: rank, rankCount: place.rankCount)
        }
        if let innocent {
          throw failure("process \(member.number) holds process \(innocent.number) to be missing: \(error)")
        }
        if case .silent = absence, !isSilent {
          throw failure("process \(member.number) waited for one that is gone: \(error)")
        }
      case .systemCall(let rank, _, let code):
        let isExpected = starved?.place?.rank == rank && [EMFILE, ENOMEM, EAGAIN].contains(code)
        if !isExpected { throw failure("process \(member.number) found \(error)") }
      default: throw failure("process \(member.number) found \(error)")
      }
    }
  }

  // MARK: Listening

  /// Handles what members report until `isDone`.
  private mutating func wait(_ what: String, until isDone: ([ChaosMember]) -> Bool) throws {
    let deadline = monotonicNow() + 30_000_000_000
    while !isDone(members) {
      guard let index = Channel.firstReady(members.map { $0.process.channel }, until: deadline) else {
        throw failure("waited in vain: \(what)")
      }
      let member = members[index]
      do {
        _ = try member.receive(until: deadline)
      } catch is Channel.Closed {
        // A newcomer whose group has lost the member that let it in ends; so does nobody else.
        guard member.isNew, case .out = member.state else {
          throw failure(
            "process \(member.number) ended: \(member.process.wait(until: deadline).map { "\($0)" } ?? "no")")
        }
        members.remove(at: index)
      }
      if case .wrong(let what) = member.state { throw failure("process \(member.number): \(what)") }
      if case .out(let error) = member.state, !member.isNew {
        throw failure("process \(member.number) is out: \(error)")
      }
      try passPieces()
    }
    for member in members { member.isNew = false }
  }

  /// Brings together what members want to gather.
  private func passPieces() throws {
    let starting = members.filter { $0.isStarting }
    if !starting.isEmpty {
      if starting.contains(where: { $0.piece == nil }) { return }
      for member in starting { try member.order(.pieces(starting.map { $0.piece! })) }
      for member in starting { (member.piece, member.isStarting) = (nil, false) }
      return
    }
    guard let leader = members.first(where: { $0.piece != nil && !$0.isJoining }) else { return }
    let newcomers = members.filter { $0.isJoining }
    if newcomers.isEmpty {
      // Who was to come is gone, or was in another's hands already.
      try? leader.order(.pieces([]))
      leader.piece = nil
    } else if let newcomer = newcomers.first, newcomer.piece != nil {
      let pieces = [leader.piece!, newcomer.piece!]
      for member in [leader, newcomer] {
        try? member.order(.pieces(pieces))
        (member.piece, member.isJoining) = (nil, false)
      }
    }
  }
}

extension [ChaosMember] {
  fileprivate var haveOneGeneration: Bool { Set(map { $0.place?.generation }).count == 1 }
}
