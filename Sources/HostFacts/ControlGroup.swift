/// A control group that this process is in, of one controller: itself, or one that the process's own is part of.
package struct ControlGroup: Equatable, Sendable {
  package enum Version: Int, Sendable {
    case v1 = 1
    case v2 = 2
  }

  package let version: Version
  /// Where its files are.
  package let folder: String
  /// As the system names it; from within a container, as the container sees it.
  package let path: String
}

extension FileTree {
  /// The control groups of this process that limit it by `controller` ("memory", "cpu", "pids"), its own first.
  package func controlGroups(of controller: String) -> [ControlGroup] {
    // number:controller,controller:path
    let memberships = lines("/proc/self/cgroup").map { $0.split(separator: ":", maxSplits: 2) }
      .filter { $0.count == 3 }
    // A controller belongs to the old hierarchy or to the new one, never to both.
    let old = memberships.first { $0[1].split(separator: ",").contains(Word(controller)) }
    guard let membership = old ?? memberships.first(where: { $0[0] == "0" && $0[1] == "" }) else { return [] }
    let version: ControlGroup.Version = old == nil ? .v2 : .v1
    guard let (mount, path) = place(membership[2].text, version, controller) else { return [] }

    var groups: [ControlGroup] = []
    var below = path.split(separator: "/")
    while true {
      let suffix = below.map { "/" + $0 }.joined()
      groups.append(ControlGroup(version: version, folder: mount + suffix, path: suffix.isEmpty ? "/" : suffix))
      if below.popLast() == nil { break }
    }
    if version == .v1 && controller == "memory" {
      // Groups of old kernels limit those below them only where they say so.
      let limiting = groups.dropFirst().prefix { integer($0.folder + "/memory.use_hierarchy") != 0 }
      groups = Array(groups.prefix(1) + limiting)
    }
    return groups
  }

  /// Where the hierarchy is mounted, and the path of the process's group below that.
  private func place(
    _ path: String, _ version: ControlGroup.Version, _ controller: String
  ) -> (mount: String, path: String)? {
    var mounts: [(root: String, point: String)] = []
    for line in lines("/proc/self/mountinfo") {
      // number parent device root point options [tag]... - type source options
      let words = line.split(separator: " ")
      guard let dash = words.firstIndex(where: { $0 == "-" }), dash >= 6, words.count > dash + 3 else { continue }
      let isOfVersion =
        version == .v2
        ? words[dash + 1] == "cgroup2"
        : words[dash + 1] == "cgroup" && words[dash + 3].split(separator: ",").contains(Word(controller))
      if isOfVersion { mounts.append((unescape(words[3]), unescape(words[4]))) }
    }
    // The mount that shows the most of what is above the group.
    let showing = mounts.filter { isInside(path, $0.root) }.min { $0.root.utf8.count < $1.root.utf8.count }
    if let showing { return (showing.point, String(path.dropFirst(showing.root == "/" ? 0 : showing.root.count))) }
    // A container that sees its own group as the root, whatever it is called outside.
    return mounts.first.map { ($0.point, "") }
  }

  private func isInside(_ path: String, _ root: String) -> Bool {
    if path.hasPrefix("/..") { return false }
    return root == "/" || path == root || path.hasPrefix(root + "/")
  }

  /// Blanks and the like are octal in such files.
  private func unescape(_ word: Word) -> String {
    var bytes: [UInt8] = []
    var rest = word.bytes
    while let byte = rest.popFirst() {
      if byte == UInt8(ascii: "\\"), let code = UInt8(String(decoding: rest.prefix(3), as: UTF8.self), radix: 8) {
        bytes.append(code)
        rest = rest.dropFirst(3)
      } else {
        bytes.append(byte)
      }
    }
    return String(decoding: bytes, as: UTF8.self)
  }
}
