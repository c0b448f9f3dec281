import Foundation
import HostFacts
import MadeUpHosts
import Testing

@Suite struct HostTests {
  @Test(arguments: [("0-7", 8), ("0", 1), ("0-3,8,10-11", 7)])
  func presentCores(_ text: String, _ count: Int) throws {
    let host = try MadeUpHost(["/sys/devices/system/cpu/online": text])
    #expect(host.tree.presentCoreCount == count)
  }

  @Test func noQuota() throws {
    let host = try MadeUpHost.plain()
    #expect(host.tree.coreQuota == nil)
    try host.addNewGroups(path: "/a", ["/a": ["cpu.max": "max 100000"]])
    #expect(host.tree.coreQuota == nil)
    try host.addOldGroups("cpu", path: "/a", ["/a": ["cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"]])
    #expect(host.tree.coreQuota == nil)
  }

  /// The tightest counts.
  @Test func quotas() throws {
    let host = try MadeUpHost.plain()
    try host.addNewGroups(
      path: "/a/b", ["/a/b": ["cpu.max": "max 100000"], "/a": ["cpu.max": "150000 100000"], "": ["cpu.max": "9 1"]])
    #expect(host.tree.coreQuota == 1.5)
    try host.addOldGroups(
      "cpu,cpuacct", path: "/a",
      [
        "/a": ["cpu.cfs_quota_us": "25000", "cpu.cfs_period_us": "50000"],
        "": ["cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "50000"],
      ])
    #expect(host.tree.coreQuota == 0.5)
    #expect(usableCoreCount(host.tree) == 1)
  }

  @Test func limits() throws {
    let host = try MadeUpHost([
      "/proc/self/limits": """
      Limit                     Soft Limit           Hard Limit           Units
      Max file size             1024                 unlimited            bytes
      Max open files            20000                30000                files
      Max address space         unlimited            unlimited            bytes
      """
    ])
    let files = try #require(host.tree.limit(.openFiles))
    #expect(files.soft == 20000 && files.hard == 30000)
    let size = try #require(host.tree.limit(.fileSize))
    #expect(size.soft == 1024 && size.hard == nil)
    #expect(host.tree.limit(.addressSpace) == nil && host.tree.limit(.processes) == nil)
    #expect(FileTree.host.limit(.openFiles) != nil)
  }

  @Test func titledNumbers() {
    let numbers = TitledNumbers(Array("ab: 3 kB\nab 5\nabc\t7\nd:x\nhuge 99999999999999999999\n".utf8))
    #expect(numbers["ab:"] == 3072 && numbers["ab"] == 5 && numbers["abc"] == 7)
    #expect(numbers["a"] == nil && numbers["d:"] == nil && numbers["huge"] == nil)
  }

  @Test func files() throws {
    let host = try MadeUpHost(["/a/long": String(repeating: "x", count: 10000), "/a/blank": "  \n\n"])
    #expect(host.tree.text("/a/long")?.count == 10000)
    #expect(host.tree.text("/a/blank") == "")
    #expect(host.tree.text("/a") == nil && host.tree.text("/b") == nil)
    #expect(host.tree.names(in: "/a").sorted() == ["blank", "long"])
    #expect(host.tree.names(in: "/b") == [] && host.tree.link("/a/long") == nil)
  }

  @Test func thisHost() throws {
    let host = FileTree.host
    #expect(host.bootID?.count == 36)
    #expect(host.namespace("net")?.hasPrefix("net:[") == true)
    #expect(try #require(host.presentCoreCount) >= usableCoreCount())
    #expect(try #require(host.residentByteCount) > 0)
    #expect(host.kernelVersion?.isEmpty == false)
  }
}
