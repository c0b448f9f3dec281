import CUDADriver
import Glibc
import HostMachine
import SwiftEP

/// Calls on a stream of the caller's, on a GPU, `count` times: behind the copies that make their input there, which come
/// late, and before the copies that read what they return, which come later than the results are let go and other calls
/// could take their memory. Then as many runs of a graph that is captured on the stream. All compared with calls that wait.
///
/// - Parameter job: with weighted top-k routing; its sizing and its way to wait are those of streams.
/// - Throws: `ConformanceFailure`, `EPError`, `DriverError`.
package func checkStreams(_ job: Job, count: Int, on fabric: any Fabric) throws {
  var job = job
  (job.sizing, job.isAsynchronous) = (.worstCase, true)
  let checked = job
  try fabric.run(plan: job.makePlan(), workers: job.workers, timeout: job.timeout) { buffer in
    let streams = try Streams(checked, buffer)
    try streams.runCalls(count)
    try streams.runGraph(count)
  }
}

/// One rank's part.
private final class Streams {
  let job: Job
  let buffer: ExpertBuffer
  let stream: CUDADriver.Stream
  let steps: [Step]
  let input: GraphInputs
  /// Where the stream's copies of what arrives go.
  let rows: Tensor
  let sums: Tensor
  /// UInt64: openings so far. Of the host's memory: a stream that is to open it might have to queue behind one that waits.
  let gate: PinnedMemory
  var opening: UInt64 = 0

  struct Step {
    let tokens: GraphInputs
    let rows: [UInt8]
    let sums: [UInt8]
  }

  init(_ job: Job, _ buffer: ExpertBuffer) throws {
    (self.job, self.buffer) = (job, buffer)
    let gpu = buffer.cudaDevice!.stream.gpu
    stream = try CUDADriver.Stream(gpu)
    gate = try PinnedMemory(gpu, byteCount: 64)
    steps = try (0..<3).map { number in
      let step = job.reseeded(number)
      let all = (0..<job.rankCount).map { step.makeTokens(rank: $0) }
      let tokens = try GraphInputs(all[buffer.rank], on: buffer)
      var options = job.dispatchOptions
      options.isAsynchronous = false
      let dispatched = try buffer.dispatch(tokens.x, to: tokens.routing, options: options)
      let expected = Oracle(step, tokens: all).dispatched(to: buffer.rank)
      if let text = difference(dispatched, from: expected, comparingPaddingRows: false) {
        throw ConformanceFailure(job: job, rank: buffer.rank, step: "dispatch", what: text)
      }
      let combined = try buffer.combine(dispatched.rows, with: dispatched.handle)
      // Between grouped rows lies whatever lay there before; their sums tell of them, too.
      let width = job.layout == .grouped ? 0 : dispatched.rows.byteCount / max(1, dispatched.handle.rowCapacity)
      return Step(
        tokens: tokens, rows: dispatched.rows.withUnsafeBytes { Array($0.prefix(width * expected.rowCount)) },
        sums: combined.tokens.withUnsafeBytes { Array($0) })
    }
    input = try GraphInputs(job.makeTokens(rank: buffer.rank, step: 0), on: buffer)
    let rowCount = steps.map(\.rows.count).max()!
    rows = try buffer.makeTensor(zeros: [rowCount], .uint8)
    sums = try buffer.makeTensor(zeros: [steps[0].sums.count], .uint8)
  }

  private var callers: CUDAStream { CUDAStream(unsafeHandle: stream.rawHandle, owner: stream) }

  private func open(_ opening: UInt64) { gate.base.storeBytes(of: opening, as: UInt64.self) }

  private func hold(until opening: UInt64) throws(DriverError) {
    try stream.wait(until: DeviceAddress(bits: UInt64(UInt(bitPattern: gate.base))), isAtLeast: opening)
  }

  // MARK: Calls

  func runCalls(_ count: Int) throws {
    for run in 0..<count {
      let step = steps[run % steps.count]
      opening += 2
      try hold(until: opening - 1)
      try copyInput(of: step)
      let event = try operate { try hold(until: opening) }
      open(opening - 1)
      // From now on what was returned is in use by the stream only, which has not read it yet.
      try event.wait()
      // Takes what was let go, if it may.
      let other = steps[(run + 1) % steps.count].tokens
      let dispatched = try buffer.dispatch(other.x, to: other.routing, options: job.dispatchOptions)
      let combined = try buffer.combine(dispatched.rows, with: dispatched.handle, options: combineOptions)
      // It may have to wait for the stream.
      let end = monotonicNow() + 5_000_000
      while !combined.event.isComplete && monotonicNow() < end { usleep(50) }
      open(opening)
      try combined.event.wait()
      try requireAll(step, "run \(run) on a stream")
    }
  }

  private var combineOptions: CombineOptions {
    var options = CombineOptions()
    options.isAsynchronous = true
    options.waiting = job.waiting(ofRank: buffer.rank)
    return options
  }

  /// A dispatch and a combine on the stream, and copies of what they return, behind what `delay` queues.
  ///
  /// - Returns: the combine's event.
  private func operate(_ delay: () throws -> Void) throws -> Event {
    var (options, combineOptions) = (job.dispatchOptions(ofRank: buffer.rank), combineOptions)
    (options.stream, combineOptions.stream) = (callers, callers)
    let dispatched = try buffer.dispatch(input.x, to: input.routing, options: options)
    let combined = try buffer.combine(dispatched.rows, with: dispatched.handle, options: combineOptions)
    try delay()
    try copy(dispatched.rows, to: rows, byteCount: rows.byteCount)
    try copy(combined.tokens, to: sums, byteCount: sums.byteCount)
    return combined.event
  }

  // MARK: A graph

  func runGraph(_ count: Int) throws {
    var failure: (any Error)?
    let graph = try CUDADriver.Graph(of: stream) { () throws(DriverError) in
      do { _ = try operate {} } catch { failure = error }
    }
    if let failure { throw failure }
    for run in 0..<count {
      let step = steps[run % steps.count]
      try copyInput(of: step)
      // Between launches of the graph, calls on the same stream.
      if run % 3 == 1 { _ = try operate {} } else { try graph.launch(on: stream) }
      try requireAll(step, "run \(run) of a captured graph")
    }
  }

  // MARK: Copies

  private func copyInput(of step: Step) throws {
    try copy(step.tokens.x, to: input.x, byteCount: input.x.byteCount)
    try copy(step.tokens.indices, to: input.indices, byteCount: input.indices.byteCount)
    try copy(step.tokens.weights, to: input.weights, byteCount: input.weights.byteCount)
  }

  private func copy(_ source: Tensor, to target: Tensor, byteCount: Int) throws {
    if byteCount == 0 { return }
    try stream.copy(
      from: DeviceAddress(bits: source.unsafeAddress), to: DeviceAddress(bits: target.unsafeAddress),
      byteCount: byteCount)
  }

  private func requireAll(_ step: Step, _ what: String) throws {
    try stream.synchronize()
    for (found, expected, name) in [(rows, step.rows, "rows"), (sums, step.sums, "tokens")] {
      let bytes = found.withUnsafeBytes { Array($0.prefix(expected.count)) }
      if let index = bytes.indices.first(where: { bytes[$0] != expected[$0] }) {
        throw ConformanceFailure(job: job, rank: buffer.rank, step: what, what: "\(name): byte \(index) differs")
      }
    }
  }
}
