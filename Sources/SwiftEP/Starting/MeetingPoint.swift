import Rendezvous

/// Where the processes of a job find each other, and the token by which they know each other.
///
/// The lowest rank listens there while a group is made, or waits for somebody who joins, and at no other time. What is
/// exchanged is encrypted; who connects without proving to know the token is ignored.
public struct MeetingPoint: Sendable {
  let place: MeetingPlace

  /// - Parameters:
  ///   - token: what the ranks share and prove to each other.
  ///   - address: `host:port` or `[v6]:port`, where the lowest rank listens. Nil: on the loopback address, at a port
  ///     that follows from `token` and `job`, or one of a few others where that one is in use.
  ///   - job: keeps jobs that have the same token and no address apart.
  /// - Throws: `invalidArgument` where the address is none.
  public init(token: JobToken, address: String? = nil, job: String = "") throws(EPError) {
    let parsed = try EPError.mapping { () throws(InputFault) in
      try address.map { text throws(InputFault) in try HostAndPort(text, from: "address") }
    }
    place = MeetingPlace(token: token.token, address: parsed, job: job)
  }

  init(_ place: MeetingPlace) { self.place = place }

  /// Rooms of it: what a gather is for.
  private static let start = "start"
  private static let join = "join"

  /// How the ranks of a new group meet.
  func gather(rank: Int, rankCount: Int, timeout: Duration) -> ([UInt8]) throws -> [[UInt8]] {
    { bytes in try place.gather(bytes, as: Seat(room: Self.start, index: rank, of: rankCount), timeout: timeout) }
  }

  /// How a group and somebody new meet.
  var meeting: Group.Meeting {
    { index, bytes, timeout in
      try place.gather(bytes, as: Seat(room: Self.join, index: index, of: 2), timeout: timeout)
    }
  }
}
