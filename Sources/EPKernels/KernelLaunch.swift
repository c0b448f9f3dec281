/// One kernel with its arguments, as a machine launches it on all of a call's workers.
@frozen public enum KernelLaunch: Sendable {
  case prepareDispatch(DispatchArguments)
  case deliverDispatch(DispatchArguments)
  case prepareCombine(CombineArguments)
  case deliverCombine(CombineArguments)

  @inlinable public func run<M: Machine>(on machine: M) {
    switch self {
    case .prepareDispatch(let arguments): EPKernels.prepareDispatch(machine, arguments)
    case .deliverDispatch(let arguments): EPKernels.deliverDispatch(machine, arguments)
    case .prepareCombine(let arguments): EPKernels.prepareCombine(machine, arguments)
    case .deliverCombine(let arguments): EPKernels.deliverCombine(machine, arguments)
    }
  }
}
