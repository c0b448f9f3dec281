import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// What a checked build says where an unchecked one would write to wherever it leads.
  @Suite struct CheckedTests {
    /// Where one of a rank's chunks begins at a receiver is not what the exchange said: its rows would lie outside.
    @Test(arguments: ["cached dispatch", "combine"], [false, true])
    func rowsOutsideOfAnOutput(operation: String, isAsynchronous: Bool) throws {
      if try !fabric.isChecked { try Test.cancel("kernels do not check themselves") }
      let job = smallJob().with { $0.isAsynchronous = isAsynchronous }
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let first = try job.dispatch(on: buffer)
        try first.event.wait()
        if buffer.rank == 1 {
          first.handle.places.withUnsafeMutableBytes { $0.storeBytes(of: 1000, as: Int32.self) }
        }
        let failed = try error { () throws(EPError) in
          if operation == "combine" {
            var options = CombineOptions()
            options.isAsynchronous = isAsynchronous
            try buffer.combine(first.rows, with: first.handle, options: options).event.wait()
          } else {
            try job.dispatch(on: buffer, handle: first.handle).event.wait()
          }
        }
        let later = try error { () throws(EPError) in _ = try job.dispatch(on: buffer).event.wait() }
        let record = buffer.flightRecord.operations
        if buffer.rank == 1 { try require(record.contains { $0.outcome == .checkFailed }, "\(record)") }
        return [failed, later]
      }
      guard case .checkFailed(1, .deliver, "a row", let expected, let found) = errors[0][0] else {
        Issue.record("\(errors[0][0])")
        return
      }
      #expect(expected.hasPrefix("one of 0..<") && found.hasPrefix("10"))
      #expect(errors.allSatisfy { $0 == [errors[0][0], .bufferLost(cause: errors[0][0])] })
    }
  }
}
