import Arena
import CPlatform
import Glibc

/// The process of a rank, which leads a process group of the same number.
struct RankProcess {
  let id: pid_t
  /// Becomes readable at the process's end; nil where the system has no such thing.
  let handle: OpenFile?
  var hasEnded = false

  /// - Parameters:
  ///   - variables: `NAME=value`, beside the launcher's own environment.
  ///   - descriptors: its stdin, stdout and stderr.
  init(
    _ program: Program, _ variables: [String], descriptors: (Int32, Int32, Int32), _ signals: SignalQueue,
    _ keeper: Keeper
  ) throws {
    var code: Int32 = 0
    id = withCStrings(program.arguments) { arguments in
      withCStrings(variables) { variables in
        withUnsafePointer(to: signals.before) { mask in
          program.path.withCString { path in
            var start = swiftep_program(
              path: path, arguments: arguments, variables: variables, input: descriptors.0, output: descriptors.1,
              errors: descriptors.2, mask: mask, keeper: keeper.orders.raw)
            let process = swiftep_start(&start)
            code = errno
            return process
          }
        }
      }
    }
    if id < 0 { throw Self.refusal(program, code) }
    handle = try? OpenFile("pidfd_open") { [id] in swiftep_open_process(id) }
  }

  /// Those errors that fork can have are the system's.
  private static func refusal(_ program: Program, _ code: Int32) -> any Error {
    switch code {
    case EAGAIN, ENOMEM, EMFILE, ENFILE: SystemCallError(call: "fork", code: code)
    default:
      ProgramError(
        code: ProgramError.notExecutable, expected: "'\(program.path)' to be executable",
        found: code == ENOENT ? "one whose interpreter is not there" : String(cString: strerror(code)).lowercased())
    }
  }

  /// How the process has ended, once.
  mutating func takeEnd() -> RankEnd? {
    var end = swiftep_end()
    guard !hasEnded, swiftep_reap(id, &end) == 1 else { return nil }
    hasEnded = true
    return RankEnd(end)
  }
}

/// The end of any child.
func takeAnyEnd() -> (process: pid_t, end: RankEnd)? {
  var end = swiftep_end()
  return swiftep_reap(0, &end) == 1 ? (end.process, RankEnd(end)) : nil
}

private func withCStrings<Result>(
  _ strings: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) -> Result
) -> Result {
  let copies = strings.map { strdup($0) } + [nil]
  defer { for copy in copies { free(copy) } }
  return copies.withUnsafeBufferPointer { body($0.baseAddress!) }
}

/// The process that kills the ranks if the launcher itself is killed: the kernel ends a rank then, but not what the rank
/// has started.
final class Keeper {
  let orders: OpenFile
  let process: pid_t
  var hasEnded = false

  init(groupCountMax: Int) throws(SystemCallError) {
    var process: pid_t = 0
    orders = try OpenFile("fork") { swiftep_start_keeper(Int32(groupCountMax), &process) }
    self.process = process
  }

  /// Nothing is left of a group; it took care of it from the beginning.
  func forget(_ group: pid_t) { _ = swiftep_order(orders.raw, -group) }

  /// Ends it: nothing is left to take care of.
  func dismiss() {
    if hasEnded { return }
    kill(process, SIGKILL)
    waitpid(process, nil, 0)
    hasEnded = true
  }
}
