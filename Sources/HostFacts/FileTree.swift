import Glibc

/// The files by which a host tells of itself, or files that stand for them: `/proc` and `/sys` below some folder.
package struct FileTree: Sendable {
  private let root: String

  /// - Parameter root: the folder that stands for `/`.
  package init(root: String = "") { self.root = root }

  /// The host that this process runs on.
  package static let host = FileTree()

  /// Nil where there is no such file, or none that can be read.
  package func bytes(_ path: String) -> [UInt8]? {
    let file = open(root + path, O_RDONLY | O_CLOEXEC)
    if file < 0 { return nil }
    defer { close(file) }
    // Such files have no size beforehand.
    var bytes = [UInt8](repeating: 0, count: 4096)
    var count = 0
    while true {
      let added = bytes.withUnsafeMutableBytes { read(file, $0.baseAddress! + count, $0.count - count) }
      if added < 0 && errno == EINTR { continue }
      if added < 0 { return nil }
      if added == 0 { return Array(bytes[..<count]) }
      count += added
      if count == bytes.count { bytes += [UInt8](repeating: 0, count: bytes.count) }
    }
  }

  /// Without white space at the end.
  package func text(_ path: String) -> String? {
    guard let bytes = bytes(path) else { return nil }
    return String(decoding: bytes[..<(bytes.lastIndex { $0 > 32 }.map { $0 + 1 } ?? 0)], as: UTF8.self)
  }

  /// None where there is no such file.
  package func lines(_ path: String) -> [Word] { bytes(path).map { Word($0[...]).split(separator: "\n") } ?? [] }

  /// Nil also where the file holds something else.
  package func integer(_ path: String) -> Int64? { text(path).flatMap { Int64($0) } }

  /// Where a symbolic link leads.
  package func link(_ path: String) -> String? {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = bytes.withUnsafeMutableBytes { readlink(root + path, $0.baseAddress!, $0.count) }
    return count > 0 ? String(decoding: bytes[..<count], as: UTF8.self) : nil
  }

  /// In no order.
  package func names(in folder: String) -> [String] {
    guard let stream = opendir(root + folder) else { return [] }
    defer { closedir(stream) }
    var names: [String] = []
    while let entry = readdir(stream) {
      let name = withUnsafePointer(to: &entry.pointee.d_name) { name in
        name.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
      }
      if name != "." && name != ".." { names.append(name) }
    }
    return names
  }

  package func exists(_ path: String) -> Bool { access(root + path, F_OK) == 0 }

  /// The same for the same file, whatever path it is reached by and from whatever container.
  package func identity(of path: String) -> String? {
    var status = stat()
    return stat(root + path, &status) == 0 ? "\(status.st_dev):\(status.st_ino)" : nil
  }
}
