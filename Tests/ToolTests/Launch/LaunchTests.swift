import Foundation
import Testing

@testable import swiftep

/// Jobs of real processes. Nothing here depends on how fast the machine is, but for bounds that are generous.
@Suite struct LaunchTests {
  // MARK: What ranks are given

  @Test func everyRankKnowsItsPlace() throws {
    let run = try LaunchedJob.run(
      ["-n", "64"], script: #"echo "$SWIFTEP_RANK/$SWIFTEP_RANK_COUNT $SWIFTEP_TOKEN $FOLDER""#)
    #expect(run.status == 0, "\(run.errors)")
    let lines = run.output.split(separator: "\n").map { $0.split(separator: " ") }
    #expect(Set(lines.map { $0[0] }) == Set((0..<64).map { "\($0)/64" }))
    #expect(lines.count == 64)
    let tokens = Set(lines.map { $0[1] })
    #expect(tokens.count == 1)
    let token = try #require(tokens.first)
    #expect(token.count == 64 && token.allSatisfy(\.isHexDigit))
    #expect(run.errors.isEmpty)
    let other = try LaunchedJob.run(["-n", "1"], script: "echo $SWIFTEP_TOKEN")
    #expect(other.output != token + "\n")
  }

  /// A job within a job is a job of its own.
  @Test func variablesAreReplaced() throws {
    let run = try LaunchedJob.run(
      ["-n", "1"], script: "env | grep -c '^SWIFTEP_RANK='; echo $SWIFTEP_RANK",
      shell: #"SWIFTEP_RANK=7 exec "$0" "$@""#)
    #expect(run.output == "1\n0\n")
  }

  @Test func inputIsRankZeros() throws {
    let job = try LaunchedJob(
      ["-n", "3", "--tag"], script: "while read word; do echo $word; done", input: Data("one\ntwo\n".utf8))
    let run = try job.end()
    #expect(run.status == 0)
    #expect(run.output == "[0] one\n[0] two\n")
  }

  /// Descriptors, blocked and ignored signals are those of the shell that the launcher was started by. Of the signals, the
  /// first 32: the next one is the C library's own, which it sets as soon as there is a second thread.
  @Test(arguments: [#"grep -oP ^Sig(Blk|Ign):\s*.{8}\K.* /proc/self/status"#, "ls /proc/self/fd"], [[], ["--tag"]])
  func nothingLeaks(_ command: String, _ flags: [String]) throws {
    let words = command.split(separator: " ").map(String.init)
    let shell = Process()
    let pipe = Pipe()
    shell.executableURL = URL(fileURLWithPath: "/bin/sh")
    shell.arguments = ["-c", #""$@"; echo; "$0" launch -n 1 \#(flags.joined()) -- "$@""#, Binary.url.path] + words
    shell.standardOutput = pipe
    shell.standardInput = FileHandle.nullDevice
    try shell.run()
    let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    shell.waitUntilExit()
    let parts = output.replacingOccurrences(of: "[0] ", with: "").components(separatedBy: "\n\n")
    #expect(parts.count == 2 && parts[1] == parts[0] + "\n", "\(output)")
  }

  @Test func aScriptNeedsNoFirstLine() throws {
    let file = try TemporaryFile(Data("echo script $1\n".utf8))
    #expect(chmod(file.path, 0o755) == 0)
    let run = try Binary.run(["launch", "-n", "1", "--", file.path, "argument"])
    #expect(run.output == "script argument\n")
  }

  // MARK: How jobs end

  @Test(arguments: [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137), ("kill -SEGV $$", 139)])
  func exitCodes(_ script: String, _ code: Int32) throws {
    let run = try LaunchedJob.run(["-n", "3"], script: "[ $SWIFTEP_RANK = 1 ] || exit 0; \(script)")
    #expect(run.status == code)
    #expect(run.errors.isEmpty == (code == 0))
    if code > 0 { #expect(run.errors.contains("swiftep: rank 1 "), "\(run.errors)") }
  }

  /// Both have ended before the launcher gets to see either.
  @Test func theFirstFailureWins() throws {
    let job = try LaunchedJob(
      ["-n", "4"], script: "mark there; trap 'exit $((10 + SWIFTEP_RANK))' USR1; while :; do sleep 0.01; done")
    let ranks = try (0..<4).map { try job.mark("there", of: $0) }
    usleep(50_000)
    job.send(SIGSTOP)
    for rank in [2, 0, 3, 1] {
      kill(ranks[rank], SIGUSR1)
      try job.eventually("the end of rank \(rank)") { !isAlive(ranks[rank]) }
    }
    job.send(SIGCONT)
    let run = try job.end()
    #expect(run.status == 12)
    #expect(run.errors.hasSuffix("swiftep: rank 2, the first of 4 to fail, exited with code 12\n"), "\(run.errors)")
  }

  /// Those that are left after the grace time are ended, those that take no notice of SIGTERM or are stopped too.
  @Test(arguments: ["sleep 1000", "trap '' TERM; sleep 1000; sleep 1000", "kill -STOP $$", "sleep 1000 & wait"])
  func stragglersAreEnded(_ script: String) throws {
    let job = try LaunchedJob(
      ["-n", "3", "--grace", "0.3"], script: "mark there; [ $SWIFTEP_RANK = 2 ] && exit 5; \(script)")
    let ranks = try (0..<3).map { try job.mark("there", of: $0) }
    let run = try job.end()
    #expect(run.status == 5)
    #expect(run.errors.contains("rank 2 exited with code 5; the others have 0.3 s to end by themselves"))
    #expect(run.errors.contains("killing ranks 0, 1") == script.hasPrefix("trap"), "\(run.errors)")
    for rank in ranks { #expect(!isAlive(rank)) }
  }

  /// They have the grace time to report what they think of it.
  @Test func theOthersMayEndByThemselves() throws {
    let job = try LaunchedJob(
      ["-n", "2", "--grace", "50"],
      script:
        "mark there; [ $SWIFTEP_RANK = 1 ] && exit 5; await_go; echo done; exit 6"
    )
    let failing = try job.mark("there", of: 1)
    try job.eventually("the end of rank 1") { !isAlive(failing) }
    try job.letGo()
    let run = try job.end()
    #expect(run.status == 5 && run.output == "done\n")
    #expect(!run.errors.contains("ending"))
  }

  @Test func keepGoing() throws {
    let job = try LaunchedJob(
      ["-n", "3", "--keep-going", "--grace", "0"],
      script:
        "mark there; [ $SWIFTEP_RANK = 0 ] && kill -9 $$; await_go; echo done")
    let ranks = try (0..<3).map { try job.mark("there", of: $0) }
    try job.eventually("the end of rank 0") { !isAlive(ranks[0]) }
    usleep(200_000)
    try job.letGo()
    let run = try job.end()
    #expect(run.status == 137)
    #expect(run.output == "done\ndone\n")
    #expect(run.errors == "swiftep: rank 0 was ended by SIGKILL\nswiftep: rank 0 was ended by SIGKILL\n")
  }

  /// What a rank has started ends with it.
  @Test func nothingIsLeftOfAGroup() throws {
    let job = try LaunchedJob(
      ["-n", "2", "--grace", "0.3"],
      script:
        "sh -c 'trap \"\" TERM; echo $$ > $FOLDER/child.$SWIFTEP_RANK; sleep 1000; sleep 1000' & while [ ! -s $FOLDER/child.$SWIFTEP_RANK ]; do sleep 0.01; done"
    )
    let children = try (0..<2).map { try job.mark("child", of: $0) }
    let run = try job.end()
    #expect(run.status == 0 && run.errors.contains("killing rank"), "\(run.errors)")
    for child in children { #expect(!isAlive(child)) }
  }

  @Test(arguments: [["-n", "4"], ["-n", "4", "--tag"]])
  func aKilledLauncherLeavesNothing(_ flags: [String]) throws {
    let job = try LaunchedJob(
      flags,
      script:
        "trap '' TERM HUP INT; sh -c 'echo $$ > $FOLDER/child.$SWIFTEP_RANK; sleep 1000; sleep 1000' & mark there; wait"
    )
    var processes = try (0..<4).map { try job.mark("there", of: $0) }
    for rank in 0..<4 {
      try job.eventually("the child's id") { (try? job.mark("child", of: rank)) != nil }
      processes.append(try job.mark("child", of: rank))
    }
    processes += children(of: job.launcher)
    #expect(processes.count >= 13)
    job.send(SIGKILL)
    #expect(try job.end().status == -SIGKILL)
    try job.eventually("the end of all") { !processes.contains(where: isAlive) }
  }

  private func children(of process: pid_t) -> [pid_t] {
    let text = try? String(contentsOfFile: "/proc/\(process)/task/\(process)/children", encoding: .utf8)
    return (text ?? "").split(separator: " ").compactMap { pid_t($0) }
  }

  // MARK: Signals

  @Test(arguments: [SIGINT, SIGTERM, SIGHUP, SIGQUIT])
  func signalsArePassedOn(_ signal: Int32) throws {
    let name = signalName(signal).dropFirst(3)
    let job = try LaunchedJob(
      ["-n", "2", "--grace", "50"],
      script: "trap 'echo got; exit $((40 + SWIFTEP_RANK * 0))' \(name); mark there; while :; do sleep 0.01; done")
    for rank in 0..<2 { try job.mark("there", of: rank) }
    job.send(signal)
    let run = try job.end()
    #expect(run.status == 40 && run.output == "got\ngot\n", "\(run)")
  }

  @Test func signalsAreEscalated() throws {
    let job = try LaunchedJob(
      ["-n", "2", "--grace", "0.3"], script: "trap '' INT TERM; mark there; while :; do sleep 0.01; done")
    for rank in 0..<2 { try job.mark("there", of: rank) }
    job.send(SIGINT)
    let run = try job.end()
    #expect(run.status == 137)
    #expect(run.errors.contains("killing ranks 0, 1"), "\(run.errors)")
  }

  @Test func theSecondSignalKills() throws {
    let job = try LaunchedJob(
      ["-n", "2", "--grace", "1000"],
      script: "trap 'mark got' TERM; mark there; while :; do sleep 0.01; done")
    for rank in 0..<2 { try job.mark("there", of: rank) }
    job.send(SIGTERM)
    for rank in 0..<2 { try job.mark("got", of: rank) }
    job.send(SIGINT)
    #expect(try job.end().status == 137)
  }

  @Test func otherSignalsEndNothing() throws {
    let job = try LaunchedJob(
      ["-n", "2"],
      script: "trap 'mark first' USR1; trap 'mark second; exit 0' USR2; mark there; while :; do sleep 0.01; done")
    for rank in 0..<2 { try job.mark("there", of: rank) }
    job.send(SIGUSR1)
    for rank in 0..<2 { try job.mark("first", of: rank) }
    job.send(SIGUSR2)
    #expect(try job.end().status == 0)
  }

  /// As under `nohup`.
  @Test func ignoredSignalsStayIgnored() throws {
    let job = try LaunchedJob(
      ["-n", "1", "--grace", "0"],
      script: "mark there; await_go; echo done",
      shell: #"trap '' HUP; exec "$0" "$@""#)
    try job.mark("there", of: 0)
    job.send(SIGHUP)
    usleep(200_000)
    try job.letGo()
    let run = try job.end()
    #expect(run.status == 0 && run.output == "done\n")
  }

  // MARK: Output

  /// Every line whole, none lost, in each rank's order; the last one has no end.
  @Test func linesAreTagged() throws {
    let script = """
      line=0
      while [ $line -lt 300 ]; do
        printf '%s out ' $line; printf '%0*d\\n' $((line * 7 % 900 + 1)) 0
        [ $((line % 10)) = 0 ] && echo "$line err" >&2
        line=$((line + 1))
      done
      printf 'the last'
      """
    let run = try LaunchedJob.run(["-n", "16", "--tag"], script: script)
    #expect(run.status == 0)
    var lines = Array(repeating: [Substring](), count: 16)
    for line in run.output.split(separator: "\n") {
      let parts = line.split(separator: "]", maxSplits: 1)
      let rank = try #require(Int(parts[0].dropFirst()), "\(line.prefix(80))")
      lines[rank].append(parts[1].dropFirst())
    }
    let expected = (0..<300).map { "\($0) out " + String(repeating: "0", count: $0 * 7 % 900 + 1) } + ["the last"]
    for rank in 0..<16 { #expect(lines[rank].map(String.init) == expected, "rank \(rank)") }
    for rank in 0..<16 { #expect(run.errors.contains("[\(rank)] 290 err\n")) }
  }

  @Test func aRankThatSaysMuchBeforeItDiesIsHeard() throws {
    let run = try LaunchedJob.run(
      ["-n", "4", "--tag", "--grace", "0"],
      script: "head -c 60000 /dev/zero | tr '\\0' x; if [ $SWIFTEP_RANK = 3 ]; then kill -9 $$; fi")
    #expect(run.output.contains("[3] " + String(repeating: "x", count: 60000) + "\n"))
  }

  /// Who has left the rank's group may keep its output for ever.
  @Test func aPipeThatIsKeptOpenKeepsNobody() throws {
    let job = try LaunchedJob(
      ["-n", "2", "--tag"],
      script:
        "setsid sh -c 'echo $$ > $FOLDER/child.$SWIFTEP_RANK; exec sleep 1000' & echo said; while [ ! -s $FOLDER/child.$SWIFTEP_RANK ]; do sleep 0.01; done"
    )
    try job.eventually("the launcher's end") { !isAlive(job.launcher) }
    for rank in 0..<2 { kill(try job.mark("child", of: rank), SIGKILL) }
    let run = try job.end()
    #expect(run.status == 0)
    #expect(run.output.split(separator: "\n").sorted() == ["[0] said", "[1] said"])
  }

  /// A reader that goes away ends the ranks as it would without a launcher between.
  @Test func aClosedOutputIsNoticed() throws {
    let run = try LaunchedJob.run(
      ["-n", "2", "--tag"], script: "while echo line; do :; done 2> /dev/null; exit 9",
      shell: #""$0" "$@" 2> $FOLDER/errors | head -n 3; true"#)
    #expect(run.output.split(separator: "\n").count == 3)
  }

  // MARK: What cannot be started

  static let programs: [([String], Int32, String)] = [
    (["no-such-program"], 127, "program: expected a program in PATH ("),
    (["./no-such-program"], 127, "program: expected an executable file './no-such-program', found no such file"),
    (["/etc/passwd"], 126, "program: expected an executable file '/etc/passwd', found one that may not be executed"),
    (["/"], 126, "program: expected an executable file '/', found something else"),
  ]

  @Test(arguments: programs)
  func badPrograms(_ words: [String], _ code: Int32, _ sentence: String) throws {
    let run = try Binary.run(["launch", "-n", "2", "--"] + words)
    #expect(run.status == code)
    #expect(run.errors.hasPrefix("swiftep: " + sentence), "\(run.errors)")
  }

  @Test func aMissingInterpreterIsSaid() throws {
    let file = try TemporaryFile(Data("#!/no/such/interpreter\n".utf8))
    #expect(chmod(file.path, 0o755) == 0)
    let run = try Binary.run(["launch", "-n", "2", "--", file.path])
    #expect(run.status == 126)
    #expect(run.errors.contains("found one whose interpreter is not there"), "\(run.errors)")
  }

  /// A file that may not be as large as an arena is an error like others, and ends the bench's other threads too: the
  /// system's own answer is SIGXFSZ.
  /// The limit is above the 512 KiB that ThreadSanitizer keeps in a file of its own.
  @Test func aLimitOfFileSizesIsAnError() throws {
    let job = try LaunchedJob(
      ["-n", "1"], script: "ulimit -f 2000; exec \(Binary.url.path) bench --workers 2 --tokens 4096 --hidden 256")
    let run = try job.end()
    #expect(run.status == 3)
    #expect(run.errors.contains("ftruncate of rank 0 failed: File too large\n"), "\(run.errors)")
  }

  /// What was started before the system refused more is ended again.
  @Test func aLimitOfDescriptorsIsAnError() throws {
    let job = try LaunchedJob(
      ["-n", "64", "--tag", "--grace", "0"], script: "mark there; sleep 1000", shell: #"ulimit -n 32; exec "$0" "$@""#)
    let run = try job.end()
    #expect(run.status == 3)
    #expect(run.errors.hasSuffix("failed: Too many open files\n"), "\(run.errors)")
    for rank in 0..<64 where job.hasMark("there", of: rank) { #expect(!isAlive(try job.mark("there", of: rank))) }
  }
}
