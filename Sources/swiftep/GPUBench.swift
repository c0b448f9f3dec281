import CUDADriver
import Conformance
import EPKernels
import Foundation
import Glibc
import HostMachine
import SwiftEP

/// A bench of ranks on GPUs: checked against the oracle once, then timed by the GPUs' own clocks.
///
/// Every rank queues its operation behind a gate, all gates open, and a rank's time runs from its start to its end: what
/// the host does meanwhile is in no figure. Sizes are the worst case, so that no rank waits for its host in between.
final class GPUBench: Sendable {
  let job: JobSpec
  let workload: Workload
  let plan: ExpertBuffer.Plan
  let workerCount: Int
  let iterationCount: Int
  /// How often a graph runs an operation; 0: operations are called, not recorded.
  let replayCount: Int
  let waiting: Waiting
  /// Whether the flight records of all timed iterations are kept: of as many operations of each as a record has.
  let isTraced: Bool
  private let oracle: Oracle
  private let barrier: SpinBarrier
  private let sums: SharedRows
  /// By GPU.
  private let gates = Guarded<[Int: StreamGate]>([:])

  /// What one rank has measured; all times in nanoseconds.
  struct Measurements: Codable, Sendable {
    var dispatch: [UInt64] = []
    var combine: [UInt64] = []
    /// Of rows that lie in no arena.
    var stagedCombine: [UInt64] = []
    /// Of rank 0.
    var copyBytesPerNanosecond = 0.0
    /// Of the rank's GPU, in the first rank's that has it.
    var takenByteCount = 0
    var resultHash: UInt64 = 0
    var gpuName: String
    var multiprocessorCount: Int
    /// Of the timed iterations; nil unless traced.
    var flight: FlightRecord?
  }

  init(
    _ job: JobSpec, _ workload: Workload, plan: ExpertBuffer.Plan, workerCount: Int, iterationCount: Int,
    replayCount: Int, waiting: Waiting = .workers, isTraced: Bool = false
  ) throws {
    (self.waiting, self.isTraced) = (waiting, isTraced)
    (self.job, self.workload, self.plan) = (job, workload, plan)
    (self.workerCount, self.iterationCount, self.replayCount) = (workerCount, iterationCount, replayCount)
    oracle = Oracle(
      expertOwners: contiguousOwners(expertCount: job.expertCount, rankCount: job.rankCount), tokens: workload.tokens,
      layout: job.layout, quantization: job.rowType.quantization,
      groupCapacity: job.shape.groupCapacity, sourceCapacity: job.sourceCapacity)
    barrier = try SpinBarrier(partyCount: job.rankCount)
    sums = try SharedRows(
      rowCounts: oracle.rowCounts, hidden: job.hidden, dtype: job.rowType.combinedDType)
  }

  /// All ranks' measurements, by rank.
  ///
  /// - Throws: `CheckFailure` where a result is wrong, `EPError`, `DriverError`.
  func run(on fabric: some Fabric) throws -> [Measurements] {
    try measurements(of: job.rankCount, on: fabric) { [self] communicator in
      guard case .cuda(let index) = fabric.machine(ofRank: communicator.rank) else { preconditionFailure("no GPU") }
      let gpu = try GPUHost.shared(index).gpu
      let gate = try gates.withLock { gates throws(DriverError) in
        if let gate = gates[index] { return gate }
        let gate = try StreamGate(gpu)
        gates[index] = gate
        return gate
      }
      do {
        return try Rank(self, communicator, gpu: gpu, index: index, gate: gate, gpuCount: fabric.machines.count).run()
      } catch {
        barrier.cancel()
        gate.openForGood()
        throw error
      }
    }
  }

  /// A rank that is a process of its own is not where the bench was made.
  private let creator = getpid()

  // MARK: One rank

  private final class Rank {
    let bench: GPUBench
    let communicator: Communicator
    let gpu: GPU
    let index: Int
    let gate: StreamGate
    /// Whether no rank before this one has this gate.
    let opensGate: Bool
    /// Whether no rank before this one has this GPU.
    let isFirstOfGPU: Bool
    private let start: StreamEvent
    private let end: StreamEvent
    private var opening: UInt64 = 0
    private var ordinary: Tensor?

    init(_ bench: GPUBench, _ communicator: Communicator, gpu: GPU, index: Int, gate: StreamGate, gpuCount: Int) throws
    {
      (self.bench, self.communicator, self.gpu, self.index, self.gate) = (bench, communicator, gpu, index, gate)
      isFirstOfGPU = communicator.rank < gpuCount
      opensGate = isFirstOfGPU || getpid() != bench.creator
      (start, end) = (try StreamEvent(gpu, isTimed: true), try StreamEvent(gpu, isTimed: true))
    }

    private var rank: Int { communicator.rank }
    private var barrier: SpinBarrier { bench.barrier }
    private var job: JobSpec { bench.job }

    func run() throws -> Measurements {
      var measurements = Measurements(gpuName: gpu.name, multiprocessorCount: gpu.multiprocessorCount)
      try barrier.wait()
      let freeBefore = try gpu.freeByteCount()
      try barrier.wait()
      let buffer = try ExpertBuffer(
        communicator, plan: bench.plan, workers: bench.workerCount, machine: .cuda(gpu: index))
      defer { buffer.close() }
      let tokens = try bench.workload.tokens[rank].reachable(from: buffer)
      let weights = try buffer.reachable(bench.workload.weights[rank])
      measurements.resultHash = try checkOnce(buffer, tokens, weights)
      if isFirstOfGPU { measurements.takenByteCount = freeBefore - (try gpu.freeByteCount()) }
      try barrier.wait()
      try checkStaged(buffer, tokens, weights)
      try barrier.wait()
      if rank == 0 { measurements.copyBytesPerNanosecond = try measureCopies(buffer) }
      try barrier.wait()
      let stream = buffer.cudaDevice!.stream
      // The first rounds are not counted.
      var graphs: (dispatch: OperationGraph, combine: OperationGraph, stagedCombine: OperationGraph)?
      var flight: FlightLog?
      for round in -3..<bench.iterationCount {
        let (dispatchTime, combineTime, stagedTime): (UInt64, UInt64, UInt64)
        if bench.replayCount > 0 {
          if graphs == nil {
            graphs = try record(buffer, tokens, weights)
            // Making one may wait for all that is queued on the GPU, which waits for this rank.
            try barrier.wait()
          }
          let count = UInt64(bench.replayCount)
          dispatchTime = try measure(stream) { try graphs!.dispatch.launch() } / count
          combineTime = try measure(stream) { try graphs!.combine.launch() } / count
          stagedTime = try measure(stream) { try graphs!.stagedCombine.launch() } / count
          try graphs!.combine.launch().wait()
        } else {
          var dispatched: DispatchResult?
          dispatchTime = try measure(stream) { [bench] in
            dispatched = try bench.dispatch(buffer, tokens, sizing: .worstCase)
          }
          let rows = try bench.combineRows(buffer, dispatched!)
          combineTime = try measure(stream) { [bench] in
            let result = try bench.combine(buffer, rows, dispatched!.handle, weights, isAsynchronous: true)
            withExtendedLifetime(result) {}
          }
          let ordinary = try ordinaryRows(like: rows, buffer)
          stagedTime = try measure(stream) { [bench] in
            let result = try bench.combine(buffer, ordinary, dispatched!.handle, weights, isAsynchronous: true)
            withExtendedLifetime(result) {}
          }
        }
        flight?.append(buffer.flightRecord)
        if bench.isTraced && round == -1 { flight = FlightLog(after: buffer.flightRecord) }
        if round >= 0 {
          measurements.dispatch.append(dispatchTime)
          measurements.combine.append(combineTime)
          measurements.stagedCombine.append(stagedTime)
        }
      }
      measurements.flight = flight?.record
      return measurements
    }

    private func record(
      _ buffer: ExpertBuffer, _ tokens: RankTokens, _ weights: Tensor
    ) throws -> (OperationGraph, OperationGraph, OperationGraph) {
      let (dispatchGraph, dispatched) = try buffer.record(repeatCount: bench.replayCount) { () throws(EPError) in
        try bench.dispatch(buffer, tokens, sizing: .worstCase)
      }
      let rows = try bench.combineRows(buffer, dispatched)
      let (combineGraph, _) = try buffer.record(repeatCount: bench.replayCount) { () throws(EPError) in
        try bench.combine(buffer, rows, dispatched.handle, weights, isAsynchronous: true)
      }
      let ordinary = try ordinaryRows(like: rows, buffer)
      let (stagedGraph, _) = try buffer.record(repeatCount: bench.replayCount) { () throws(EPError) in
        try bench.combine(buffer, ordinary, dispatched.handle, weights, isAsynchronous: true)
      }
      return (dispatchGraph, combineGraph, stagedGraph)
    }

    /// Returns a hash of what this rank has received.
    private func checkOnce(_ buffer: ExpertBuffer, _ tokens: RankTokens, _ weights: Tensor) throws -> UInt64 {
      let dispatched = try bench.dispatch(buffer, tokens, sizing: .exact)
      let rows = try bench.combineRows(buffer, dispatched)
      if !job.rowType.combinesInPlace { writeExpertRows(of: dispatched, to: rows) }
      let combined = try bench.combine(buffer, rows, dispatched.handle, weights, isAsynchronous: false)
      bench.sums.rows?[rank].copyBeginning(from: rows)
      try barrier.wait()
      if let text = difference(dispatched, from: bench.oracle.dispatched(to: rank), comparingPaddingRows: true) {
        throw CheckFailure(what: "dispatch, rank \(rank): \(text)")
      }
      let sums = bench.oracle.combined(
        at: rank, rows: bench.sums.rows!, encoding: job.encoding,
        rowWeights: job.layout.hasRowPerExpert ? bench.workload.weights[rank] : nil, biases: [])
      if let text = difference(combined.tokens, from: sums, named: "tokens") {
        throw CheckFailure(what: "combine, rank \(rank): \(text)")
      }
      var hash = FNVHash()
      for tensor in [dispatched.rows, dispatched.scales, dispatched.origins, combined.tokens].compactMap({ $0 }) {
        tensor.withUnsafeBytes { hash.add($0) }
      }
      try barrier.wait()
      bench.sums.release()
      return hash.value
    }

    /// Rows of the same shape that lie in no arena, made once.
    private func ordinaryRows(like rows: Tensor, _ buffer: ExpertBuffer) throws(EPError) -> Tensor {
      if let ordinary { return ordinary }
      let made = try buffer.makeTensor(zeros: rows.shape, rows.dtype)
      ordinary = made
      return made
    }

    /// Sums rows where they lie in no arena, and the same in the arena. Not in what is reported of memory.
    private func checkStaged(_ buffer: ExpertBuffer, _ tokens: RankTokens, _ weights: Tensor) throws {
      let dispatched = try bench.dispatch(buffer, tokens, sizing: .exact)
      let rows = try bench.combineRows(buffer, dispatched)
      if !job.rowType.combinesInPlace { writeExpertRows(of: dispatched, to: rows) }
      let ordinary = try buffer.makeTensor(zeros: rows.shape, rows.dtype)
      ordinary.copyBeginning(from: rows)
      let sums = try [rows, ordinary].map {
        try bench.combine(buffer, $0, dispatched.handle, weights, isAsynchronous: false).tokens
      }
      let bytes = sums[0].withUnsafeBytes { Array($0) }
      if let text = difference(sums[1], from: bytes, named: "tokens") {
        throw CheckFailure(what: "combine of an ordinary tensor, rank \(rank): \(text)")
      }
    }

    /// Queues `body` on all ranks, lets them go at once, and returns the nanoseconds from this rank's start to its end.
    private func measure(_ stream: CUDADriver.Stream, _ body: () throws -> Void) throws -> UInt64 {
      opening += 1
      try gate.hold(stream, until: opening)
      try start.record(on: stream)
      try body()
      try end.record(on: stream)
      try barrier.wait()
      if opensGate { try gate.open(opening) }
      try end.synchronize()
      return UInt64(1000 * (try end.microseconds(since: start)))
    }

    /// Bytes read and written a nanosecond by the driver's own copy.
    private func measureCopies(_ buffer: ExpertBuffer) throws -> Double {
      let byteCount = 512 << 20
      let source = try buffer.makeTensor(zeros: [byteCount], .uint8)
      let target = try buffer.makeTensor(zeros: [byteCount], .uint8)
      let stream = try CUDADriver.Stream(gpu)
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

  // MARK: Operations

  private func dispatch(_ buffer: ExpertBuffer, _ tokens: RankTokens, sizing: Sizing) throws(EPError) -> DispatchResult
  {
    var options = DispatchOptions()
    options.layout = job.layout
    options.quantization = job.rowType.quantization
    options.sizing = sizing
    options.isAsynchronous = sizing == .worstCase
    options.waiting = waiting
    return try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
  }

  private func combine(
    _ buffer: ExpertBuffer, _ rows: Tensor, _ handle: DispatchHandle, _ weights: Tensor, isAsynchronous: Bool
  ) throws(EPError) -> CombineResult {
    var options = CombineOptions()
    if job.layout.hasRowPerExpert { options.rowWeights = weights }
    options.encoding = job.encoding
    options.isAsynchronous = isAsynchronous
    options.waiting = waiting
    return try buffer.combine(rows, with: handle, options: options)
  }

  /// What combine sums: the rows that arrived, or arena memory where those cannot be summed.
  private func combineRows(_ buffer: ExpertBuffer, _ dispatched: DispatchResult) throws -> Tensor {
    if job.rowType.combinesInPlace { return dispatched.rows }
    return try buffer.combineInput(for: dispatched.handle, hidden: job.hidden, dtype: job.rowType.combinedDType)
  }
}
