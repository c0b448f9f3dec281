import PTX

// The kernels' names are what the host looks up in the module. Their arguments lie in the launch's parameters.

@_cdecl("swiftep_prepare_dispatch")
public func kernelPrepareDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  prepareExactDispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("swiftep_deliver_dispatch")
public func kernelDeliverDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  deliverExactDispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("swiftep_dispatch")
public func kernelDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  dispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("swiftep_combine")
public func kernelCombine(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  combine(GPUMachine(), arguments.assumingMemoryBound(to: CombineArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("swiftep_combine_step")
public func kernelCombineStep(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  combineStep(GPUMachine(), arguments.assumingMemoryBound(to: CombineArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

/// Tells the time of the GPU's clock. Launched once on every stream before it is used: what the driver puts off until then
/// would have to wait for kernels that wait for this stream's.
@_cdecl("swiftep_tell_time")
public func kernelTellTime(_ counter: UInt64, _ word: UInt64) {
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: GPUMachine().now)
}

#if CHECKED
  /// The kernels of all ranks that share a GPU as one launch, a row of blocks each: for tools that let a GPU run one launch
  /// after the other, and ranks that wait for each other.
  ///
  /// - Parameter launches: `RankLaunch`, one for each row of blocks.
  @_cdecl("swiftep_ranks")
  public func kernelRanks(_ launches: UnsafeRawPointer) {
    let launch = launches.assumingMemoryBound(to: RankLaunch.self)[Int(ptx_block_row())]
    launch.run(on: GPUMachine())
    GPUMachine().leave(launch.counter, word: launch.word, ticket: launch.ticket)
  }
#endif

// How many bytes each takes: for `scripts/build-kernels`.

@_cdecl("swiftep_size_dispatch") public func sizeOfDispatch() -> Int { MemoryLayout<DispatchArguments>.size }
@_cdecl("swiftep_size_combine") public func sizeOfCombine() -> Int { MemoryLayout<CombineArguments>.size }
