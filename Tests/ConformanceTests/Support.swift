import Conformance
import Foundation
import SwiftEP
import Testing

/// All suites of this target, one test at a time: each runs many threads of its own.
@Suite(.serialized) struct ConformanceTests {}

/// What kind of ranks the tests run on: `SWIFTEP_TEST_FABRIC` is `threads` (the default), `sockets` (threads that reach
/// each other as processes do) or `processes`.
let fabric: any Fabric = {
  // Buffers are lost here on purpose.
  setenv("SWIFTEP_FLIGHT_RECORDER", "off", 0)
  return switch ProcessInfo.processInfo.environment["SWIFTEP_TEST_FABRIC"] {
  case nil, "threads": ThreadFabric()
  case "sockets": SocketFabric()
  case "processes": ProcessFabric(patience: .seconds(120))
  case let other?: preconditionFailure("SWIFTEP_TEST_FABRIC: expected threads, sockets or processes, found \(other)")
  }
}()

/// The same, but ranks are threads of this process: for tests that look at several of them at once.
let threadFabric: any Fabric = fabric is ProcessFabric ? SocketFabric() : fabric

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
func onEachRank<Value: Codable & Sendable>(
  of fabric: any Fabric = fabric, _ plan: ExpertBuffer.Plan, workers: Int = 1, timeout: Duration = .seconds(30),
  _ body: @escaping @Sendable (ExpertBuffer) throws -> Value
) throws -> [Value] {
  try fabric.values(plan: plan, workers: workers, timeout: timeout, body)
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
