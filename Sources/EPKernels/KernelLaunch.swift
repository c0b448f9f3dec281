/// One kernel with its arguments, as a machine launches it on all of a call's workers.
@frozen public enum KernelLaunch: Sendable {
  case prepareDispatch(DispatchArguments)
  case deliverDispatch(DispatchArguments)
  case dispatch(DispatchArguments)
  case combine(CombineArguments)
  /// A combine in steps, or one launch of it.
  case combineStep(CombineArguments)

  @inlinable public func run<M: Machine>(on machine: M) {
    withArguments { arguments in
      Self.run(kernel: index, Address(bits: UInt64(UInt(bitPattern: arguments.baseAddress))), on: machine)
    }
  }

  /// - Parameter kernel: as `index` names it.
  @inlinable static func run<M: Machine>(kernel: Int64, _ arguments: Address, on machine: M) {
    switch kernel {
    case 0: EPKernels.prepareExactDispatch(machine, arguments.load(DispatchArguments.self, at: 0))
    case 1: EPKernels.deliverExactDispatch(machine, arguments.load(DispatchArguments.self, at: 0))
    case 2: EPKernels.dispatch(machine, arguments.load(DispatchArguments.self, at: 0))
    case 3: EPKernels.combine(machine, arguments.load(CombineArguments.self, at: 0))
    default: EPKernels.combineStep(machine, arguments.load(CombineArguments.self, at: 0))
    }
  }

  /// Which it is, where only its arguments are passed on.
  @inlinable public var index: Int64 {
    switch self {
    case .prepareDispatch: 0
    case .deliverDispatch: 1
    case .dispatch: 2
    case .combine: 3
    case .combineStep: 4
    }
  }

  /// The bytes of its arguments.
  @inlinable public func withArguments<Result>(_ body: (UnsafeRawBufferPointer) -> Result) -> Result {
    switch self {
    case .prepareDispatch(let arguments), .deliverDispatch(let arguments), .dispatch(let arguments):
      withUnsafeBytes(of: arguments, body)
    case .combine(let arguments), .combineStep(let arguments): withUnsafeBytes(of: arguments, body)
    }
  }
}

/// One rank's kernel in a launch of several ranks' kernels, in memory that they reach.
@frozen public struct RankLaunch: Sendable {
  /// `KernelLaunch.index`.
  public var kernel: Int64
  /// That one's arguments.
  public var arguments: Address
  /// As a launch of its own has them: where its workers count themselves out, and what the last one stores where.
  public var counter: Address
  public var word: Address
  public var ticket: UInt64

  @inlinable public init(kernel: Int64, arguments: Address, counter: Address, word: Address, ticket: UInt64) {
    self.kernel = kernel
    self.arguments = arguments
    self.counter = counter
    self.word = word
    self.ticket = ticket
  }

  @inlinable public func run<M: Machine>(on machine: M) {
    KernelLaunch.run(kernel: kernel, arguments, on: machine)
  }
}
