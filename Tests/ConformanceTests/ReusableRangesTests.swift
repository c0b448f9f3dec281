import Conformance
import HostMachine
import Testing

@testable import SwiftEP

extension ConformanceTests {
  /// Memory that streams still use, with fences that a test passes.
  @Suite struct ReusableRangesTests {
    private final class Fence: ReuseFence {
      private let flag = Guarded(false)
      var isPassed: Bool { flag.withLock { $0 } }
      func pass() { flag.withLock { $0 = true } }
    }

    @Test func whatIsUsedIsNotTaken() {
      var ranges = ReusableRanges()
      let (early, late) = (Fence(), Fence())
      ranges.give(0..<8192, behind: late)
      ranges.give(8192..<16384, behind: early)
      ranges.give(16384..<20480)
      #expect(ranges.take(8192) == nil)
      #expect(ranges.take(4096) == 16384..<20480)
      #expect(ranges.takeLargest().isEmpty)
      early.pass()
      #expect(ranges.take(4096) == 8192..<12288)
      late.pass()
      #expect(ranges.takeLargest() == 0..<8192)
    }

    @Test func whatIsUsedComesWithItsFences() {
      var ranges = ReusableRanges()
      let fence = Fence()
      ranges.give(0..<16384, behind: fence)
      #expect(ranges.take(16384) == nil)
      let fences = ranges.reclaimAll()
      #expect(fences.count == 1 && fences[0] as? Fence === fence)
      #expect(ranges.take(16384) == 0..<16384)
      #expect(ranges.reclaimAll().isEmpty)
    }

    @Test func cpusKnowNoStreams() throws {
      try ThreadFabric().test(plan: try makePlan(), workers: 1, timeout: .seconds(20)) { buffer in
        let (x, indices) = (try Tensor(zeros: [1, 8], .bf16), try Tensor(zeros: [1, 1], .int32))
        var options = DispatchOptions()
        options.stream = CUDAStream(unsafeHandle: nil)
        // All ranks learn which one gave a stream, and go on.
        let found = #expect(throws: EPError.self) {
          try buffer.dispatch(x, to: .topK(indices: indices), options: buffer.rank == 1 ? options : DispatchOptions())
        }
        guard case .invalidArgument(let rank, let argument, _, _) = found else { throw found ?? EPError.bufferClosed }
        #expect(rank == 1 && argument == "stream")
        let result = try buffer.dispatch(x, to: .topK(indices: indices))
        #expect(throws: EPError.self) { try result.event.enqueueWait(on: CUDAStream(unsafeHandle: nil)) }
        let graph = try buffer.record { () throws(EPError) in
          var options = DispatchOptions()
          (options.sizing, options.isAsynchronous) = (.worstCase, true)
          return try buffer.dispatch(x, to: .topK(indices: indices), options: options)
        }.graph
        #expect(throws: EPError.self) { try graph.launch(stream: CUDAStream(unsafeHandle: nil)) }
      }
    }

    private func makePlan() throws(EPError) -> ExpertBuffer.Plan {
      try ExpertBuffer.Plan(
        JobShape(rankCount: 2, tokensPerRankMax: 4, hidden: 8, topK: 1, expertCount: 2, dtype: .bf16))
    }
  }
}
