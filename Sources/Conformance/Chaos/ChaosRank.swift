import Glibc
import HostMachine
import SwiftEP

/// A process that does what it is ordered to, and jobs in between, until it is out of its group or somebody kills it.
struct ChaosRank {
  private let channel: Channel
  private let seed: UInt64
  private let timeout: Duration
  private var shortage: Shortage?
  /// With others that regroup: nobody is silent then, but machines are slow at times.
  private let patience = Duration.seconds(10)

  /// An order to leave, or the end of the one who gives orders.
  private struct Left: Error {}

  init(_ channel: Channel, seed: UInt64, timeout: Duration) {
    (self.channel, self.seed, self.timeout) = (channel, seed, timeout)
  }

  /// Returns the process's exit code.
  mutating func run() -> Int32 {
    do {
      var communicator = try enter()
      while true {
        let failure = try work(communicator)
        try channel.send(
          ChaosReport.failed(failure, ChaosPlace(communicator), at: monotonicNow()))
        communicator = try regroup(communicator)
      }
    } catch let error as EPError {
      try? channel.send(ChaosReport.out(error))
    } catch let failure as ConformanceFailure {
      try? channel.send(ChaosReport.wrong("\(failure)"))
      return 1
    } catch is Left {
    } catch is Channel.Closed {
    } catch {
      try? channel.send(ChaosReport.wrong("\(error)"))
      return 1
    }
    return 0
  }

  private func nextOrder() throws -> ChaosOrder {
    try channel.receive(ChaosOrder.self, until: monotonicNow() &+ 120_000_000_000)
  }

  private func enter() throws -> Communicator {
    switch try nextOrder() {
    case .start(let rank, let rankCount):
      return try Communicator.processes(rank: rank, rankCount: rankCount, timeout: timeout, allGather: gather)
    case .join(let generation):
      return try admit(to: try Communicator.join(timeout: .seconds(20), allGather: gather), until: generation)
    default: throw Left()
    }
  }

  /// The caller's own way of gathering bytes.
  private var gather: @Sendable ([UInt8]) throws -> [[UInt8]] {
    { [channel] bytes in
      try channel.send(ChaosReport.piece(bytes))
      let order = try channel.receive(ChaosOrder.self, until: monotonicNow() &+ 60_000_000_000)
      guard case .pieces(let pieces) = order else { throw Left() }
      return pieces
    }
  }

  private mutating func regroup(_ communicator: Communicator) throws -> Communicator {
    while true {
      switch try nextOrder() {
      case .shrink: return try communicator.shrink(timeout: patience)
      case .admit(let generation): return try admit(to: communicator, until: generation)
      case .starve(let shortage): self.shortage = shortage
      default: throw Left()
      }
    }
  }

  private func admit(to communicator: Communicator, until generation: Int) throws -> Communicator {
    var communicator = communicator
    while communicator.generation < generation {
      communicator = try communicator.admit(timeout: patience, allGather: gather).communicator
    }
    return communicator
  }

  // MARK: Jobs

  /// Makes a buffer and does jobs until something fails.
  private mutating func work(_ communicator: Communicator) throws -> EPError {
    let script = Script(Job.chaos(rankCount: communicator.rankCount, seed: seed &+ UInt64(communicator.generation)))
    defer { shortage = nil }
    do {
      let buffer = try makeBuffer(communicator, script.job)
      defer { buffer.close() }
      var isFirst = true
      while true {
        try script.run(on: buffer)
        if isFirst { try channel.send(ChaosReport.works(ChaosPlace(communicator), at: monotonicNow())) }
        isFirst = false
        if Channel.firstReady([channel], until: 0) != nil, case .leave(let isClosing) = try nextOrder() {
          // Without that, the process ends with its buffer open.
          if isClosing { buffer.close() } else { _exit(0) }
          throw Left()
        }
      }
    } catch let error as EPError {
      return error
    }
  }

  private func makeBuffer(_ communicator: Communicator, _ job: Job) throws -> ExpertBuffer {
    let plan = try job.makePlan()
    guard let shortage else {
      return try ExpertBuffer(communicator, plan: plan, workers: job.workers, timeout: timeout)
    }
    let limit = try ResourceLimit(shortage)
    defer { limit.lift() }
    return try ExpertBuffer(communicator, plan: plan, workers: job.workers, timeout: timeout)
  }
}

extension ChaosPlace {
  init(_ communicator: Communicator) {
    self.init(generation: communicator.generation, rank: communicator.rank, rankCount: communicator.rankCount)
  }
}

extension Job {
  /// Small, with everything that takes part in a step of the protocol.
  static func chaos(rankCount: Int, seed: UInt64) -> Job {
    var random = SplitMix64(seed: seed, 9)
    var job = Job(
      rankCount: rankCount, tokenCount: random.pick([1, 8, 24]), hidden: random.pick([64, 256, 1040]), topK: 2,
      expertCount: 2 * rankCount + 1)
    job.seed = seed
    job.layout = random.pick([.bySource, .byExpert])
    job.sizing = random.pick([.exact, .worstCase])
    job.isAsynchronous = random.chance(0.4)
    job.workers = random.pick([1, 1, 2])
    if random.chance(0.3) { job.quantization = .float }
    if random.chance(0.4) { job.tokensPerStep = random.pick([1, 2]) }
    if random.chance(0.4) { job.ranksOfWaitingStreams = Set(0..<rankCount) }
    return job
  }
}

/// A limit that this process has set itself.
private struct ResourceLimit {
  private let resource: Int32
  private let before: rlimit

  init(_ shortage: Shortage) throws {
    let isMemory = if case .memory = shortage { true } else { false }
    resource = Int32((isMemory ? RLIMIT_AS : RLIMIT_NOFILE).rawValue)
    var limit = rlimit()
    getrlimit(resource, &limit)
    before = limit
    switch shortage {
    case .descriptors(let spare): limit.rlim_cur = rlim_t(try Self.openDescriptorCount() + spare)
    // Enough for what a buffer needs besides its arenas, whose address space is larger by far.
    case .memory: limit.rlim_cur = rlim_t(try Self.addressSpace() + (256 << 20))
    }
    setrlimit(resource, &limit)
  }

  func lift() {
    var limit = before
    setrlimit(resource, &limit)
  }

  /// All numbers below it are in use, or will be before the limit bites.
  private static func openDescriptorCount() throws -> Int {
    var count = 0
    for number in 0..<Int32(4096) where fcntl(number, F_GETFD) >= 0 { count = Int(number) + 1 }
    return count
  }

  private static func addressSpace() throws -> Int {
    guard let file = fopen("/proc/self/statm", "re") else {
      throw EPError.systemCall(rank: -1, name: "fopen", code: errno)
    }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 256)
    fgets(&line, 256, file)
    return strtol(line, nil, 10) * Int(sysconf(Int32(_SC_PAGESIZE)))
  }
}
