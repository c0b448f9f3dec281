import HostFacts

/// Memory that a rank is about to take, and all that limits it: compared over all ranks before anybody takes any.
struct MemoryNeed: Codable, Sendable {
  let neededByteCount: Int64
  /// Empty where the system does not say.
  let domains: [Domain]

  /// A limit, which ranks can share.
  struct Domain: Codable, Sendable {
    /// The same exactly for ranks that take from the same.
    let name: String
    /// As this rank has seen it, before anybody took anything.
    let availableByteCount: Int64
  }

  init(neededByteCount: Int64, domains: [Domain]) {
    self.neededByteCount = neededByteCount
    self.domains = domains
  }

  init(neededByteCount: Int64, limits: [MemoryLimit]) {
    self.init(
      neededByteCount: neededByteCount,
      domains: limits.map { Domain(name: $0.name, availableByteCount: $0.grantableByteCount) })
  }

  /// Throws unless all ranks of each domain fit into it: the same on all ranks. The error's rank is the first of the
  /// ranks that do not fit, its bytes are those that all of them need, and can have.
  static func check(_ needs: [MemoryNeed?]) throws(EPError) {
    var sums: [String: (needed: Int64, available: Int64)] = [:]
    for case let need? in needs {
      for domain in need.domains {
        let (needed, available) = sums[domain.name] ?? (0, .max)
        sums[domain.name] = (needed + need.neededByteCount, min(available, domain.availableByteCount))
      }
    }
    for (rank, need) in needs.enumerated() {
      for domain in need?.domains ?? [] {
        let (needed, available) = sums[domain.name]!
        if needed > available {
          throw .outOfMemory(rank: rank, neededByteCount: needed, availableByteCount: available)
        }
      }
    }
  }
}
