import CUDADriver
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
      ranges.give(0..<8192, behind: [late])
      ranges.give(8192..<16384, behind: [early])
      ranges.give(16384..<20480)
      #expect(ranges.take(8192) == nil)
      #expect(ranges.take(4096) == 16384..<20480)
      #expect(ranges.takeLargest().isEmpty)
      early.pass()
      #expect(ranges.take(4096) == 8192..<12288)
      late.pass()
      #expect(ranges.takeLargest() == 0..<8192)
    }

    /// Launches take what comes before them anyway, if it is of their size, and nobody asks the GPU whether that is over.
    @Test func whatComesBeforeIsTaken() {
      let streams = (16...17).map { CUDAStream(unsafeHandle: UnsafeMutableRawPointer(bitPattern: $0)) }
      let orders = (streams + [nil]).map { LaunchOrder(lane: .null, device: 1, stream: $0) }
      var ranges = ReusableRanges()
      let fences = streams.map { Fence(on: $0) }
      ranges.give(0..<8192, behind: [fences[0]])
      ranges.give(8192..<12288, behind: fences)
      ranges.give(16384..<20480, behind: [fences[1]])
      for order in orders { #expect(ranges.take(12288, for: order) == nil) }
      #expect(ranges.take(4096, for: orders[0]) == nil && ranges.take(8192, for: orders[2]) == nil)
      let taken = ranges.take(8000, for: orders[0])
      #expect(taken?.range == 0..<8192 && taken?.fences.count == 1 && taken?.fences.first as? Fence === fences[0])
      #expect(ranges.take(4096, for: orders[1])?.range == 16384..<20480)
      #expect(fences.map(\.questionCount) == [0, 0])
      // What is used by both is used until both are done.
      fences[1].pass()
      #expect(ranges.take(4096) == nil)
      fences[0].pass()
      #expect(ranges.take(4096) == 8192..<12288)
    }

    /// Before memory grows, whatever is used can be taken by who waits for its fences, and for no others.
    @Test func whatIsUsedComesWithItsFences() {
      var ranges = ReusableRanges()
      let (fence, other) = (Fence(), Fence())
      ranges.give(0..<16384, behind: [fence])
      ranges.give(20480..<24576, behind: [other])
      #expect(ranges.take(12288) == nil)
      let taken = ranges.takeUsed(12288)
      #expect(taken?.range == 0..<12288 && taken?.fences.count == 1 && taken?.fences.first as? Fence === fence)
      #expect(ranges.take(4096) == nil)
      let rest = ranges.takeUsed(4096, from: .high)
      #expect(rest?.range == 20480..<24576 && rest?.fences.first as? Fence === other)
      fence.pass()
      #expect(ranges.take(4096) == 12288..<16384)
    }

    /// Parts of ranges are cut and joined for ever, and have no more fences than there are.
    @Test func fencesDoNotPileUp() throws {
      var ranges = ReusableRanges()
      let fences = [Fence(), Fence()]
      ranges.give(0..<8192, behind: [fences[0]])
      ranges.give(8192..<24576, behind: [fences[1]])
      for round in 0..<100 {
        var taken: [(range: Range<Int64>, fences: [any ReuseFence])] = []
        let sizes: [Int64] = round % 2 == 0 ? [12288, 4096, 8192] : [4096, 4096, 16384]
        for size in sizes {
          let next = ranges.takeUsed(size)
          taken.append(try #require(next))
        }
        #expect(taken.allSatisfy { $0.fences.count <= 2 }, "round \(round)")
        for taken in taken { ranges.give(taken.range, behind: taken.fences) }
      }
    }

    /// Blocks that streams of a GPU use, by fences that are none of a GPU's.
    @Test func blocksComeBehindTheirFences() throws {
      final class BlockFence: StreamFence {
        private let fence: Fence
        init(_ fence: Fence) { self.fence = fence }
        var isPassed: Bool { fence.isPassed }
        func comesBefore(_ order: LaunchOrder) -> Bool { fence.comesBefore(order) }
        func hold(_ stream: CUDADriver.Stream) {}
        var gpu: GPU { preconditionFailure("no GPU is asked") }
      }
      try ThreadFabric().test(plan: try makePlan(), workers: 1, timeout: .seconds(20)) { buffer in
        let arena = buffer.core.arena
        let streams = (16...17).map { CUDAStream(unsafeHandle: UnsafeMutableRawPointer(bitPattern: $0)) }
        let orders = streams.map { LaunchOrder(lane: .null, device: 1, stream: $0) }
        let fence = Fence(on: streams[0])
        var waitCount = 0
        func range(_ order: LaunchOrder?) throws(EPError) -> Range<Int64> {
          let block = try arena.take(8192, from: .low, for: order, behind: { _ in waitCount += 1 })
          return block.range
        }
        var used: ArenaBlock? = try arena.take(8192, from: .low)
        let place = try #require(used).range
        used?.noteUse(until: BlockFence(fence))
        used = nil

        // Given back without having been used, it is behind the same fence as before.
        for _ in 0..<2 { #expect(try range(orders[0]) == place) }
        #expect(try range(nil) != place && range(orders[1]) != place)
        let others = (0..<4).map { _ in arena.takeLargest() }
        #expect(others.last?.range.isEmpty == true && waitCount == 0)
        for count in 1...2 { #expect(try range(orders[1]) == place && waitCount == count) }
        fence.pass()
        #expect(try range(nil) == place && waitCount == 2)
      }
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
