/// What one member knows of its group.
struct MeshState {
  var links: [MemberID: any Link] = [:]
  var cards: [MemberID: Card] = [:]
  /// Members whose connection has ended.
  var exited: Set<MemberID> = []
  /// Newcomers that are connected to all members.
  var connected: Set<MemberID> = []
  /// The others go on without this member.
  var isExpelled = false
  /// Members of each generation, in rank order.
  var generations: [Int: [MemberID]] = [:]
  var bufferCounts: [Int: Int] = [:]
  var contributions: [GatherKey: [MemberID: Parcel]] = [:]
  var departures: [BufferKey: [MemberID: Departure]] = [:]
  var boards: [BufferKey: DepartureBoard] = [:]
  /// All ranks' arenas as they are mapped here, in rank order.
  var arenas: [BufferKey: [any SymmetricMemory]] = [:]
  /// What others have said of this member's growth.
  var mappings: [GrowthKey: [MemberID: Result<Void, EPError>]] = [:]
  var regroupings: [Int: Regrouping] = [:]
  /// Of generations that this member has not entered yet.
  var earlyRegroupings: [Int: [(message: Regrouping.Message, sender: MemberID)]] = [:]
  /// For members whose connection is on its way: a newcomer's may be taken after the decision that lets it in.
  var unsent: [MemberID: [Parcel]] = [:]
  /// Links with something queued.
  var unflushed: [any Link] = []
}

struct GatherKey: Hashable {
  let buffer: BufferKey
  let step: Int
}

struct GrowthKey: Hashable {
  let buffer: BufferKey
  let offset: Int64
}

extension MeshState {
  mutating func add(_ link: any Link, to member: MemberID, of generation: Int) -> Bool {
    if links[member] != nil { return false }
    // One that was to join an earlier generation, and whom the others have not waited for.
    let latest = generations.keys.max() ?? 0
    if generation < latest && generations[latest]?.contains(member) == false { return false }
    links[member] = link
    for parcel in unsent.removeValue(forKey: member) ?? [] { send(parcel, to: member) }
    return true
  }

  mutating func send(_ parcel: Parcel, to member: MemberID) {
    guard let link = links[member] else {
      if !exited.contains(member) { unsent[member, default: []].append(parcel) }
      return
    }
    link.enqueue(parcel)
    if !unflushed.contains(where: { $0 === link }) { unflushed.append(link) }
  }

  mutating func enter(_ generation: Int, members: [MemberID], own: MemberID) {
    if generations[generation] != nil { return }
    generations[generation] = members
    regroupings[generation] = Regrouping(own: own, members: members)
    let early = earlyRegroupings.removeValue(forKey: generation) ?? []
    regroup(generation) { [exited] regrouping in
      regrouping.hold(absent: exited)
      for (message, sender) in early { regrouping.receive(message, from: sender) }
    }
  }

  /// A member's departure, told by itself or learnt from the end of its connection. The first reason counts.
  mutating func note(_ departure: Departure, of member: MemberID, in key: BufferKey) {
    guard departures[key]?[member] == nil else { return }
    // Of a generation that this member has not entered: to be found when it does.
    guard let members = generations[key.generation] else { return departures[key, default: [:]][member] = departure }
    guard let rank = members.firstIndex(of: member) else { return }
    departures[key, default: [:]][member] = departure
    boards[key]?.note(rank: rank)
    suspect(departure, in: key)
  }

  /// Whom somebody has waited for in vain, nobody waits for again.
  mutating func suspect(_ departure: Departure, in key: BufferKey) {
    guard case .lost(.rankMissing(let rank, _, .silent)) = departure, let members = generations[key.generation],
      members.indices.contains(rank)
    else { return }
    regroup(key.generation) { $0.hold(absent: [members[rank]]) }
  }

  /// Changes a generation's agreement on the next; sends what follows from that, and enters the next.
  mutating func regroup(_ generation: Int, _ change: (inout Regrouping) -> Void) {
    guard var regrouping = regroupings[generation] else { return }
    change(&regrouping)
    for (receiver, message) in regrouping.takeOutbox() {
      send(Parcel(message: .regrouping(generation: generation, message)), to: receiver)
    }
    regroupings[generation] = regrouping
    if regrouping.isExpelled { isExpelled = true }
    if let decision = regrouping.decision, !isExpelled, generations[generation + 1] == nil {
      if let newcomer = decision.newcomer {
        cards[newcomer.id] = newcomer
        send(Parcel(message: .regrouping(generation: generation, .decision(decision))), to: newcomer.id)
      }
      enter(generation + 1, members: decision.members + (decision.newcomer.map { [$0.id] } ?? []), own: regrouping.own)
    }
  }
}
