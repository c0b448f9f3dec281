import Arena
import CPlatform
import Glibc

/// Where the processes of a job find each other: an address, or by default one of a few ports of this host that only who
/// knows the token can tell; and the token.
package struct MeetingPlace: Sendable {
  private let key: JobKey
  private let address: HostAndPort?

  /// - Parameters:
  ///   - address: where participant 0 listens. Nil: on this host's loopback address.
  ///   - job: keeps jobs with the same token apart.
  package init(token: Token, address: HostAndPort? = nil, job: String = "") {
    key = token.key(for: job)
    self.address = address
  }

  /// Gives every participant's piece to every participant, by index. Collective.
  ///
  /// - Parameter piece: at most `Seat.pieceByteCountMax` bytes.
  package func gather(
    _ piece: [UInt8], as seat: Seat, timeout: Duration, patience: Patience = Patience()
  ) throws(RendezvousError) -> [[UInt8]] {
    let byteCountMax = Seat.pieceByteCountMax(ofIndex: seat.index)
    guard piece.count <= byteCountMax else {
      throw .pieceTooLong(byteCountMax: byteCountMax, found: piece.count)
    }
    if seat.count == 1 { return [piece] }
    // A century is as good as for ever, and no sum of a time and this overflows.
    let deadline = ContinuousClock.now + min(max(.zero, timeout), .seconds(3_155_760_000))
    let places = try places(until: deadline)
    if seat.index == 0 {
      let listener = try listen(at: places, for: seat, until: deadline)
      let server = Server(
        key: key, seat: seat, piece: piece, now: .now, deadline: deadline, patience: patience)
      return try ServerLoop.run(server, on: listener)
    }
    return try join(at: places, as: seat, with: piece, until: deadline, patience)
  }

  private func join(
    at places: [SocketAddress], as seat: Seat, with piece: [UInt8], until deadline: ContinuousClock.Instant,
    _ patience: Patience
  ) throws(RendezvousError) -> [[UInt8]] {
    let client = Client(
      key: key, seat: seat, piece: piece, places: places.map(\.description), now: .now, deadline: deadline,
      patience: patience)
    return try ClientLoop.run(client, places: places)
  }

  // MARK: Places

  private static let portCount = 6

  /// Participant 0 listens at the first that it can have; the others try each.
  private func places(until deadline: ContinuousClock.Instant) throws(RendezvousError) -> [SocketAddress] {
    if let address { return try NameLookup.addresses(of: address, until: deadline) }
    let ports = key.ports(count: Self.portCount)
    // The last is for hosts without IPv4.
    return ports.map { SocketAddress.loopback(port: $0) } + [.loopback6(port: ports[0])]
  }

  /// How long another's socket at the only place is waited for to go away.
  private static let listenPatience: Duration = .seconds(5)
  private static let probePatience: Duration = .milliseconds(500)

  private func listen(
    at places: [SocketAddress], for seat: Seat, until deadline: ContinuousClock.Instant
  ) throws(RendezvousError) -> Descriptor {
    let end = min(deadline, .now + Self.listenPatience)
    while true {
      var failure: (place: SocketAddress, code: Int32)?
      for place in places {
        let raw = place.withPointer { swiftep_listen_tcp($0, $1) }
        if raw >= 0 { return Descriptor(owning: raw) }
        let code = errno
        if code == EADDRINUSE { try checkIsForeign(place, seat) }
        // That a place is in use says more than that there is none.
        if failure?.code != EADDRINUSE { failure = (place, code) }
      }
      guard let failure, failure.code == EADDRINUSE, .now < end else {
        let (place, code) = failure!
        throw .badAddress("\(place)", expected: "an address to listen at", found: errorText(code))
      }
      usleep(20_000)
    }
  }

  /// Throws if who listens at `place` is this job's participant 0: then this process is not.
  private func checkIsForeign(_ place: SocketAddress, _ seat: Seat) throws(RendezvousError) {
    do throws(RendezvousError) {
      _ = try join(at: [place], as: seat, with: [], until: .now + Self.probePatience, Patience())
    } catch {
      if error == .taken(index: 0) { throw error }
    }
  }
}
