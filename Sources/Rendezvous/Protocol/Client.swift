/// A participant that connects: finds the one that listens, among several places where it may be; gives it a piece, and
/// receives everybody's. A state machine without input or output: every event returns what is to be done, in this order.
package struct Client: Secret {
  package typealias Instant = ContinuousClock.Instant

  package enum Directive: Equatable, Sendable {
    /// To the place of this number.
    case connect(Int)
    case send([UInt8])
    /// The connection, or the attempt to connect.
    case close
    /// The pieces, by index. Nothing follows.
    case finish([[UInt8]])
    /// Nothing follows.
    case fail(RendezvousError)
  }

  private enum Stage {
    case resting(until: Instant)
    case connecting
    case greeting(Nonce)
    case claiming(Handshake)
    case member(Member)
    case over
  }

  private struct Member {
    var incoming: SealedChannel
    var outgoing: SealedChannel
    /// Who is missing, once the server has said so: it has taken this one then.
    var missing: Int?
    var pieces: [[UInt8]] = []
    /// What has come of the next piece.
    var partial: [UInt8] = []
  }

  private let key: JobKey
  private let seat: Seat
  private let piece: [UInt8]
  private let places: [String]
  private let patience: Patience
  private let deadline: Instant
  private var now: Instant
  private var stage: Stage
  private var input = Input()
  private var place = 0
  private var rest: Duration
  private var placePatience: Duration
  /// When the place is given up, unless it proves to be the right one.
  private var patienceEnd: Instant
  /// Who was found in this round of the places, and in the one before, that knows the protocol but not the token.
  private var finding: RendezvousError?
  private var earlierFinding: RendezvousError?

  /// - Parameters:
  ///   - piece: at most `Seat.pieceByteCountMax(ofIndex:)` bytes.
  ///   - places: where the server may be, for errors; at least one.
  package init(
    key: JobKey, seat: Seat, piece: [UInt8], places: [String], now: Instant, deadline: Instant,
    patience: Patience = Patience()
  ) {
    precondition(!places.isEmpty && piece.count <= Message.partByteCountMax)
    self.key = key
    self.seat = seat
    self.piece = piece
    self.places = places
    self.patience = patience
    self.deadline = deadline
    self.now = now
    stage = .resting(until: now)
    rest = patience.rest
    placePatience = patience.place
    patienceEnd = now
  }

  // MARK: Events

  /// The connection is there. `nonce` is a new one.
  package mutating func connected(nonce: Nonce) -> [Directive] {
    guard case .connecting = stage else { return [] }
    stage = .greeting(nonce)
    return [.send(Handshake.Greeting.bytes(of: .client, nonce))]
  }

  package mutating func received(_ bytes: [UInt8]) -> [Directive] {
    input.append(bytes)
    var directives: [Directive] = []
    do throws(Malformed) {
      while let more = try readMessage() { directives += more }
    } catch {
      directives.append(.close)
      leave()
    }
    return directives
  }

  /// The connection has ended, or could not be made.
  package mutating func ended() -> [Directive] {
    if case .claiming = stage { find("one that did not take this one's proof of the token") }
    leave()
    return []
  }

  package mutating func tick(now: Instant) -> [Directive] {
    self.now = now
    if case .over = stage { return [] }
    if now >= deadline { return fail(verdict) }
    if case .resting(let end) = stage {
      guard now >= end else { return [] }
      stage = .connecting
      patienceEnd = now + placePatience
      return [.connect(place)]
    }
    guard isBeingProven && now >= patienceEnd else { return [] }
    leave()
    return [.close]
  }

  /// When `tick` is to be called at the latest.
  package var nextTick: Instant? {
    switch stage {
    case .resting(let end): min(end, deadline)
    case .over: nil
    default: isBeingProven ? min(patienceEnd, deadline) : deadline
    }
  }

  /// What the peer makes this keep, for who checks that it is bounded.
  package var heldByteCount: Int {
    guard case .member(let member) = stage else { return input.count }
    return input.count + member.partial.count + member.pieces.reduce(0) { $0 + $1.count }
  }

  // MARK: State

  private var isConnected: Bool {
    switch stage {
    case .resting, .over: false
    default: true
    }
  }

  private var isBeingProven: Bool {
    switch stage {
    case .connecting, .greeting, .claiming: true
    case .member(let member): member.missing == nil
    case .resting, .over: false
    }
  }

  /// Why the time was not enough.
  private var verdict: RendezvousError {
    if case .member(let member) = stage, let missing = member.missing { return .missing(index: missing) }
    return finding ?? earlierFinding ?? .missing(index: 0)
  }

  private mutating func find(_ what: String) { finding = .unproven(place: places[place], found: what) }

  /// Goes on to the next place; after the last, rests first.
  private mutating func leave() {
    guard isConnected else { return }
    input = Input()
    place = (place + 1) % places.count
    stage = .resting(until: place > 0 ? now : now + rest)
    guard place == 0 else { return }
    rest = min(rest * 2, patience.restMax)
    placePatience = min(placePatience * 2, patience.placeMax)
    (earlierFinding, finding) = (finding, nil)
  }

  private mutating func fail(_ error: RendezvousError) -> [Directive] {
    defer { stage = .over }
    return (isConnected ? [.close] : []) + [.fail(error)]
  }
}

// MARK: - Reading

extension Client {
  /// Reads one message, and returns what it leads to; nil when more bytes have to come first.
  private mutating func readMessage() throws(Malformed) -> [Directive]? {
    switch stage {
    case .resting, .connecting, .over:
      input = Input()
      return nil
    case .greeting(let nonce): return try readGreeting(own: nonce)
    case .claiming(let handshake): return try readProof(of: handshake)
    case .member(var member):
      guard let text = try member.incoming.open(&input) else { return nil }
      let message = try Message(text)
      stage = .member(member)
      return try act(on: message, &member)
    }
  }

  private mutating func readGreeting(own: Nonce) throws(Malformed) -> [Directive]? {
    guard let greeting = try Handshake.Greeting(of: .server, from: &input) else { return nil }
    guard greeting.version == Handshake.version else {
      find("one of version \(greeting.version) of the protocol rather than \(Handshake.version)")
      throw Malformed()
    }
    let handshake = Handshake(clientNonce: own, serverNonce: greeting.nonce, seat: seat)
    stage = .claiming(handshake)
    return [.send(seat.bytes + key.proof(of: .client, in: handshake))]
  }

  private mutating func readProof(of handshake: Handshake) throws(Malformed) -> [Directive]? {
    guard let proof = input.take(SHA256.digestByteCount) else { return nil }
    guard key.isProof(proof, of: .server, in: handshake) else {
      find("one that does not know the token")
      throw Malformed()
    }
    stage = .member(
      Member(
        incoming: key.channel(from: .server, after: handshake), outgoing: key.channel(from: .client, after: handshake)))
    return []
  }

  private mutating func act(on message: Message, _ member: inout Member) throws(Malformed) -> [Directive] {
    var directives: [Directive] = []
    switch message {
    case .refusal(.taken): return fail(.taken(index: seat.index))
    case .refusal(.count(let expected)):
      return fail(.countsDiffer(index: seat.index, expected: expected, found: seat.count))
    case .refusal(.room(let expected)): return fail(.roomsDiffer(expected: expected, found: seat.room))
    case .abandoned(let missing): return fail(.missing(index: missing))
    case .waiting(let missing):
      if member.missing == nil {
        directives = [.send(member.outgoing.seal(Message.part(piece, isLast: true).bytes))]
        // Whatever comes of this connection, the next attempts are the first again.
        (rest, placePatience) = (patience.rest, patience.place)
      }
      member.missing = missing
    case .part(let part, let isLast):
      let byteCountMax = Seat.pieceByteCountMax(ofIndex: member.pieces.count)
      guard member.missing != nil, member.partial.count + part.count <= byteCountMax else { throw Malformed() }
      member.partial += part
      guard isLast else { break }
      member.pieces.append(member.partial)
      member.partial = []
      if member.pieces.count == seat.count {
        stage = .over
        return [.close, .finish(member.pieces)]
      }
    }
    stage = .member(member)
    return directives
  }
}
