import Foundation
import MadeUpHosts
import Testing

@testable import HostFacts

private let mebibyte: Int64 = 1 << 20
private let gibibyte: Int64 = 1 << 30

@Suite struct MemoryLimitTests {
  private func groupLimits(_ host: MadeUpHost) -> [MemoryLimit] {
    host.tree.memoryLimits.filter { if case .controlGroup = $0.kind { true } else { false } }
  }

  private func paths(_ limits: [MemoryLimit]) -> [String] {
    limits.map { if case .controlGroup(let group) = $0.kind { group.path } else { "" } }
  }

  @Test func aHostWithoutGroups() throws {
    let host = try MadeUpHost.plain()
    #expect(
      host.tree.memoryLimits == [
        MemoryLimit(
          kind: .host, name: "\(MadeUpHost.bootID) host", byteCount: 16 * gibibyte, availableByteCount: 8 * gibibyte)
      ])
    #expect(host.tree.grantableByteCount == 8 * gibibyte - MemoryLimit.reserve)
  }

  @Test func aHostThatSaysNothing() throws {
    let host = try MadeUpHost()
    #expect(host.tree.memoryLimits == [] && host.tree.grantableByteCount == nil)
    try host.write("/proc/meminfo", "MemTotal: 5 kB\nMemAvailableX: 6 kB")
    #expect(host.tree.memoryLimits == [])
  }

  /// A host that promises no more than it has.
  @Test func commitment() throws {
    let host = try MadeUpHost.plain()
    try host.write("/proc/sys/vm/overcommit_memory", "2")
    let limit = try #require(host.tree.memoryLimits.last)
    #expect(limit.kind == .commitment)
    #expect(limit.byteCount == 10 * gibibyte && limit.availableByteCount == gibibyte)
    try host.write("/proc/sys/vm/overcommit_memory", "1")
    #expect(host.tree.memoryLimits.count == 1)
  }

  private func new(max: String, current: Int64, files: Int64 = 0, high: String = "max") -> [String: String] {
    [
      "memory.max": max, "memory.high": high, "memory.current": "\(current)",
      "memory.stat": "anon 1\ninactive_file \(files / 2)\nactive_file \(files / 2)\nshmem 77\nslab_reclaimable 0",
    ]
  }

  @Test func newGroups() throws {
    let host = try MadeUpHost.plain()
    try host.addNewGroups(
      path: "/a/b/c",
      [
        "/a/b/c": new(max: "max", current: 10),
        "/a/b": new(max: "\(4 * gibibyte)", current: 3 * gibibyte, files: gibibyte),
        "/a": new(max: "\(6 * gibibyte)", current: 5 * gibibyte, high: "\(5 * gibibyte)"),
        "/": ["memory.stat": "anon 1"],
      ])
    let limits = groupLimits(host)
    #expect(paths(limits) == ["/a/b", "/a"])
    #expect(limits.map(\.byteCount) == [4 * gibibyte, 5 * gibibyte])
    #expect(limits.map(\.availableByteCount) == [2 * gibibyte, 0])
    #expect(Set(limits.map(\.name)).count == 2)
    #expect(host.tree.grantableByteCount == 0)
  }

  /// What a container sees: its own group as the root.
  @Test(arguments: ["/", "/../../other", "/kubepods/pod1/container"])
  func aContainer(_ path: String) throws {
    let host = try MadeUpHost.plain()
    let mounts = "30 23 0:26 /kubepods/pod1/container /sys/fs/cgroup ro - cgroup2 cgroup rw"
    try host.addNewGroups(path: path, mounts: mounts, ["": new(max: "\(gibibyte)", current: mebibyte)])
    let limits = groupLimits(host)
    #expect(paths(limits) == ["/"])
    #expect(limits.first?.availableByteCount == gibibyte - mebibyte)
  }

  /// Of several mounts, the one that shows more groups.
  @Test func severalMounts() throws {
    let host = try MadeUpHost.plain()
    let mounts = """
      30 23 0:26 /a/b /mnt/part rw - cgroup2 cgroup rw
      31 23 0:26 /a /sys/fs/cgroup rw - cgroup2 cgroup rw
      32 23 0:26 /ab /mnt/other rw - cgroup2 cgroup rw
      """
    try host.addNewGroups(
      path: "/a/b", mounts: mounts,
      ["/b": new(max: "\(2 * gibibyte)", current: 0), "": new(max: "\(gibibyte)", current: 0)])
    #expect(paths(groupLimits(host)) == ["/b", "/"])
  }

  @Test func aMountWithABlankInItsName() throws {
    let host = try MadeUpHost.plain()
    try host.addNewGroups(path: "/a", mounts: #"30 23 0:26 / /mnt/c\040g rw - cgroup2 cgroup rw"#, [:])
    for (name, content) in new(max: "\(gibibyte)", current: 0) { try host.write("/mnt/c g/a/\(name)", content) }
    #expect(groupLimits(host).count == 1)
  }

  private func old(limit: Int64, usage: Int64, files: Int64 = 0) -> [String: String] {
    [
      "memory.limit_in_bytes": "\(limit)", "memory.usage_in_bytes": "\(usage)", "memory.use_hierarchy": "1",
      "memory.stat":
        "cache 5\ntotal_inactive_file \(files)\ntotal_active_file 0",
    ]
  }

  @Test func oldGroups() throws {
    let host = try MadeUpHost.plain()
    try host.addOldGroups(
      "memory", path: "/a/b",
      [
        "/a/b": old(limit: 2 * gibibyte, usage: gibibyte, files: 100 * mebibyte),
        "/a": old(limit: 3 * gibibyte, usage: gibibyte), "": old(limit: .max - 4095, usage: 9 * gibibyte),
      ])
    let limits = groupLimits(host)
    #expect(paths(limits) == ["/a/b", "/a"])
    #expect(limits.map(\.availableByteCount) == [gibibyte + 100 * mebibyte, 2 * gibibyte])
    // Groups of old kernels that do not limit what is below them.
    try host.write("/sys/fs/cgroup/memory/a/memory.use_hierarchy", "0")
    #expect(paths(groupLimits(host)) == ["/a/b"])
  }

  @Test func anOldContainer() throws {
    let host = try MadeUpHost.plain()
    try host.addOldGroups(
      "memory", path: "/docker/1234", root: "/docker/1234",
      ["": old(limit: 3 * gibibyte, usage: gibibyte)])
    let limits = groupLimits(host)
    #expect(limits.map(\.byteCount) == [3 * gibibyte] && limits.map(\.availableByteCount) == [2 * gibibyte])
  }

  /// Names are equal for those under the same limit, and for no others.
  @Test func names() throws {
    let host = try MadeUpHost.plain()
    let other = try MadeUpHost.plain()
    for each in [host, other] {
      try each.addNewGroups(path: "/a", ["/a": new(max: "\(gibibyte)", current: 0)])
    }
    let (first, second) = (host.tree.memoryLimits.map(\.name), other.tree.memoryLimits.map(\.name))
    #expect(first[0] == second[0] && first[1] != second[1])
    #expect(first == host.tree.memoryLimits.map(\.name))
    let linked = try MadeUpHost.plain()
    try linked.addNewGroups(path: "/a", [:])
    try FileManager.default.createSymbolicLink(
      at: linked.folder.appendingPathComponent("/sys"), withDestinationURL: host.folder.appendingPathComponent("/sys"))
    #expect(linked.tree.memoryLimits.map(\.name) == first)
  }

  /// This host, whatever it is.
  @Test func thisHost() throws {
    let limits = FileTree.host.memoryLimits
    let host = try #require(limits.first)
    #expect(host.kind == .host && host.byteCount > 0)
    for limit in limits { #expect((0...limit.byteCount).contains(limit.availableByteCount), "\(limit)") }
  }
}
