import CPlatform
import Glibc
import HostFacts

/// How a process introduces itself to those that it is to share memory with.
struct Card: Equatable, Codable, Sendable {
  let id: MemberID
  /// The abstract socket on which it takes control connections, and what to say there.
  let socketName: String
  let secret: String
  /// What has to be the same for memory and sockets to be shared.
  let version: Int
  let bootID: String
  let networkNamespace: String
  let user: UInt32
  /// What may differ.
  let processNamespace: String
  let process: Int32

  static let version = 1

  /// This process's, for a group that it is about to enter.
  static func make(rank: Int) throws(EPError) -> Card {
    Card(
      id: try random(rank: rank), socketName: "swiftep-\(try hex(rank: rank))", secret: try hex(rank: rank),
      version: version, bootID: FileTree.host.bootID ?? "unknown",
      networkNamespace: FileTree.host.namespace("net") ?? "unknown", user: geteuid(),
      processNamespace: FileTree.host.namespace("pid") ?? "unknown", process: getpid())
  }

  /// Throws unless a process with this card can share memory with those that have the others.
  static func check(_ cards: [Card]) throws(EPError) {
    let first = cards[0]
    for (rank, card) in cards.enumerated() {
      try require("the library's version", rank, "\(first.version)", "\(card.version)")
      try require("the host (its boot id)", rank, first.bootID, card.bootID)
      try require("the network namespace", rank, first.networkNamespace, card.networkNamespace)
      try require("the user (its id)", rank, "\(first.user)", "\(card.user)")
    }
    guard Set(cards.map(\.id)).count == cards.count else {
      throw .invalidArgument(
        rank: -1, argument: "allGather", expected: "what every rank passed, in rank order", found: "one rank's twice")
    }
  }

  private static func require(_ what: String, _ rank: Int, _ expected: String, _ found: String) throws(EPError) {
    if expected != found { throw .ranksDisagree(about: what, rank: rank, expected: expected, found: found) }
  }

  private static func random(rank: Int) throws(EPError) -> UInt64 {
    var number: UInt64 = 0
    guard swiftep_random(&number, 8) == 0 else { throw .systemCall(rank: rank, name: "getrandom", code: errno) }
    return number
  }

  /// 128 bits.
  private static func hex(rank: Int) throws(EPError) -> String {
    String(try random(rank: rank), radix: 16) + String(try random(rank: rank), radix: 16)
  }
}
