import Conformance
import HostMachine
import Testing

@testable import EPKernels
@testable import SwiftEP

/// What ranks tell each other of where their completions come from. A GPU's rank that knows they come from kernels which run already
/// lets its next kernel be started.
@Suite struct CompletesLaterTests {
  enum Peer: CaseIterable {
    case whole, queueWaits, receivesLater
  }

  /// Whether rank 0 knows of a completion that comes from a later launch, when rank 1 makes its calls so.
  private func isLater(peer: Peer, isCombine: Bool) throws -> Bool {
    let shape = JobShape(rankCount: 2, tokensPerRankMax: 4, hidden: 256, topK: 2, expertCount: 4)
    let communicators = try Communicator.threads(rankCount: 2)
    let found = Guarded(false)
    try inParallel(2) { rank in
      let buffer = try ExpertBuffer(communicators[rank], plan: ExpertBuffer.Plan(shape))
      let x = try Tensor(zeros: [4, 256], .bf16)
      let indices = try Tensor(copying: [0, 2, 1, 0, 3, 2, 1, 3] as [Int64], shape: [4, 2], .int64)
      var (dispatch, combine) = (DispatchOptions(), CombineOptions())
      (dispatch.sizing, dispatch.isAsynchronous, combine.isAsynchronous) = (.worstCase, true, true)
      if rank == 1 {
        let waiting: Waiting = peer == .queueWaits ? .stream : .workers
        (dispatch.waiting, combine.waiting) = (waiting, waiting)
        (dispatch.receivesLater, combine.receivesLater) = (peer == .receivesLater, peer == .receivesLater)
      }
      let (graph, operation) = try buffer.record { [dispatch, combine] () throws(EPError) in
        let result = try buffer.dispatch(x, to: .topK(indices: indices), options: dispatch)
        if dispatch.receivesLater { try result.receive() }
        let dispatched = buffer.core.recording.withLock { $0!.launches.last!.launch }
        let rows = try buffer.combineInput(for: result.handle, hidden: 256, dtype: .bf16)
        let sums = try buffer.combine(rows, with: result.handle, options: combine)
        if combine.receivesLater { try sums.receive() }
        let combined = buffer.core.recording.withLock { $0!.launches.last!.launch }
        return isCombine ? combined : dispatched
      }
      try graph.launch().wait()
      if rank != 0 { return }
      switch operation {
      case .dispatch(let arguments): found.withLock { $0 = arguments.operation.knowsLaterCompletion }
      case .combine(let arguments): found.withLock { $0 = arguments.operation.knowsLaterCompletion }
      default: Issue.record("\(operation)")
      }
    }
    return found.withLock { $0 }
  }

  @Test(arguments: Peer.allCases)
  func dispatches(_ peer: Peer) throws {
    // Who receives a dispatch later has sent its rows, and said so.
    #expect(try isLater(peer: peer, isCombine: false) == (peer == .queueWaits))
  }

  @Test(arguments: Peer.allCases)
  func combines(_ peer: Peer) throws {
    #expect(try isLater(peer: peer, isCombine: true) == (peer != .whole))
  }
}

extension OperationView {
  fileprivate var knowsLaterCompletion: Bool { at(layout.completesLater).load(UInt32.self, at: 0) != 0 }
}
