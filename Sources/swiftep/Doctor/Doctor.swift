import Arena
import Glibc
import HostFacts
import Rendezvous
import SwiftEP

/// Looks at a host, and says what a job would find there. All that it knows is given to it.
struct Doctor {
  let job: JobSpec
  let plan: ExpertBuffer.Plan
  let files: FileTree
  let environment: [String: String]
  let probes: Probes
  let user: UInt32
  /// Cores that this process may run on.
  let allowedCoreCount: Int

  func checks() -> [Check] {
    coreChecks + memoryChecks + limitChecks + kernelChecks + [launcherCheck] + gpuChecks
  }

  /// What a process needs to be a rank: threads of its workers, of its stream and of its connections.
  var threadsPerRank: Int { max(1, allowedCoreCount / job.rankCount) + 2 }
}

// MARK: Cores

extension Doctor {
  private var coreChecks: [Check] {
    let present = files.presentCoreCount ?? allowedCoreCount
    let isCrowded = job.rankCount > allowedCoreCount
    let cores = Check(
      name: "cores", state: isCrowded ? .warning : .ok, found: "\(allowedCoreCount) of \(present) usable",
      needed: "\(job.rankCount), one a rank",
      remedy: isCrowded ? "ranks take turns; use fewer, or allow more cores (taskset, --cpuset-cpus)" : "")
    guard let quota = files.coreQuota else { return [cores, Check(name: "core quota", found: "none")] }
    let isTight = quota < Double(min(allowedCoreCount, job.rankCount))
    let remedy = "ranks are stopped while they wait for each other; raise the control group's quota (--cpus, cpu.max)"
    return [
      cores,
      Check(
        name: "core quota", state: isTight ? .warning : .ok,
        found: "\(quota.rounded(toPlaces: 2)) cores' worth of time",
        needed: "\(job.rankCount), one a rank", remedy: isTight ? remedy : ""),
    ]
  }
}

// MARK: Memory

extension Doctor {
  /// What all ranks take together, as processes, which have page tables each.
  private var neededByteCount: Int64 {
    Int64(job.rankCount) * plan.systemByteCount(mappedArenaCount: job.rankCount)
  }

  private var memoryChecks: [Check] {
    let limits = files.memoryLimits
    let needed = "\(binaryUnits(neededByteCount)) for the ranks, \(binaryUnits(MemoryLimit.reserve)) left over"
    var checks = limits.map { limit in
      let isEnough = neededByteCount <= limit.grantableByteCount
      return Check(
        name: limit.title, state: isEnough ? .ok : .failed,
        found: "\(binaryUnits(limit.availableByteCount)) of \(binaryUnits(limit.byteCount)) available", needed: needed,
        remedy: isEnough ? "" : limit.remedy, blocks: isEnough ? [] : [.threads, .processes])
    }
    if limits.isEmpty {
      checks.append(
        Check(
          name: "memory", state: .warning, found: "/proc/meminfo does not say", needed: needed,
          remedy: "mount /proc; without it, memory is not compared before it is taken"))
    }
    if !limits.contains(where: { if case .controlGroup = $0.kind { true } else { false } }) {
      checks.append(Check(name: "memory of control groups", found: "not limited"))
    }
    return checks + [hugePages]
  }

  private var hugePages: Check {
    let folder = "/sys/kernel/mm"
    let settings = [("shared memory", "shmem_enabled"), ("other", "enabled")].compactMap { title, name -> String? in
      // As in "always [madvise] never".
      let choices = files.text("\(folder)/transparent_hugepage/\(name)")?.split(separator: " ") ?? []
      return choices.first { $0.hasPrefix("[") }.map { "\(title) \($0.dropFirst().dropLast())" }
    }
    let pools = files.names(in: "\(folder)/hugepages").sorted().compactMap { name -> String? in
      guard let count = files.integer("\(folder)/hugepages/\(name)/nr_hugepages"), count > 0 else { return nil }
      let free = files.integer("\(folder)/hugepages/\(name)/free_hugepages") ?? 0
      return "\(free) of \(count) reserved ones of \(name.dropFirst("hugepages-".count)) free"
    }
    let found = settings + pools
    return Check(
      name: "huge pages", found: found.isEmpty ? "not known to this kernel" : found.joined(separator: ", "),
      needed: "none; arenas have them where shared memory has")
  }
}

extension MemoryLimit {
  fileprivate var title: String {
    switch kind {
    case .host: "memory"
    case .commitment: "memory commitment"
    case .controlGroup(let group): "memory of \(group.path) (v\(group.version.rawValue))"
    }
  }

  fileprivate var remedy: String {
    switch kind {
    case .host: "fewer ranks, tokens or results (swiftep plan), or end what else takes memory"
    case .commitment: "sysctl vm.overcommit_memory=0, or a larger vm.overcommit_ratio"
    case .controlGroup(let group):
      group.version == .v1
        ? "raise memory.limit_in_bytes of the group (docker --memory, SLURM --mem)"
        : "raise memory.max and memory.high of the group (docker --memory, SLURM --mem, systemd MemoryMax)"
    }
  }
}

// MARK: Launchers

extension Doctor {
  var launcher: String? { Rendezvous.Launcher.find(in: environment)?.rawValue }

  /// Whether a rank that is started here finds the others, if by what a launcher tells it.
  private var launcherCheck: Check {
    guard let launcher else { return Check(name: "launcher", state: .ok, found: "no variables of one") }
    do throws(InputFault) {
      let job = try JobEnvironment(environment)
      return Check(name: "launcher", state: .ok, found: "\(launcher): rank \(job.rank) of \(job.rankCount)")
    } catch {
      return Check(
        name: "launcher", state: .warning, found: "\(launcher): \(error.subject): \(error.found)",
        needed: "\(error.subject): \(error.expected)", remedy: "start ranks by a launcher, or set the variable")
    }
  }
}
