import PTX

// The host looks the kernels up in the module by these names, `swiftep::dispatch()` and so on as C++ mangles them: what
// profilers show, and what callers look for there. One launch of each call has the operation's name. Arguments lie in the
// launch's parameters.

@_cdecl("_ZN7swiftep6layoutEv")
public func kernelPrepareDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  prepareExactDispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("_ZN7swiftep13dispatch_rowsEv")
public func kernelDeliverDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  deliverExactDispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("_ZN7swiftep8dispatchEv")
public func kernelDispatch(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  dispatch(GPUMachine(), arguments.assumingMemoryBound(to: DispatchArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("_ZN7swiftep7combineEv")
public func kernelCombine(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  combine(GPUMachine(), arguments.assumingMemoryBound(to: CombineArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@_cdecl("_ZN7swiftep12combine_stepEv")
public func kernelCombineStep(_ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  combineStep(GPUMachine(), arguments.assumingMemoryBound(to: CombineArguments.self).pointee)
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

/// Tells the time of the GPU's clock. Launched once on every stream before it is used: what the driver puts off until then
/// would have to wait for kernels that wait for this stream's.
@_cdecl("_ZN7swiftep9tell_timeEv")
public func kernelTellTime(_ counter: UInt64, _ word: UInt64) {
  GPUMachine().leave(Address(bits: counter), word: Address(bits: word), ticket: GPUMachine().now)
}

#if CHECKED
  /// The kernels of all ranks that share a GPU as one launch, a row of blocks each: for tools that let a GPU run one launch
  /// after the other, and ranks that wait for each other.
  ///
  /// - Parameter launches: `RankLaunch`, one for each row of blocks.
  @_cdecl("_ZN7swiftep5ranksEv")
  public func kernelRanks(_ launches: UnsafeRawPointer) {
    let launch = launches.assumingMemoryBound(to: RankLaunch.self)[Int(ptx_block_row())]
    launch.run(on: GPUMachine())
    GPUMachine().leave(launch.counter, word: launch.word, ticket: launch.ticket)
  }
#endif

// How many bytes each takes: for `scripts/build-kernels`.

@_cdecl("swiftep_size_dispatch") public func sizeOfDispatch() -> Int { MemoryLayout<DispatchArguments>.size }
@_cdecl("swiftep_size_combine") public func sizeOfCombine() -> Int { MemoryLayout<CombineArguments>.size }
