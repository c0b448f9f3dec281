import Arena
import CPlatform
import Glibc
import HostMachine
import Rendezvous

/// Runs the ranks of a job: starts them, hands on what they write and what signals come, and ends what is left. For the
/// process's main thread, once.
final class Launcher {
  struct Options {
    var rankCount: Int
    var graceNanoseconds: UInt64
    var keepsGoing = false
    var tagsLines = false
  }

  private let program: Program
  private let options: Options
  private var supervision: Supervision
  private var ranks: [RankProcess?]
  private var streams: [TaggedStream] = []
  /// Nil where rank 0 has the launcher's stdin itself.
  private var terminal: TerminalRelay?
  private let output: Outlet
  private let errors: Outlet
  private let keeper: Keeper
  private let signals: SignalQueue
  private let watch: Watch
  private var isReapingDue = false
  /// The user wants no more output either.
  private var isHurried = false

  init(_ program: Program, _ options: Options) throws(SystemCallError) {
    (self.program, self.options) = (program, options)
    supervision = Supervision(
      rankCount: options.rankCount, grace: options.graceNanoseconds, keepsGoing: options.keepsGoing)
    ranks = Array(repeating: nil, count: options.rankCount)
    try OpenFile.openStandardFiles()
    output = Outlet(STDOUT_FILENO)
    errors = isSameFile(STDOUT_FILENO, STDERR_FILENO) ? output : Outlet(STDERR_FILENO)
    signals = try SignalQueue(
      Supervision.endingSignals + Supervision.otherSignals + [SIGCHLD, SIGPIPE])
    try systemCall("prctl(PR_SET_CHILD_SUBREAPER)") { swiftep_adopt_orphans() }
    keeper = try Keeper(groupCountMax: options.rankCount)
    watch = try Watch()
    try watch.add(signals.file.raw, .signals)
  }

  /// Starts the ranks and returns when all have ended: the first that failed, or nil.
  func run() throws -> RankFailure? {
    var refusal: (any Error)?
    do {
      try start()
    } catch {
      refusal = error
      for rank in ranks.indices where ranks[rank] == nil { supervision.left(rank) }
      act(supervision.giveUp(now: monotonicNow()))
    }
    while !isDone {
      for source in watch.wait(until: supervision.deadline) { handle(source) }
      if isReapingDue && !watch.mayHaveMore { reap() }
      act(supervision.timePassed(now: monotonicNow()))
      updateWatches()
    }
    keeper.dismiss()
    if let refusal { throw refusal }
    return supervision.failure
  }

  private var isDone: Bool {
    supervision.isOver && (isHurried || (output.isEmpty && errors.isEmpty))
  }

  // MARK: Starting

  private func start() throws {
    let token = try Token.random().text
    let null = try OpenFile.null()
    var firstInput: OpenFile?
    if isatty(STDIN_FILENO) == 1 {
      let pipe = try OpenFile.pipe(own: .writing)
      firstInput = pipe.reading
      terminal = TerminalRelay(to: pipe.writing)
    }
    for rank in ranks.indices {
      let variables = [
        "SWIFTEP_RANK=\(rank)", "SWIFTEP_RANK_COUNT=\(options.rankCount)", "SWIFTEP_TOKEN=\(token)",
      ]
      let input = rank > 0 ? null.raw : firstInput?.raw ?? STDIN_FILENO
      let process: RankProcess
      if options.tagsLines {
        let (output, errors) = (try OpenFile.pipe(own: .reading), try OpenFile.pipe(own: .reading))
        process = try RankProcess(
          program, variables, descriptors: (input, output.writing.raw, errors.writing.raw), signals, keeper)
        try follow(rank, output.reading, to: self.output)
        try follow(rank, errors.reading, to: self.errors)
      } else {
        process = try RankProcess(
          program, variables, descriptors: (input, STDOUT_FILENO, STDERR_FILENO), signals, keeper)
      }
      ranks[rank] = process
      if let handle = process.handle { try watch.add(handle.raw, .rank(rank)) }
    }
  }

  private func follow(_ rank: Int, _ pipe: OpenFile, to outlet: Outlet) throws(SystemCallError) {
    try watch.add(pipe.raw, .stream(streams.count))
    streams.append(TaggedStream(rank: rank, pipe, to: outlet))
  }

  // MARK: What happens

  private func handle(_ source: Watch.Source) {
    switch source {
    case .signals:
      while let signal = signals.next() { handle(signal: signal) }
    case .rank(let rank):
      if let end = ranks[rank]?.takeEnd() { note(end, of: rank) }
    case .stream(let index): streams[index].read()
    case .output: output.flush()
    case .errors: errors.flush()
    case .terminal: terminal?.read()
    case .input: terminal?.flush()
    }
  }

  private func handle(signal: Int32) {
    switch signal {
    case SIGCHLD: isReapingDue = true
    case SIGPIPE: break
    default:
      if supervision.isOver { isHurried = true }
      act(supervision.received(signal, now: monotonicNow()))
      if signal == SIGTSTP { kill(getpid(), SIGSTOP) }
    }
  }

  private func note(_ end: RankEnd, of rank: Int) {
    let isGone = swiftep_group_is_empty(ranks[rank]!.id)
    if let handle = ranks[rank]!.handle { watch.remove(handle.raw) }
    // What it has said comes before what is said of it.
    for stream in streams where stream.rank == rank { stream.drain() }
    if isGone { leave(rank) }
    act(supervision.ended(rank, end, isGone: isGone, now: monotonicNow()))
  }

  /// Nothing of the rank's group is left.
  private func leave(_ rank: Int) {
    keeper.forget(ranks[rank]!.id)
    for stream in streams where stream.rank == rank {
      if let pipe = stream.pipe { watch.remove(pipe.raw) }
      stream.finish()
    }
  }

  /// Takes the ends of processes whose parents have ended before them.
  private func reap() {
    isReapingDue = false
    while let (process, end) = takeAnyEnd() {
      if let rank = ranks.firstIndex(where: { $0?.id == process && $0?.hasEnded == false }) {
        ranks[rank]!.hasEnded = true
        note(end, of: rank)
      }
      if process == keeper.process { keeper.hasEnded = true }
    }
    for rank in ranks.indices where supervision.isLingering(rank) && swiftep_group_is_empty(ranks[rank]!.id) {
      supervision.left(rank)
      leave(rank)
    }
  }

  private func act(_ actions: [Supervision.Action]) {
    for action in actions {
      switch action {
      case .send(let signal, let rank): kill(-ranks[rank]!.id, signal)
      case .say(let sentence): errors.add(Array("swiftep: \(sentence)\n".utf8))
      }
    }
  }

  private func updateWatches() {
    if let terminal {
      watch.set(STDIN_FILENO, .terminal, isWatched: terminal.isReading)
      watch.set(terminal.pipe.raw, .input, isWatched: !terminal.isEmpty, forWriting: true)
      if terminal.isOver { self.terminal = nil }
    }
    for (outlet, source) in [(output, Watch.Source.output), (errors, .errors)] {
      if source == .errors && errors === output { continue }
      watch.set(outlet.descriptor, source, isWatched: !outlet.isEmpty, forWriting: true)
    }
    for (index, stream) in streams.enumerated() {
      guard let pipe = stream.pipe else { continue }
      // A rank whose reader is gone is to notice it as it would without a launcher between.
      if stream.outlet.isBroken {
        watch.remove(pipe.raw)
        stream.finish()
      } else {
        watch.set(pipe.raw, .stream(index), isWatched: !stream.outlet.isFull)
      }
    }
  }
}

private func isSameFile(_ first: Int32, _ second: Int32) -> Bool {
  var (a, b) = (stat(), stat())
  return fstat(first, &a) == 0 && fstat(second, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino
}
