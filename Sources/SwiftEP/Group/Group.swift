import Arena
import Glibc
import HostMachine
import Rendezvous

/// One generation of a group, as one of its members sees it. A change of members makes a new generation, over the same
/// connections.
package final class Group: Sendable {
  let generation: Int
  /// In rank order.
  let members: [MemberID]
  package let rank: Int
  /// How somebody new finds the group, unless the caller has a way of its own.
  let meeting: Meeting?
  private let open: OpenMesh

  var mesh: Mesh { open.mesh }

  /// A gather of bytes between the group's rank 0 and somebody new, in this order.
  typealias Meeting = @Sendable (_ index: Int, _ bytes: [UInt8], _ timeout: Duration) throws -> [[UInt8]]

  private init(_ open: OpenMesh, generation: Int, members: [MemberID], meeting: Meeting? = nil) {
    self.open = open
    self.generation = generation
    self.members = members
    self.meeting = meeting
    rank = members.firstIndex(of: open.mesh.own)!
    open.mesh.enter(generation, members: members)
  }

  package var rankCount: Int { members.count }

  /// Rather than of threads.
  var isOfProcesses: Bool { mesh.isListening }

  /// As this process would call it; nil where that is not known.
  func process(ofRank rank: Int) -> Int32? {
    if !mesh.isListening { return mesh.card.process }
    guard let card = mesh.cards(of: [members[rank]]).first, card.processNamespace == mesh.card.processNamespace else {
      return nil
    }
    return card.process
  }
}

// MARK: - Making a group

extension Group {
  /// The members are threads of this process.
  static func threads(rankCount: Int) throws(EPError) -> [Group] {
    let meshes = try (0..<rankCount).map { rank throws(EPError) in Mesh(card: try Card.make(rank: rank)) }
    let members = meshes.map(\.own)
    // Before anybody can go away again.
    for mesh in meshes { mesh.enter(0, members: members) }
    for mesh in meshes {
      for peer in meshes where peer !== mesh { mesh.add(MemoryLink(from: mesh.own, to: peer), to: peer.own) }
    }
    return meshes.map { Group(OpenMesh($0), generation: 0, members: members) }
  }

  /// The members are processes; `allGather` is their callers' way of exchanging bytes.
  static func processes(
    rank: Int, rankCount: Int, timeout: Duration, meeting: Meeting?, allGather: ([UInt8]) throws -> [[UInt8]]
  ) throws(EPError) -> Group {
    let deadline = monotonicNow() &+ timeout.nanoseconds
    let open = try OpenMesh.listening(rank: rank)
    let mesh = open.mesh
    let participants = Participants(ranks: Array(0..<rankCount), own: rank, step: .setup, timeout: timeout)
    let cards = try gathered(by: allGather, encode(mesh.card)!, as: Card.self, from: participants)
    guard cards[rank] == mesh.card else {
      throw .invalidArgument(
        rank: rank, argument: "allGather", expected: "bytes in rank order, this rank's at \(rank)",
        found: "another's there")
    }
    try Card.check(cards)
    mesh.know(cards)
    let group = Group(open, generation: 0, members: cards.map(\.id), meeting: meeting)
    // Later ranks connect here.
    for (peer, card) in cards.enumerated().prefix(rank) {
      try mesh.connect(to: card, rank: peer, own: rank, generation: 0)
    }
    for (peer, card) in cards.enumerated() where peer != rank {
      guard mesh.waitForLink(to: card.id, until: deadline) else {
        throw .rankMissing(rank: peer, step: .setup, because: .silent(timeout))
      }
    }
    return group
  }

  /// Who takes part in a gather, and why.
  private struct Participants {
    /// By index.
    let ranks: [Int]
    let own: Int
    let step: EPError.Step
    let timeout: Duration
  }

  private static func gathered<Value: Decodable>(
    by gather: ([UInt8]) throws -> [[UInt8]], _ bytes: [UInt8], as type: Value.Type, from participants: Participants
  ) throws(EPError) -> [Value] {
    let count = participants.ranks.count
    let all: [[UInt8]]
    do {
      all = try gather(bytes)
    } catch let error as EPError {
      throw error
    } catch let error as RendezvousError {
      throw EPError(
        error, ranks: participants.ranks, own: participants.own, step: participants.step, timeout: participants.timeout)
    } catch {
      throw .rendezvousFailed("\(error)")
    }
    let values = all.compactMap { decode(type, from: $0) }
    guard values.count == count, all.count == count else {
      throw .rendezvousFailed(
        "expected what each of \(count) ranks passed to allGather, found \(all.count) pieces, \(values.count) of them such"
      )
    }
    return values
  }
}

// MARK: - Changing it

/// What a group and somebody new pass each other.
private enum Greeting: Codable {
  /// From the group: those who stay, in rank order, the one that decides first.
  case invitation(generation: Int, cards: [Card])
  case newcomer(Card)
}

extension Group {
  /// The next generation: those that are still there.
  func shrink(timeout: Duration) throws(EPError) -> Group {
    next(try mesh.regroup(generation, timeout: timeout))
  }

  /// The next generation: those that are still there, and somebody new who calls `join`; or why nobody came.
  func admit(timeout: Duration, meeting: Meeting?) throws(EPError) -> (group: Group, refusal: EPError?) {
    guard mesh.isListening else {
      throw .invalidArgument(
        rank: rank, argument: "communicator", expected: "one of processes", found: "one of threads")
    }
    let decision = try mesh.regroup(generation, timeout: timeout) { [self] stay throws(EPError) in
      guard let meeting = meeting ?? self.meeting else {
        throw .invalidArgument(
          rank: rank, argument: "allGather", expected: "a way to reach who joins", found: "none")
      }
      return try invite(to: stay, by: meeting, timeout: timeout)
    }
    return (next(decision), decision.refusal)
  }

  private func invite(to stay: [MemberID], by meeting: Meeting, timeout: Duration) throws(EPError) -> Card {
    let deadline = monotonicNow() &+ timeout.nanoseconds
    let greeting = Greeting.invitation(generation: generation, cards: mesh.cards(of: stay))
    let participants = Participants(ranks: [rank, stay.count], own: rank, step: .regrouping, timeout: timeout)
    let answers = try Self.gathered(
      by: { try meeting(0, $0, timeout) }, encode(greeting)!, as: Greeting.self, from: participants)
    guard case .newcomer(let card) = answers[1] else {
      throw .rendezvousFailed("expected the card of who joins, found another invitation")
    }
    try Card.check([mesh.card, card])
    // Who joins connects here first, so that its end is noticed.
    if let absence = mesh.waitForNewcomer(card.id, until: deadline, timeout: timeout) {
      throw .rankMissing(rank: stay.count, step: .regrouping, because: absence)
    }
    return card
  }

  /// Becomes the last rank of a group whose members call `admit`.
  static func join(timeout: Duration, meeting: @escaping Meeting) throws(EPError) -> Group {
    let deadline = monotonicNow() &+ timeout.nanoseconds
    let open = try OpenMesh.listening(rank: -1)
    let mesh = open.mesh
    let participants = Participants(ranks: [0, -1], own: -1, step: .regrouping, timeout: timeout)
    let answers = try gathered(
      by: { try meeting(1, $0, timeout) }, encode(Greeting.newcomer(mesh.card))!, as: Greeting.self, from: participants)
    guard case .invitation(let generation, let cards) = answers[0], !cards.isEmpty else {
      throw .rendezvousFailed("expected a group's invitation, found another's wish to join")
    }
    try Card.check(cards + [mesh.card])
    mesh.know(cards)
    for (rank, card) in cards.enumerated() {
      try mesh.connect(to: card, rank: rank, own: cards.count, generation: generation)
    }
    mesh.tellConnected(to: cards[0].id)
    guard let decision = mesh.waitForAdmission(to: generation, by: cards.map(\.id), until: deadline) else {
      throw .rankMissing(rank: 0, step: .regrouping, because: .silent(timeout))
    }
    guard decision.newcomer == mesh.card else {
      throw .rendezvousFailed("the group went on without its newcomer")
    }
    return Group(
      open, generation: generation + 1, members: decision.members + [mesh.own], meeting: meeting)
  }

  private func next(_ decision: Regrouping.Decision) -> Group {
    mesh.leaveBehind(allBut: generation + 1)
    let newcomers = decision.newcomer.map { [$0.id] } ?? []
    return Group(open, generation: generation + 1, members: decision.members + newcomers, meeting: meeting)
  }
}

extension OpenMesh {
  /// One that processes can connect to.
  fileprivate static func listening(rank: Int) throws(EPError) -> OpenMesh {
    let card = try Card.make(rank: rank)
    do throws(SystemCallError) {
      let hub = try SocketHub(card: card)
      let open = OpenMesh(Mesh(card: card, hub: hub))
      guard hub.isRunning else { throw SystemCallError(call: "pthread_create", code: EAGAIN) }
      return open
    } catch {
      throw .systemCall(rank: rank, name: error.call, code: error.code)
    }
  }

}

extension Mesh {
  /// Connects to the process of `card`; one that is gone already is lost.
  fileprivate func connect(to card: Card, rank: Int, own: Int, generation: Int) throws(EPError) {
    do throws(SystemCallError) {
      try connect(to: card, of: generation)
    } catch {
      guard error.code == ECONNREFUSED || error.code == EPIPE || error.code == ECONNRESET else {
        throw .systemCall(rank: own, name: error.call, code: error.code)
      }
      add(LostLink(), to: card.id)
      lose(card.id)
    }
  }
}

/// To a member that was gone before there was a connection.
private final class LostLink: Link {
  func enqueue(_ parcel: Parcel) {}
  func flush() {}
  func close() {}
}
