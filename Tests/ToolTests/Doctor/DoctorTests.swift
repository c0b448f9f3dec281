import Arena
import Foundation
import HostFacts
import MadeUpHosts
import Testing

@testable import swiftep

@Suite struct DoctorTests {
  static let healthy = Probes(
    memoryFiles: nil, populating: nil, sockets: nil, futexes: nil, inspection: nil, gpu: .noLibrary("not there"))

  static let limits = """
    Limit                     Soft Limit           Hard Limit           Units
    Max file size             unlimited            unlimited            bytes
    Max processes             1000                 1000                 processes
    Max open files            1024                 1048576              files
    Max locked memory         8388608              8388608              bytes
    Max address space         unlimited            unlimited            bytes
    """

  /// 16 GiB of memory, 8 of them available, 8 cores.
  func host() throws -> MadeUpHost {
    let host = try MadeUpHost.plain()
    try host.write("/proc/self/limits", Self.limits)
    try host.write("/proc/sys/kernel/osrelease", "6.1.0")
    try host.write("/sys/devices/system/cpu/online", "0-7")
    return host
  }

  func report(
    _ host: MadeUpHost, _ words: [String] = [], environment: [String: String] = [:], user: UInt32 = 1000,
    coreCount: Int = 8, change: (inout Probes) -> Void = { _ in }
  ) throws -> DoctorReport {
    var probes = Self.healthy
    change(&probes)
    let job = try JobSpec(try Arguments(parsing: words, flags: JobSpec.flags))
    let report = DoctorReport(
      Doctor(
        job: job, plan: try job.plan(staging: .unplanned), files: host.tree, environment: environment, probes: probes,
        user: user, allowedCoreCount: coreCount))
    withExtendedLifetime(host) {}
    return report
  }

  func check(_ report: DoctorReport, _ name: String) throws -> Check {
    try #require(report.checks.first { $0.name == name }, "\(report.checks.map(\.name))")
  }

  @Test func aHealthyHost() throws {
    let report = try report(try host())
    for check in report.checks where check.name != "GPU" {
      #expect(check.state == .ok && check.remedy.isEmpty && check.blocks.isEmpty, "\(check)")
    }
    #expect(report.path == .threads && report.isPossible)
    #expect(report.ways.map(\.path) == JobPath.allCases && report.ways.map(\.isPossible) == [true, true, false])
    #expect(Set(report.checks.map(\.name)).count == report.checks.count)
    let table = report.table()
    for check in report.checks { #expect(table.contains("\(check.state.rawValue) ") && table.contains(check.name)) }
    #expect(table.contains("a job takes threads of one process:"))
    #expect(!table.contains("->"))
  }

  @Test func everythingHasAName() throws {
    let report = try report(try host())
    #expect(
      report.checks.map(\.name) == [
        "cores", "core quota", "memory", "memory of control groups", "huge pages", "open files", "address space",
        "file size", "locked memory", "processes and threads", "kernel", "memory files", "populating", "futexes",
        "sockets", "boot id", "network namespace", "process namespace", "inspection", "launcher", "GPU",
      ])
  }

  // MARK: Cores

  @Test func cores() throws {
    let host = try host()
    let crowded = try check(try report(host, ["--ranks", "9"]), "cores")
    #expect(crowded.state == .warning && crowded.found == "8 of 8 usable" && !crowded.remedy.isEmpty)
    #expect(try check(try report(host, coreCount: 3), "cores").found == "3 of 8 usable")
    try host.addNewGroups(path: "/a", ["/a": ["cpu.max": "150000 100000"]])
    let quota = try check(try report(host), "core quota")
    #expect(quota.state == .warning && quota.found == "1.50 cores' worth of time")
    #expect(try check(try report(host, ["--ranks", "1"]), "core quota").state == .ok)
  }

  // MARK: Memory

  /// 8 GiB are available: what two ranks fit into is too little for 64.
  @Test func memory() throws {
    let host = try host()
    let report = try report(host, ["--ranks", "64"])
    let memory = try check(report, "memory")
    #expect(memory.state == .failed && memory.blocks == [.threads, .processes])
    #expect(
      memory.found == "8.0 GiB of 16.0 GiB available"
        && memory.needed.hasSuffix("GiB for the ranks, 64.0 MiB left over"))
    #expect(!report.isPossible && report.obstacles == ["memory"])
    #expect(report.ways[0].why == "not possible: see memory" && report.ways[1].why == "not possible: see memory")
  }

  @Test func memoryOfGroups() throws {
    let host = try host()
    try host.addNewGroups(
      path: "/a/b",
      [
        "/a": ["memory.max": "1073741824", "memory.current": "1000000000", "memory.stat": "inactive_file 0"],
        "/a/b": ["memory.max": "4294967296", "memory.current": "0"],
      ])
    let report = try report(host)
    #expect(try check(report, "memory").state == .ok)
    #expect(try check(report, "memory of /a/b (v2)").state == .ok)
    let tight = try check(report, "memory of /a (v2)")
    #expect(tight.state == .failed && tight.found == "70.3 MiB of 1.0 GiB available")
    #expect(tight.remedy.contains("memory.max"))
    try host.addOldGroups(
      "memory", path: "/x", ["/x": ["memory.limit_in_bytes": "104857600", "memory.usage_in_bytes": "0"]])
    let old = try check(try self.report(host), "memory of /x (v1)")
    #expect(old.state == .failed && old.remedy.contains("memory.limit_in_bytes"))
  }

  @Test func commitment() throws {
    let host = try host()
    try host.write("/proc/sys/vm/overcommit_memory", "2")
    let check = try check(try report(host, ["--ranks", "5"]), "memory commitment")
    #expect(check.state == .failed && check.remedy.contains("vm.overcommit_memory"))
  }

  @Test func hugePages() throws {
    let host = try host()
    #expect(try check(try report(host), "huge pages").found == "not known to this kernel")
    try host.write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    try host.write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force")
    try host.write("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4")
    try host.write("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3")
    try host.write("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0")
    #expect(
      try check(try report(host), "huge pages").found
        == "shared memory advise, other madvise, 3 of 4 reserved ones of 2048kB free")
  }

  // MARK: Limits

  /// Threads need fewer descriptors than processes.
  @Test func openFiles() throws {
    let host = try host()
    try host.write("/proc/self/limits", "Max open files  64  4096  files")
    let threads = try report(host, ["--ranks", "16", "--tokens", "8"])
    let files = try check(threads, "open files")
    #expect(files.state == .failed && files.blocks == [.processes] && files.remedy == "ulimit -n 80")
    #expect(threads.path == .threads && threads.isPossible && !threads.ways[1].isPossible)
    let processes = try report(
      host, ["--ranks", "16", "--tokens", "8"], environment: ["SWIFTEP_RANK": "0", "SWIFTEP_RANK_COUNT": "16"])
    #expect(processes.path == .processes && !processes.isPossible && processes.obstacles == ["open files"])
    try host.write("/proc/self/limits", "Max open files  40  64  files")
    let hard = try check(try report(host, ["--ranks", "16", "--tokens", "8"]), "open files")
    #expect(hard.blocks == [.threads, .processes] && hard.remedy.hasPrefix("ulimit -n 80, as root"))
  }

  @Test func sizes() throws {
    let host = try host()
    try host.write(
      "/proc/self/limits",
      "Max file size  1048576  unlimited  bytes\nMax address space  1073741824  unlimited  bytes")
    let report = try report(host)
    for (name, remedy) in [("file size", "ulimit -f unlimited"), ("address space", "ulimit -v unlimited")] {
      let check = try check(report, name)
      #expect(check.state == .failed && check.remedy == remedy && check.blocks == [.threads, .processes])
    }
    #expect(report.obstacles == ["address space", "file size"])
    let small = ["--tokens", "8", "--hidden", "64"]
    #expect(try check(try self.report(host, small), "file size").state == .ok)
    let large = try check(
      try self.report(host, ["--ranks", "200", "--tokens", "1000", "--hidden", "1048576"]), "address space")
    #expect(large.state == .failed && large.found == "128 TiB")
  }

  @Test func processes() throws {
    let host = try host()
    for (process, user, threads) in [(1, 0, 500), (20, 1000, 900), (21, 1000, 98), (22, 1001, 7)] {
      try host.write("/proc/\(process)/status", "Name:\tx\nUid:\t\(user)\t0\t0\t0\nThreads:\t\(threads)")
    }
    let tight = try check(try report(host), "processes and threads")
    #expect(tight.state == .failed && tight.found == "998 of 1,000 of this user" && tight.remedy.hasPrefix("ulimit -u"))
    #expect(try check(try report(host, user: 1001), "processes and threads").state == .ok)
    #expect(try check(try report(host, user: 0), "processes and threads").found == "not limited")
    try host.addNewGroups(path: "/a/b", ["/a": ["pids.max": "20", "pids.current": "17"], "/a/b": ["pids.max": "max"]])
    let group = try check(try report(host, user: 0), "processes and threads")
    #expect(group.state == .failed && group.found == "17 of 20 of control group /a")
    #expect(group.remedy.contains("pids.max"))
  }

  // MARK: What the system refuses

  @Test func refusals() throws {
    let refusal = SystemCallError(call: "some_call", code: EPERM)
    let cases: [(String, WritableKeyPath<Probes, Probes.Outcome>, Check.State, [JobPath])] = [
      ("memory files", \.memoryFiles, .failed, [.threads, .processes]), ("populating", \.populating, .warning, []),
      ("futexes", \.futexes, .failed, [.threads, .processes]), ("sockets", \.sockets, .failed, [.processes]),
      ("inspection", \.inspection, .missing, []),
    ]
    for (name, probe, state, blocks) in cases {
      let report = try report(try host()) { $0[keyPath: probe] = refusal }
      let check = try check(report, name)
      #expect(check.state == state && check.blocks == blocks, "\(check)")
      #expect(check.found == "some_call: Operation not permitted" && !check.remedy.isEmpty)
      #expect(report.isPossible == !blocks.contains(.threads))
      #expect(report.table().contains("-> \(check.remedy)"))
    }
  }

  @Test func conditionsOfInspection() throws {
    let host = try host()
    try host.write("/proc/sys/kernel/yama/ptrace_scope", "1")
    try host.write("/proc/self/status", "Seccomp:\t2")
    #expect(try check(try report(host), "inspection").found == "allowed (ptrace_scope 1, seccomp 2)")
  }

  // MARK: Launchers

  @Test func launchers() throws {
    let host = try host()
    var environment = [
      "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SWIFTEP_TOKEN": "a secret of some length", "PATH": "/bin",
    ]
    let report = try report(host, environment: environment)
    #expect(report.path == .processes && report.ways[1].why == "started by SLURM's srun")
    #expect(try check(report, "launcher").found == "SLURM's srun: rank 3 of 8")
    #expect(!String(decoding: try report.json(), as: UTF8.self).contains("a secret"))
    let half = try check(try self.report(host, environment: ["RANK": "1"]), "launcher")
    #expect(half.state == .warning && half.needed.hasPrefix("WORLD_SIZE: an integer"))
    environment["SWIFTEP_TOKEN"] = nil
    let untold = try check(try self.report(host, environment: environment), "launcher")
    #expect(untold.state == .warning && untold.needed.hasPrefix("SWIFTEP_TOKEN: a secret that all ranks have"))
    #expect(try check(try self.report(host), "launcher").found == "no variables of one")
  }

  // MARK: GPUs

  @Test func gpus() throws {
    let host = try host()
    try host.write(
      "/proc/driver/nvidia/version",
      "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:09:07 UTC 2025\nGCC version: gcc 12")
    try host.write("/dev/nvidia0", "")
    try host.write("/dev/nvidia1", "")
    try host.write("/dev/nvidiactl", "")
    let gpu = Probes.GPU(name: "NVIDIA H100 80GB HBM3", byteCount: 85_017_493_504)
    let found = try report(host) { $0.gpu = .gpus([gpu, gpu], driverVersion: 13000) }
    #expect(try check(found, "GPU driver").found == "kernel module 580.65.06, CUDA 13.0")
    #expect(try check(found, "GPUs").found == "2 x NVIDIA H100 80GB HBM3, 79.2 GiB")
    #expect(found.ways.contains { $0.path == .gpu && $0.isPossible && $0.why.contains("sm_80") })
    #expect(try check(found, "GPU peer access").found == "between all")
    let apart = Probes.GPU(name: gpu.name, byteCount: gpu.byteCount, unreached: [0, 1])
    let pairs = try check(
      try report(host) { $0.gpu = .gpus([gpu, gpu, apart], driverVersion: 13000) }, "GPU peer access")
    #expect(pairs.state == .warning && pairs.found == "none between 0 and 2, 1 and 2")
    #expect(pairs.needed.contains("pinned host memory"))
    let single = try report(host) { $0.gpu = .gpus([gpu], driverVersion: 13000) }
    #expect(single.checks.allSatisfy { $0.name != "GPU peer access" })
    let none = try report(host) { $0.gpu = .gpus([], driverVersion: 12040) }
    #expect(try check(none, "GPUs").state == .missing)
    #expect(none.ways.contains { $0.path == .gpu && !$0.isPossible })
    let refused = try check(
      try report(host) { $0.gpu = .refused("cuInit: CUDA_ERROR_X (803)", driverVersion: 12040) }, "GPU driver")
    #expect(refused.state == .warning)
    #expect(refused.found == "kernel module 580.65.06, 2 devices, CUDA 12.4; cuInit: CUDA_ERROR_X (803)")
    let library = try check(try report(host), "GPU driver")
    #expect(library.state == .warning && library.remedy.contains("--gpus all"))
    let bare = try check(
      try report(try self.host()) { $0.gpu = .refused("cuInit: no", driverVersion: 0) }, "GPU driver")
    #expect(bare.found == "no kernel module, 0 devices, no CUDA version; cuInit: no")
    #expect(try check(try report(try self.host()), "GPU").state == .missing)
  }

  // MARK: The command

  @Test func thisHost() throws {
    let words = ["doctor", "--tokens", "16", "--hidden", "64"]
    let table = try Binary.run(words)
    #expect(table.status == 0, "\(table.output)\(table.errors)")
    #expect(table.output.contains("memory files") && table.output.contains("a job takes "))
    let json = try Binary.run(words + ["--json"])
    #expect(json.status == 0)
    let report = try JSONDecoder().decode(DoctorReport.self, from: Data(json.output.utf8))
    #expect(report.isPossible)
    for name in ["memory files", "futexes", "sockets"] { #expect(try check(report, name).state == .ok) }
    let value = try JSONSerialization.jsonObject(with: Data(json.output.utf8))
    let object = try #require(value as? [String: Any])
    #expect(Set(object.keys) == ["job", "checks", "path", "isPossible", "ways"])
    let checks = try #require(object["checks"] as? [[String: Any]])
    for check in checks { #expect(Set(check.keys) == ["name", "state", "found", "needed", "remedy", "blocks"]) }
  }

  @Test func anImpossibleJob() throws {
    let run = try Binary.run(["doctor", "--json", "--ranks", "256", "--tokens", "1000000"])
    #expect(run.status == 1)
    #expect(run.errors.hasPrefix("swiftep: check failed: such a job cannot run here: memory"), "\(run.errors)")
    let report = try JSONDecoder().decode(DoctorReport.self, from: Data(run.output.utf8))
    #expect(!report.isPossible && report.obstacles.contains("memory"))
  }
}
