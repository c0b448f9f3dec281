import Conformance
import Foundation
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
  /// Dispatch's, then combine's; one for both where they move the same bytes.
  let floors: [CopyFloor]
  private let oracle: Oracle
  private let rankSteps: SharedStopwatch
  private let copySteps: SharedStopwatch
  private let state: Guarded<State>
  private let progress: @Sendable (Int) -> Void

  /// All times in nanoseconds.
  struct Measurements: Sendable {
    var dispatch: [UInt64] = []
    var combine: [UInt64] = []
    /// By floor, then by kind.
    var copies: [[CopyFloor.Kind: [UInt64]]]
    var residentByteCount = 0
    var resultHash = ""
  }

  private struct State: Sendable {
    var rounds: [Round?]
    var hashes: [UInt64]
    /// The first.
    var failure: (any Error)?
    var measurements: Measurements
  }

  /// What one rank's dispatch and combine returned.
  private struct Round: Sendable {
    let dispatched: DispatchResult
    let combinedRows: Tensor
    let combined: CombineResult
  }

  /// - Parameter progress: called by one thread with the number of iterations that are done.
  init(
    _ job: JobSpec, _ workload: Workload, plan: ExpertBuffer.Plan, workerCount: Int, iterationCount: Int,
    progress: @escaping @Sendable (Int) -> Void
  ) throws(EPError) {
    (self.job, self.workload, self.plan) = (job, workload, plan)
    (self.workerCount, self.iterationCount, self.progress) = (workerCount, iterationCount, progress)
    oracle = Oracle(
      expertOwners: contiguousOwners(expertCount: job.expertCount, rankCount: job.rankCount), tokens: workload.tokens,
      layout: job.layout, expertAlignment: 1,
      quantization: job.rowType.quantization)
    var floors = [
      try CopyFloor(
        CopyFloor.dispatchSizes(job, workload), sources: workload.tokens.map(\.x), workerCount: workerCount)
    ]
    if !job.rowType.combinesInPlace {
      floors.append(try CopyFloor(CopyFloor.combineSizes(job, workload), workerCount: workerCount))
    }
    self.floors = floors
    rankSteps = SharedStopwatch(partyCount: job.rankCount)
    copySteps = SharedStopwatch(partyCount: job.rankCount * workerCount)
    state = Guarded(
      State(
        rounds: Array(repeating: nil, count: job.rankCount), hashes: Array(repeating: 0, count: job.rankCount),
        measurements: Measurements(copies: Array(repeating: [:], count: floors.count))))
  }

  /// - Throws: `CheckFailure` where a result is wrong, `EPError`.
  func run() throws -> Measurements {
    let communicators = try Communicator.threads(rankCount: job.rankCount)
    let residentBefore = Int(FileTree.host.residentByteCount ?? 0)
    try inParallel(job.rankCount * workerCount) { [self] party in
      let (rank, worker) = party.quotientAndRemainder(dividingBy: workerCount)
      do {
        if worker == 0 {
          try runRank(rank, communicators[rank], residentBefore: residentBefore)
        } else {
          try helpCopying(rank: rank, worker: worker)
        }
      } catch {
        fail(error)
      }
    }
    return try state.withLock { state in
      if let failure = state.failure { throw failure }
      return state.measurements
    }
  }

  /// Lets all other threads out of their waits.
  private func fail(_ error: any Error) {
    if !(error is SpinBarrier.Cancelled) { state.withLock { $0.failure = $0.failure ?? error } }
    rankSteps.barrier.cancel()
    copySteps.barrier.cancel()
  }

  // MARK: One rank

  private func runRank(_ rank: Int, _ communicator: Communicator, residentBefore: Int) throws {
    let buffer = try ExpertBuffer(communicator, plan: plan, workers: workerCount)
    defer { buffer.close() }
    // Rows that are not the received ones are the experts' to make, which takes no part in the times.
    let expertRows = try checkOnce(rank, buffer, residentBefore: residentBefore)
    for iteration in 0...iterationCount {
      // The first is not counted.
      try time(rank, buffer, expertRows, isCounted: iteration > 0, isLast: iteration == iterationCount)
      if rank == 0 { progress(iteration) }
    }
  }

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
    if job.layout == .byExpert { options.rowWeights = workload.weights[rank] }
    return try buffer.combine(rows, with: handle, options: options)
  }

  /// The first round: against the oracle, hashed, its memory measured.
  ///
  /// - Returns: combine's rows, where they are not those that dispatch returns.
  private func checkOnce(_ rank: Int, _ buffer: ExpertBuffer, residentBefore: Int) throws -> Tensor? {
    let dispatched = try dispatch(rank, buffer)
    var rows = dispatched.rows
    if !job.rowType.combinesInPlace {
      rows = try buffer.combineInput(for: dispatched.handle, hidden: job.hidden, dtype: job.rowType.combinedDType)
      writeExpertRows(of: dispatched, to: rows)
    }
    let combined = try combine(rank, buffer, rows, dispatched.handle)
    let round = Round(dispatched: dispatched, combinedRows: rows, combined: combined)
    state.withLock { $0.rounds[rank] = round }
    try rankSteps.barrier.wait()
    if rank == 0 {
      let added = max(0, Int(FileTree.host.residentByteCount ?? 0) - residentBefore)
      state.withLock { $0.measurements.residentByteCount = added }
    }
    try rankSteps.barrier.wait()
    try check(round, rank)
    let hash = Self.hash(dispatched, combined)
    state.withLock { $0.hashes[rank] = hash }
    try rankSteps.barrier.wait()
    state.withLock { state in
      state.rounds[rank] = nil
      if rank == 0 {
        var hash = FNVHash()
        for rankHash in state.hashes { hash.add(rankHash) }
        state.measurements.resultHash = hash.text
      }
    }
    return job.rowType.combinesInPlace ? nil : rows
  }

  private func check(_ round: Round, _ rank: Int) throws {
    let expected = oracle.dispatched(to: rank)
    if let difference = difference(round.dispatched, from: expected, comparingPaddingRows: true) {
      throw CheckFailure(what: "dispatch, rank \(rank): \(difference)")
    }
    let rows = state.withLock { $0.rounds.map { $0!.combinedRows } }
    let weights = job.layout == .byExpert ? workload.weights[rank] : nil
    let sums = oracle.combined(at: rank, rows: rows, rowWeights: weights, biases: [])
    if let difference = difference(round.combined.tokens, from: sums, named: "tokens") {
      throw CheckFailure(what: "combine, rank \(rank): \(difference)")
    }
  }

  private func time(
    _ rank: Int, _ buffer: ExpertBuffer, _ expertRows: Tensor?, isCounted: Bool, isLast: Bool
  ) throws {
    // Lets the library's own threads, which spin a while after their work, fall asleep: they would slow the copies. Not
    // asleep itself, since a core that idles starts slowly.
    let rested = monotonicNow() + 100_000
    while monotonicNow() < rested {}
    let copies = try timeCopies(rank: rank, worker: 0)
    let (dispatched, dispatchTime) = try rankSteps.measure(party: rank) { try dispatch(rank, buffer) }
    let (combined, combineTime) = try rankSteps.measure(party: rank) {
      try combine(rank, buffer, expertRows ?? dispatched.rows, dispatched.handle)
    }
    if rank == 0 && isCounted {
      state.withLock { state in
        state.measurements.dispatch.append(dispatchTime)
        state.measurements.combine.append(combineTime)
        for (floor, times) in copies.enumerated() {
          for (kind, some) in times {
            state.measurements.copies[floor][kind, default: []].append(contentsOf: some)
          }
        }
      }
    }
    if isLast && Self.hash(dispatched, combined) != state.withLock({ $0.hashes[rank] }) {
      throw CheckFailure(what: "rank \(rank): the last iteration's results differ from the first's")
    }
  }

  // MARK: Copies

  /// Measures every floor; all threads of all ranks do so together. By floor, then by kind.
  private func timeCopies(rank: Int, worker: Int) throws -> [[CopyFloor.Kind: [UInt64]]] {
    try floors.map { floor in
      var times: [CopyFloor.Kind: [UInt64]] = [:]
      for _ in 0..<floor.repetitionCount {
        for kind in CopyFloor.Kind.allCases {
          let time = try copySteps.measure(party: rank * workerCount + worker) {
            floor.copy(kind, rank: rank, worker: worker)
          }
          times[kind, default: []].append(time.nanoseconds)
        }
      }
      return times
    }
  }

  private func helpCopying(rank: Int, worker: Int) throws {
    for _ in 0...iterationCount { _ = try timeCopies(rank: rank, worker: worker) }
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
