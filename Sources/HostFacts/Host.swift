import CPlatform

extension FileTree {
  /// Different for every start of every host; nil where the system does not say.
  package var bootID: String? {
    guard let id = text("/proc/sys/kernel/random/boot_id"), !id.isEmpty else { return nil }
    return id
  }

  /// As `kind:[number]`; kinds are "net", "pid" and others.
  package func namespace(_ kind: String) -> String? { link("/proc/self/ns/\(kind)") }

  package var kernelVersion: String? { text("/proc/sys/kernel/osrelease") }

  package var processorName: String {
    let line = lines("/proc/cpuinfo").first { $0.hasPrefix("model name") }
    let name = line?.split(separator: ":", maxSplits: 1).last?.split(separator: " ")
    return name?.map(\.text).joined(separator: " ") ?? "unknown"
  }

  /// Memory of this process that is in RAM, shared pages counted in part. Bytes.
  package var residentByteCount: Int64? { TitledNumbers(self, "/proc/self/smaps_rollup")?["Pss:"] }

  /// Cores that this host has in use, whoever may run on them.
  package var presentCoreCount: Int? {
    text("/sys/devices/system/cpu/online").map { text in
      text.split(separator: ",").reduce(0) { count, range in
        let ends = range.split(separator: "-").compactMap { Int($0) }
        return count + (ends.count == 2 ? ends[1] - ends[0] + 1 : ends.count)
      }
    }
  }

  /// Cores' worth of time that the control groups grant; nil where they do not limit it.
  package var coreQuota: Double? {
    controlGroups(of: "cpu").compactMap { group -> Double? in
      let numbers: [Double?]
      switch group.version {
      case .v1:
        numbers = ["quota", "period"].map { integer("\(group.folder)/cpu.cfs_\($0)_us").map { Double($0) } }
      case .v2:
        numbers = text("\(group.folder)/cpu.max").map { $0.split(separator: " ").map { Double($0) } } ?? []
      }
      guard numbers.count == 2, let quota = numbers[0], let period = numbers[1], quota > 0, period > 0 else {
        return nil
      }
      return quota / period
    }.min()
  }
}

/// Cores that this process may run on at the same time.
package func usableCoreCount(_ files: FileTree = .host) -> Int {
  let allowed = Int(swiftep_usable_core_count())
  return max(1, min(allowed, files.coreQuota.map { Int($0.rounded(.up)) } ?? allowed))
}
