import Conformance
import Testing

@testable import Rendezvous

@Suite struct ProtocolTests {
  func complete(_ simulation: Simulation) {
    let pieces = (0..<simulation.options.count).map(Simulation.piece)
    #expect(simulation.serverOutcome == .success(pieces))
    for index in simulation.clientIndices { #expect(simulation.participants[index]!.outcome == .success(pieces)) }
    #expect(simulation.violations.isEmpty)
  }

  @Test(arguments: [2, 3, 17])
  func allCome(count: Int) {
    var simulation = Simulation(.init(count: count))
    simulation.settle(rounds: 6 + count)
    complete(simulation)
  }

  @Test func bytesOneByOne() {
    var simulation = Simulation(.init(count: 3))
    for _ in 0..<2000 {
      for index in simulation.clientIndices {
        simulation.connect(index)
        simulation.deliverToServer(index, 1)
        simulation.deliverToClient(index, 1)
      }
    }
    complete(simulation)
  }

  /// The listener's own piece may need many frames.
  @Test func aLongPiece() {
    let key = JobKey(token: Simulation.token, job: "")
    let long = (0..<100_000).map { UInt8(truncatingIfNeeded: $0 &* $0 >> 3) }
    let now = ContinuousClock.now
    var server = Server(
      key: key, seat: Seat(room: "join", index: 0, of: 2), piece: long, now: now, deadline: now + .seconds(1))
    var client = Client(
      key: key, seat: Seat(room: "join", index: 1, of: 2), piece: [7], places: ["p"], now: now,
      deadline: now + .seconds(1))
    #expect(client.tick(now: now) == [.connect(0)])
    var toClient = server.accepted(0, nonce: Nonce([UInt8](repeating: 1, count: 32)))
    var toServer = client.connected(nonce: Nonce([UInt8](repeating: 2, count: 32)))
    var (atServer, atClient): ([[UInt8]]?, [[UInt8]]?)
    while !toServer.isEmpty || !toClient.isEmpty {
      var answers: [Server.Directive] = []
      for case .send(let bytes) in toServer { answers += server.received(0, bytes) }
      toServer = []
      for directive in toClient + answers {
        if case .finish(let pieces) = directive { atServer = pieces }
        guard case .send(_, let bytes) = directive else { continue }
        #expect(bytes.count <= SealedChannel.frameByteCountMax)
        toServer += client.received(bytes)
      }
      for case .finish(let pieces) in toServer { atClient = pieces }
      toClient = answers.isEmpty && toClient.isEmpty ? [] : server.sent(0)
    }
    #expect(atServer == [long, [7]])
    #expect(atClient == [long, [7]])
  }

  // MARK: Who does not come

  @Test func theLowestMissingIsNamedByAll() {
    var simulation = Simulation(.init(count: 4, withoutToken: [2]))
    simulation.settle()
    #expect(simulation.serverOutcome == nil)
    // The notices are on their way by then.
    simulation.tick(.seconds(1))
    simulation.settle(rounds: 2)
    simulation.finish()
    #expect(simulation.serverOutcome == .failure(.missing(index: 2)))
    for index in [1, 3] { #expect(simulation.participants[index]!.outcome == .failure(.missing(index: 2))) }
    let found = "one that did not take this one's proof of the token"
    #expect(simulation.participants[2]!.outcome == .failure(.unproven(place: "place 0", found: found)))
    #expect(simulation.violations.isEmpty)
  }

  @Test func aServerThatNeverComes() {
    var simulation = Simulation(.init(count: 2, placeCount: 3))
    for _ in 0..<100 {
      simulation.refuse(1)
      simulation.tick(.milliseconds(100))
    }
    simulation.finish()
    #expect(simulation.participants[1]!.outcome == .failure(.missing(index: 0)))
  }

  /// Rather than by its own clock, a client learns of the end from the server.
  @Test func theEndIsTold() {
    var simulation = Simulation(.init(count: 3, withoutToken: [2]))
    simulation.settle()
    simulation.tick(.seconds(99))
    // Only the server's clock.
    simulation.deliverToClient(1)
    simulation.tick(.seconds(1))
    #expect(simulation.serverOutcome == .failure(.missing(index: 2)))
  }

  // MARK: Who is wrong

  @Test(arguments: [
    (Seat(room: "join", index: 1, of: 3), RendezvousError.roomsDiffer(expected: "start", found: "join")),
    (Seat(room: "start", index: 1, of: 5), .countsDiffer(index: 1, expected: 3, found: 5)),
    (Seat(room: "start", index: 2, of: 3), .taken(index: 2)),
    (Seat(room: "start", index: 0, of: 3), .taken(index: 0)),
  ])
  func seatsThatAreNotThere(_ seat: Seat, _ expected: RendezvousError) {
    var simulation = Simulation(.init(count: 3, seats: [1: seat]))
    for _ in 0..<4 {
      simulation.connect(2)
      simulation.deliverToServer(2)
      simulation.deliverToClient(2)
    }
    simulation.settle()
    #expect(simulation.participants[1]!.outcome == .failure(expected))
    // The job goes on waiting for the right one.
    #expect(simulation.serverOutcome == nil && simulation.participants[2]!.outcome == nil)
    simulation.finish()
    #expect(simulation.serverOutcome == .failure(.missing(index: 1)))
    #expect(simulation.violations.isEmpty)
  }

  @Test func aConnectionThatBreaksAtAnyByte() {
    for count in stride(from: 0, to: 400, by: 7) {
      var simulation = Simulation(.init(count: 3))
      simulation.settle(rounds: 0)
      simulation.connect(1)
      var left = count
      // Byte by byte, in turns.
      while left > 0 {
        simulation.deliverToServer(1, 1)
        simulation.deliverToClient(1, 1)
        left -= 1
      }
      simulation.cut(1)
      simulation.settle()
      complete(simulation)
    }
  }

  @Test func aServerOfAnotherVersion() {
    var simulation = Simulation(.init(count: 2))
    simulation.connect(1, toStranger: true)
    simulation.inject(Array("SwEPhost".utf8) + [9] + [UInt8](repeating: 1, count: 32), 1, toServer: false)
    simulation.deliverToClient(1)
    simulation.finish()
    let found = "one of version 9 of the protocol rather than 1"
    #expect(simulation.participants[1]!.outcome == .failure(.unproven(place: "place 0", found: found)))
  }

  /// Without the token there is no proof: none of bytes that somebody makes up, and none of the client's own.
  @Test(arguments: [false, true])
  func aServerWithoutProof(reflects: Bool) {
    var simulation = Simulation(.init(count: 2))
    simulation.connect(1, toStranger: true)
    simulation.inject(Array("SwEPhost".utf8) + [1] + [UInt8](repeating: 1, count: 32), 1, toServer: false)
    simulation.deliverToClient(1)
    let ownProof = Array(simulation.participants[1]!.link!.toServer.suffix(32))
    simulation.inject(reflects ? ownProof : [UInt8](repeating: 7, count: 32), 1, toServer: false)
    simulation.deliverToClient(1)
    #expect(simulation.participants[1]!.link == nil)
    simulation.finish()
    let expected = RendezvousError.unproven(place: "place 0", found: "one that does not know the token")
    #expect(simulation.participants[1]!.outcome == .failure(expected))
  }

  @Test func aClientOfAnotherVersionIsTold() {
    var simulation = Simulation(.init(count: 2))
    let stranger = simulation.acceptStranger()
    simulation.receive(Array("SwEPcall".utf8) + [9] + [UInt8](repeating: 1, count: 32), from: stranger)
    #expect(simulation.toStrangers[stranger]?.prefix(9) == Array("SwEPhost".utf8)[...] + [1])
    #expect(simulation.connections[stranger] == nil)
  }

  // MARK: Strangers

  @Test func garbageIsDroppedAtItsFirstWrongByte() {
    var simulation = Simulation(.init(count: 2))
    let stranger = simulation.acceptStranger()
    simulation.receive(Array("SwEP".utf8), from: stranger)
    #expect(simulation.connections[stranger] != nil)
    simulation.receive(Array("GET / HTTP/1.1".utf8), from: stranger)
    #expect(simulation.connections[stranger] == nil)
    simulation.settle()
    complete(simulation)
  }

  /// Who says nothing, or a byte a second, has to go.
  @Test func slowGuests() {
    var simulation = Simulation(.init(count: 2))
    let silent = simulation.acceptStranger()
    let slow = simulation.acceptStranger()
    for byte in Array("SwEPcall".utf8) {
      simulation.receive([byte], from: slow)
      simulation.tick(.seconds(1))
    }
    #expect(simulation.connections.count == 2)
    simulation.tick(.seconds(2))
    #expect(simulation.connections[silent] == nil && simulation.connections[slow] == nil)
    simulation.settle()
    complete(simulation)
  }

  /// Who has proven the token, and then keeps its piece to itself.
  @Test func aSlowMember() {
    var simulation = Simulation(.init(count: 2))
    simulation.connect(1)
    simulation.deliverToServer(1)
    simulation.deliverToClient(1)
    simulation.deliverToServer(1)
    #expect(simulation.server.guestCount == 1)
    simulation.tick(.seconds(10))
    #expect(simulation.server.guestCount == 0)
    simulation.settle()
    complete(simulation)
  }

  @Test func thousandsOfGuests() {
    var simulation = Simulation(.init(count: 3))
    simulation.connect(1)
    simulation.deliverToServer(1)
    simulation.deliverToClient(1)
    simulation.deliverToServer(1)
    for _ in 0..<5000 { simulation.acceptStranger() }
    #expect(simulation.server.guestCount <= Patience.strangerCountMax(participantCount: 3) + 2)
    simulation.settle()
    complete(simulation)
  }

  /// What was ever said, said again.
  @Test func replays() {
    var earlier = Simulation(.init(count: 3))
    earlier.settle()
    complete(earlier)
    var simulation = Simulation(.init(count: 3))
    // Other nonces than in the recording, as is always so.
    for _ in 0..<10 { simulation.acceptStranger() }
    for recording in earlier.recordedToServer {
      let stranger = simulation.acceptStranger()
      simulation.receive(recording, from: stranger)
      #expect(simulation.connections[stranger] == nil)
      let patient = simulation.acceptStranger()
      simulation.receive(Array(recording.prefix(Handshake.greetingByteCount)), from: patient)
      simulation.receive(Array(recording.dropFirst(Handshake.greetingByteCount)), from: patient)
      #expect(simulation.connections[patient] == nil)
    }
    for recording in earlier.recordedToClient {
      simulation.connect(1, toStranger: true)
      simulation.inject(recording, 1, toServer: false)
      simulation.deliverToClient(1)
      #expect(simulation.participants[1]!.link == nil && simulation.participants[1]!.outcome == nil)
      simulation.tick(.seconds(1))
    }
    simulation.settle()
    complete(simulation)
  }

  /// Its own words come back to a client, or the server's to it.
  @Test func reflections() {
    var simulation = Simulation(.init(count: 2))
    simulation.connect(1, toStranger: true)
    let own = simulation.participants[1]!.link!.toServer
    simulation.inject(own, 1, toServer: false)
    simulation.deliverToClient(1)
    #expect(simulation.participants[1]!.link == nil)
    simulation.settle()
    complete(simulation)
  }

  /// Whoever has come for the next gather must not be told that it is there already.
  @Test func whoComesAtTheEndComesForTheNext() {
    var simulation = Simulation(.init(count: 2))
    let stranger = simulation.acceptStranger()
    simulation.receive(Array("SwEPcall".utf8), from: stranger)
    simulation.settle()
    complete(simulation)
    #expect(!simulation.isListening)
    #expect(simulation.connections[stranger] == nil && simulation.toStrangers[stranger] == nil)
  }

  // MARK: Random programs

  /// Seeds are in the name of a failing case.
  @Test(arguments: 0..<100)
  func randomPrograms(seed: UInt64) {
    var random = SplitMix64(seed: seed)
    let program = (0..<random.pick(10...600)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    #expect(Interpreter.run(program).isEmpty, "seed \(seed)")
  }

  /// Random bytes into either end, after any number of right ones. Who has given its piece may be too late to come again.
  @Test(arguments: 0..<100, [false, true])
  func randomBytes(seed: UInt64, toServer: Bool) {
    var random = SplitMix64(seed: seed)
    var simulation = Simulation(.init(count: 2))
    simulation.connect(1)
    for _ in 0..<random.pick(0...3) {
      simulation.deliverToServer(1, random.pick(1...100))
      simulation.deliverToClient(1, random.pick(1...100))
    }
    let noise = (0..<random.pick(1...300)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    simulation.inject(noise, 1, toServer: toServer)
    for _ in 0..<4 {
      simulation.settle()
      simulation.tick(.seconds(11))
    }
    simulation.finish()
    #expect(simulation.violations.isEmpty)
    if toServer || simulation.participants[1]!.outcome == simulation.serverOutcome { complete(simulation) }
  }
}
