/// What the system lets a process have of something.
package enum ResourceLimit: String, CaseIterable, Sendable {
  case openFiles = "Max open files"
  case addressSpace = "Max address space"
  case fileSize = "Max file size"
  case lockedMemory = "Max locked memory"
  /// Processes and threads of the user.
  case processes = "Max processes"
}

extension FileTree {
  /// Nil where there is no limit, or the system does not say. `hard`: how far the process may raise it itself.
  package func limit(_ limit: ResourceLimit) -> (soft: Int64, hard: Int64?)? {
    for line in lines("/proc/self/limits") where line.hasPrefix(limit.rawValue + " ") {
      let words = Word(line.bytes.dropFirst(limit.rawValue.utf8.count)).split(separator: " ")
      guard words.count >= 2, let soft = words[0].integer else { return nil }
      return (soft, words[1].integer)
    }
    return nil
  }
}
