import Foundation
import HostFacts

/// A host that is made up of files in a folder.
package final class MadeUpHost {
  package let folder: URL

  /// - Parameter files: contents by absolute paths.
  package init(_ files: [String: String] = [:]) throws {
    folder = FileManager.default.temporaryDirectory.appendingPathComponent("host-\(UUID().uuidString)")
    for (path, content) in files { try write(path, content) }
  }

  deinit { try? FileManager.default.removeItem(at: folder) }

  package var tree: FileTree { FileTree(root: folder.path) }

  package func write(_ path: String, _ content: String) throws {
    let file = folder.appendingPathComponent(path)
    try FileManager.default.createDirectory(at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data((content + "\n").utf8).write(to: file)
  }

  package static let meminfo = """
    MemTotal:       16777216 kB
    MemFree:         1048576 kB
    MemAvailable:    8388608 kB
    CommitLimit:    10485760 kB
    Committed_AS:    9437184 kB
    HugePages_Total:       4
    """

  /// A host with so much memory to give, and nothing else.
  package static func granting(_ byteCount: Int64) throws -> MadeUpHost {
    let kilobytes = (byteCount + MemoryLimit.reserve) / 1024
    return try MadeUpHost(["/proc/meminfo": "MemTotal: \(kilobytes) kB\nMemAvailable: \(kilobytes) kB"])
  }

  package static let bootID = "4d6d5ec2-3b55-4e22-9d61-0f7b5e6a4a10"

  /// A host without limits.
  package static func plain() throws -> MadeUpHost {
    try MadeUpHost(["/proc/meminfo": meminfo, "/proc/sys/kernel/random/boot_id": bootID])
  }

  // MARK: Control groups

  private static let mount2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"

  /// The process is in `path` of the new hierarchy; `groups` have their files by their paths.
  package func addNewGroups(path: String, mounts: String? = nil, _ groups: [String: [String: String]]) throws {
    try write("/proc/self/cgroup", "0::\(path)")
    try write("/proc/self/mountinfo", "23 1 8:1 / / rw - ext4 /dev/root rw\n" + (mounts ?? Self.mount2))
    for (group, files) in groups {
      for (name, content) in files { try write("/sys/fs/cgroup\(group)/\(name)", content) }
    }
  }

  /// As `addNewGroups`, in the old hierarchy of `controllers`, beside an empty new one.
  package func addOldGroups(
    _ controllers: String, path: String, root: String = "/", _ groups: [String: [String: String]]
  ) throws {
    try write("/proc/self/cgroup", "12:\(controllers):\(path)\n1:name=systemd:/x\n0::/somewhere/else")
    try write(
      "/proc/self/mountinfo",
      """
      31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
      32 31 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
      33 31 0:30 \(root) /sys/fs/cgroup/\(controllers) rw,nosuid shared:9 - cgroup cgroup rw,\(controllers)
      """)
    for (group, files) in groups {
      for (name, content) in files { try write("/sys/fs/cgroup/\(controllers)\(group)/\(name)", content) }
    }
  }
}
