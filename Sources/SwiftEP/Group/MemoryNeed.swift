/// Memory that a rank is about to take, and what it can have: compared over all ranks before anybody takes any.
struct MemoryNeed: Codable, Sendable {
  let neededByteCount: Int64
  /// Nil where the system does not say.
  let availableByteCount: Int64?
  /// What limits it: the same for ranks that take from the same.
  let domain: String

  /// Throws unless all ranks of each domain fit into it. The same on all ranks.
  static func check(_ needs: [MemoryNeed?]) throws(EPError) {
    for (rank, need) in needs.enumerated() {
      guard let need, let available = need.availableByteCount else { continue }
      let needed = needs.reduce(0) { $0 + ($1?.domain == need.domain ? $1!.neededByteCount : 0) }
      if needed > available {
        throw .outOfMemory(rank: rank, neededByteCount: needed, availableByteCount: available)
      }
    }
  }
}
