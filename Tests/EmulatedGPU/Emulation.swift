import PTX

/// Runs `body` on all lanes of blocks of threads, one block after the other. Returns what a lane did that a GPU would not do;
/// nil where all went well.
///
/// - Parameter arguments: the launch's; nil where `body` asks for none.
public func emulate(
  blockCount: Int, arguments: UnsafeRawPointer? = nil, _ body: (GPUMachine) -> Void
) -> String? {
  withoutActuallyEscaping(body) { body in
    var kernel = Kernel(body: body, arguments: arguments)
    let sharedByteCount = Shared.stagesOffset + GPUMachine.warpCount * Shared.stageByteCountOfWarp
    return withUnsafeMutablePointer(to: &kernel) { kernel in
      let fault = emulated_launch(
        UInt32(blockCount), UInt32(GPUMachine.threadCount), UInt32(sharedByteCount),
        {
          let kernel = $0!.assumingMemoryBound(to: Kernel.self).pointee
          kernel.body(GPUMachine(kernel.arguments))
        }, kernel)
      return fault.map { String(cString: $0) }
    }
  }
}

private struct Kernel {
  let body: (GPUMachine) -> Void
  let arguments: UnsafeRawPointer?
}
