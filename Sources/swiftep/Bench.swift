import Conformance
import Foundation
import Glibc
import HostFacts
import HostMachine
import SwiftEP

/// Runs a workload's dispatch and combine: once against the oracle, then timed, copies of the same sizes before
/// each pair.
final class Bench: Sendable {
  let job: JobSpec
  let workload: Workload
  let plan: ExpertBuffer.Plan
  let workerCount: Int
  let iterationCount: Int
  /// Whether the flight records of all timed iterations are kept.
  let isTraced: Bool
  /// What is copied, by rank: for dispatch, then for combine; once for both where they move the same bytes.
  let floorSizes: [[CopyFloor.Sizes]]
  private let oracle: Oracle
  private let rankSteps: SharedStopwatch
  private let copySteps: SharedStopwatch
  private let sums: SharedRows
  private let flags: FlagRoundTrip
  private let progress: @Sendable (Int) -> Void

  /// What one rank has measured; times, the same on all, in nanoseconds.
  struct Measurements: Codable, Sendable {
    var dispatch: [UInt64] = []
    var combine: [UInt64] = []
    /// By floor, then by kind.
    var copies: [[CopyFloor.Kind: [UInt64]]]
    /// Nil of one rank.
    var flagRoundTripNanoseconds: Double?
    var residentByteCount = 0
    var resultHash: UInt64 = 0
    /// Of the timed iterations; nil unless traced.
    var flight: FlightRecord?
  }

  /// - Parameter progress: called by one thread with the number of iterations that are done.
  init(
    _ job: JobSpec, _ workload: Workload, plan: ExpertBuffer.Plan, workerCount: Int, iterationCount: Int,
    isTraced: Bool = false, progress: @escaping @Sendable (Int) -> Void
  ) throws {
    (self.job, self.workload, self.plan) = (job, workload, plan)
    (self.workerCount, self.iterationCount, self.progress) = (workerCount, iterationCount, progress)
    self.isTraced = isTraced
    oracle = Oracle(
      expertOwners: contiguousOwners(expertCount: job.expertCount, rankCount: job.rankCount), tokens: workload.tokens,
      layout: job.layout, quantization: job.rowType.quantization,
      groupCapacity: job.shape.groupCapacity, sourceCapacity: job.sourceCapacity)
    let dispatchSizes = CopyFloor.dispatchSizes(job, workload)
    floorSizes = [dispatchSizes] + (job.rowType.combinesInPlace ? [] : [CopyFloor.combineSizes(job, workload)])
    rankSteps = try SharedStopwatch(partyCount: job.rankCount)
    copySteps = try SharedStopwatch(partyCount: job.rankCount * workerCount)
    sums = try SharedRows(
      rowCounts: oracle.rowCounts, hidden: job.hidden, dtype: job.rowType.combinedDType)
    flags = try FlagRoundTrip()
  }

  /// All ranks' measurements, by rank.
  ///
  /// - Throws: `CheckFailure` where a result is wrong, `EPError`.
  func run(on fabric: some Fabric) throws -> [Measurements] {
    try measurements(of: job.rankCount, on: fabric) { [self] communicator in
      try endingAllWaits { try runRank(communicator) }
    }
  }

  /// Where `body` fails, all other threads get out of their waits.
  private func endingAllWaits<Result>(_ body: () throws -> Result) throws -> Result {
    do {
      return try body()
    } catch {
      rankSteps.barrier.cancel()
      copySteps.barrier.cancel()
      throw error
    }
  }

  // MARK: One rank

  private func runRank(_ communicator: Communicator) throws -> Measurements {
    let rank = communicator.rank
    let floors = try floorSizes.enumerated().map { index, sizes throws(EPError) in
      try CopyFloor(sizes[rank], source: index == 0 ? workload.tokens[rank].x : nil, workerCount: workerCount)
    }
    let measured = Guarded(Measurements(copies: Array(repeating: [:], count: floors.count)))
    try inParallel(workerCount) { [self] worker in
      let copies = Copies(bench: self, floors: floors, party: rank * workerCount + worker, worker: worker)
      if worker == 0 {
        let measurements = try endingAllWaits { try runRank(communicator, copies) }
        measured.withLock { $0 = measurements }
      } else {
        // Whose failure ends it says so itself.
        do { for _ in 0...iterationCount { _ = try copies.time() } } catch is SpinBarrier.Cancelled {}
      }
    }
    return measured.withLock { $0 }
  }

  private func runRank(_ communicator: Communicator, _ copies: Copies) throws -> Measurements {
    let rank = communicator.rank
    try rankSteps.barrier.wait()
    let residentBefore = residentByteCount(rank)
    try rankSteps.barrier.wait()
    let buffer = try ExpertBuffer(communicator, plan: plan, workers: workerCount)
    defer { buffer.close() }
    var measurements = Measurements(copies: Array(repeating: [:], count: floorSizes.count))
    // Rows that are not the received ones are the experts' to make, which takes no part in the times.
    let expertRows = try checkOnce(rank, buffer, residentBefore: residentBefore, &measurements)
    if job.rankCount > 1 {
      measurements.flagRoundTripNanoseconds = try rankSteps.measure(party: rank) { flags.measure(rank: rank) }.result
    }
    var flight: FlightLog?
    for iteration in 0...iterationCount {
      // The first is not counted.
      try time(rank, buffer, copies, expertRows, iteration, &measurements)
      flight?.append(buffer.flightRecord)
      if isTraced && iteration == 0 {
        buffer.forgetLongestWaits()
        flight = FlightLog(after: buffer.flightRecord)
      }
      if rank == 0 { progress(iteration) }
    }
    measurements.flight = flight?.record
    return measurements
  }

  /// Of this rank, if it is a process; of all ranks of this process, if it is the first of them.
  private func residentByteCount(_ rank: Int) -> Int {
    rank == 0 || isProcess ? Int(FileTree.host.residentByteCount ?? 0) : 0
  }

  /// A rank that is a process of its own is not where the bench was made.
  private let creator = getpid()
  private var isProcess: Bool { getpid() != creator }

  private func dispatch(_ rank: Int, _ buffer: ExpertBuffer) throws(EPError) -> DispatchResult {
    var options = DispatchOptions()
    options.layout = job.layout
    options.quantization = job.rowType.quantization
    let tokens = workload.tokens[rank]
    return try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
  }

  private func combine(
    _ rank: Int, _ buffer: ExpertBuffer, _ rows: Tensor, _ handle: DispatchHandle
  ) throws(EPError) -> CombineResult {
    var options = CombineOptions()
    if job.layout.hasRowPerExpert { options.rowWeights = workload.weights[rank] }
    options.encoding = job.encoding
    return try buffer.combine(rows, with: handle, options: options)
  }

  /// The first round: against the oracle, hashed, its memory measured.
  ///
  /// - Returns: combine's rows, where they are not those that dispatch returns.
  private func checkOnce(
    _ rank: Int, _ buffer: ExpertBuffer, residentBefore: Int, _ measurements: inout Measurements
  ) throws -> Tensor? {
    let dispatched = try dispatch(rank, buffer)
    var rows = dispatched.rows
    if !job.rowType.combinesInPlace {
      rows = try buffer.combineInput(for: dispatched.handle, hidden: job.hidden, dtype: job.rowType.combinedDType)
      writeExpertRows(of: dispatched, to: rows)
    }
    let combined = try combine(rank, buffer, rows, dispatched.handle)
    try rankSteps.barrier.wait()
    measurements.residentByteCount = max(0, residentByteCount(rank) - residentBefore)
    try rankSteps.barrier.wait()
    sums.rows?[rank].copyBeginning(from: rows)
    try rankSteps.barrier.wait()
    try check(rank, dispatched, combined)
    try rankSteps.barrier.wait()
    sums.release()
    measurements.resultHash = Self.hash(dispatched, combined)
    return job.rowType.combinesInPlace ? nil : rows
  }

  private func check(_ rank: Int, _ dispatched: DispatchResult, _ combined: CombineResult) throws {
    let expected = oracle.dispatched(to: rank)
    if let difference = difference(dispatched, from: expected, comparingPaddingRows: true) {
      throw CheckFailure(what: "dispatch, rank \(rank): \(difference)")
    }
    let weights = job.layout.hasRowPerExpert ? workload.weights[rank] : nil
    let sums = oracle.combined(at: rank, rows: sums.rows!, encoding: job.encoding, rowWeights: weights, biases: [])
    if let difference = difference(combined.tokens, from: sums, named: "tokens") {
      throw CheckFailure(what: "combine, rank \(rank): \(difference)")
    }
  }

  private func time(
    _ rank: Int, _ buffer: ExpertBuffer, _ copies: Copies, _ expertRows: Tensor?, _ iteration: Int,
    _ measurements: inout Measurements
  ) throws {
    // Lets the library's own threads, which spin a while after their work, fall asleep: they would slow the copies. Not
    // asleep itself, since a core that idles starts slowly.
    let rested = monotonicNow() + 100_000
    while monotonicNow() < rested {}
    let copyTimes = try copies.time()
    let (dispatched, dispatchTime) = try rankSteps.measure(party: rank) { try dispatch(rank, buffer) }
    let (combined, combineTime) = try rankSteps.measure(party: rank) {
      try combine(rank, buffer, expertRows ?? dispatched.rows, dispatched.handle)
    }
    if iteration > 0 {
      measurements.dispatch.append(dispatchTime)
      measurements.combine.append(combineTime)
      for (floor, times) in copyTimes.enumerated() {
        measurements.copies[floor].merge(times) { $0 + $1 }
      }
    }
    if iteration == iterationCount && Self.hash(dispatched, combined) != measurements.resultHash {
      throw CheckFailure(what: "rank \(rank): the last iteration's results differ from the first's")
    }
  }

  // MARK: Copies

  /// One thread's part of the floors.
  private struct Copies {
    let bench: Bench
    let floors: [CopyFloor]
    let party: Int
    let worker: Int

    /// Measures every floor; all threads of all ranks do so together. By floor, then by kind.
    func time() throws -> [[CopyFloor.Kind: [UInt64]]] {
      try zip(floors, bench.floorSizes).map { floor, sizes in
        var times: [CopyFloor.Kind: [UInt64]] = [:]
        for _ in 0..<sizes.repetitionCount {
          for kind in CopyFloor.Kind.allCases {
            let time = try bench.copySteps.measure(party: party) { floor.copy(kind, worker: worker) }
            times[kind, default: []].append(time.nanoseconds)
          }
        }
        return times
      }
    }
  }

  // MARK: Results

  private static func hash(_ dispatched: DispatchResult, _ combined: CombineResult) -> UInt64 {
    let tensors = [
      dispatched.rows, dispatched.scales, dispatched.origins, dispatched.topKIndices, dispatched.topKWeights,
      dispatched.rowCount, dispatched.tokensPerSource, dispatched.tokensPerExpert, combined.tokens,
    ]
    var hash = FNVHash()
    for tensor in tensors.compactMap({ $0 }) { tensor.withUnsafeBytes { hash.add($0) } }
    return hash.value
  }
}

/// How a rank's part ended, where it did not throw an `EPError`.
private enum Outcome<Measurements: Codable & Sendable>: Codable, Sendable {
  case measured(Measurements)
  case checkFailed(String)
  /// Another rank's failure ended it.
  case cancelled
}

/// What `body` has measured on each rank, in rank order.
///
/// - Parameter body: throws `SpinBarrier.Cancelled` where another rank's failure ends it.
/// - Throws: the first rank's `CheckFailure`, or what else a rank has thrown.
func measurements<Measurements: Codable & Sendable>(
  of rankCount: Int, on fabric: some Fabric, _ body: @escaping @Sendable (Communicator) throws -> Measurements
) throws -> [Measurements] {
  let outcomes = try fabric.values(rankCount: rankCount, timeout: .seconds(100)) { communicator in
    do {
      return Outcome.measured(try body(communicator))
    } catch let failure as CheckFailure {
      return .checkFailed(failure.what)
    } catch is SpinBarrier.Cancelled {
      return .cancelled
    }
  }
  return try outcomes.compactMap { outcome in
    switch outcome {
    case .measured(let measurements): measurements
    case .checkFailed(let what): throw CheckFailure(what: what)
    case .cancelled: nil
    }
  }
}
