import PTX

/// Runs `body` on all lanes of blocks of threads, one block after the other. Returns what a lane did that a GPU would not do;
/// nil where all went well.
public func emulate(blockCount: Int, _ body: (GPUMachine) -> Void) -> String? {
  withoutActuallyEscaping(body) { body in
    var kernel = Kernel(body: body)
    let sharedByteCount = Shared.stagesOffset + GPUMachine.warpCount * Shared.stageByteCountOfWarp
    return withUnsafeMutablePointer(to: &kernel) { kernel in
      let fault = emulated_launch(
        UInt32(blockCount), UInt32(GPUMachine.threadCount), UInt32(sharedByteCount),
        { $0!.assumingMemoryBound(to: Kernel.self).pointee.body(GPUMachine()) }, kernel)
      return fault.map { String(cString: $0) }
    }
  }
}

private struct Kernel {
  let body: (GPUMachine) -> Void
}
