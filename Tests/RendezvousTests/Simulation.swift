#if !FUZZER
  @testable import Rendezvous
#endif

/// A server, its clients and strangers, over connections that exist in memory only, in which anything can happen at any
/// time. Notes whatever must never be.
struct Simulation {
  struct Options {
    var count = 3
    /// Clients with another token.
    var withoutToken: Set<Int> = []
    /// What a client believes, where that is not what the server believes.
    var seats: [Int: Seat] = [:]
    var placeCount = 1
    var timeout: Duration = .seconds(100)
    var patience = Patience()
  }

  struct Participant {
    var client: Client
    /// Where it wants to connect.
    var wantedPlace: Int?
    var link: Link?
    var outcome: Result<[[UInt8]], RendezvousError>?
  }

  /// Between a client and a connection of the server, or a stranger where there is none.
  struct Link {
    var connection: Server.Connection?
    var toServer: [UInt8] = []
    var toClient: [UInt8] = []
    var isClosedByServer = false
  }

  let options: Options
  private(set) var server: Server
  private(set) var serverOutcome: Result<[[UInt8]], RendezvousError>?
  private(set) var isListening = true
  /// By index; nothing at 0.
  private(set) var participants: [Participant?]
  /// Connections that the server has not dropped: the client's index, or nil for a stranger.
  private(set) var connections: [Server.Connection: Int?] = [:]
  private(set) var toStrangers: [Server.Connection: [UInt8]] = [:]
  /// What was ever sent in each direction over each link.
  private(set) var recordedToServer: [[UInt8]] = []
  private(set) var recordedToClient: [[UInt8]] = []
  private(set) var violations: [String] = []
  private var recordings: [Server.Connection: Int] = [:]
  private(set) var now: ContinuousClock.Instant
  let deadline: ContinuousClock.Instant
  private var nextConnection = 0
  private let secrets: [ArraySlice<UInt8>]
  private var nonceCount = 0

  static let token = Array("the token of this very simulation".utf8)

  /// Long enough to be recognized where it must not be seen.
  static func piece(_ index: Int) -> [UInt8] {
    (0..<40 + index).map { UInt8(truncatingIfNeeded: $0 * 37 + index * 101 + 11) }
  }

  init(_ options: Options) {
    self.options = options
    secrets = (0..<options.count).map { Self.piece($0).prefix(8) } + [Self.token.prefix(8)]
    now = .now
    deadline = now + options.timeout
    let key = JobKey(token: Self.token, job: "simulated")
    server = Server(
      key: key, seat: Seat(room: "start", index: 0, of: options.count), piece: Self.piece(0), now: now,
      deadline: deadline, patience: options.patience)
    participants = [nil]
    for index in 1..<options.count {
      let isWrong = options.withoutToken.contains(index)
      let client = Client(
        key: isWrong ? JobKey(token: Array("another token".utf8), job: "simulated") : key,
        seat: options.seats[index] ?? Seat(room: "start", index: index, of: options.count), piece: Self.piece(index),
        places: (0..<options.placeCount).map { "place \($0)" }, now: now, deadline: deadline,
        patience: options.patience)
      participants.append(Participant(client: client))
    }
    tick(.zero)
  }

  var clientIndices: Range<Int> { 1..<options.count }

  /// Nobody can claim to be this one rightly.
  func isRight(_ index: Int) -> Bool { !options.withoutToken.contains(index) && options.seats[index] == nil }

  // MARK: What can happen

  mutating func tick(_ duration: Duration) {
    now += duration
    perform(server.tick(now: now))
    for index in clientIndices { perform(participants[index]!.client.tick(now: now), of: index) }
    check()
    checkMemory()
  }

  /// The client's attempt to connect succeeds, and leads to the server (or to nobody, where that does not listen), or to
  /// a stranger.
  mutating func connect(_ index: Int, toStranger: Bool = false) {
    guard participants[index]!.wantedPlace != nil else { return }
    if !toStranger && !isListening { return refuse(index) }
    participants[index]!.wantedPlace = nil
    var link = Link()
    if !toStranger { link.connection = accept(index) }
    participants[index]!.link = link
    perform(participants[index]!.client.connected(nonce: nonce()), of: index)
    check()
  }

  mutating func refuse(_ index: Int) {
    guard participants[index]!.wantedPlace != nil else { return }
    participants[index]!.wantedPlace = nil
    perform(participants[index]!.client.ended(), of: index)
    check()
  }

  /// Bytes that a client has sent arrive.
  mutating func deliverToServer(_ index: Int, _ count: Int = .max) {
    guard var link = participants[index]!.link, let connection = link.connection else { return }
    let bytes = Array(link.toServer.prefix(count))
    guard !bytes.isEmpty else { return }
    link.toServer.removeFirst(bytes.count)
    participants[index]!.link = link
    if connections[connection] != nil { perform(server.received(connection, bytes)) }
    check()
  }

  /// Bytes for a client arrive, and behind the last the end.
  mutating func deliverToClient(_ index: Int, _ count: Int = .max) {
    guard var link = participants[index]!.link else { return }
    let bytes = Array(link.toClient.prefix(count))
    link.toClient.removeFirst(bytes.count)
    participants[index]!.link = link
    if !bytes.isEmpty { perform(participants[index]!.client.received(bytes), of: index) }
    if let left = participants[index]!.link, left.connection == link.connection, left.toClient.isEmpty {
      if left.isClosedByServer {
        participants[index]!.link = nil
        perform(participants[index]!.client.ended(), of: index)
      } else if let connection = left.connection, connections[connection] != nil, !bytes.isEmpty {
        perform(server.sent(connection))
      }
    }
    check()
  }

  /// The connection breaks, and what is on its way is lost.
  mutating func cut(_ index: Int) {
    guard let link = participants[index]!.link else { return }
    participants[index]!.link = nil
    if let connection = link.connection { end(connection) }
    perform(participants[index]!.client.ended(), of: index)
    check()
  }

  mutating func end(_ connection: Server.Connection) {
    if connections.removeValue(forKey: connection) != nil { perform(server.ended(connection)) }
    check()
  }

  /// What is on its way is changed.
  mutating func corrupt(_ index: Int, toServer: Bool, at offset: Int, _ mask: UInt8) {
    guard var link = participants[index]!.link else { return }
    if toServer, !link.toServer.isEmpty { link.toServer[offset % link.toServer.count] ^= mask }
    if !toServer, !link.toClient.isEmpty { link.toClient[offset % link.toClient.count] ^= mask }
    participants[index]!.link = link
  }

  /// Bytes come in between, to either end.
  mutating func inject(_ bytes: [UInt8], _ index: Int, toServer: Bool) {
    if toServer {
      participants[index]!.link?.toServer += bytes
    } else {
      participants[index]!.link?.toClient += bytes
    }
  }

  /// Somebody connects to the server; -1 where it does not listen.
  @discardableResult
  mutating func acceptStranger() -> Server.Connection { isListening ? accept(nil) : -1 }

  mutating func receive(_ bytes: [UInt8], from stranger: Server.Connection) {
    guard connections[stranger] == .some(.none), !bytes.isEmpty else { return }
    perform(server.received(stranger, bytes))
    checkMemory()
  }

  /// All that wants to happen happens, for a while.
  mutating func settle(rounds: Int = 12) {
    for _ in 0..<rounds {
      for index in clientIndices {
        connect(index)
        deliverToServer(index)
        deliverToClient(index)
      }
      tick(.milliseconds(20))
    }
  }

  /// The time is over for all.
  mutating func finish() {
    if now < deadline { tick(now.duration(to: deadline)) }
    // What is on its way at the end, each part waiting for the one before.
    for _ in 0..<4 * options.count where serverOutcome == nil { tick(options.patience.guest) }
    if serverOutcome == nil { violations.append("the server does not end") }
    for index in clientIndices where participants[index]!.outcome == nil {
      violations.append("client \(index) does not end")
    }
  }

  // MARK: Directives

  private mutating func nonce() -> Nonce {
    nonceCount += 1
    return Nonce(SHA256.digest(of: UInt64(nonceCount).bigEndianBytes))
  }

  private mutating func accept(_ index: Int?) -> Server.Connection {
    let connection = nextConnection
    nextConnection += 1
    connections[connection] = .some(index)
    recordings[connection] = recordedToServer.count
    recordedToServer.append([])
    recordedToClient.append([])
    perform(server.accepted(connection, nonce: nonce()))
    check()
    return connection
  }

  private mutating func perform(_ directives: [Server.Directive]) {
    for directive in directives {
      if serverOutcome != nil { violations.append("\(directive) after the server's end") }
      switch directive {
      case .send(let connection, let bytes): send(bytes, to: connection)
      case .drop(let connection):
        guard let index = connections.removeValue(forKey: connection) else {
          violations.append("a connection is dropped that is not there")
          continue
        }
        if let index { closeByServer(index, connection) }
      case .stopListening: isListening = false
      case .finish(let pieces): noteServer(.success(pieces))
      case .fail(let error): noteServer(.failure(error))
      }
    }
  }

  private mutating func send(_ bytes: [UInt8], to connection: Server.Connection) {
    guard let index = connections[connection] else {
      violations.append("something is sent to nobody")
      return
    }
    checkIsSecret(bytes)
    recordedToClient[recordings[connection]!] += bytes
    if let index {
      // Unless the client has closed it and the server does not know yet.
      if participants[index]!.link?.connection == connection { participants[index]!.link!.toClient += bytes }
    } else {
      toStrangers[connection, default: []] += bytes
      perform(server.sent(connection))
    }
  }

  private mutating func closeByServer(_ index: Int, _ connection: Server.Connection) {
    if participants[index]!.link?.connection == connection { participants[index]!.link!.isClosedByServer = true }
  }

  private mutating func noteServer(_ outcome: Result<[[UInt8]], RendezvousError>) {
    serverOutcome = outcome
    // Who comes for the next gather must not come to this one.
    if case .success = outcome, isListening { violations.append("the server finishes while it listens") }
    isListening = false
    for case (let connection, let index?) in connections { closeByServer(index, connection) }
    connections = [:]
    if case .success(let pieces) = outcome {
      checkPieces(pieces, of: "the server")
      if !clientIndices.allSatisfy(isRight) { violations.append("finished without all proofs") }
    }
  }

  private mutating func perform(_ directives: [Client.Directive], of index: Int) {
    for directive in directives {
      if participants[index]!.outcome != nil { violations.append("\(directive) after the end of client \(index)") }
      switch directive {
      case .connect(let place):
        if participants[index]!.wantedPlace != nil || participants[index]!.link != nil {
          violations.append("client \(index) connects twice")
        }
        if place >= options.placeCount { violations.append("client \(index) wants place \(place)") }
        participants[index]!.wantedPlace = place
      case .send(let bytes):
        checkIsSecret(bytes)
        if participants[index]!.link == nil { violations.append("client \(index) sends to nobody") }
        participants[index]!.link?.toServer += bytes
        if let connection = participants[index]!.link?.connection { recordedToServer[recordings[connection]!] += bytes }
      case .close:
        participants[index]!.wantedPlace = nil
        guard let link = participants[index]!.link else { continue }
        participants[index]!.link = nil
        guard let connection = link.connection, connections[connection] != nil else { continue }
        if !link.toServer.isEmpty { perform(server.received(connection, link.toServer)) }
        if connections.removeValue(forKey: connection) != nil { perform(server.ended(connection)) }
      case .finish(let pieces):
        participants[index]!.outcome = .success(pieces)
        checkPieces(pieces, of: "client \(index)")
        if !clientIndices.allSatisfy(isRight) { violations.append("client \(index) finished without all proofs") }
      case .fail(let error): participants[index]!.outcome = .failure(error)
      }
    }
  }

  // MARK: What must never be

  private mutating func checkPieces(_ pieces: [[UInt8]], of whom: String) {
    if pieces != (0..<options.count).map(Self.piece) { violations.append("\(whom) has pieces that nobody gave") }
  }

  /// No eight bytes of a piece or of the token are on the wire.
  private mutating func checkIsSecret(_ bytes: [UInt8]) {
    for secret in secrets where bytes.count >= 8 {
      for first in 0...bytes.count - 8 where bytes[first] == secret[0] && bytes[first..<first + 8] == secret {
        violations.append("a secret is on the wire")
      }
    }
  }

  private mutating func check() {
    let guestCountMax = Patience.strangerCountMax(participantCount: options.count) + options.count - 1
    if server.guestCount > guestCountMax { violations.append("\(server.guestCount) guests") }
    if server.guestCount > connections.count { violations.append("the server has guests without connections") }
  }

  private mutating func checkMemory() {
    let heldMax = server.guestCount * SealedChannel.frameByteCountMax + options.count * Message.partByteCountMax
    if server.heldByteCount > heldMax { violations.append("the server holds \(server.heldByteCount) bytes") }
    for index in clientIndices {
      let held = participants[index]!.client.heldByteCount
      if held > SealedChannel.frameByteCountMax + options.count * Message.partByteCountMax {
        violations.append("client \(index) holds \(held) bytes")
      }
    }
    if let next = server.nextTick, serverOutcome != nil { violations.append("a tick at \(next) after the end") }
  }
}
