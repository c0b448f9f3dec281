import Conformance
import SwiftEP
import Testing

/// Whether ranks run on GPUs.
let isOnGPU = fabric.machine(ofRank: 0) != .cpu

/// The same, but ranks are threads of this process: for tests that look at several of them at once. Of CPUs, where ranks are
/// processes otherwise: those could not use GPUs that this process has used.
let threadFabric: any Fabric = fabric is ProcessFabric ? SocketFabric() : fabric

/// A rank's buffer for tests that give it tensors of the host: each is copied to where the buffer's machine reaches it,
/// unless it lies there. What is to change after a call must be made by `makeTensor`.
@dynamicMemberLookup
struct TestBuffer: Sendable {
  let buffer: ExpertBuffer

  init(_ buffer: ExpertBuffer) { self.buffer = buffer }

  /// Of a thread of this process, on what its rank of the tests runs on.
  init(
    _ communicator: Communicator, plan: ExpertBuffer.Plan, workers: Int? = nil, timeout: Duration = .seconds(100)
  ) throws(EPError) {
    let machine = threadFabric.machine(ofRank: communicator.rank)
    buffer = try ExpertBuffer(
      communicator, plan: plan, workers: workers, timeout: timeout, machine: machine)
  }

  subscript<Value>(dynamicMember path: KeyPath<ExpertBuffer, Value>) -> Value { buffer[keyPath: path] }

  func dispatch(
    _ x: Tensor, scales: Tensor? = nil, sidecars: [Tensor] = [], to routing: Routing,
    options: DispatchOptions = DispatchOptions()
  ) throws(EPError) -> DispatchResult {
    let tokens = try RankTokens(x: x, scales: scales, sidecars: sidecars, routing: routing).reachable(from: buffer)
    return try buffer.dispatch(
      tokens.x, scales: tokens.scales, sidecars: tokens.sidecars, to: tokens.routing, options: options)
  }

  func combine(
    _ rows: Tensor, with handle: DispatchHandle, options: CombineOptions = CombineOptions()
  ) throws(EPError) -> CombineResult {
    var options = options
    options.rowWeights = try reachable(options.rowWeights)
    options.topKWeights = try reachable(options.topKWeights)
    options.biases = try options.biases.map { bias throws(EPError) in try buffer.reachable(bias) }
    options.output = try reachable(options.output)
    return try buffer.combine(try buffer.reachable(rows), with: handle, options: options)
  }

  private func reachable(_ tensor: Tensor?) throws(EPError) -> Tensor? {
    if let tensor { return try buffer.reachable(tensor) }
    return nil
  }

  func combineInput(for handle: DispatchHandle, hidden: Int, dtype: DType) throws(EPError) -> Tensor {
    try buffer.combineInput(for: handle, hidden: hidden, dtype: dtype)
  }

  func makeTensor(zeros shape: [Int], _ dtype: DType) throws(EPError) -> Tensor {
    try buffer.makeTensor(zeros: shape, dtype)
  }

  func record<Result>(
    _ body: () throws(EPError) -> Result
  ) throws(EPError) -> (graph: OperationGraph, result: Result) { try buffer.record(body) }

  var maskedRanks: [Int] { get throws(EPError) { try buffer.maskedRanks } }

  func forgetLongestWaits() { buffer.forgetLongestWaits() }

  func close() { buffer.close() }
}

extension Fabric {
  /// Runs `body` with a buffer on every rank.
  func test(
    plan: ExpertBuffer.Plan, workers: Int, timeout: Duration, _ body: @escaping @Sendable (TestBuffer) throws -> Void
  ) throws {
    _ = try values(plan: plan, workers: workers, timeout: timeout) { (buffer: ExpertBuffer) in
      try body(TestBuffer(buffer))
      return true
    }
  }
}

extension Tensor {
  var bytes: [UInt8] { withUnsafeBytes { Array($0) } }
}

extension DispatchResult {
  /// Everything that a dispatch returned, as bytes.
  var bytes: [[UInt8]] {
    [
      rows.bytes, scales?.bytes ?? [], origins.bytes, topKIndices?.bytes ?? [], topKWeights?.bytes ?? [],
      rowCount.bytes, tokensPerSource.bytes, tokensPerPair.bytes, tokensPerExpert.bytes, unalignedTokensPerExpert.bytes,
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
func onEachRank<Value: Codable & Sendable>(
  of fabric: any Fabric = fabric, _ plan: ExpertBuffer.Plan, workers: Int = 1, timeout: Duration = .seconds(30),
  _ body: @escaping @Sendable (TestBuffer) throws -> Value
) throws -> [Value] {
  try fabric.values(plan: plan, workers: workers, timeout: timeout) { try body(TestBuffer($0)) }
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
    Oracle(self, tokens: (0..<rankCount).map { makeTokens(rank: $0, step: step) })
  }

  /// This rank's part of dispatch `step`.
  func dispatch(
    on buffer: TestBuffer, step: Int = 0, handle: DispatchHandle? = nil, options: DispatchOptions? = nil
  ) throws(EPError) -> DispatchResult {
    let tokens = makeTokens(rank: buffer.rank, step: step)
    var routing = tokens.routing
    if let handle { routing = .cached(handle) }
    return try buffer.dispatch(
      tokens.x, scales: tokens.scaleColumns ?? tokens.scales, sidecars: tokens.sidecars, to: routing,
      options: options ?? dispatchOptions)
  }

  /// One dispatch that must be right: the buffer still works.
  func checkDispatch(on buffer: TestBuffer, step: Int = 0) throws {
    let result = try dispatch(on: buffer, step: step)
    try result.event.wait()
    let expected = makeOracle(step: step).dispatched(to: buffer.rank)
    if let text = difference(result, from: expected, comparingPaddingRows: zeroesPadding) {
      throw Mismatch(description: text)
    }
  }
}
