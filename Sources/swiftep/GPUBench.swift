import CUDADriver
import Conformance
import EPKernels
import Foundation
import HostMachine
import SwiftEP

/// A bench of ranks that share a GPU: checked against the oracle once, then timed by the GPU's own clock.
///
/// Every rank queues its operation behind a gate, the gate opens, and the time runs from the first rank's start to the
/// last rank's end: what the host does meanwhile is in no figure. Sizes are the worst case, so that no rank waits for
/// its host in between.
final class GPUBench: Sendable {
  let job: JobSpec
  let workload: Workload
  let plan: ExpertBuffer.Plan
  let workerCount: Int
  let iterationCount: Int
  /// How often a recorded operation is run in a row; 0: operations are called, not recorded.
  let replayCount: Int
  private let oracle: Oracle
  private let barrier: SpinBarrier
  private let state: Guarded<State>
  private let gpu: GPU
  /// UInt64: openings of the gate so far. In the GPU's memory: streams that wait for a word of the host's notice it late,
  /// one after the other.
  private let gate: VirtualMemory
  /// Opens it.
  private let opener: CUDADriver.Stream

  /// All times in nanoseconds.
  struct Measurements: Sendable {
    var dispatch: [UInt64] = []
    var combine: [UInt64] = []
    var copyBytesPerNanosecond = 0.0
    var takenByteCount = 0
    var resultHash = ""
  }

  private struct State: Sendable {
    var combinedRows: [Tensor?]
    var starts: [TimedEvent?]
    var ends: [TimedEvent?]
    var hashes: [UInt64]
    var failure: (any Error)?
    var measurements = Measurements()
  }

  init(
    _ job: JobSpec, _ workload: Workload, plan: ExpertBuffer.Plan, workerCount: Int, iterationCount: Int,
    replayCount: Int
  ) throws {
    (self.job, self.workload, self.plan) = (job, workload, plan)
    (self.workerCount, self.iterationCount, self.replayCount) = (workerCount, iterationCount, replayCount)
    oracle = Oracle(
      expertOwners: contiguousOwners(expertCount: job.expertCount, rankCount: job.rankCount), tokens: workload.tokens,
      layout: job.layout, expertAlignment: 1, quantization: job.rowType.quantization)
    barrier = try SpinBarrier(partyCount: job.rankCount)
    state = Guarded(
      State(
        combinedRows: Array(repeating: nil, count: job.rankCount), starts: Array(repeating: nil, count: job.rankCount),
        ends: Array(repeating: nil, count: job.rankCount), hashes: Array(repeating: 0, count: job.rankCount)))
    gpu = try GPUHost.shared(0).gpu
    gate = try VirtualMemory(gpu, reservedByteCount: 64)
    try gate.grow(to: 64)
    opener = try CUDADriver.Stream(gpu)
    try opener.fill(gate.base, byteCount: 64, with: 0)
    try opener.synchronize()
  }

  var gpuName: String { gpu.name }
  var multiprocessorCount: Int { gpu.multiprocessorCount }

  /// - Throws: `CheckFailure` where a result is wrong, `EPError`, `DriverError`.
  func run() throws -> Measurements {
    let communicators = try Communicator.threads(rankCount: job.rankCount)
    let freeBefore = try gpu.freeByteCount()
    try inParallel(job.rankCount) { [self] rank in
      do {
        try runRank(rank, communicators[rank], freeBefore: freeBefore)
      } catch {
        if !(error is SpinBarrier.Cancelled) {
          printError("rank \(rank): \(error)")
          state.withLock { $0.failure = $0.failure ?? error }
        }
        barrier.cancel()
        // The driver compares as in a cycle: this is ahead of every opening.
        try? open(to: 1 << 62)
      }
    }
    return try state.withLock { state in
      if let failure = state.failure { throw failure }
      return state.measurements
    }
  }

  private func open(to value: UInt64) throws(DriverError) { try opener.write(value, to: gate.base) }

  // MARK: One rank

  private func runRank(_ rank: Int, _ communicator: Communicator, freeBefore: Int) throws {
    let buffer = try ExpertBuffer(communicator, plan: plan, workers: workerCount, machine: .cuda(gpu: 0))
    defer { buffer.close() }
    let tokens = try workload.tokens[rank].reachable(from: buffer)
    let weights = try buffer.reachable(workload.weights[rank])
    try checkOnce(rank, buffer, tokens, weights)
    if rank == 0 {
      let taken = freeBefore - (try gpu.freeByteCount())
      let bandwidth = try measureCopies(buffer)
      state.withLock {
        ($0.measurements.takenByteCount, $0.measurements.copyBytesPerNanosecond) = (taken, bandwidth)
      }
    }
    try barrier.wait()
    let stream = buffer.cudaDevice!.stream
    let (start, end) = (try TimedEvent(gpu), try TimedEvent(gpu))
    state.withLock { ($0.starts[rank], $0.ends[rank]) = (start, end) }
    var opening: UInt64 = 0
    // The first rounds are not counted.
    var graphs: (dispatch: OperationGraph, combine: OperationGraph)?
    for round in -3..<iterationCount {
      let (dispatchTime, combineTime): (UInt64, UInt64)
      if replayCount > 0 {
        graphs = try graphs ?? record(buffer, tokens, weights)
        dispatchTime = try measure(rank, stream, &opening) { try replay(graphs!.dispatch) } / UInt64(replayCount)
        combineTime = try measure(rank, stream, &opening) { try replay(graphs!.combine) } / UInt64(replayCount)
        try graphs!.combine.launch().wait()
      } else {
        var dispatched: DispatchResult?
        dispatchTime = try measure(rank, stream, &opening) {
          dispatched = try dispatch(buffer, tokens, sizing: .worstCase)
        }
        let rows = try combineRows(buffer, dispatched!)
        combineTime = try measure(rank, stream, &opening) {
          let result = try combine(buffer, rows, dispatched!.handle, weights, isAsynchronous: true)
          withExtendedLifetime(result) {}
        }
      }
      if rank == 0 && round >= 0 {
        state.withLock {
          $0.measurements.dispatch.append(dispatchTime)
          $0.measurements.combine.append(combineTime)
        }
      }
    }
  }

  private func replay(_ graph: OperationGraph) throws {
    for _ in 0..<replayCount { try graph.launch() }
  }

  private func record(
    _ buffer: ExpertBuffer, _ tokens: RankTokens, _ weights: Tensor
  ) throws -> (OperationGraph, OperationGraph) {
    let (dispatchGraph, dispatched) = try buffer.record { () throws(EPError) in
      try dispatch(buffer, tokens, sizing: .worstCase)
    }
    let rows = try combineRows(buffer, dispatched)
    let (combineGraph, _) = try buffer.record { () throws(EPError) in
      try combine(buffer, rows, dispatched.handle, weights, isAsynchronous: true)
    }
    return (dispatchGraph, combineGraph)
  }

  private func dispatch(_ buffer: ExpertBuffer, _ tokens: RankTokens, sizing: Sizing) throws(EPError) -> DispatchResult
  {
    var options = DispatchOptions()
    options.layout = job.layout
    options.quantization = job.rowType.quantization
    options.sizing = sizing
    options.isAsynchronous = sizing == .worstCase
    return try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
  }

  private func combine(
    _ buffer: ExpertBuffer, _ rows: Tensor, _ handle: DispatchHandle, _ weights: Tensor, isAsynchronous: Bool
  ) throws(EPError) -> CombineResult {
    var options = CombineOptions()
    if job.layout == .byExpert { options.rowWeights = weights }
    options.isAsynchronous = isAsynchronous
    return try buffer.combine(rows, with: handle, options: options)
  }

  /// What combine sums: the rows that arrived, or arena memory where those cannot be summed.
  private func combineRows(_ buffer: ExpertBuffer, _ dispatched: DispatchResult) throws -> Tensor {
    if job.rowType.combinesInPlace { return dispatched.rows }
    return try buffer.combineInput(for: dispatched.handle, hidden: job.hidden, dtype: job.rowType.combinedDType)
  }

  // MARK: Results

  private func checkOnce(_ rank: Int, _ buffer: ExpertBuffer, _ tokens: RankTokens, _ weights: Tensor) throws {
    let dispatched = try dispatch(buffer, tokens, sizing: .exact)
    let rows = try combineRows(buffer, dispatched)
    if !job.rowType.combinesInPlace { writeExpertRows(of: dispatched, to: rows) }
    let combined = try combine(buffer, rows, dispatched.handle, weights, isAsynchronous: false)
    let copy = try Tensor(copying: try rows.elements(UInt16.self), shape: rows.shape, rows.dtype)
    state.withLock { $0.combinedRows[rank] = copy }
    try barrier.wait()
    if let text = difference(dispatched, from: oracle.dispatched(to: rank), comparingPaddingRows: true) {
      throw CheckFailure(what: "dispatch, rank \(rank): \(text)")
    }
    let sums = oracle.combined(
      at: rank, rows: state.withLock { $0.combinedRows.map { $0! } },
      rowWeights: job.layout == .byExpert ? workload.weights[rank] : nil, biases: [])
    if let text = difference(combined.tokens, from: sums, named: "tokens") {
      throw CheckFailure(what: "combine, rank \(rank): \(text)")
    }
    var hash = FNVHash()
    for tensor in [dispatched.rows, dispatched.scales, dispatched.origins, combined.tokens].compactMap({ $0 }) {
      tensor.withUnsafeBytes { hash.add($0) }
    }
    state.withLock { $0.hashes[rank] = hash.value }
    try barrier.wait()
    state.withLock { state in
      state.combinedRows[rank] = nil
      if rank == 0 {
        var hash = FNVHash()
        for rankHash in state.hashes { hash.add(rankHash) }
        state.measurements.resultHash = hash.text
      }
    }
  }

  // MARK: Time

  /// Queues `body` on all ranks, lets them go at once, and returns the nanoseconds from the first start to the last end.
  private func measure(
    _ rank: Int, _ stream: CUDADriver.Stream, _ opening: inout UInt64, _ body: () throws -> Void
  ) throws -> UInt64 {
    opening += 1
    let (start, end) = state.withLock { ($0.starts[rank]!, $0.ends[rank]!) }
    try stream.wait(until: gate.base, isAtLeast: opening)
    try start.record(on: stream)
    try body()
    try end.record(on: stream)
    try barrier.wait()
    if rank == 0 { try open(to: opening) }
    try end.synchronize()
    try barrier.wait()
    var time: UInt64 = 0
    if rank == 0 {
      let (starts, ends) = state.withLock { ($0.starts.map { $0! }, $0.ends.map { $0! }) }
      let firstStart = try starts.map { try $0.microseconds(since: starts[0]) }.min()!
      let lastEnd = try ends.map { try $0.microseconds(since: starts[0]) }.max()!
      time = UInt64(1000 * (lastEnd - firstStart))
    }
    // Until then, nobody records anew.
    try barrier.wait()
    return time
  }

  /// Bytes read and written a nanosecond by the driver's own copy.
  private func measureCopies(_ buffer: ExpertBuffer) throws -> Double {
    let byteCount = 512 << 20
    let source = try buffer.makeTensor(zeros: [byteCount], .uint8)
    let target = try buffer.makeTensor(zeros: [byteCount], .uint8)
    let stream = try CUDADriver.Stream(gpu)
    let (start, end) = (try TimedEvent(gpu), try TimedEvent(gpu))
    var best = Double.infinity
    for _ in 0..<12 {
      try start.record(on: stream)
      try stream.copy(
        from: DeviceAddress(bits: source.address.bits), to: DeviceAddress(bits: target.address.bits),
        byteCount: byteCount)
      try end.record(on: stream)
      try end.synchronize()
      best = min(best, try end.microseconds(since: start))
    }
    return Double(2 * byteCount) / (1000 * best)
  }
}
