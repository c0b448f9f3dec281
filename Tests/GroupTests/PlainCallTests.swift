import EPKernels
import Testing

@testable import SwiftEP

/// Which kernel of its own a call would take on a GPU: every machine is given the same arguments.
@Suite struct PlainCallTests {
  private let buffer: ExpertBuffer
  private let x: Tensor
  private let indices: Tensor

  init() throws {
    let shape = JobShape(rankCount: 1, tokensPerRankMax: 4, hidden: 256, topK: 2, expertCount: 16)
    buffer = try ExpertBuffer(try Communicator.threads(rankCount: 1)[0], plan: ExpertBuffer.Plan(shape))
    x = try Tensor(zeros: [4, 256], .bf16)
    indices = try Tensor(copying: [0, 2, 1, 0, 3, 2, 1, 3] as [Int64], shape: [4, 2], .int64)
  }

  private func kernel(_ routing: Routing, _ change: (inout DispatchOptions) -> Void = { _ in }) throws -> String {
    var options = DispatchOptions()
    (options.sizing, options.isAsynchronous) = (.worstCase, true)
    change(&options)
    let (kernel, _) = try buffer.record { [options] () throws(EPError) in
      let result = try buffer.dispatch(x, to: routing, options: options)
      let launch = buffer.core.recording.withLock { $0?.launches.last?.launch }
      guard case .dispatch(let arguments)? = launch else { return ("none", result) }
      if arguments.isPlainCopy { return ("copying", result) }
      if arguments.isPlainQuantizing { return ("quantizing", result) }
      return (arguments.isPlainGrouped ? "grouped" : "general", result)
    }.result
    return kernel
  }

  @Test func dispatches() throws {
    let routing = Routing.topK(indices: indices)
    #expect(try kernel(routing) == "copying")
    #expect(try kernel(routing) { $0.quantization = .float } == "quantizing")
    #expect(try kernel(routing) { ($0.quantization, $0.layout) = (.float, .grouped) } == "grouped")
    #expect(try kernel(routing) { ($0.quantization, $0.layout) = (.float, .byExpert) } == "general")
    #expect(try kernel(routing) { $0.layout = .grouped } == "general")
  }

  /// Such a call names no experts; its handle does.
  @Test func cachedDispatches() throws {
    for (layout, expected) in [(SwiftEP.RowLayout.bySource, "copying"), (SwiftEP.RowLayout.byExpert, "general")] {
      var options = DispatchOptions()
      options.layout = layout
      let handle = try buffer.dispatch(x, to: .topK(indices: indices), options: options).handle
      #expect(try kernel(.cached(handle)) { $0.layout = layout } == expected)
    }
  }
}
