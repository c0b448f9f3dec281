// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import Glibc
import SwiftEP

/// A buffer that C holds, and what it runs on.
final class GivenBuffer: Sendable {
  let buffer: ExpertBuffer
  let machine: Machine

  init(_ buffer: ExpertBuffer, on machine: Machine) { (self.buffer, self.machine) = (buffer, machine) }
}

private func buffer(_ pointer: OpaquePointer?) throws(EPError) -> ExpertBuffer {
  try object(pointer, "buffer", GivenBuffer.self).buffer
}

@c @implementation
public func swiftep_buffer_create(
  _ communicator: OpaquePointer?, _ plan: OpaquePointer?, _ options: UnsafePointer<swiftep_buffer_options>?,
  _ buffer: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(buffer, "buffer")
    let communicator = try object(communicator, "communicator", Box<Communicator>.self).value
    let plan = try object(plan, "plan", GivenPlan.self).plan
    var given = swiftep_buffer_options()
    if options != nil { given = try read(options, over: given, "options") }
    guard let machine = Machine(deviceType: given.device_type, index: given.device_index) else {
      throw .unusable("device_type", expected: "one of 0...1", found: "\(given.device_type)")
    }
    let made = try ExpertBuffer(
      communicator, plan: plan, workers: unlessZero(given.workers), timeout: try duration(given.timeout),
      machine: machine)
    place.pointee = give(GivenBuffer(made, on: machine))
  }
}

@c @implementation
public func swiftep_buffer_close(_ buffer: OpaquePointer?) { object(buffer, GivenBuffer.self)?.buffer.close() }

@c @implementation
public func swiftep_buffer_free(_ buffer: OpaquePointer?) { take(buffer) }

@c @implementation
public func swiftep_buffer_rank(_ buffer: OpaquePointer?) -> Int32 {
  object(buffer, GivenBuffer.self).map { Int32($0.buffer.rank) } ?? -1
}

@c @implementation
public func swiftep_buffer_rank_count(_ buffer: OpaquePointer?) -> Int32 {
  object(buffer, GivenBuffer.self).map { Int32($0.buffer.rankCount) } ?? 0
}

@c @implementation
public func swiftep_buffer_worker_count_max(_ buffer: OpaquePointer?) -> Int32 {
  object(buffer, GivenBuffer.self).map { Int32($0.buffer.workerCountMax) } ?? 0
}

@c @implementation
public func swiftep_buffer_arena_byte_count(_ buffer: OpaquePointer?) -> Int64 {
  object(buffer, GivenBuffer.self)?.buffer.arenaByteCount ?? -1
}

@c @implementation
public func swiftep_buffer_local_expert_count(_ buffer: OpaquePointer?) -> Int32 {
  object(buffer, GivenBuffer.self).map { Int32($0.buffer.localExpertCount) } ?? 0
}

@c @implementation
public func swiftep_buffer_worst_case_row_count(
  _ buffer: OpaquePointer?, _ layout: Int32, _ topK: Int32, _ expertAlignment: Int32
) -> Int64 {
  guard let buffer = object(buffer, GivenBuffer.self)?.buffer,
    let layout = try? value(layout, of: RowLayout.allCases, "layout")
  else { return -1 }
  let shape = buffer.worstCaseRowShape(layout, topK: Int(topK), expertAlignment: Int(expertAlignment))
  return Int64(shape[shape.count - 1])
}

/// Stores a new tensor of a buffer's.
private func giveNew(
  _ buffer: OpaquePointer?, _ dtype: Int32, _ dimensionCount: Int32, _ shape: UnsafePointer<Int64>?,
  _ tensor: UnsafeMutablePointer<swiftep_tensor>?, _ error: ErrorPlace?,
  make: (ExpertBuffer, [Int], DType) throws(EPError) -> Tensor
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let given = try object(buffer, "buffer", GivenBuffer.self)
    let shape = try array(shape, dimensionCount, "shape").map { Int($0) }
    try give(
      make(given.buffer, shape, .given(dtype, orElse: nil, "dtype")), on: given.machine, in: tensor)
  }
}

@c @implementation
public func swiftep_buffer_make_tensor(
  _ buffer: OpaquePointer?, _ dtype: Int32, _ dimensionCount: Int32, _ shape: UnsafePointer<Int64>?,
  _ tensor: UnsafeMutablePointer<swiftep_tensor>?, _ error: ErrorPlace?
) -> swiftep_code {
  giveNew(buffer, dtype, dimensionCount, shape, tensor, error) { buffer, shape, dtype throws(EPError) in
    try buffer.makeTensor(zeros: shape, dtype)
  }
}

@c @implementation
public func swiftep_buffer_make_arena_tensor(
  _ buffer: OpaquePointer?, _ dtype: Int32, _ dimensionCount: Int32, _ shape: UnsafePointer<Int64>?,
  _ tensor: UnsafeMutablePointer<swiftep_tensor>?, _ error: ErrorPlace?
) -> swiftep_code {
  giveNew(buffer, dtype, dimensionCount, shape, tensor, error) { buffer, shape, dtype throws(EPError) in
    try buffer.makeArenaTensor(shape, dtype)
  }
}

// MARK: Masks

/// By number, of a bit each.
private func ranks(_ bits: UInt64) -> [Int] { (0..<64).filter { bits >> UInt64($0) & 1 != 0 } }

@c @implementation
public func swiftep_buffer_masked_ranks(
  _ pointer: OpaquePointer?, _ ranks: UnsafeMutablePointer<UInt64>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    guard let ranks else { throw .unusable("ranks", expected: "a place for the result", found: "NULL") }
    ranks.pointee = try buffer(pointer).maskedRanks.reduce(0) { $0 | 1 << UInt64($1) }
  }
}

@c @implementation
public func swiftep_buffer_mask(_ pointer: OpaquePointer?, _ bits: UInt64, _ error: ErrorPlace?) -> swiftep_code {
  attempt(error) { () throws(EPError) in try buffer(pointer).mask(ranks(bits)) }
}

@c @implementation
public func swiftep_buffer_unmask(_ pointer: OpaquePointer?, _ bits: UInt64, _ error: ErrorPlace?) -> swiftep_code {
  attempt(error) { () throws(EPError) in try buffer(pointer).unmask(ranks(bits)) }
}

// MARK: Flight record

@c @implementation
public func swiftep_buffer_flight_record(
  _ pointer: OpaquePointer?, _ text: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    try place(text, "text").pointee = strdup("\(try buffer(pointer).flightRecord)")
  }
}

@c @implementation
public func swiftep_text_free(_ text: UnsafeMutablePointer<CChar>?) { free(text) }
