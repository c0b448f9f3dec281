import PTX

// The host looks the kernels up in the module by these names, `swiftep::dispatch()` and so on as C++ mangles them: what
// profilers show, and what callers look for there. One launch of each call has the operation's name. Arguments lie in the
// launch's parameters.

// A kernel for plain arguments returns where they are not, and goes on with the very ones that it has asked: so the compiler
// leaves out what they do not need.

@_cdecl("_ZN7swiftep6layoutEv")
public func kernelPrepareDispatch(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  run(address, counter, word, ticket) { prepareExactDispatch($0, dispatchArguments(address)) }
}

@_cdecl("_ZN7swiftep13dispatch_rowsEv")
public func kernelDeliverDispatch(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  run(address, counter, word, ticket) { deliverExactDispatch($0, dispatchArguments(address)) }
}

@_cdecl("_ZN7swiftep8dispatchEv")
public func kernelDispatch(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  run(address, counter, word, ticket) { dispatch($0, dispatchArguments(address)) }
}

@_cdecl("_ZN7swiftep16dispatch_copyingEv")
public func kernelDispatchCopying(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  runPlainDispatch(address, counter, word, ticket) { $0.isPlainCopy }
}

@_cdecl("_ZN7swiftep19dispatch_quantizingEv")
public func kernelDispatchQuantizing(
  _ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64
) {
  runPlainDispatch(address, counter, word, ticket) { $0.isPlainQuantizing }
}

@_cdecl("_ZN7swiftep16dispatch_groupedEv")
public func kernelDispatchGrouped(
  _ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64
) {
  runPlainDispatch(address, counter, word, ticket) { $0.isPlainGrouped }
}

@_cdecl("_ZN7swiftep7combineEv")
public func kernelCombine(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  run(address, counter, word, ticket) { combine($0, combineArguments(address)) }
}

@_cdecl("_ZN7swiftep16combine_in_placeEv")
public func kernelCombineInPlace(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  let arguments = combineArguments(address)
  if !arguments.isPlainInPlace { return }
  run(address, counter, word, ticket) { combine($0, arguments) }
}

@_cdecl("_ZN7swiftep12combine_stepEv")
public func kernelCombineStep(_ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64) {
  let arguments = combineArguments(address)
  // Coded rows are combined at once.
  if arguments.isEncoded { return }
  run(address, counter, word, ticket) { combineStep($0, arguments) }
}

@inline(__always) private func run(
  _ arguments: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64, _ kernel: (GPUMachine) -> Void
) {
  let machine = GPUMachine(arguments)
  #if BULK_COPIES
    ptx_await_previous()
  #endif
  kernel(machine)
  machine.leave(Address(bits: counter), word: Address(bits: word), ticket: ticket)
}

@inline(__always) private func runPlainDispatch(
  _ address: UnsafeRawPointer, _ counter: UInt64, _ word: UInt64, _ ticket: UInt64,
  _ isPlain: (DispatchArguments) -> Bool
) {
  let arguments = dispatchArguments(address)
  if !isPlain(arguments) { return }
  run(address, counter, word, ticket) { dispatch($0, arguments) }
}

@inline(__always) private func dispatchArguments(_ address: UnsafeRawPointer) -> DispatchArguments {
  address.assumingMemoryBound(to: DispatchArguments.self).pointee
}

@inline(__always) private func combineArguments(_ address: UnsafeRawPointer) -> CombineArguments {
  address.assumingMemoryBound(to: CombineArguments.self).pointee
}

/// Tells the time of the GPU's clock. Launched once on every stream before it is used: what the driver puts off until then
/// would have to wait for kernels that wait for this stream's.
@_cdecl("_ZN7swiftep9tell_timeEv")
public func kernelTellTime(_ counter: UInt64, _ word: UInt64) {
  let machine = GPUMachine()
  machine.leave(Address(bits: counter), word: Address(bits: word), ticket: machine.now)
}

#if CHECKED
  /// The kernels of all ranks that share a GPU as one launch, a row of blocks each: for tools that let a GPU run one launch
  /// after the other, and ranks that wait for each other.
  ///
  /// - Parameter launches: `RankLaunch`, one for each row of blocks.
  @_cdecl("_ZN7swiftep5ranksEv")
  public func kernelRanks(_ launches: UnsafeRawPointer) {
    let launch = launches.assumingMemoryBound(to: RankLaunch.self)[Int(ptx_block_row())]
    run(launch.arguments.pointer, launch.counter.bits, launch.word.bits, launch.ticket) { launch.run(on: $0) }
  }
#endif

// How many bytes each takes: for `scripts/build-kernels`.

@_cdecl("swiftep_size_dispatch") public func sizeOfDispatch() -> Int { MemoryLayout<DispatchArguments>.size }
@_cdecl("swiftep_size_combine") public func sizeOfCombine() -> Int { MemoryLayout<CombineArguments>.size }
