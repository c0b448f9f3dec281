import Conformance
import Foundation
import Testing

/// All suites of this target, one test at a time: each runs many threads of its own. `GPUTests` has the same suites under
/// a root and on a fabric of its own.
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
