/// One kernel with its arguments, as a machine launches it on all of a call's workers.
@frozen public enum KernelLaunch: Sendable {
  case prepareDispatch(DispatchArguments)
  case deliverDispatch(DispatchArguments)
  case dispatch(DispatchArguments)
  case combine(CombineArguments)

  @inlinable public func run<M: Machine>(on machine: M) {
    switch self {
    case .prepareDispatch(let arguments): _ = EPKernels.prepareDispatch(machine, arguments)
    case .deliverDispatch(let arguments): EPKernels.deliverDispatch(machine, arguments)
    case .dispatch(let arguments): EPKernels.dispatch(machine, arguments)
    case .combine(let arguments): EPKernels.combine(machine, arguments)
    }
  }
}
