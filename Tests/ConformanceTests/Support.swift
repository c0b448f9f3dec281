import Conformance
import Foundation
import SwiftEP
import Testing

/// All suites of this target, one test at a time: each runs many threads of its own.
@Suite(.serialized) struct ConformanceTests {}

/// What kind of ranks the tests run on: `SWIFTEP_TEST_FABRIC=sockets` is the other kind. Tests that bring values of
/// several ranks together need ranks that share memory.
let fabric: any Fabric = {
  // Buffers are lost here on purpose.
  setenv("SWIFTEP_FLIGHT_RECORDER", "off", 0)
  return ProcessInfo.processInfo.environment["SWIFTEP_TEST_FABRIC"] == "sockets" ? SocketFabric() : ThreadFabric()
}()

extension Tensor {
  var bytes: [UInt8] { withUnsafeBytes { Array($0) } }
}

extension DispatchResult {
  /// Everything that a dispatch returned, as bytes.
  var bytes: [[UInt8]] {
    [
      rows.bytes, scales?.bytes ?? [], origins.bytes, topKIndices?.bytes ?? [], topKWeights?.bytes ?? [],
      rowCount.bytes, tokensPerSource.bytes, tokensPerExpert.bytes, unalignedTokensPerExpert.bytes,
    ] + sidecars.map(\.bytes)
  }
}

/// Something that is not as a test wants it, found on a rank's own thread.
struct Mismatch: Error, CustomStringConvertible {
  let description: String
}

func require(_ condition: Bool, _ description: @autoclosure () -> String) throws {
  if !condition { throw Mismatch(description: description()) }
}

/// Makes a buffer on every rank, runs `body` with each, and returns what it returned, by rank.
func onEachRank<Value: Sendable>(
  _ plan: ExpertBuffer.Plan, workers: Int = 1, timeout: Duration = .seconds(30),
  _ body: @escaping @Sendable (ExpertBuffer) throws -> Value
) throws -> [Value] {
  let slots = Slots<Value>(count: plan.shape.rankCount)
  try fabric.run(plan: plan, workers: workers, timeout: timeout) { buffer in
    slots.set(try body(buffer), at: buffer.rank)
  }
  return slots.values
}

/// Runs `body` on `count` threads and returns what it returned, by index.
func valuesInParallel<Value: Sendable>(
  _ count: Int, _ body: @escaping @Sendable (Int) throws -> Value
) throws -> [Value] {
  let slots = Slots<Value>(count: count)
  try inParallel(count) { index in slots.set(try body(index), at: index) }
  return slots.values
}

/// One slot for each rank's value.
private final class Slots<Value: Sendable>: @unchecked Sendable {
  private let base: UnsafeMutablePointer<Value?>
  private let count: Int

  init(count: Int) {
    self.count = count
    base = .allocate(capacity: count)
    base.initialize(repeating: nil, count: count)
  }

  deinit {
    base.deinitialize(count: count)
    base.deallocate()
  }

  /// SAFETY: each thread sets its own slot; all are read after the threads have been joined.
  func set(_ value: Value, at index: Int) { base[index] = value }
  var values: [Value] { (0..<count).map { base[$0]! } }
}

/// What a call throws; a `Mismatch` when it throws nothing.
func error(of call: () throws(EPError) -> Void) throws -> EPError {
  do throws(EPError) {
    try call()
  } catch {
    return error
  }
  throw Mismatch(description: "the call threw nothing")
}

/// A small job: 16 tokens a rank, hidden 64, top-2 of 6 experts.
func smallJob(rankCount: Int = 3) -> Job {
  Job(rankCount: rankCount, tokenCount: 16, hidden: 64, topK: 2, expertCount: 6)
}

extension Job {
  func with(_ change: (inout Job) -> Void) -> Job {
    var job = self
    change(&job)
    return job
  }

  func makeOracle(step: Int = 0) -> Oracle {
    Oracle(
      expertOwners: owners, tokens: (0..<rankCount).map { makeTokens(rank: $0, step: step) }, layout: layout,
      expertAlignment: expertAlignment, quantization: quantization)
  }

  /// This rank's part of dispatch `step`.
  func dispatch(
    on buffer: ExpertBuffer, step: Int = 0, handle: DispatchHandle? = nil, options: DispatchOptions? = nil
  ) throws(EPError) -> DispatchResult {
    let tokens = makeTokens(rank: buffer.rank, step: step)
    var routing = tokens.routing
    if let handle { routing = .cached(handle) }
    return try buffer.dispatch(
      tokens.x, scales: tokens.scales, sidecars: tokens.sidecars, to: routing, options: options ?? dispatchOptions)
  }

  /// One dispatch that must be right: the buffer still works.
  func checkDispatch(on buffer: ExpertBuffer, step: Int = 0) throws {
    let result = try dispatch(on: buffer, step: step)
    try result.event.wait()
    let expected = makeOracle(step: step).dispatched(to: buffer.rank)
    if let text = difference(result, from: expected, comparingPaddingRows: zeroesPadding) {
      throw Mismatch(description: text)
    }
  }
}
