import Arena
import EPKernels
import Glibc
import HostMachine

extension FlightRecord {
  /// The records of all buffers that a process of this host has, whatever state it is in: it takes no part, and is not
  /// disturbed. None where it has no buffer.
  ///
  /// - Throws: `invalidArgument` with rank -1: where there is no such process, or it may not be looked into (it takes
  ///   the same user, or root), or it is a program of another version of this library; `systemCall`.
  public static func records(ofProcess process: Int32) throws(EPError) -> [FlightRecord] {
    let folder = ProcessFolder(process: process)
    var records: [FlightRecord] = []
    var seen: Set<UInt64> = []
    for descriptor in try folder.arenaDescriptors() {
      // Ranks that are threads of one process can have descriptors of each other's for a moment.
      guard let file = try folder.open(descriptor), seen.insert(UInt64(try folder.status(file).st_ino)).inserted else {
        continue
      }
      if let record = try folder.read(file, as: descriptor) { records.append(record) }
    }
    return records.sorted {
      ($0.group, $0.generation, $0.buffer, $0.rank) < ($1.group, $1.generation, $1.buffer, $1.rank)
    }
  }
}

/// What a process has open, as `/proc` shows it.
private struct ProcessFolder {
  let process: Int32

  private var path: String { "/proc/\(process)/fd" }

  func arenaDescriptors() throws(EPError) -> [String] {
    guard let folder = opendir(path) else { throw error("opendir", code: errno) }
    defer { closedir(folder) }
    var found: [String] = []
    while let entry = readdir(folder) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
      if link(name) == "/memfd:\(ArenaMemory.fileName) (deleted)" { found.append(name) }
    }
    return found
  }

  private func link(_ name: String) -> String {
    var bytes = [UInt8](repeating: 0, count: 64)
    let count = bytes.withUnsafeMutableBytes { readlink("\(path)/\(name)", $0.baseAddress!, $0.count) }
    return String(decoding: bytes[..<max(0, count)], as: UTF8.self)
  }

  /// Nil where the process has closed it meanwhile.
  func open(_ name: String) throws(EPError) -> Descriptor? {
    do throws(SystemCallError) {
      return try Descriptor("open") { Glibc.open("\(path)/\(name)", O_RDONLY | O_CLOEXEC) }
    } catch {
      if error.code == ENOENT { return nil }
      throw self.error(error.call, code: error.code)
    }
  }

  func status(_ file: Descriptor) throws(EPError) -> stat {
    var status = stat()
    if fstat(file.raw, &status) != 0 { throw error("fstat", code: errno) }
    return status
  }

  /// Nil where the buffer is only being made.
  func read(_ file: Descriptor, as name: String) throws(EPError) -> FlightRecord? {
    if try status(file).st_size == 0 { return nil }
    let view: ArenaView
    do throws(SystemCallError) {
      view = try ArenaView(of: file)
    } catch {
      throw error.code == EPERM
        ? unlike("a file that can shrink", name) : self.error(error.call, code: error.code)
    }
    let base = Address(view.base)
    guard view.byteCount >= ControlLayout.identityOffset + ArenaIdentity.byteCount else {
      throw unlike("\(view.byteCount) bytes", name)
    }
    let magic = base.advanced(byBytes: ControlLayout.identityOffset).noted()
    if magic == 0 { return nil }
    let identity = base.advanced(byBytes: ControlLayout.identityOffset).load(ArenaIdentity.self, at: 0)
    if magic != ArenaIdentity.magicNumber { throw unlike("other bytes (\(String(magic, radix: 16)))", name) }
    if identity.version != ArenaIdentity.layoutVersion {
      throw .invalidArgument(
        rank: -1, argument: "process \(process)",
        expected: "a program of this version of the library (control words of version \(ArenaIdentity.layoutVersion))",
        found: "one of version \(identity.version)")
    }
    guard (1...1 << 16).contains(identity.rankCount), (0..<identity.rankCount).contains(identity.rank),
      (0...1 << 24).contains(identity.expertCount),
      ControlLayout(rankCount: identity.rankCount, expertCount: identity.expertCount).byteCount <= view.byteCount
    else {
      throw unlike(
        "rank \(identity.rank) of \(identity.rankCount), \(identity.expertCount) experts, \(view.byteCount) bytes", name
      )
    }
    return withExtendedLifetime(view) { FlightRecord(reading: base, now: monotonicNow()) }
  }

  private func unlike(_ found: String, _ name: String) -> EPError {
    .invalidArgument(
      rank: -1, argument: "process \(process), descriptor \(name)", expected: "an arena of this library", found: found)
  }

  private func error(_ call: String, code: Int32) -> EPError {
    let found: String
    switch code {
    case ENOENT, ESRCH: found = "no such process"
    case EACCES, EPERM: found = "one that this user may not look into"
    default: return .systemCall(rank: -1, name: call, code: code)
    }
    return .invalidArgument(rank: -1, argument: "process \(process)", expected: "a running process", found: found)
  }
}
