// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import SwiftEP

/// What C holds of a result, and what the buffer runs on.
private final class GivenResult<Result: Sendable>: Sendable {
  let result: Result
  let machine: Machine

  init(_ result: Result, on machine: Machine) { (self.result, self.machine) = (result, machine) }
}

/// A call's number that is not one of an enumeration: all ranks are to learn of it.
private func value<Value>(
  _ number: Int32, of values: [Value], from first: Int32 = 0, _ name: ArgumentFault.Name
) throws(ArgumentFault) -> Value {
  let index = Int(number) - Int(first)
  if index < 0 { throw ArgumentFault(.atLeast, name, expected: Int(first), found: Int(number)) }
  if index >= values.count {
    throw ArgumentFault(.atMost, name, expected: Int(first) + values.count - 1, found: Int(number))
  }
  return values[index]
}

private let waitings: [Waiting] = [.workers, .stream]

// MARK: - Dispatch

@c @implementation
public func swiftep_dispatch(
  _ buffer: OpaquePointer?, _ options: UnsafePointer<swiftep_dispatch_options>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(result, "result")
    let given = try object(buffer, "buffer", GivenBuffer.self)
    let call = try DispatchCall(try read(options, over: swiftep_dispatch_options(), "options"), on: given.machine)
    let made = try given.buffer.dispatch(
      call.x, scales: call.scales, sidecars: call.sidecars, to: call.routing, options: call.options)
    place.pointee = give(GivenResult(made, on: given.machine))
  }
}

/// A dispatch as Swift has it. What C has passed that cannot be is passed on as an `x` that no call takes, so that the peers
/// learn of it.
private struct DispatchCall {
  private let given: swiftep_dispatch_options
  private let machine: Machine
  private(set) var x: Tensor
  let scales: Tensor?
  private(set) var sidecars: [Tensor] = []
  private(set) var routing: Routing
  private(set) var options = DispatchOptions()

  init(_ given: swiftep_dispatch_options, on machine: Machine) throws(EPError) {
    (self.given, self.machine) = (given, machine)
    x = try tensor(given.x, .x, on: machine) ?? .missing(.x)
    (scales, options.givenScaleOrder) = try SwiftEPC.scales(given.scales, on: machine)
    for sidecar in try array(given.sidecars, given.sidecar_count, "sidecars") {
      sidecars.append(try tensor(sidecar, .sidecars, on: machine) ?? .missing(.sidecars))
    }
    routing = .topK(
      indices: try tensor(given.indices, .indices, on: machine) ?? .missing(.indices),
      weights: try tensor(given.weights, .weights, on: machine))
    try chooseRouting()
    options.expertStatistics = try tensor(given.expert_statistics, .expertStatistics, on: machine)
    options.waitStatistics = try tensor(given.wait_statistics, .waitStatistics, on: machine)
    options.after = try events(given.after, given.after_count)
    options.stream = callerStream(given.uses_stream, given.stream)
    do throws(ArgumentFault) { try setNumbers() } catch { x = Tensor(unusable: error) }
  }

  private mutating func chooseRouting() throws(EPError) {
    let others = (indices: given.indices ?? given.weights, table: given.table)
    if let handle = object(given.handle, DispatchHandle.self) {
      routing = .cached(handle)
      if others.indices != nil { x = .superfluous(.indices) }
      if others.table != nil { x = .superfluous(.table) }
    } else if let table = try tensor(given.table, .table, on: machine) {
      routing = .table(table)
      if others.indices != nil { x = .superfluous(.indices) }
    }
  }

  private mutating func setNumbers() throws(ArgumentFault) {
    options.layout = try value(given.layout, of: RowLayout.allCases, .layout)
    if given.expert_alignment != 0 { options.expertAlignment = Int(given.expert_alignment) }
    options.zeroesPadding = given.zeroes_padding != 0
    options.sizing = try value(given.sizing, of: [.exact, .worstCase], .sizing)
    options.quantization = try value(given.quantization, of: [nil] + ScaleFormat.allCases, .quantization)
    if given.global_scale != 0 { options.globalScale = given.global_scale }
    options.scaleOrder = try value(given.scale_order, of: ScaleOrder.allCases, .scaleOrder)
    options.rowsMax = unlessZero(given.rows_max)
    options.workers = unlessZero(given.workers)
    options.waiting = try value(given.waiting, of: waitings, .waiting)
    options.receivesLater = given.receives_later != 0
    options.isAsynchronous = given.is_asynchronous != 0
  }
}

extension Tensor {
  fileprivate static func missing(_ name: ArgumentFault.Name) -> Tensor {
    Tensor(unusable: ArgumentFault(.presence, name, expected: 1, found: 0))
  }

  fileprivate static func superfluous(_ name: ArgumentFault.Name) -> Tensor {
    Tensor(unusable: ArgumentFault(.presence, name, expected: 0, found: 1))
  }
}

private func dispatchResult(_ pointer: OpaquePointer?) -> GivenResult<DispatchResult>? { object(pointer) }

extension DispatchResult {
  /// As C numbers them.
  fileprivate func tensor(_ which: Int) -> Tensor? {
    switch which {
    case SWIFTEP_ROWS: rows
    case SWIFTEP_ROW_SCALES: scales
    case SWIFTEP_ORIGINS: origins
    case SWIFTEP_TOP_K_INDICES: topKIndices
    case SWIFTEP_TOP_K_WEIGHTS: topKWeights
    case SWIFTEP_ROW_COUNT: rowCount
    case SWIFTEP_TOKENS_PER_SOURCE: tokensPerSource
    case SWIFTEP_TOKENS_PER_EXPERT: tokensPerExpert
    case SWIFTEP_UNALIGNED_TOKENS_PER_EXPERT: unalignedTokensPerExpert
    case SWIFTEP_SOURCE_OFFSETS: sourceOffsets
    case SWIFTEP_SOURCE_COUNTS: sourceCounts
    case SWIFTEP_TOKENS_PER_PAIR: tokensPerPair
    default:
      sidecars.indices.contains(which - SWIFTEP_SIDECARS) ? sidecars[which - SWIFTEP_SIDECARS] : nil
    }
  }
}

/// Whether there is such a tensor, and a place for it.
private func giveIfAny(
  _ tensor: Tensor?, on machine: Machine, in place: UnsafeMutablePointer<swiftep_tensor>?
) -> Int32 {
  do throws(EPError) { try give(tensor, on: machine, in: place) } catch { return 0 }
  return tensor == nil ? 0 : 1
}

@c @implementation
public func swiftep_dispatch_result_tensor(
  _ result: OpaquePointer?, _ which: Int32, _ tensor: UnsafeMutablePointer<swiftep_tensor>?
) -> Int32 {
  let result = dispatchResult(result)
  return giveIfAny(result?.result.tensor(Int(which)), on: result?.machine ?? .cpu, in: tensor)
}

@c @implementation
public func swiftep_dispatch_result_handle(_ result: OpaquePointer?) -> OpaquePointer! {
  dispatchResult(result).map { give($0.result.handle) }
}

@c @implementation
public func swiftep_dispatch_result_event(_ result: OpaquePointer?) -> OpaquePointer! {
  dispatchResult(result).map { give($0.result.event) }
}

@c @implementation
public func swiftep_dispatch_receive(_ pointer: OpaquePointer?, _ error: ErrorPlace?) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    try object(pointer, "result", GivenResult<DispatchResult>.self).result.receive()
  }
}

@c @implementation
public func swiftep_dispatch_result_free(_ result: OpaquePointer?) { take(result) }

// MARK: Handles

private func handle(_ pointer: OpaquePointer?) -> DispatchHandle? { object(pointer) }

@c @implementation
public func swiftep_handle_token_count(_ pointer: OpaquePointer?) -> Int64 {
  handle(pointer).map { Int64($0.tokenCount) } ?? -1
}

@c @implementation
public func swiftep_handle_row_capacity(_ pointer: OpaquePointer?) -> Int64 {
  handle(pointer).map { Int64($0.rowCapacity) } ?? -1
}

@c @implementation
public func swiftep_handle_top_k(_ pointer: OpaquePointer?) -> Int32 { handle(pointer).map { Int32($0.topK) } ?? -1 }

@c @implementation
public func swiftep_handle_layout(_ pointer: OpaquePointer?) -> Int32 {
  handle(pointer).flatMap { RowLayout.allCases.firstIndex(of: $0.rowLayout) }.map { Int32($0) } ?? -1
}

@c @implementation
public func swiftep_handle_free(_ pointer: OpaquePointer?) { take(pointer) }

// MARK: - Combine

@c @implementation
public func swiftep_combine(
  _ buffer: OpaquePointer?, _ options: UnsafePointer<swiftep_combine_options>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(result, "result")
    let given = try object(buffer, "buffer", GivenBuffer.self)
    let options = try read(options, over: swiftep_combine_options(), "options")
    let handle = try object(options.handle, "handle", DispatchHandle.self)
    let (rows, combineOptions) = try combineArguments(options, on: given.machine)
    let made = try given.buffer.combine(rows, with: handle, options: combineOptions)
    place.pointee = give(GivenResult(made, on: given.machine))
  }
}

private func combineArguments(
  _ given: swiftep_combine_options, on machine: Machine
) throws(EPError) -> (rows: Tensor, options: CombineOptions) {
  var rows = try tensor(given.rows, .rows, on: machine) ?? .missing(.rows)
  var options = CombineOptions()
  options.rowWeights = try tensor(given.row_weights, .rowWeights, on: machine)
  options.topKWeights = try tensor(given.top_k_weights, .topKWeights, on: machine)
  for bias in try array(given.biases, given.bias_count, "biases") {
    options.biases.append(try tensor(bias, .biases, on: machine) ?? .missing(.biases))
  }
  options.output = try tensor(given.output, .output, on: machine)
  options.workers = unlessZero(given.workers)
  options.waitStatistics = try tensor(given.wait_statistics, .waitStatistics, on: machine)
  options.receivesLater = given.receives_later != 0
  options.isAsynchronous = given.is_asynchronous != 0
  options.after = try events(given.after, given.after_count)
  options.stream = callerStream(given.uses_stream, given.stream)
  do throws(ArgumentFault) {
    options.waiting = try value(given.waiting, of: waitings, .waiting)
    options.encoding = try value(given.encoding, of: RowEncoding.allCases, .encoding)
  } catch {
    rows = Tensor(unusable: error)
  }
  return (rows, options)
}

private func combineResult(_ pointer: OpaquePointer?) -> GivenResult<CombineResult>? { object(pointer) }

@c @implementation
public func swiftep_combine_result_tensor(
  _ result: OpaquePointer?, _ which: Int32, _ tensor: UnsafeMutablePointer<swiftep_tensor>?
) -> Int32 {
  let result = combineResult(result)
  let found =
    switch Int(which) {
    case SWIFTEP_TOKENS: result?.result.tokens
    case SWIFTEP_SUMMED_WEIGHTS: result?.result.topKWeights
    default: nil as Tensor?
    }
  return giveIfAny(found, on: result?.machine ?? .cpu, in: tensor)
}

@c @implementation
public func swiftep_combine_result_event(_ result: OpaquePointer?) -> OpaquePointer! {
  combineResult(result).map { give($0.result.event) }
}

@c @implementation
public func swiftep_combine_receive(_ pointer: OpaquePointer?, _ error: ErrorPlace?) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    try object(pointer, "result", GivenResult<CombineResult>.self).result.receive()
  }
}

@c @implementation
public func swiftep_combine_result_free(_ result: OpaquePointer?) { take(result) }

@c @implementation
public func swiftep_combine_input(
  _ buffer: OpaquePointer?, _ handle: OpaquePointer?, _ hidden: Int32, _ dtype: Int32,
  _ tensor: UnsafeMutablePointer<swiftep_tensor>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let given = try object(buffer, "buffer", GivenBuffer.self)
    let made = try given.buffer.combineInput(
      for: try object(handle, "handle"), hidden: Int(hidden), dtype: try .given(dtype, orElse: nil, "dtype"))
    try give(made, on: given.machine, in: tensor)
  }
}
