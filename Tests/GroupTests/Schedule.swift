import Conformance

@testable import SwiftEP

/// One way in which a regrouping may go: members that die, doubt each other and are slow, at moments that a seed
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

  enum Intention { case decide, losePatience }

  var members: [Member]
  /// Whom somebody has doubted, or who has died.
  var doubted: Set<Int> = []
  private var mail: [[[Mail]]]
  private var random: SplitMix64

  init(seed: Int) {
    random = SplitMix64(seed: UInt64(seed))
    let count = random.pick(2...6)
    let ids = (0..<count).map { MemberID(100 + $0) }
    members = ids.map { Member(regrouping: Regrouping(own: $0, members: ids)) }
    mail = Array(repeating: Array(repeating: [], count: count), count: count)
    let (death, doubt, accusation) = (random.fraction() / 2, random.fraction() / 2, random.fraction() / 3)
    for index in members.indices {
      members[index].isMortal = random.chance(death)
      members[index].doubts = random.chance(doubt) ? 1 : 0
      members[index].accusations = random.chance(accusation) ? 1 : 0
    }
  }

  /// Returns false when it does not come to an end.
  mutating func run() -> Bool {
    for _ in 0..<20_000 {
      let steps = possibleSteps()
      if !steps.isEmpty {
        take(random.pick(steps))
        continue
      }
      // Nothing moves any more: really, somebody's patience ends.
      let waiting = members.indices.filter { isWaiting($0) }
      if waiting.isEmpty { return true }
      losePatience(random.pick(waiting))
    }
    return false
  }

  // MARK: Steps

  private enum Step {
    case send(Int), read(Int, from: Int), begin(Int), doubt(Int), accuse(Int), decide(Int), goOn(Int), die(Int)
  }

  private func isWaiting(_ index: Int) -> Bool {
    let member = members[index]
    return !member.isGone && member.hasBegun && member.regrouping.decision == nil && !member.regrouping.isExpelled
  }

  private func possibleSteps() -> [Step] {
    var steps: [Step] = []
    for (index, member) in members.enumerated() where !member.isGone {
      let regrouping = member.regrouping
      if member.isMortal && random(index) { steps.append(.die(index)) }
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
      settle(index, before: .losePatience)
    case .accuse(let index):
      members[index].accusations -= 1
      let accused = random.pick(members.indices.filter { $0 != index })
      doubted.insert(accused)
      members[index].regrouping.hold(absent: [id(accused)])
      flush(index)
      for other in members.indices where other != index { send(.accusation(id(accused)), from: index, to: other) }
    case .decide(let index): settle(index, before: .decide)
    case .goOn(let index): goOn(index)
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
    case .losePatience: losePatience(index)
    }
    flush(index)
  }

  private mutating func losePatience(_ index: Int) {
    let before = members[index].regrouping.absent
    members[index].regrouping.losePatience()
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
