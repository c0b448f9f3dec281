import Arena
import CPlatform
import Glibc

/// A descriptor of a launcher, closed when the last reference to it is gone.
final class OpenFile {
  let raw: Int32

  init(_ call: String, _ body: () -> Int32) throws(SystemCallError) { raw = try systemCall(call, body) }
  private init(owning raw: Int32) { self.raw = raw }
  deinit { close(raw) }

  enum End: Int32 {
    case reading, writing
  }

  /// A pipe to or from a rank.
  ///
  /// - Parameter own: the end that is used here: it does not block.
  static func pipe(own: End) throws(SystemCallError) -> (reading: OpenFile, writing: OpenFile) {
    var ends: [Int32] = [-1, -1]
    try systemCall("pipe") { swiftep_pipe(&ends, own.rawValue) }
    return (OpenFile(owning: ends[0]), OpenFile(owning: ends[1]))
  }

  /// Opens what is not open of stdin, stdout and stderr: no other file is to be taken for one of them.
  static func openStandardFiles() throws(SystemCallError) {
    for standard in STDIN_FILENO...STDERR_FILENO where fcntl(standard, F_GETFD) < 0 {
      try systemCall("open of /dev/null") { open("/dev/null", O_RDWR) }
    }
  }

  static func null() throws(SystemCallError) -> OpenFile {
    try OpenFile("open of /dev/null") { open("/dev/null", O_RDWR | O_CLOEXEC) }
  }
}
