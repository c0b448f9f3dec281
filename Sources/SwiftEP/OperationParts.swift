import EPKernels

/// A part of an operation, as a queue of launches runs it.
struct LaunchPart: Sendable {
  let launch: KernelLaunch
  /// The queue waits for this slot's gates first.
  let waitsFor: SignalSlot?
  /// Workers that it takes, at most.
  let workerCountMax: Int
}

extension KernelLaunch {
  /// Whether it is queued as it is.
  var isOnePart: Bool {
    if case .combineStep = self { return false }
    return part != .apart
  }

  /// What is queued for it, in this order.
  var parts: [LaunchPart] { steps.flatMap(\.partsOfStep) }

  /// Operations in which it meets its peers, in this order: itself, but for a combine in steps.
  var steps: [KernelLaunch] {
    guard case .combineStep(let arguments) = self else { return [self] }
    return (0...arguments.steps.stepCount).map { launch in
      var step = arguments
      step.steps.launch = launch
      return .combineStep(step)
    }
  }

  private var partsOfStep: [LaunchPart] {
    guard part == .apart else { return [LaunchPart(launch: self, waitsFor: nil, workerCountMax: .max)] }
    let kinds: [OperationPart] =
      switch self {
      case .prepareDispatch: [.begin, .middle]
      case .deliverDispatch: [.middle, .end]
      case .dispatch, .combine, .combineStep: [.begin, .middle, .end]
      }
    return kinds.enumerated().map { index, kind in
      LaunchPart(
        launch: with(kind), waitsFor: index == 0 ? nil : kind == .middle ? .exchange : .completion,
        workerCountMax: kind == .end ? 1 : .max)
    }
  }

  var part: OperationPart {
    switch self {
    case .prepareDispatch(let arguments), .deliverDispatch(let arguments), .dispatch(let arguments):
      arguments.operation.part
    case .combine(let arguments), .combineStep(let arguments): arguments.operation.part
    }
  }

  func with(_ part: OperationPart) -> KernelLaunch {
    switch self {
    case .prepareDispatch(let arguments): .prepareDispatch(arguments.with(part))
    case .deliverDispatch(let arguments): .deliverDispatch(arguments.with(part))
    case .dispatch(let arguments): .dispatch(arguments.with(part))
    case .combine(let arguments): .combine(arguments.with(part))
    case .combineStep(let arguments): .combineStep(arguments.with(part))
    }
  }
}

extension DispatchArguments {
  fileprivate func with(_ part: OperationPart) -> Self {
    var arguments = self
    arguments.operation.part = part
    return arguments
  }
}

extension CombineArguments {
  fileprivate func with(_ part: OperationPart) -> Self {
    var arguments = self
    arguments.operation.part = part
    return arguments
  }
}
