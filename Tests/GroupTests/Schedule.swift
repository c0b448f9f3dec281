import Conformance

@testable import SwiftEP

/// One way in which a regrouping may go: members that die, stop, doubt each other and are slow, at moments that a seed
/// chooses. Connections keep order, and what has been sent arrives, as late as it may.
struct Schedule {
  enum Mail {
    case message(Regrouping.Message)
    /// Somebody has waited for this member in vain, before the regrouping.
    case accusation(MemberID)
    case end
  }

  struct Member {
    var regrouping: Regrouping
    var isMortal = false
    /// Stops at some moment, without an end of its connections.
    var isStopping = false
    var isStopped = false
    var doubts = 0
    var accusations = 0
    var hasBegun = false
    /// To be sent, one at a time: a member can die in between.
    var pending: [(receiver: Int, mail: Mail)] = []
    /// How many messages of each other member have to be read before what follows.
    var settling: [Int]?
    var afterSettling = Intention.decide
    /// Members whose connection this one has ended.
    var left: Set<Int> = []
    /// With which decision it has gone on, and whether it is still there.
    var decision: Regrouping.Decision?
    var isGone = false
  }

  enum Intention { case decide, losePatience(since: Regrouping.Knowledge) }

  var members: [Member]
  /// Whom somebody has doubted too early, and who has died or stopped.
  var doubted: Set<Int> = []
  private var mail: [[[Mail]]]
  private var random: SplitMix64
  /// Connections whose messages are read late.
  private var slow: Set<Int> = []

  init(seed: Int) {
    random = SplitMix64(seed: UInt64(seed))
    let count = random.pick(2...6)
    let ids = (0..<count).map { MemberID(100 + $0) }
    members = ids.map { Member(regrouping: Regrouping(own: $0, members: ids)) }
    mail = Array(repeating: Array(repeating: [], count: count), count: count)
    let stop = random.chance(0.3) ? 0.3 : 0
    let (death, doubt, accusation) = (random.fraction() / 2, random.fraction(), random.fraction() / 3)
    let slowness = random.fraction()
    for connection in 0..<count * count where random.chance(slowness) { slow.insert(connection) }
    for index in members.indices {
      members[index].isMortal = random.chance(death)
      members[index].isStopping = random.chance(stop)
      members[index].doubts = random.chance(doubt) ? 1 : 0
      members[index].accusations = random.chance(accusation) ? 1 : 0
    }
  }

  /// Until nothing moves any more. Returns false when it does not come to that.
  mutating func run() -> Bool {
    for _ in 0..<20_000 {
      let steps = possibleSteps()
      if steps.isEmpty {
        // Really: somebody's patience ends. It must hit none that still moves.
        guard let index = members.indices.first(where: { isWaiting($0) }) else { return true }
        members[index].regrouping.losePatience(since: members[index].regrouping.knowledge)
        flush(index)
        continue
      }
      let fast = steps.filter { !isSlow($0) }
      take(random.pick(fast.isEmpty || random.chance(0.02) ? steps : fast))
    }
    return false
  }

  // MARK: Steps

  private enum Step {
    case send(Int), read(Int, from: Int), begin(Int), doubt(Int), accuse(Int), decide(Int), goOn(Int), die(Int), stop(
      Int)
  }

  private func isWaiting(_ index: Int) -> Bool {
    let member = members[index]
    let isUndecided = member.regrouping.decision == nil && !member.regrouping.isExpelled
    return !member.isGone && !member.isStopped && member.hasBegun && isUndecided
  }

  private func isSlow(_ step: Step) -> Bool {
    if case .read(let index, let source) = step { return slow.contains(source * members.count + index) }
    return false
  }

  private func possibleSteps() -> [Step] {
    var steps: [Step] = []
    for (index, member) in members.enumerated() where !member.isGone && !member.isStopped {
      let regrouping = member.regrouping
      if member.isMortal && random(index) { steps.append(.die(index)) }
      if member.isStopping && random(index) { steps.append(.stop(index)) }
      if !member.pending.isEmpty {
        steps.append(.send(index))
        continue
      }
      for source in members.indices where !mail[source][index].isEmpty && (member.settling?[source] ?? 1) > 0 {
        steps.append(.read(index, from: source))
      }
      if member.settling != nil { continue }
      let isUndecided = regrouping.decision == nil && !regrouping.isExpelled
      if regrouping.isReady { steps.append(.decide(index)) }
      if regrouping.isExpelled || regrouping.decision != nil && member.decision == nil { steps.append(.goOn(index)) }
      if isUndecided && !member.hasBegun {
        steps.append(.begin(index))
        if member.accusations > 0 && regrouping.absent.isEmpty { steps.append(.accuse(index)) }
      }
      if isUndecided && member.hasBegun && member.doubts > 0 && !regrouping.isReady { steps.append(.doubt(index)) }
    }
    return steps
  }

  /// Those that may die do so seldom enough to have done something before.
  private func random(_ index: Int) -> Bool {
    var coin = random
    return coin.pick(0...members.count) == index
  }

  private mutating func take(_ step: Step) {
    switch step {
    case .send(let index):
      let (receiver, mail) = members[index].pending.removeFirst()
      self.mail[index][receiver].append(mail)
    case .read(let index, let source): read(index, from: source)
    case .begin(let index):
      members[index].hasBegun = true
      members[index].regrouping.begin()
      flush(index)
    case .doubt(let index):
      members[index].doubts -= 1
      settle(index, before: .losePatience(since: members[index].regrouping.knowledge))
    case .accuse(let index):
      members[index].accusations -= 1
      let accused = random.pick(members.indices.filter { $0 != index })
      doubted.insert(accused)
      members[index].regrouping.hold(absent: [id(accused)])
      flush(index)
      for other in members.indices where other != index { send(.accusation(id(accused)), from: index, to: other) }
    case .decide(let index): settle(index, before: .decide)
    case .goOn(let index): goOn(index)
    case .stop(let index):
      members[index].isStopped = true
      doubted.insert(index)
    case .die(let index):
      members[index].pending = []
      doubted.insert(index)
      leave(index)
    }
  }

  private func id(_ index: Int) -> MemberID { members[index].regrouping.own }

  private func index(_ id: MemberID) -> Int { members.firstIndex { $0.regrouping.own == id }! }

  private mutating func send(_ mail: Mail, from index: Int, to other: Int) {
    if members[index].left.contains(other) { return }
    members[index].pending.append((other, mail))
  }

  private mutating func flush(_ index: Int) {
    for (receiver, message) in members[index].regrouping.takeOutbox() {
      send(.message(message), from: index, to: self.index(receiver))
    }
  }

  private mutating func read(_ index: Int, from source: Int) {
    let mail = self.mail[source][index].removeFirst()
    if !members[index].left.contains(source) {
      switch mail {
      case .message(let message): members[index].regrouping.receive(message, from: id(source))
      case .accusation(let accused):
        // A departed member's word is heard as long as it is connected.
        members[index].regrouping.hold(absent: [accused])
      case .end: members[index].regrouping.hold(absent: [id(source)])
      }
      flush(index)
    }
    members[index].settling?[source] -= 1
    endSettling(index)
  }

  // MARK: What Mesh does

  private mutating func settle(_ index: Int, before intention: Intention) {
    members[index].settling = members.indices.map { mail[$0][index].count }
    members[index].afterSettling = intention
    endSettling(index)
  }

  private mutating func endSettling(_ index: Int) {
    guard let settling = members[index].settling, settling.allSatisfy({ $0 == 0 }) else { return }
    members[index].settling = nil
    switch members[index].afterSettling {
    case .decide: members[index].regrouping.decide(newcomer: nil, refusal: nil)
    case .losePatience(let knowledge): losePatience(index, since: knowledge)
    }
    flush(index)
  }

  private mutating func losePatience(_ index: Int, since knowledge: Regrouping.Knowledge) {
    let before = members[index].regrouping.absent
    members[index].regrouping.losePatience(since: knowledge)
    doubted.formUnion(members[index].regrouping.absent.subtracting(before).map { self.index($0) })
    flush(index)
  }

  private mutating func goOn(_ index: Int) {
    if members[index].regrouping.isExpelled { return leave(index) }
    let decision = members[index].regrouping.decision!
    members[index].decision = decision
    for other in members.indices where other != index && !decision.members.contains(id(other)) {
      send(.end, from: index, to: other)
    }
    // What has been queued still goes out.
    for (receiver, mail) in members[index].pending { self.mail[index][receiver].append(mail) }
    members[index].pending = []
    members[index].left = Set(members.indices.filter { !decision.members.contains(id($0)) })
  }

  /// Dies, or is out: all its connections end.
  private mutating func leave(_ index: Int) {
    members[index].isGone = true
    for other in members.indices where other != index && !members[index].left.contains(other) {
      mail[index][other].append(.end)
    }
  }
}
