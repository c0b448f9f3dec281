import CPlatform
import Glibc

/// How a rank's program has ended.
enum RankEnd: Equatable, Sendable {
  case exited(code: Int32)
  case signalled(Int32, dumpedCore: Bool)

  init(_ end: swiftep_end) {
    self = end.is_signal ? .signalled(end.code, dumpedCore: end.dumped_core) : .exited(code: end.code)
  }

  /// As a shell gives it.
  var code: Int32 {
    switch self {
    case .exited(let code): code
    case .signalled(let signal, _): 128 + signal
    }
  }

  var isFailure: Bool { code != 0 }
}

extension RankEnd: CustomStringConvertible {
  var description: String {
    switch self {
    case .exited(let code): "exited with code \(code)"
    case .signalled(let signal, let dumpedCore):
      "was ended by \(signalName(signal))" + (dumpedCore ? " (core dumped)" : "")
    }
  }
}

/// As in "SIGKILL"; "signal 40" where it has no such name.
func signalName(_ signal: Int32) -> String {
  let names: [Int32: String] = [
    SIGHUP: "SIGHUP", SIGINT: "SIGINT", SIGQUIT: "SIGQUIT", SIGILL: "SIGILL", SIGTRAP: "SIGTRAP", SIGABRT: "SIGABRT",
    SIGBUS: "SIGBUS", SIGFPE: "SIGFPE", SIGKILL: "SIGKILL", SIGUSR1: "SIGUSR1", SIGSEGV: "SIGSEGV", SIGUSR2: "SIGUSR2",
    SIGPIPE: "SIGPIPE", SIGALRM: "SIGALRM", SIGTERM: "SIGTERM", SIGXCPU: "SIGXCPU", SIGXFSZ: "SIGXFSZ",
    SIGSYS: "SIGSYS",
  ]
  return names[signal] ?? "signal \(signal)"
}

/// A job of which a rank has failed.
struct RankFailure: Error, Equatable, CustomStringConvertible {
  /// The first to fail.
  let rank: Int
  let end: RankEnd
  /// How many failed before they were told to end.
  var failureCount: Int

  var description: String {
    let which = failureCount > 1 ? ", the first of \(failureCount) to fail," : ""
    return "rank \(rank)\(which) \(end)"
  }
}
