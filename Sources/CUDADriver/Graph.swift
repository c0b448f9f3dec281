/// Work of a stream, captured once and launched many times.
package final class Graph: @unchecked Sendable {
  private let gpu: GPU
  private let executable: CUHandle

  /// Captures what `body` queues on `stream`, which does not run then.
  package init(of stream: Stream, _ body: () throws(DriverError) -> Void) throws(DriverError) {
    gpu = stream.gpu
    let threadLocal: Int32 = 1
    try gpu.call("cuStreamBeginCapture") { $0.cuStreamBeginCapture(stream.handle, threadLocal) }
    var failure: DriverError?
    do { try body() } catch { failure = error }
    var graph: CUHandle?
    try gpu.call("cuStreamEndCapture") { $0.cuStreamEndCapture(stream.handle, &graph) }
    defer { stream.gpu.release { $0.cuGraphDestroy(graph!) } }
    if let failure { throw failure }
    var executable: CUHandle?
    try gpu.call("cuGraphInstantiate") { $0.cuGraphInstantiate(&executable, graph!, 0) }
    self.executable = executable!
  }

  deinit { gpu.release { $0.cuGraphExecDestroy(executable) } }

  package func launch(on stream: Stream) throws(DriverError) {
    try gpu.call("cuGraphLaunch") { $0.cuGraphLaunch(executable, stream.handle) }
  }
}
