import HostFacts
import SwiftEP

extension Doctor {
  var limitChecks: [Check] { [openFiles, addressSpace, fileSize, lockedMemory, processes] }

  private var openFiles: Check {
    let ranks = Int64(job.rankCount)
    // A process: a connection to each other rank and its arena's file while it is mapped; the launcher: two pipes of each
    // rank, and a handle.
    let (process, threads) = (3 * ranks + 32, ranks + 32)
    return check(
      .openFiles, "open files", needed: process, "descriptors a process", command: "ulimit -n \(process)",
      blocks: { soft in soft < threads ? [.threads, .processes] : [.processes] })
  }

  private var addressSpace: Check {
    let needed = Int64(job.rankCount) * plan.arenaByteCountMax + 1 << 30
    let neededText = "\(binaryUnits(needed)): every arena as far as it may grow"
    // What a processor of any kind can address; the limit can only be lower.
    if needed > Self.addressSpaceByteCount {
      return Check(
        name: "address space", state: .failed, found: binaryUnits(Self.addressSpaceByteCount), needed: neededText,
        remedy: "a lower arenaByteCountMax of the plan", blocks: [.threads, .processes])
    }
    return check(
      .addressSpace, "address space", needed: needed, neededText,
      command: "ulimit -v unlimited", isInBytes: true, blocks: { _ in [.threads, .processes] })
  }

  private static let addressSpaceByteCount: Int64 = 1 << 47

  private var fileSize: Check {
    check(
      .fileSize, "file size", needed: plan.arenaByteCount, "\(binaryUnits(plan.arenaByteCount)): an arena is a file",
      command: "ulimit -f unlimited", isInBytes: true, blocks: { _ in [.threads, .processes] })
  }

  private var lockedMemory: Check {
    let found = files.limit(.lockedMemory).map { binaryUnits($0.soft) } ?? "not limited"
    return Check(name: "locked memory", found: found, needed: "none")
  }

  private func check(
    _ limit: ResourceLimit, _ name: String, needed: Int64, _ what: String, command: String, isInBytes: Bool = false,
    blocks: (_ soft: Int64) -> [JobPath]
  ) -> Check {
    let neededText = isInBytes ? what : "\(needed.grouped) \(what)"
    guard let (soft, hard) = files.limit(limit) else {
      return Check(name: name, found: "not limited", needed: neededText)
    }
    let found = isInBytes ? binaryUnits(soft) : soft.grouped
    if soft >= needed { return Check(name: name, found: found, needed: neededText) }
    let isAllowed = hard == nil || hard! >= needed
    let remedy = isAllowed ? command : "\(command), as root (the hard limit, limits.conf or LimitNOFILE and the like)"
    return Check(name: name, state: .failed, found: found, needed: neededText, remedy: remedy, blocks: blocks(soft))
  }

  /// The user's limit, which is not root's, and the control groups'.
  private var processes: Check {
    let needed = Int64(job.rankCount * threadsPerRank)
    let neededText = "\(needed.grouped) more"
    var room: [(free: Int64, text: String, remedy: String)] = []
    if user != 0, let (soft, _) = files.limit(.processes) {
      let used = userThreadCount
      room.append((soft - used, "\(used.grouped) of \(soft.grouped) of this user", "ulimit -u \(used + 2 * needed)"))
    }
    for group in files.controlGroups(of: "pids") {
      guard let limit = files.integer("\(group.folder)/pids.max"),
        let used = files.integer("\(group.folder)/pids.current")
      else { continue }
      room.append(
        (
          limit - used, "\(used.grouped) of \(limit.grouped) of control group \(group.path)",
          "raise pids.max of the control group (docker --pids-limit, systemd TasksMax)"
        ))
    }
    guard let tightest = room.min(by: { $0.free < $1.free }) else {
      return Check(name: "processes and threads", found: "not limited", needed: neededText)
    }
    let isEnough = tightest.free >= needed
    return Check(
      name: "processes and threads", state: isEnough ? .ok : .failed, found: tightest.text, needed: neededText,
      remedy: isEnough ? "" : tightest.remedy, blocks: isEnough ? [] : [.threads, .processes])
  }

  private var userThreadCount: Int64 {
    files.names(in: "/proc").reduce(0) { count, name in
      guard name.first?.isNumber == true, let status = TitledNumbers(files, "/proc/\(name)/status"),
        status["Uid:"] == Int64(user)
      else { return count }
      return count + (status["Threads:"] ?? 1)
    }
  }
}
