import Arena
import HostMachine

/// Keeps a mesh open. Threads that serve the mesh hold the mesh, but not this.
final class OpenMesh: Sendable {
  let mesh: Mesh
  init(_ mesh: Mesh) { self.mesh = mesh }
  deinit { mesh.close() }
}

/// One member's connections to all others, and what it has learnt from them. What comes in is handled on whatever thread
/// brings it; callers wait for what they need, each until its deadline.
final class Mesh: Sendable {
  let card: Card
  private let state: Guarded<MeshState>
  /// Rung after every change.
  private let bell = SharedBell()
  /// Where processes connect; nil between threads.
  private let hub: SocketHub?

  var own: MemberID { card.id }
  var isListening: Bool { hub != nil }

  init(card: Card, hub: SocketHub? = nil) {
    self.card = card
    self.hub = hub
    state = Guarded(MeshState())
    state.withLock { $0.cards[card.id] = card }
    hub?.start(delivering: self)
  }

  /// Ends all connections.
  func close() {
    hub?.close()
    for link in state.withLock({ $0.links.values }) { link.close() }
  }

  /// Changes the state, then sends what that has queued and wakes who waits.
  private func update<Result>(_ body: (inout MeshState) -> Result) -> Result {
    let (result, links) = state.withLock { state in
      let result = body(&state)
      defer { state.unflushed = [] }
      return (result, state.unflushed)
    }
    for link in links { link.flush() }
    bell.ring()
    return result
  }

  /// Waits until `body` returns something; nil when the deadline passes first.
  private func wait<Result>(until deadline: UInt64, for body: (inout MeshState) -> Result?) -> Result? {
    var result: Result?
    _ = bell.wait(until: deadline, spinningFor: 0) {
      result = state.withLock(body)
      return result != nil
    }
    return result
  }

  // MARK: Connections

  /// Returns false, and does not take the connection, where there is one already, or the group has gone on without the
  /// member.
  @discardableResult
  func add(_ link: any Link, to member: MemberID, of generation: Int = 0) -> Bool {
    update { $0.add(link, to: member, of: generation) }
  }

  /// Waits until there is a connection to the member, even one that has ended again.
  func waitForLink(to member: MemberID, until deadline: UInt64) -> Bool {
    wait(until: deadline) { $0.links[member].map { _ in true } } != nil
  }

  /// Waits until the newcomer is connected to all members.
  ///
  /// - Returns: what it is missing for, if it is.
  func waitForNewcomer(_ member: MemberID, until deadline: UInt64, timeout: Duration) -> EPError.Absence? {
    let outcome = wait(until: deadline) { state -> EPError.Absence?? in
      if state.exited.contains(member) { return .exited }
      return state.connected.contains(member) ? .some(nil) : nil
    }
    return outcome ?? .silent(timeout)
  }

  /// Tells `member` that this one is connected to all.
  func tellConnected(to member: MemberID) { update { $0.send(Parcel(message: .connected), to: member) } }

  /// Connects to the process of `card`.
  func connect(to card: Card, of generation: Int) throws(SystemCallError) {
    guard let hub else { preconditionFailure("threads do not connect") }
    add(try hub.connect(to: card, as: own, generation: generation), to: card.id)
  }

  func know(_ cards: [Card]) { state.withLock { state in for card in cards { state.cards[card.id] = card } } }

  func cards(of members: [MemberID]) -> [Card] { state.withLock { state in members.compactMap { state.cards[$0] } } }

  /// The connection to `member` has ended.
  func lose(_ member: MemberID) {
    update { state in
      guard state.exited.insert(member).inserted else { return }
      state.unsent[member] = nil
      for key in state.boards.keys { state.note(.exited, of: member, in: key) }
      for generation in state.regroupings.keys { state.regroup(generation) { $0.hold(absent: [member]) } }
    }
  }

  func receive(_ parcel: Parcel, from sender: MemberID) {
    if case .growth(let key, let offset, let byteCount) = parcel.message {
      return map(ArenaPiece(range: offset..<offset + byteCount, file: parcel.file), of: sender, in: key)
    }
    update { state in
      switch parcel.message {
      case .contribution(let key, let step, _):
        state.contributions[GatherKey(buffer: key, step: step), default: [:]][sender] = parcel
      case .departure(let key, let departure):
        state.note(departure, of: sender, in: key)
      case .mapped(let key, let offset, let failure):
        let result: Result<Void, EPError> = failure.map { .failure($0) } ?? .success(())
        state.mappings[GrowthKey(buffer: key, offset: offset)]?[sender] = result
      case .growth: preconditionFailure("taken above")
      case .connected: state.connected.insert(sender)
      case .regrouping(let generation, let message):
        if state.generations[generation] == nil {
          state.earlyRegroupings[generation, default: []].append((message, sender))
        } else {
          state.regroup(generation) { $0.receive(message, from: sender) }
        }
      }
    }
  }

  // MARK: Buffers

  func enter(_ generation: Int, members: [MemberID]) {
    update { $0.enter(generation, members: members, own: own) }
  }

  func nextBuffer(of generation: Int) -> BufferKey {
    state.withLock { state in
      defer { state.bufferCounts[generation, default: 0] += 1 }
      return BufferKey(generation: generation, index: state.bufferCounts[generation, default: 0])
    }
  }

  /// Gives every member's contribution to every member, in rank order. Collective.
  ///
  /// - Throws: `rankMissing`, which the others then throw too.
  func gather(
    _ contribution: Contribution, memory: (any SymmetricMemory)?, for key: BufferKey, step: Int, timeout: Duration
  ) throws(EPError) -> [(contribution: Contribution, parcel: Parcel)] {
    let mine = Parcel(message: .contribution(key, step: step, contribution), memory: memory, file: nil)
    let members = update { state in
      let members = state.generations[key.generation]!
      for member in members where member != own { state.send(mine, to: member) }
      return members
    }
    var missing = 0
    let outcome = wait(until: monotonicNow() &+ timeout.nanoseconds) { state -> Result<[Parcel], EPError>? in
      var gathered = state.contributions[GatherKey(buffer: key, step: step)] ?? [:]
      gathered[own] = mine
      guard let first = members.firstIndex(where: { gathered[$0] == nil }) else {
        state.contributions[GatherKey(buffer: key, step: step)] = nil
        return .success(members.map { gathered[$0]! })
      }
      missing = first
      if state.isExpelled {
        let rank = members.firstIndex(of: own)!
        return .failure(.rankMissing(rank: rank, step: .regrouping, because: .silent(timeout)))
      }
      for (rank, member) in members.enumerated() where gathered[member] == nil {
        let departure = state.departures[key]?[member] ?? (state.exited.contains(member) ? .exited : nil)
        if let departure { return .failure(departure.error(rank: rank, step: .setup)) }
      }
      return nil
    }
    switch outcome ?? .failure(.rankMissing(rank: missing, step: .setup, because: .silent(timeout))) {
    case .success(let parcels):
      return parcels.map { parcel in
        guard case .contribution(_, _, let contribution) = parcel.message else {
          preconditionFailure("not one of these")
        }
        return (contribution, parcel)
      }
    case .failure(let cause):
      tell(.lost(cause), of: key)
      throw cause
    }
  }

  /// Gathers the places of all ranks that none of those masks which take part; nil for the others. In two phases: in the first,
  /// all find out where the others are; behind the second, each knows that all have found the same. What comes from a call that
  /// has failed is replaced when its rank calls again: then those that have taken it in find out anew. What goes wrong here,
  /// nobody else is told.
  ///
  /// - Parameters:
  ///   - timeout: of each phase.
  ///   - confirming: run before this rank tells the others what it has found.
  func gather(
    _ place: Contribution.Place, for key: BufferKey, timeout: Duration, confirming: () throws(EPError) -> Void
  ) throws(EPError) -> [Contribution.Place?] {
    var deadline = monotonicNow() &+ timeout.nanoseconds
    let members = state.withLock { $0.generations[key.generation]! }
    let own = members.firstIndex(of: own)!
    let keys = [0, 1].map { GatherKey(buffer: key, step: BufferSetup.stepCount + $0) }
    func tell(_ place: Contribution.Place, phase: Int) {
      var contribution = Contribution()
      contribution.place = place
      let parcel = Parcel(message: .contribution(key, step: keys[phase].step, contribution))
      update { state in for member in members where member != self.own { state.send(parcel, to: member) } }
    }
    tell(place, phase: 0)
    var found = Gathered(places: members.map { _ in nil })
    var missing = 0
    while monotonicNow() < deadline {
      let next = wait(until: deadline) { state -> Result<Gathered, EPError>? in
        func came(_ phase: Int) -> [Contribution.Place?] {
          let parcels = state.contributions[keys[phase]] ?? [:]
          return members.map { member in
            guard case .contribution(_, _, let contribution) = parcels[member]?.message else { return nil }
            return contribution.place
          }
        }
        let confirmed = came(1)
        let open = found.members.filter { $0 != own && confirmed[$0]?.attempt != found.attempt }
        if !found.members.isEmpty && open.isEmpty {
          // Of those that are ahead, their next call's are here already.
          for (rank, place) in came(0).enumerated() where place?.attempt == found.places[rank]?.attempt {
            state.contributions[keys[0]]?[members[rank]] = nil
          }
          for rank in found.members { state.contributions[keys[1]]?[members[rank]] = nil }
          return .success(found)
        }
        var next = Gathered(places: came(0))
        for rank in found.members where !open.contains(rank) { next.places[rank] = found.places[rank] }
        next.places[own] = place
        next.leaveOutMasked(own: own)
        func departure(_ rank: Int) -> Departure? {
          state.departures[key]?[members[rank]] ?? (state.exited.contains(members[rank]) ? .exited : nil)
        }
        let absent = members.indices.filter { next.places[$0] == nil && next.masked >> UInt64($0) & 1 == 0 }
        if let first = absent.first {
          // Those that have departed may yet turn out to be masked.
          guard let rank = absent.first(where: { departure($0) == nil }) else {
            return .failure(departure(first)!.error(rank: first, step: .regrouping))
          }
          missing = rank
          return nil
        }
        if next.attempt != found.attempt { return .success(next) }
        if let gone = open.first(where: { departure($0) != nil }) {
          return .failure(departure(gone)!.error(rank: gone, step: .regrouping))
        }
        missing = open[0]
        return nil
      }
      guard let next = try next?.get() else { break }
      if next.attempt == found.attempt { return found.places }
      found = next
      // All have called, as far as is known: whoever gives up now may leave others that go on with it.
      deadline = monotonicNow() &+ timeout.nanoseconds
      try confirming()
      tell(Contribution.Place(masked: found.masked, epoch: place.epoch, attempt: found.attempt), phase: 1)
    }
    throw .rankMissing(rank: missing, step: .regrouping, because: .silent(timeout))
  }

  /// The places of those that take part, by rank, as one of them knows them.
  private struct Gathered {
    var places: [Contribution.Place?]
    var masked: UInt64 = 0

    var members: [Int] { places.indices.filter { places[$0] != nil } }
    /// What their attempts amount to.
    var attempt: UInt64 { places.reduce(0) { $0 ^ ($1?.attempt ?? 0) } }

    /// What masked ranks have said does not count, nor what masks this one: it is from calls that have failed. So those that
    /// nobody masks are believed first.
    mutating func leaveOutMasked(own: Int) {
      for rank in members where places[rank]!.masked >> UInt64(own) & 1 != 0 { places[rank] = nil }
      while true {
        masked = masks(of: members)
        let believed = masks(of: members.filter { masked >> UInt64($0) & 1 == 0 })
        let leaving = members.filter { believed >> UInt64($0) & 1 != 0 }
        if leaving.isEmpty { return }
        for rank in leaving { places[rank] = nil }
      }
    }

    private func masks(of ranks: [Int]) -> UInt64 { ranks.reduce(0) { $0 | places[$1]!.masked } }
  }

  /// Maps what a peer's arena has grown by, and tells it so. Waits for nobody, whatever this rank's kernels wait for.
  private func map(_ piece: ArenaPiece, of sender: MemberID, in key: BufferKey) {
    let arena = state.withLock { state -> (any SymmetricMemory)? in
      guard let rank = state.generations[key.generation]?.firstIndex(of: sender) else { return nil }
      return state.arenas[key]?[rank]
    }
    var failure: EPError?
    // A buffer that is gone here has no use for it.
    do throws(EPError) { try arena?.map(piece) } catch { failure = error }
    update { [offset = piece.range.lowerBound] state in
      state.send(Parcel(message: .mapped(key, offset: offset, failure: failure)), to: sender)
    }
  }

  /// Returns when every other member that takes part in the buffer has mapped what this member's arena has grown by.
  ///
  /// - Throws: why one could not; `rankMissing` where one says nothing.
  func share(_ piece: ArenaPiece, of key: BufferKey, timeout: Duration) throws(EPError) {
    let (range, growth) = (piece.range, GrowthKey(buffer: key, offset: piece.range.lowerBound))
    let members = update { state in
      let members = state.generations[key.generation]!
      let message = Message.growth(key, offset: range.lowerBound, byteCount: Int64(range.count))
      state.mappings[growth] = [:]
      for member in members where member != own {
        state.send(Parcel(message: message, file: piece.file), to: member)
      }
      return members
    }
    var missing = 0
    let result = wait(until: monotonicNow() &+ timeout.nanoseconds) { state -> Result<Void, EPError>? in
      for (rank, member) in members.enumerated() where member != own {
        switch state.mappings[growth]?[member] {
        case .failure(let failure): return .failure(failure)
        case nil where state.departures[key]?[member] == nil && !state.exited.contains(member):
          missing = rank
          return nil
        default: continue
        }
      }
      return .success(())
    }
    state.withLock { $0.mappings[growth] = nil }
    try (result ?? .failure(.rankMissing(rank: missing, step: .exchange, because: .silent(timeout)))).get()
  }

  /// From now on, what the others' arenas grow by is mapped here.
  ///
  /// - Parameter arenas: all ranks', in rank order, as they are mapped here.
  func register(_ arenas: [any SymmetricMemory], for key: BufferKey) { state.withLock { $0.arenas[key] = arenas } }

  /// From now on, `board` shows which ranks take part in the buffer no more.
  func register(_ board: DepartureBoard, for key: BufferKey) {
    state.withLock { state in
      state.boards[key] = board
      for (rank, member) in state.generations[key.generation]!.enumerated() where member != own {
        if state.exited.contains(member) && state.departures[key]?[member] == nil {
          state.departures[key, default: [:]][member] = .exited
        }
        if state.departures[key]?[member] != nil { board.note(rank: rank) }
      }
    }
  }

  func unregister(_ key: BufferKey) {
    state.withLock { state in
      state.boards[key] = nil
      state.arenas[key] = nil
    }
  }

  /// Why `rank` takes part in the buffer no more.
  func departure(of rank: Int, in key: BufferKey) -> Departure? {
    state.withLock { $0.departures[key]?[$0.generations[key.generation]![rank]] }
  }

  /// Tells all others that this member takes part in the buffer no more. The first reason counts.
  func tell(_ departure: Departure, of key: BufferKey) {
    update { state in
      guard state.departures[key]?[own] == nil else { return }
      state.departures[key, default: [:]][own] = departure
      state.suspect(departure, in: key)
      let parcel = Parcel(message: .departure(key, departure))
      for member in state.generations[key.generation]! where member != own { state.send(parcel, to: member) }
    }
  }

  // MARK: Regrouping

  /// Waits until everything is handled that had been sent to this member when it was called. Returns false where that
  /// did not happen in time.
  private func settle(until deadline: UInt64) -> Bool {
    if let hub { return hub.settle(until: deadline) }
    let links = state.withLock { $0.links.values.compactMap { $0 as? MemoryLink } }
    return links.allSatisfy { $0.opposite?.waitUntilDelivered(until: deadline) ?? true }
  }

  func memoryLink(to member: MemberID) -> MemoryLink? { state.withLock { $0.links[member] as? MemoryLink } }

  /// Agrees with the other members on the next generation, and enters it. Collective.
  ///
  /// - Parameter invite: finds somebody new; called on one member, when all have agreed on who is still there. The
  ///   others wait as long again.
  /// - Throws: `rankMissing` where the others go on without this member.
  func regroup(
    _ generation: Int, timeout: Duration, inviting invite: ((_ stay: [MemberID]) throws(EPError) -> Card)? = nil
  ) throws(EPError) -> Regrouping.Decision {
    let patience = timeout.nanoseconds &* (invite == nil ? 1 : 2)
    update { state in state.regroup(generation) { $0.begin() } }
    while true {
      let knowledge = state.withLock { $0.regroupings[generation]!.knowledge }
      let progress = wait(until: monotonicNow() &+ patience) { state -> (isExpelled: Bool, regrouping: Regrouping)? in
        let regrouping = state.regroupings[generation]!
        let goesOn = state.isExpelled || regrouping.decision != nil || regrouping.isReady
        return goesOn || regrouping.knowledge != knowledge ? (state.isExpelled, regrouping) : nil
      }
      if let progress {
        if progress.isExpelled { break }
        if let decision = progress.regrouping.decision { return decision }
        if !progress.regrouping.isReady { continue }
        var (newcomer, refusal): (Card?, EPError?)
        if let invite {
          do { newcomer = try invite(progress.regrouping.present) } catch { refusal = error }
        }
        guard settle(until: monotonicNow() &+ patience) else { break }
        update { state in state.regroup(generation) { $0.decide(newcomer: newcomer, refusal: refusal) } }
      } else {
        // A member that was stopped itself finds answers now, not silence.
        guard settle(until: monotonicNow() &+ patience) else { break }
        update { state in state.regroup(generation) { $0.losePatience(since: knowledge) } }
      }
    }
    let rank = state.withLock { $0.generations[generation]!.firstIndex(of: own)! }
    throw .rankMissing(rank: rank, step: .regrouping, because: .silent(timeout))
  }

  /// Waits for the decision of `generation`, which this member is not in, on whether it belongs to the next; nil when
  /// none comes in time, or none of `members` is left.
  func waitForAdmission(
    to generation: Int, by members: [MemberID], until deadline: UInt64
  ) -> Regrouping.Decision? {
    wait(until: deadline) { state -> Regrouping.Decision?? in
      for case (.decision(let decision), _) in state.earlyRegroupings[generation] ?? [] { return decision }
      return state.exited.isSuperset(of: members) ? .some(nil) : nil
    } ?? nil
  }

  /// Ends the connections to those that are not members of `generation`, and forgets what earlier ones had.
  func leaveBehind(allBut generation: Int) {
    let dropped = update { state in
      let members = state.generations[generation]!
      let dropped = state.links.filter { !members.contains($0.key) }
      for member in dropped.keys { state.links[member] = nil }
      state.unsent = state.unsent.filter { members.contains($0.key) }
      state.contributions = state.contributions.filter { $0.key.buffer.generation >= generation }
      state.earlyRegroupings = state.earlyRegroupings.filter { $0.key > generation }
      return Array(dropped.values)
    }
    for link in dropped { link.close() }
  }
}
