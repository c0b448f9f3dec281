import Arena
import Glibc
import HostFacts

extension Doctor {
  var kernelChecks: [Check] {
    [
      Check(name: "kernel", found: files.kernelVersion ?? "unknown"),
      check(
        "memory files", probes.memoryFiles, works: "created, sealed, mapped twice", needed: "for every arena",
        remedy: "Linux 3.17 or newer; a seccomp filter of a container may refuse memfd_create",
        blocks: [.threads, .processes]),
      check(
        "populating", probes.populating, works: "MADV_POPULATE_WRITE", needed: "to take memory before it is touched",
        remedy: "Linux 5.14 or newer; without it, a lack of memory shows at the first touch", blocks: []),
      check(
        "futexes", probes.futexes, works: "waited for and woken", needed: "for ranks that wait",
        remedy: "a seccomp filter of a container may refuse futex", blocks: [.threads, .processes]),
      check(
        "sockets", probes.sockets, works: "abstract ones, SO_PEERCRED, SCM_RIGHTS", needed: "between processes",
        remedy: "allow Unix sockets in this network namespace (seccomp, AppArmor)", blocks: [.processes]),
      bootID, networkNamespace, processNamespace, inspection,
    ]
  }

  private func check(
    _ name: String, _ outcome: Probes.Outcome, works: String, needed: String, remedy: String, blocks: [JobPath]
  ) -> Check {
    guard let refusal = outcome else { return Check(name: name, found: works, needed: needed) }
    return Check(
      name: name, state: blocks.isEmpty ? .warning : .failed, found: text(refusal), needed: needed, remedy: remedy,
      blocks: blocks)
  }

  private func text(_ refusal: SystemCallError) -> String {
    "\(refusal.call): \(String(cString: strerror(refusal.code)))"
  }

  private var bootID: Check {
    guard let id = files.bootID else {
      return Check(
        name: "boot id", state: .warning, found: "none", needed: "to tell whether ranks are on one host",
        remedy: "mount /proc: /proc/sys/kernel/random/boot_id")
    }
    return Check(name: "boot id", found: id, needed: "the same for all ranks")
  }

  private var networkNamespace: Check {
    Check(
      name: "network namespace", found: files.namespace("net") ?? "unknown", needed: "the same for all ranks")
  }

  private var processNamespace: Check {
    // The number that the first one always has.
    let isHosts = files.namespace("pid") == "pid:[4026531836]"
    let found = files.namespace("pid").map { $0 + (isHosts ? ", the host's" : ", a container's") } ?? "unknown"
    return Check(name: "process namespace", found: found, needed: "ranks may have different ones")
  }

  private var inspection: Check {
    var conditions: [String] = []
    if let scope = files.text("/proc/sys/kernel/yama/ptrace_scope") { conditions.append("ptrace_scope \(scope)") }
    if let mode = TitledNumbers(files, "/proc/self/status")?["Seccomp:"], mode > 0 {
      conditions.append("seccomp \(mode)")
    }
    let suffix = conditions.isEmpty ? "" : " (\(conditions.joined(separator: ", ")))"
    guard let refusal = probes.inspection else {
      return Check(name: "inspection", found: "allowed" + suffix, needed: "for swiftep inspect")
    }
    return Check(
      name: "inspection", state: .missing, found: text(refusal) + suffix, needed: "for swiftep inspect",
      remedy: "run swiftep inspect as the ranks' user, in their container, or as root")
  }
}
