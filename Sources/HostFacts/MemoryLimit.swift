/// Something that limits how much memory processes take together.
package struct MemoryLimit: Equatable, Sendable {
  package enum Kind: Equatable, Sendable {
    /// The host's own memory.
    case host
    /// What the host has promised at most, where it is set to keep its promises.
    case commitment
    case controlGroup(ControlGroup)
  }

  package let kind: Kind
  /// Of this limit alone: the same exactly for processes that are under the same one.
  package let name: String
  package let byteCount: Int64
  /// What can be had yet: free, or given back by caches on demand. Swap space does not count: memory that kernels and
  /// peers work on is not to be swapped.
  package let availableByteCount: Int64

  /// Left over for everybody else, and for what the system itself takes along.
  package static let reserve: Int64 = 64 << 20

  package var grantableByteCount: Int64 { max(0, availableByteCount - Self.reserve) }
}

extension FileTree {
  /// All that limits the memory that this process can have. Empty where the system does not say.
  package var memoryLimits: [MemoryLimit] {
    let boot = bootID ?? "unknown"
    var limits = hostLimits(boot)
    for group in controlGroups(of: "memory") {
      guard let identity = identity(of: group.folder), let (limit, available) = limit(of: group) else { continue }
      limits.append(
        MemoryLimit(
          kind: .controlGroup(group), name: "\(boot) cgroup \(identity)", byteCount: limit,
          availableByteCount: max(0, available)))
    }
    return limits
  }

  /// What a process can take yet without being killed for it; nil where the system does not say.
  package var grantableByteCount: Int64? { memoryLimits.map(\.grantableByteCount).min() }

  private func hostLimits(_ boot: String) -> [MemoryLimit] {
    guard let memory = TitledNumbers(self, "/proc/meminfo"), let total = memory["MemTotal:"],
      let available = memory["MemAvailable:"]
    else { return [] }
    var limits = [
      MemoryLimit(kind: .host, name: "\(boot) host", byteCount: total, availableByteCount: available)
    ]
    if integer("/proc/sys/vm/overcommit_memory") == 2, let limit = memory["CommitLimit:"],
      let committed = memory["Committed_AS:"]
    {
      limits.append(
        MemoryLimit(
          kind: .commitment, name: "\(boot) commitment", byteCount: limit,
          availableByteCount: max(0, limit - committed)))
    }
    return limits
  }

  /// What a group may use, and can have yet; nil where it has no limit.
  private func limit(of group: ControlGroup) -> (limit: Int64, available: Int64)? {
    let (limits, use, caches): ([String], String, [String])
    switch group.version {
    case .v1:
      limits = ["memory.limit_in_bytes"]
      use = "memory.usage_in_bytes"
      caches = ["total_inactive_file", "total_active_file"]
    case .v2:
      // Beyond the second, processes are slowed down until they hardly move.
      limits = ["memory.max", "memory.high"]
      use = "memory.current"
      caches = ["inactive_file", "active_file", "slab_reclaimable"]
    }
    // Without a limit it is the word "max", or as many pages as a number counts.
    guard let limit = limits.compactMap({ integer("\(group.folder)/\($0)") }).min(), limit < 1 << 62,
      let used = integer("\(group.folder)/\(use)")
    else { return nil }
    let statistics = TitledNumbers(self, "\(group.folder)/memory.stat")
    let reclaimable = caches.reduce(0) { $0 + (statistics?[$1] ?? 0) }
    return (limit, limit - used + min(reclaimable, used))
  }
}
