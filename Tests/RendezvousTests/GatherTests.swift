import Arena
import CPlatform
import Conformance
import Glibc
import HostMachine
import Testing

@testable import Rendezvous

/// Over real sockets, between threads. One at a time: each has many threads of its own.
@Suite(.serialized) struct GatherTests {
  static func piece(_ index: Int) -> [UInt8] { [UInt8](repeating: UInt8(index), count: 100 + index) }

  static func gather(
    _ count: Int, at place: MeetingPlace, room: String = "start", timeout: Duration = .seconds(60),
    after delays: [Int: UInt32] = [:]
  ) -> [Outcome] {
    outcomes(count) { index throws(RendezvousError) in
      if let delay = delays[index] { usleep(delay * 1000) }
      return try place.gather(piece(index), as: Seat(room: room, index: index, of: count), timeout: timeout)
    }
  }

  static func complete(_ count: Int) -> [Outcome] { Array(repeating: .success((0..<count).map(piece)), count: count) }

  @Test(arguments: [1, 2, 5, 16])
  func allCome(count: Int) throws {
    #expect(Self.gather(count, at: try newPlace()) == Self.complete(count))
  }

  @Test func theListenerComesLast() throws {
    #expect(Self.gather(3, at: try newPlace(), after: [0: 400]) == Self.complete(3))
  }

  /// The next begins while the last is ending for others.
  @Test func oneGatherAfterAnother() throws {
    let place = try newPlace()
    let results = outcomes(4) { index throws(RendezvousError) in
      for round in 0..<20 {
        let seat = Seat(room: "start", index: index, of: 4)
        let pieces = try place.gather([UInt8(round), UInt8(index)], as: seat, timeout: .seconds(60))
        if pieces != (0..<4).map({ [UInt8(round), $0] }) { return round }
      }
      return -1
    }
    #expect(results == Array(repeating: .success(-1), count: 4))
  }

  @Test func anotherListensNext() throws {
    let place = try newPlace()
    let results: [Outcome] = outcomes(3) { index throws(RendezvousError) in
      _ = try place.gather([], as: Seat(room: "start", index: index, of: 3), timeout: .seconds(60))
      // Who listened before has nothing to do with it.
      if index == 0 { return [] }
      return try place.gather(Self.piece(index), as: Seat(room: "join", index: 2 - index, of: 2), timeout: .seconds(60))
    }
    #expect(results[1] == .success([Self.piece(2), Self.piece(1)]))
    #expect(results[2] == results[1])
  }

  // MARK: Addresses

  static let hasIPv6 = SilentListener(at: .loopback6(port: 0)) != nil

  @Test(arguments: ["127.0.0.1", "localhost", "127.0.0.2", "[::1]"])
  func addresses(_ host: String) throws {
    if host == "[::1]" && !Self.hasIPv6 { return }
    let token = try Token.random()
    let address = try HostAndPort("\(host):\(firstPort(of: token))", from: "a test")
    #expect(Self.gather(3, at: MeetingPlace(token: token, address: address)) == Self.complete(3))
  }

  @Test func anAddressOfNobody() throws {
    // Documentation has it; no host does.
    let place = try newPlace(address: try HostAndPort("192.0.2.1:20000", from: "a test"))
    let outcome = Self.gather(2, at: place, timeout: .milliseconds(500))[0]
    guard case .failure(.badAddress("192.0.2.1:20000", "an address to listen at", _)) = outcome else {
      Issue.record("\(outcome)")
      return
    }
  }

  @Test func anUnknownHost() throws {
    let place = try newPlace(address: try HostAndPort("no-such-host.invalid:20000", from: "a test"))
    for outcome in Self.gather(2, at: place, timeout: .seconds(2)) {
      guard case .failure(.badAddress("no-such-host.invalid:20000", "a host with an address", _)) = outcome else {
        Issue.record("\(outcome)")
        return
      }
    }
  }

  /// Somebody else has the port, and takes connections without a word.
  @Test func aPortThatIsTaken() throws {
    let token = try Token.random()
    let holders = (0..<2).compactMap { SilentListener(at: .loopback(port: firstPort(of: token, $0))) }
    #expect(Self.gather(3, at: MeetingPlace(token: token)) == Self.complete(3))
    withExtendedLifetime(holders) {}
  }

  @Test func theOnlyPortIsTaken() throws {
    let token = try Token.random()
    let port = firstPort(of: token)
    let holder = SilentListener(at: .loopback(port: port))
    let place = MeetingPlace(token: token, address: try HostAndPort("127.0.0.1:\(port)", from: "a test"))
    let outcomes = Self.gather(2, at: place, timeout: .seconds(2))
    let found = "Address already in use"
    #expect(
      outcomes[0]
        == .failure(.badAddress("127.0.0.1:\(port)", expected: "an address to listen at", found: found)))
    #expect(outcomes[1] == .failure(.missing(index: 0)))
    withExtendedLifetime(holder) {}
  }

  // MARK: Who is missing, who is wrong

  @Test func theLowestMissingIsNamedByAll() throws {
    let place = try newPlace()
    let results = outcomes(2) { index throws(RendezvousError) in
      try place.gather([], as: Seat(room: "start", index: index * 2, of: 4), timeout: .seconds(2))
    }
    #expect(results == Array(repeating: .failure(.missing(index: 1)), count: 2))
  }

  @Test func nobodyListens() throws {
    let seat = Seat(room: "start", index: 1, of: 2)
    let place = try newPlace()
    #expect(throws: RendezvousError.missing(index: 0)) { try place.gather([], as: seat, timeout: .milliseconds(300)) }
    #expect(throws: RendezvousError.missing(index: 0)) { try place.gather([], as: seat, timeout: .zero) }
    #expect(throws: RendezvousError.missing(index: 0)) { try place.gather([], as: seat, timeout: .seconds(-1)) }
  }

  @Test func piecesThatAreTooLong() throws {
    let place = try newPlace()
    #expect(throws: RendezvousError.pieceTooLong(byteCountMax: 4096, found: 4097)) {
      try place.gather(
        [UInt8](repeating: 0, count: 4097), as: Seat(room: "start", index: 1, of: 2), timeout: .seconds(1))
    }
  }

  /// Each claims a seat that another has, or that is not there; all others meet as if nothing was.
  @Test func impostorsAreTold() throws {
    let place = try newPlace()
    let seats = [
      Seat(room: "start", index: 0, of: 4), Seat(room: "start", index: 1, of: 4), Seat(room: "start", index: 2, of: 4),
      // Too late, or wrong.
      Seat(room: "start", index: 0, of: 4), Seat(room: "start", index: 1, of: 4), Seat(room: "start", index: 1, of: 3),
      Seat(room: "join", index: 1, of: 2),
      // After all of these.
      Seat(room: "start", index: 3, of: 4),
    ]
    let results = outcomes(seats.count) { number throws(RendezvousError) in
      usleep(number < 3 ? 0 : number == 7 ? 2_500_000 : 1_000_000)
      return try place.gather([UInt8(number)], as: seats[number], timeout: .seconds(60))
    }
    let pieces: Outcome = .success([[0], [1], [2], [7]])
    #expect([0, 1, 2, 7].map { results[$0] } == Array(repeating: pieces, count: 4))
    #expect(results[3] == .failure(.taken(index: 0)))
    #expect(results[4] == .failure(.taken(index: 1)))
    #expect(results[5] == .failure(.countsDiffer(index: 1, expected: 4, found: 3)))
    #expect(results[6] == .failure(.roomsDiffer(expected: "start", found: "join")))
  }

  @Test func anotherToken() throws {
    let token = try Token.random()
    let address = try HostAndPort("127.0.0.1:\(firstPort(of: token))", from: "a test")
    let place = MeetingPlace(token: token, address: address)
    let other = MeetingPlace(token: try Token.random(), address: address)
    let results = outcomes(3) { number throws(RendezvousError) in
      if number == 2 { return try other.gather([], as: Seat(room: "start", index: 1, of: 2), timeout: .seconds(1)) }
      if number == 1 { usleep(2_000_000) }
      return try place.gather([], as: Seat(room: "start", index: number, of: 2), timeout: .seconds(60))
    }
    #expect(results[0] == .success([[], []]) && results[1] == results[0])
    let found = "one that did not take this one's proof of the token"
    #expect(results[2] == .failure(.unproven(place: "\(address)", found: found)))
  }

  /// Jobs of one token keep apart by their names.
  @Test func anotherJob() throws {
    let token = try Token.random()
    let results = outcomes(4) { number throws(RendezvousError) in
      let place = MeetingPlace(token: token, job: number < 2 ? "a" : "b")
      return try place.gather(
        [UInt8(number)], as: Seat(room: "start", index: number % 2, of: 2), timeout: .seconds(60))
    }
    #expect(results == [[[0], [1]], [[0], [1]], [[2], [3]], [[2], [3]]].map { .success($0) })
  }

  /// Gives up, and is there again before the others have come.
  @Test func oneThatComesAgain() throws {
    let place = try newPlace()
    let results = outcomes(3) { index throws(RendezvousError) in
      let seat = Seat(room: "start", index: index, of: 3)
      if index == 2 { usleep(1_500_000) }
      if index == 1 {
        #expect(throws: RendezvousError.self) { try place.gather([9], as: seat, timeout: .milliseconds(700)) }
      }
      return try place.gather([UInt8(index)], as: seat, timeout: .seconds(60))
    }
    #expect(results == Array(repeating: .success([[0], [1], [2]]), count: 3))
  }

  // MARK: Disturbances

  /// Whose peer is gone learns it; no signal ends its process.
  @Test func writingToWhoIsGone() throws {
    let token = try Token.random()
    let address = SocketAddress.loopback(port: firstPort(of: token))
    let listener = try #require(SilentListener(at: address))
    var connection = RawConnection(to: address)
    #expect(connection != nil)
    var accepted = StreamSocket(Descriptor(owning: swiftep_accept(listener.descriptor.raw)))
    connection?.reset()
    connection = nil
    var progress = StreamSocket.Progress.done
    // The first write may come before the news.
    for _ in 0..<100 where progress != .ended {
      accepted.enqueue([1])
      progress = accepted.flush()
      usleep(1000)
    }
    #expect(progress == .ended)
    // The error was told once; from now on it is a broken pipe.
    accepted.enqueue([1])
    #expect(accepted.flush() == .ended)
    #expect(accepted.receive() == nil)
  }

  /// While one is still awaited, everybody else does all that a stranger can do.
  @Test func disturbances() throws {
    let token = try Token.random()
    let address = SocketAddress.loopback(port: firstPort(of: token))
    let isOver = Guarded(false)
    let disturbers = (0..<3).map { kind in
      startThread {
        var random = SplitMix64(seed: UInt64(kind))
        var held: [RawConnection] = []
        while !isOver.withLock({ $0 }) {
          guard let connection = RawConnection(to: address) else {
            usleep(1000)
            continue
          }
          switch kind {
          case 0:
            connection.send((0..<random.pick(1...3000)).map { _ in UInt8(truncatingIfNeeded: random.next()) })
          case 1:
            // Half of a handshake, and then the hard way out, while an answer is on its way.
            connection.send(Handshake.Greeting.bytes(of: .client, Nonce([UInt8](repeating: 1, count: 32))))
            if random.chance(0.5) { _ = connection.receive() }
            connection.reset()
          default:
            held.append(connection)
            if held.count > 200 { held.removeFirst(100) }
          }
          usleep(200)
        }
      }!
    }
    let results = Self.gather(4, at: MeetingPlace(token: token), after: [2: 1500])
    isOver.withLock { $0 = true }
    for thread in disturbers { pthread_join(thread, nil) }
    #expect(results == Self.complete(4))
  }
}
