/// How the members of a generation agree on who belongs to the next one, whoever dies meanwhile: a state machine of one
/// member, without input or output of its own.
///
/// Every member tells all others whom it holds to be *absent*: those whose connection has ended, and those that somebody
/// has waited for in vain. What one holds, all come to hold. The first member that is not absent leads: once all that
/// are not absent have reported exactly the set that it holds itself, it decides who stays. Who receives a decision
/// passes it on to all others before it acts on it, so that it reaches all even when the leader dies.
///
/// A member that may be alive can be held absent in error. So having reported a set is a promise: a member takes no
/// decision from one in that set. The one held absent finds itself in others' sets and is out, in every later generation
/// too, even if it holds those others absent itself. What has been sent lies at its receiver, and before a member
/// decides it reads what lies there: so of two that hold each other absent, one at least learns it before it decides.
///
/// `Model/regrouping.pml` is a model of this.
struct Regrouping: Sendable {
  enum Message: Codable, Sendable {
    case report(absent: Set<MemberID>)
    case decision(Decision)
  }

  struct Decision: Equatable, Codable, Sendable {
    /// In rank order.
    var members: [MemberID]
    var newcomer: Card?
    /// Why nobody new is among them though the group waited for somebody.
    var refusal: EPError?
  }

  let own: MemberID
  /// In rank order.
  let members: [MemberID]
  private(set) var absent: Set<MemberID> = []
  private(set) var decision: Decision?
  /// Others go on without this member, or would if they could: they hold it absent, or have decided so.
  private(set) var isExpelled = false
  private var hasBegun = false
  private var reported: Set<MemberID>?
  /// What each member reported last.
  private var reports: [MemberID: Set<MemberID>] = [:]
  /// To be sent to all other members.
  private var outbox: [(receiver: MemberID, message: Message)] = []

  init(own: MemberID, members: [MemberID]) {
    self.own = own
    self.members = members
  }

  // MARK: Events

  /// This member's caller wants the next generation.
  mutating func begin() {
    hasBegun = true
    report()
  }

  mutating func hold(absent more: Set<MemberID>) {
    absent.formUnion(more.intersection(members))
    if absent.contains(own) { isExpelled = true }
    report()
  }

  /// Nothing has been learnt for too long since `knowledge` was this.
  mutating func losePatience(since knowledge: Knowledge) {
    if knowledge == self.knowledge && decision == nil && !isExpelled && !isReady { hold(absent: laggards) }
  }

  mutating func receive(_ message: Message, from sender: MemberID) {
    guard members.contains(sender) else { return }
    switch message {
    case .report(let set):
      if set.contains(own) { isExpelled = true }
      if absent.contains(sender) { return }
      reports[sender] = set
      if decision == nil { hold(absent: set) }
    case .decision(let decision):
      if reported?.contains(sender) == true { return }
      if !decision.members.contains(own) { isExpelled = true }
      adopt(decision)
    }
  }

  /// Decides, as the leader, if nothing has changed since `isReady` was asked. By now, this member must have read what
  /// had been sent to it since then.
  mutating func decide(newcomer: Card?, refusal: EPError?) {
    guard isReady else { return }
    adopt(Decision(members: members.filter { !absent.contains($0) }, newcomer: newcomer, refusal: refusal))
  }

  mutating func takeOutbox() -> [(receiver: MemberID, message: Message)] {
    defer { outbox = [] }
    return outbox
  }

  // MARK: State

  /// What others have told. Each can tell something new only a few times, so patience that begins anew with it ends.
  struct Knowledge: Equatable {
    let absent: Set<MemberID>
    let reports: [MemberID: Set<MemberID>]
  }

  var knowledge: Knowledge { Knowledge(absent: absent, reports: reports) }

  /// Whether this member is to decide now.
  var isReady: Bool {
    guard hasBegun && decision == nil && !isExpelled, present.first == own else { return false }
    return present.allSatisfy { $0 == own || reports[$0] == absent }
  }

  /// The members that keep this one waiting.
  var laggards: Set<MemberID> {
    let behind = present.filter { $0 != own && reports[$0] != absent }
    return Set(behind.isEmpty ? present.prefix(1).filter { $0 != own } : behind)
  }

  var present: [MemberID] { members.filter { !absent.contains($0) } }

  private mutating func report() {
    guard hasBegun, decision == nil, reported != absent else { return }
    reported = absent
    send(.report(absent: absent))
  }

  private mutating func adopt(_ decision: Decision) {
    if self.decision != nil { return }
    self.decision = decision
    send(.decision(decision))
  }

  private mutating func send(_ message: Message) {
    for member in members where member != own { outbox.append((member, message)) }
  }
}
