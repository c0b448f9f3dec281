/// The participant that listens, index 0: gathers the others' pieces and tells all to all. A state machine without input
/// or output: every event returns what is to be done, in this order.
///
/// Its memory is bounded. Guests that have proven nothing are `Patience.strangerCountMax` at most (the oldest has to go
/// for another), with less than a message each; the others are one for each index, with a piece.
package struct Server: Secret {
  /// Chosen by who feeds this: each larger than the one before.
  package typealias Connection = Int
  package typealias Instant = ContinuousClock.Instant

  package enum Directive: Equatable, Sendable {
    case send(Connection, [UInt8])
    /// Close, once what was to be sent is sent.
    case drop(Connection)
    /// Take no more connections: who comes now has come for something else.
    case stopListening
    /// The pieces, by index. Nothing follows.
    case finish([[UInt8]])
    /// Close all, once what was to be sent is sent. Nothing follows.
    case fail(RendezvousError)
  }

  enum Phase {
    case gathering
    /// All pieces are here, and on their way to all.
    case delivering
    case over
  }

  let key: JobKey
  let seat: Seat
  let patience: Patience
  private let deadline: Instant
  var now: Instant
  private var phase = Phase.gathering
  private var guests: [Connection: Guest] = [:]
  /// By index, as the next.
  var pieces: [[UInt8]?]
  var isTaken: [Bool]
  /// When those who wait may be told who is missing.
  private var nextNotice: Instant

  /// - Parameters:
  ///   - seat: has index 0.
  ///   - piece: at most `Seat.pieceByteCountMax(ofIndex: 0)` bytes.
  package init(
    key: JobKey, seat: Seat, piece: [UInt8], now: Instant, deadline: Instant, patience: Patience = Patience()
  ) {
    precondition(seat.index == 0 && piece.count <= Seat.pieceByteCountMax(ofIndex: 0))
    self.key = key
    self.seat = seat
    self.patience = patience
    self.deadline = deadline
    self.now = now
    pieces = [piece] + Array(repeating: nil, count: seat.count - 1)
    isTaken = [true] + Array(repeating: false, count: seat.count - 1)
    nextNotice = now
  }

  /// Nil when all are here.
  var lowestMissing: Int? { pieces.firstIndex { $0 == nil } }

  /// In the order in which they have connected.
  private var connections: [Connection] { guests.keys.sorted() }

  // MARK: Events

  /// Somebody has connected. `nonce` is a new one.
  package mutating func accepted(_ connection: Connection, nonce: Nonce) -> [Directive] {
    guard phase == .gathering else { return [.drop(connection)] }
    var directives: [Directive] = []
    let strangers = guests.lazy.filter { $0.value.member == nil }.map(\.key)
    if strangers.count >= Patience.strangerCountMax(participantCount: seat.count) {
      directives += drop(strangers.min()!)
    }
    guests[connection] = Guest(nonce: nonce, patienceEnd: now + patience.guest)
    return directives
  }

  package mutating func received(_ connection: Connection, _ bytes: [UInt8]) -> [Directive] {
    guard phase == .gathering, var guest = guests.removeValue(forKey: connection) else { return [] }
    guest.input.append(bytes)
    do throws(Malformed) {
      while try readMessage(from: &guest) {}
    } catch {
      guest.isLeaving = true
    }
    let directives = send(&guest, to: connection)
    guests[connection] = guest
    return directives + (guest.isLeaving ? drop(connection) : completion())
  }

  /// What was to be sent to `connection` is sent.
  package mutating func sent(_ connection: Connection) -> [Directive] {
    guests[connection]?.isSending = false
    return phase == .delivering ? deliver(to: connection) + finishing() : []
  }

  /// The connection has ended.
  package mutating func ended(_ connection: Connection) -> [Directive] {
    forget(connection)
    return finishing()
  }

  package mutating func tick(now: Instant) -> [Directive] {
    guard phase != .over else { return [] }
    self.now = now
    var directives: [Directive] = []
    for connection in connections {
      if let end = guests[connection]!.patienceEnd, end <= now { directives += drop(connection) }
    }
    directives += completion()
    if phase == .gathering { directives += now < deadline ? notices() : abandonment() }
    return directives + finishing()
  }

  /// When `tick` is to be called at the latest.
  package var nextTick: Instant? {
    var ticks = guests.values.compactMap(\.patienceEnd)
    if phase == .gathering {
      ticks.append(deadline)
      if guests.values.contains(where: isDueForNotice) { ticks.append(nextNotice) }
    }
    return ticks.min()
  }

  /// What peers make this keep, for who checks that it is bounded.
  package var heldByteCount: Int {
    guests.values.reduce(0) { $0 + $1.input.count } + pieces.dropFirst().reduce(0) { $0 + ($1?.count ?? 0) }
  }
  package var guestCount: Int { guests.count }
}

// MARK: - Directives

extension Server {
  private func send(_ guest: inout Guest, to connection: Connection) -> [Directive] {
    if guest.output.isEmpty { return [] }
    defer { guest.output = [] }
    guest.isSending = true
    return [.send(connection, guest.output)]
  }

  private mutating func tell(_ message: Message, to connection: Connection) -> [Directive] {
    guard var guest = guests.removeValue(forKey: connection), var member = guest.member else { return [] }
    guest.output += member.outgoing.seal(message.bytes)
    guest.member = member
    defer { guests[connection] = guest }
    return send(&guest, to: connection)
  }

  private mutating func forget(_ connection: Connection) {
    guard let guest = guests.removeValue(forKey: connection), let member = guest.member else { return }
    // It may come again, as long as nobody has been told of it.
    guard phase == .gathering else { return }
    isTaken[member.index] = false
    pieces[member.index] = nil
  }

  private mutating func drop(_ connection: Connection) -> [Directive] {
    forget(connection)
    return [.drop(connection)]
  }

  private func isDueForNotice(_ guest: Guest) -> Bool {
    guard let member = guest.member, !guest.isSending else { return false }
    return member.toldMissing != lowestMissing
  }

  private mutating func notices() -> [Directive] {
    guard now >= nextNotice, let missing = lowestMissing else { return [] }
    var directives: [Directive] = []
    for connection in connections where isDueForNotice(guests[connection]!) {
      guests[connection]!.member!.toldMissing = missing
      directives += tell(.waiting(missing: missing), to: connection)
    }
    if !directives.isEmpty { nextNotice = now + patience.notice }
    return directives
  }

  private mutating func abandonment() -> [Directive] {
    let missing = lowestMissing!
    let directives = connections.flatMap { tell(.abandoned(missing: missing), to: $0) }
    phase = .over
    guests = [:]
    return directives + [.fail(.missing(index: missing))]
  }

  /// If all pieces are here, begins to give them to all.
  private mutating func completion() -> [Directive] {
    guard phase == .gathering, lowestMissing == nil else { return [] }
    phase = .delivering
    var directives = [Directive.stopListening]
    for connection in connections {
      let guest = guests[connection]!
      if guest.member == nil {
        directives += drop(connection)
      } else if !guest.isSending {
        directives += deliver(to: connection)
      }
    }
    return directives + finishing()
  }

  /// The next part of the pieces: one at a time, so that what is on its way is bounded.
  private mutating func deliver(to connection: Connection) -> [Directive] {
    guard var member = guests[connection]?.member else { return [] }
    let (index, offset) = member.nextPart
    guard index < seat.count else { return drop(connection) }
    let rest = pieces[index]!.dropFirst(offset)
    let part = rest.prefix(Message.partByteCountMax)
    let isLast = part.count == rest.count
    member.nextPart = isLast ? (index + 1, 0) : (index, offset + part.count)
    guests[connection]!.member = member
    guests[connection]!.patienceEnd = now + patience.guest
    return tell(.part(Array(part), isLast: isLast), to: connection)
  }

  /// If all have been given the pieces or are gone, that is all.
  private mutating func finishing() -> [Directive] {
    guard phase == .delivering && guests.isEmpty else { return [] }
    phase = .over
    return [.finish(pieces.map { $0! })]
  }
}
