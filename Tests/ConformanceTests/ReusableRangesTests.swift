import Conformance
import HostMachine
import Testing

@testable import SwiftEP

extension ConformanceTests {
  /// Memory that streams still use, with fences that a test passes.
  @Suite struct ReusableRangesTests {
    private final class Fence: ReuseFence {
      private let flag = Guarded(false)
      private let questions = Guarded(0)
      private let stream: CUDAStream?

      init(on stream: CUDAStream? = nil) { self.stream = stream }

      var isPassed: Bool {
        questions.withLock { $0 += 1 }
        return flag.withLock { $0 }
      }
      var questionCount: Int { questions.withLock { $0 } }
      func pass() { flag.withLock { $0 = true } }
      func comesBefore(_ order: LaunchOrder) -> Bool { stream != nil && stream == order.stream }
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

    /// Launches take what comes before them anyway, and nobody asks the GPU whether that is over; others do not take it.
    @Test func whatComesBeforeIsTaken() throws {
      let streams = (16...17).map { CUDAStream(unsafeHandle: UnsafeMutableRawPointer(bitPattern: $0)) }
      let orders = streams.map { LaunchOrder(lane: .null, stream: $0) } + [LaunchOrder(lane: .null, stream: nil)]
      var ranges = ReusableRanges()
      let fences = streams.map { Fence(on: $0) }
      ranges.give(0..<4096, behind: fences[0])
      ranges.give(8192..<12288, behind: fences[1])
      #expect(ranges.take(4096) == nil && ranges.take(4096, for: orders[2]) == nil)
      #expect(fences.map(\.questionCount) == [2, 2])
      #expect(ranges.takeLargest(for: orders[1]) == 8192..<12288)
      #expect(fences.map(\.questionCount) == [3, 2])
      #expect(ranges.take(4096, for: orders[0]) == 0..<4096)
      #expect(fences.map(\.questionCount) == [3, 2] && ranges.reclaimAll().isEmpty)
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
