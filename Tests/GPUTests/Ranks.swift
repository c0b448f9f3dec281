import CUDADriver
import Conformance
import Foundation
import SwiftEP
import Testing

/// All suites of this target, one test at a time, with ranks on GPUs: those of `ConformanceTests`, and what only GPUs
/// have.
@Suite(.serialized, PromisedGPUs()) struct ConformanceTests {}

/// What kind of ranks the tests run on, each on one of the promised GPUs in turn: `SWIFTEP_TEST_FABRIC`, as for CPUs.
let fabric: any Fabric = {
  // Buffers are lost here on purpose.
  setenv("SWIFTEP_FLIGHT_RECORDER", "off", 0)
  let gpus = (0..<(PromisedGPUs.count ?? 1)).map { Machine.cuda(gpu: $0) }
  return switch ProcessInfo.processInfo.environment["SWIFTEP_TEST_FABRIC"] {
  case nil, "threads": ThreadFabric(gpus)
  case "sockets": SocketFabric(gpus)
  case "processes": ProcessFabric(patience: .seconds(120), machines: gpus)
  case let other?: preconditionFailure("SWIFTEP_TEST_FABRIC: expected threads, sockets or processes, found \(other)")
  }
}()

/// Skips a suite where nobody says that there are GPUs, and fails it where there are fewer than `SWIFTEP_TEST_GPUS` says.
struct PromisedGPUs: SuiteTrait {
  private static let text = ProcessInfo.processInfo.environment["SWIFTEP_TEST_GPUS"]
  static let count = text.flatMap { Int($0) }.flatMap { $0 >= 1 ? $0 : nil }

  struct Broken: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = "SWIFTEP_TEST_GPUS: \(text)" }
  }

  func prepare(for test: Test) async throws {
    guard let text = Self.text else { try Test.cancel("SWIFTEP_TEST_GPUS does not say how many GPUs there are") }
    guard let count = Self.count else { throw Broken("expected a number of GPUs, found '\(text)'") }
    let found: Int
    do {
      // Asked for where ranks live.
      found = try fabric.values(rankCount: 1, timeout: .seconds(60)) { _ in try Self.gpuCount() }[0]
    } catch EPError.machineUnavailable(let absence) {
      throw Broken("expected \(count), found none: \(absence)")
    }
    if found < count { throw Broken("expected \(count), found \(found)") }
  }

  private static func gpuCount() throws(EPError) -> Int {
    switch Driver.shared {
    case .success(let driver): return driver.gpuCount
    case .failure(let absence): throw .machineUnavailable("\(absence)")
    }
  }
}
