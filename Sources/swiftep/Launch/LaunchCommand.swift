import Arena
import Glibc
import SwiftEP

let launchCommand = Command(
  name: "launch", summary: "starts the ranks of a job as processes of this host, and ends them together",
  flags: [
    Flag("n", "N", "ranks, each a process (needed)"),
    Flag(
      "grace", "SECONDS",
      "how long the others may go on when one has failed, and how long\nany rank has between a signal to end by and SIGKILL (default 5)"
    ),
    Flag("keep-going", nil, "leave the others alone when one has failed: they may shrink and go on"),
    Flag("tag", nil, "begin every line that a rank writes with its number: [3]"),
  ],
  trailing: "PROGRAM [ARGUMENT]...",
  notes: """
    Each rank finds SWIFTEP_RANK, SWIFTEP_RANK_COUNT and SWIFTEP_TOKEN, a secret of this job's ranks, in its environment,
    and what the launcher has in its own. Rank 0 has the launcher's stdin, the others have none.

    A rank fails by a code that is not 0, or by a signal. The others learn it by themselves; those that still run after
    the grace time are ended. With --keep-going they are not. SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on, and
    what is left after the grace time, or at a second one, is killed. Whatever a rank leaves behind in its process
    group ends with it, and if the launcher itself is killed, all ranks are.

    exit codes of a job:
      0         every rank has ended with 0
      CODE      of the first rank that failed, with --keep-going too; 128 + N: it was ended by signal N
      126, 127  the program cannot be executed, or is not there
    """,
  body: { arguments in
    guard let rankCount = try arguments.integer("n", in: 1...65536) else {
      throw UsageError("-n", expected: "how many ranks to start", found: "none")
    }
    let grace = try arguments.real("grace", in: 0...86400, default: 5)
    let program = try Program(arguments.trailing, searchedFolders: getenv("PATH").map { String(cString: $0) })
    do {
      let launcher = try Launcher(
        program,
        Launcher.Options(
          rankCount: rankCount, graceNanoseconds: UInt64(grace * 1e9), keepsGoing: arguments.has("keep-going"),
          tagsLines: arguments.has("tag")))
      if let failure = try launcher.run() { throw failure }
    } catch let error as SystemCallError {
      throw EPError.systemCall(rank: -1, name: error.call, code: error.code)
    }
  })
