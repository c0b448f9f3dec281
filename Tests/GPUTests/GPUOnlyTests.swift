import CUDADriver
import Conformance
import Foundation
import HostMachine
import Testing

@testable import SwiftEP

extension ConformanceTests {
  /// What only GPUs have.
  @Suite(.disabled(if: fabric is ProcessFabric, "ranks are threads of this process here"))
  struct GPUOnlyTests {
    private static let job = Job(rankCount: 4, tokenCount: 64, hidden: 512, topK: 4, expertCount: 16)

    /// One, then all, so that ranks share a GPU and do not.
    private static let gpuCounts = Set([1, fabric.machines.count]).sorted()

    private static func ranks(gpuCount: Int) -> ThreadFabric { ThreadFabric(Array(fabric.machines[..<gpuCount])) }

    /// Bit for bit what threads of the host return.
    @Test(arguments: [RowLayout.bySource, .byExpert], [ScaleFormat?.none, .float, .ue8m0, .powerOfTwo, .nvfp4])
    func bytesAreThoseOfCPUs(_ layout: RowLayout, _ quantization: ScaleFormat?) throws {
      let job = Self.job.with {
        ($0.layout, $0.quantization) = (layout, quantization)
        ($0.expertAlignment, $0.zeroesPadding, $0.sidecarByteCounts) = (8, true, [12])
      }
      let bytes = { (fabric: any Fabric) in
        try onEachRank(of: fabric, try job.makePlan(), workers: 2) { buffer in
          let result = try job.dispatch(on: buffer)
          let given = job.makeExpertRows(rank: buffer.rank, rowCount: result.handle.rowCapacity, step: 0)
          return try result.bytes + [buffer.combine(given, with: result.handle).tokens.bytes]
        }
      }
      #expect(try bytes(fabric) == bytes(ThreadFabric()))
    }

    @Test(arguments: gpuCounts, RowLayout.allCases)
    func graphsAndStreams(gpuCount: Int, _ layout: RowLayout) throws {
      var job = Self.job
      (job.layout, job.workers, job.skew) = (layout, 2, 0.5)
      for waiting: Set<Int> in [[], Set(0..<job.rankCount), [1, 2]] {
        job.ranksOfWaitingStreams = waiting
        try checkReplays(job, count: 100, on: Self.ranks(gpuCount: gpuCount))
        try checkStreams(job, count: 50, on: Self.ranks(gpuCount: gpuCount))
      }
    }

    @Test(arguments: gpuCounts) func randomJobs(gpuCount: Int) throws {
      for seed: UInt64 in 1...60 { try check(Job.random(seed: seed), on: Self.ranks(gpuCount: gpuCount)) }
    }

    @Test(arguments: gpuCounts) func arenasInHostMemory(gpuCount: Int) throws {
      setenv("SWIFTEP_GPU_ARENAS", "host", 1)
      defer { unsetenv("SWIFTEP_GPU_ARENAS") }
      for seed: UInt64 in 100...130 { try check(Job.random(seed: seed), on: Self.ranks(gpuCount: gpuCount)) }
    }

    /// With one GPU, its own memory is the peer's.
    @Test func copiesBetweenPeersAreTimed() throws {
      let gpus = try fabric.machines.indices.map { try GPUHost.shared($0).gpu }
      let all = gpus.count == 1 ? [gpus[0], gpus[0], gpus[0]] : gpus
      for gpu in all {
        for peer in all where try !gpu.reaches(uuid: peer.uuid) { return }
      }
      let copies = try #require(try PeerCopies.measured(on: all, byteCount: 64 << 20, roundCount: 2))
      // Gigabytes a second, of anything between PCIe and a GPU's own memory.
      #expect((1.0..<10_000).contains(copies.writtenBytesPerNanosecond))
      #expect((1.0..<10_000).contains(copies.readBytesPerNanosecond))
    }

    /// A stream that comes late to wait for the end of a call finds it, though the event and its buffer are gone and others
    /// have taken their place.
    @Test func waitsOutliveTheirEvents() throws {
      let gpu = try GPUHost.shared(0).gpu
      let (stream, gate) = (try CUDADriver.Stream(gpu), try PinnedMemory(gpu, byteCount: 64))
      try stream.wait(until: DeviceAddress(bits: UInt64(UInt(bitPattern: gate.base))), isAtLeast: 1)
      let job = Self.job.with { $0.tokensPerRank = [8, 8, 8, 8] }
      try Self.ranks(gpuCount: 1).test(plan: job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        for step in 0..<20 { _ = try job.dispatch(on: buffer, step: step % 3) }
        let event = try job.dispatch(on: buffer).event
        try event.enqueueWait(on: CUDAStream(unsafeHandle: stream.rawHandle, owner: stream))
      }
      try Self.ranks(gpuCount: 1).test(plan: job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        try job.checkDispatch(on: buffer)
      }
      gate.base.storeBytes(of: 1, as: UInt64.self)
      let end = try StreamEvent(gpu, isTimed: false)
      try end.record(on: stream)
      let deadline = monotonicNow() + 10_000_000_000
      while try !end.isReached() && monotonicNow() < deadline { usleep(100) }
      #expect(try end.isReached())
    }

    /// While a peer is late, a stream waits and no kernel does: that would note whom it waits for.
    @Test(arguments: Waiting.allCases) func whoWaits(_ waiting: Waiting) throws {
      let job = Self.job.with { ($0.sizing, $0.isAsynchronous) = (.worstCase, true) }
      let found = try onEachRank(of: Self.ranks(gpuCount: 1), job.makePlan()) { buffer in
        var options = job.dispatchOptions
        options.waiting = waiting
        // So that gates have been opened, and closed again.
        for step in 0..<3 { try job.dispatch(on: buffer, step: step, options: options).event.wait() }
        if buffer.rank == 0 { usleep(500_000) }
        let event = try job.dispatch(on: buffer, options: options).event
        usleep(200_000)
        let current = buffer.flightRecord.current
        try event.wait()
        return "\(current.step) \(current.peer.map { "\($0)" } ?? "-")"
      }
      #expect(found == ["idle -"] + [String](repeating: waiting == .stream ? "exchange -" : "exchange 0", count: 3))
    }

    /// A graph that was captured on a caller's stream keeps what its kernels use, and ends though nobody comes any more.
    @Test(arguments: Waiting.allCases) func graphsOutliveTheirBuffer(_ waiting: Waiting) throws {
      let job = Self.job.with { ($0.sizing, $0.isAsynchronous) = (.worstCase, true) }
      let gpu = try GPUHost.shared(0).gpu
      let stream = try CUDADriver.Stream(gpu)
      let captured = Guarded<CUDADriver.Graph?>(nil)
      try Self.ranks(gpuCount: 1).test(plan: job.makePlan(), workers: 2, timeout: .milliseconds(500)) { buffer in
        let input = try GraphInputs(job.makeTokens(rank: buffer.rank), on: buffer.buffer)
        try job.checkDispatch(on: buffer)
        if buffer.rank != 1 { return }
        var options = job.dispatchOptions
        (options.waiting, options.stream) = (waiting, CUDAStream(unsafeHandle: stream.rawHandle, owner: stream))
        var failure: (any Error)?
        let graph = try CUDADriver.Graph(of: stream) { () throws(DriverError) in
          do { _ = try buffer.buffer.dispatch(input.x, to: input.routing, options: options) } catch { failure = error }
        }
        if let failure { throw failure }
        captured.withLock { $0 = graph }
      }
      // Memory that it does not keep is somebody else's.
      try Self.ranks(gpuCount: 1).test(plan: job.makePlan(), workers: 2, timeout: .seconds(30)) { buffer in
        try job.checkDispatch(on: buffer)
      }
      try captured.withLock { graph throws(DriverError) in try graph!.launch(on: stream) }
      let end = try StreamEvent(gpu, isTimed: false)
      try end.record(on: stream)
      let deadline = monotonicNow() + 10_000_000_000
      while try !end.isReached() && monotonicNow() < deadline { usleep(1000) }
      #expect(try end.isReached())
    }

    // MARK: Bad input

    private func expectError(
      _ plan: ExpertBuffer.Plan, workers: Int, machine: Machine = .cuda(gpu: 0), _ isExpected: (EPError) -> Bool
    ) throws {
      let found = #expect(throws: EPError.self) {
        let communicator = try Communicator.threads(rankCount: 1)[0]
        _ = try ExpertBuffer(communicator, plan: plan, workers: workers, machine: machine)
      }
      #expect(found.map(isExpected) == true, "\(found as Any)")
    }

    @Test func moreThanThereIs() throws {
      let job = Job(rankCount: 1, tokenCount: 64, hidden: 512, topK: 4, expertCount: 16)
      try expectError(try job.makePlan(), workers: 10_000) {
        if case .invalidArgument(0, "workers", _, "10000") = $0 { true } else { false }
      }
      try expectError(try job.makePlan(), workers: 1, machine: .cuda(gpu: 1000)) {
        if case .machineUnavailable(let what) = $0 { what.contains("GPU 1000 of") } else { false }
      }
      let shape = JobShape(rankCount: 1, tokensPerRankMax: 1 << 24, hidden: 1 << 15, topK: 1, expertCount: 1)
      try expectError(try ExpertBuffer.Plan(shape), workers: 1) {
        if case .outOfMemory(0, let needed, let available) = $0 { needed > available && available > 0 } else { false }
      }
    }

    /// Memory that kernels do not reach is refused on all ranks, and the next call works.
    @Test func tensorsElsewhere() throws {
      let job = Self.job
      try Self.ranks(gpuCount: 1).run(plan: job.makePlan(), workers: 1, timeout: .seconds(30)) { buffer in
        let tokens = try job.makeTokens(rank: buffer.rank).reachable(from: buffer)
        let host = try Tensor(zeros: tokens.x.shape, tokens.x.dtype)
        let odd = try Tensor(
          unsafeDeviceAddress: tokens.x.unsafeAddress + 8, gpu: 0, shape: [1, 64], .bf16, owner: nil)
        for wrong in [host, odd] {
          let found = #expect(throws: EPError.self) {
            try buffer.dispatch(buffer.rank == 1 ? wrong : tokens.x, to: tokens.routing)
          }
          guard case .invalidArgument(1, "x", _, _) = found else { throw found ?? EPError.bufferClosed }
        }
        let borrowed = try Tensor(
          unsafeDeviceAddress: tokens.x.unsafeAddress, gpu: 0, shape: tokens.x.shape, tokens.x.dtype)
        let both = try [tokens.x, borrowed].map { x in
          try buffer.dispatch(x, to: tokens.routing).rows.elements(UInt16.self)
        }
        #expect(both[0] == both[1])
      }
    }
  }
}
