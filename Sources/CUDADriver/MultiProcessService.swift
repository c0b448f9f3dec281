import Glibc

/// NVIDIA's Multi-Process Service, whose clients share a GPU at the same time.
package enum MultiProcessService {
  /// Whether one runs for this process.
  package static var isThere: Bool {
    isThere(in: getenv("CUDA_MPS_PIPE_DIRECTORY").map { String(cString: $0) } ?? "/tmp/nvidia-mps")
  }

  /// Whether somebody listens where clients of this pipe directory call. What an ended one has left behind does not count.
  package static func isThere(in directory: String) -> Bool {
    let path = directory + "/control"
    var status = Glibc.stat()
    if stat(path, &status) != 0 { return false }
    switch status.st_mode & S_IFMT {
    case S_IFIFO:
      let pipe = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC)
      if pipe < 0 { return errno != ENXIO }
      close(pipe)
      return true
    case S_IFSOCK: return isAnswered(path)
    default: return true
    }
  }

  /// Whether a socket's address belongs to somebody, as far as can be told.
  private static func isAnswered(_ path: String) -> Bool {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let room = MemoryLayout.size(ofValue: address.sun_path)
    if path.utf8.count >= room { return true }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    let type = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
    let caller = socket(AF_UNIX, type, 0)
    if caller < 0 { return true }
    defer { close(caller) }
    return withUnsafeBytes(of: address) { bytes in
      // SAFETY: as long as a socket's address of this family.
      let general = bytes.baseAddress!.assumingMemoryBound(to: sockaddr.self)
      return connect(caller, general, socklen_t(bytes.count)) == 0 || errno != ECONNREFUSED
    }
  }
}
