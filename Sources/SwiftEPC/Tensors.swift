// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import Glibc
import SwiftEP

// MARK: From C

/// Memory of the caller's, for as long as a tensor is on it.
private final class CallerMemory: @unchecked Sendable {
  private let owner: UnsafeMutableRawPointer?
  private let release: (@convention(c) (UnsafeMutableRawPointer?) -> Void)?

  init(_ tensor: swiftep_tensor) {
    (owner, release) = (tensor.owner, tensor.release)
    tensor.retain?(owner)
  }

  deinit { release?(owner) }
}

/// A call's tensor, for a buffer on `machine`. One that cannot be used is one that the call refuses, so that all ranks learn of
/// it.
///
/// - Throws: `invalidArgument` of a struct that makes no sense.
func tensor(
  _ pointer: UnsafePointer<swiftep_tensor>?, _ name: ArgumentFault.Name, on machine: Machine
) throws(EPError) -> Tensor? {
  guard let pointer else { return nil }
  let tensor = try read(pointer, over: swiftep_tensor(), "\(name)")
  let shape = try array(tensor.shape, tensor.dimension_count, "\(name).shape").map { Int($0) }
  guard let dtype = DType(code: tensor.dtype) else {
    return Tensor(unusable: ArgumentFault(.dtype, name, expected: DType.allCases.mask, found: -1))
  }
  let isEmpty = shape.contains(0)
  if let fault = strideFault(tensor, shape, name), !isEmpty { return Tensor(unusable: fault) }
  let owner = tensor.release == nil && tensor.retain == nil ? nil : CallerMemory(tensor)
  if !isEmpty && tensor.data == nil { return Tensor(unusable: ArgumentFault(.presence, name, expected: 1, found: 0)) }
  switch Machine(deviceType: tensor.device_type, index: tensor.device_index) {
  case .cpu:
    // Any address will do for nothing.
    let data = tensor.data ?? UnsafeMutableRawPointer(bitPattern: 64)!
    return try Tensor(unsafeMemory: data, shape: shape, dtype, owner: owner)
  case .cuda(let gpu) where machine == .cuda(gpu: gpu):
    return try Tensor(
      unsafeDeviceAddress: UInt64(UInt(bitPattern: tensor.data)), gpu: gpu, shape: shape, dtype, owner: owner)
  default: return Tensor(unusable: ArgumentFault(.memory, name, expected: 0, found: 1))
  }
}

/// A dispatch's scales, which may lie in columns: `[scales of a row, elements from column to column]` then.
func scales(
  _ pointer: UnsafePointer<swiftep_tensor>?, on machine: Machine
) throws(EPError) -> (tensor: Tensor?, order: ScaleOrder) {
  guard let pointer else { return (nil, .rowMajor) }
  var columns = try read(pointer, over: swiftep_tensor(), "scales")
  guard let shape = try columnShape(columns) else { return (try tensor(pointer, .scales, on: machine), .rowMajor) }
  columns.strides = nil
  return try shape.withUnsafeBufferPointer { shape throws(EPError) in
    columns.shape = shape.baseAddress
    return (try tensor(&columns, .scales, on: machine), .columnMajor)
  }
}

/// Of a tensor whose columns lie one behind the other, with or without gaps, while its rows do not.
private func columnShape(_ tensor: swiftep_tensor) throws(EPError) -> [Int64]? {
  let shape = try array(tensor.shape, tensor.dimension_count, "scales.shape")
  guard shape.count == 2, let strides = tensor.strides, !shape.contains(0) else { return nil }
  if strideFault(tensor, shape.map { Int($0) }, .scales) == nil { return nil }
  let (elementCount, overflows) = strides[1].multipliedReportingOverflow(by: shape[1])
  let areColumns = (shape[0] == 1 || strides[0] == 1) && strides[1] >= shape[0]
  return areColumns && !overflows && elementCount <= Int32.max ? [shape[1], strides[1]] : nil
}

/// What is wrong with strides that are not those of rows without gaps.
private func strideFault(_ tensor: swiftep_tensor, _ shape: [Int], _ name: ArgumentFault.Name) -> ArgumentFault? {
  guard let strides = tensor.strides else { return nil }
  var expected = 1
  for dimension in shape.indices.reversed() {
    let found = Int(strides[dimension])
    // Of a single element, nobody asks where the next one is.
    if shape[dimension] != 1 && found != expected {
      return ArgumentFault(.stride, name, dimension: dimension, expected: expected, found: found)
    }
    let (product, overflows) = expected.multipliedReportingOverflow(by: shape[dimension])
    if overflows { return nil }
    expected = product
  }
  return nil
}

extension DType {
  /// In C, zero is none.
  init?(code: Int32) { self.init(rawValue: Int(code) - 1) }
  var code: Int32 { Int32(rawValue) + 1 }

  /// As a number of a struct in which 0 means `missing`.
  static func given(_ code: Int32, orElse missing: DType?, _ argument: String) throws(EPError) -> DType {
    if code == 0, let missing { return missing }
    return try value(code, of: allCases, from: 1, argument)
  }
}

extension Machine {
  /// Nil of what is none.
  init?(deviceType: Int32, index: Int32) {
    switch Int(deviceType) {
    case SWIFTEP_CPU: self = .cpu
    case SWIFTEP_CUDA: self = .cuda(gpu: Int(index))
    default: return nil
    }
  }
}

// MARK: To C

/// A tensor that C has been given, and its shape, where C finds it.
private final class GivenTensor: @unchecked Sendable {
  let tensor: Tensor
  let shape: UnsafeMutablePointer<Int64>

  init(_ tensor: Tensor) {
    self.tensor = tensor
    shape = .allocate(capacity: max(1, tensor.shape.count))
    for (dimension, size) in tensor.shape.enumerated() { shape[dimension] = Int64(size) }
  }

  deinit { shape.deallocate() }
}

private func retainGiven(_ owner: UnsafeMutableRawPointer?) {
  if let owner { _ = Unmanaged<GivenTensor>.fromOpaque(owner).retain() }
}

private func releaseGiven(_ owner: UnsafeMutableRawPointer?) {
  if let owner { Unmanaged<GivenTensor>.fromOpaque(owner).release() }
}

private let given:
  (
    retain: @convention(c) (UnsafeMutableRawPointer?) -> Void,
    release: @convention(c) (UnsafeMutableRawPointer?) -> Void
  ) =
    (retainGiven, releaseGiven)

/// Stores a tensor that the caller releases; nil: a struct of zeros.
func give(_ tensor: Tensor?, on machine: Machine, in pointer: UnsafeMutablePointer<swiftep_tensor>?) throws(EPError) {
  guard let pointer else { throw .unusable("tensor", expected: "a place for the result", found: "NULL") }
  let byteCount = try checkedSize(of: pointer, "tensor")
  var made = swiftep_tensor()
  made.size = byteCount
  if let tensor {
    let owner = GivenTensor(tensor)
    made.data = UnsafeMutableRawPointer(bitPattern: UInt(tensor.unsafeAddress))
    made.dtype = tensor.dtype.code
    if case .cuda(let gpu) = machine, tensor.isOnGPU {
      (made.device_type, made.device_index) = (Int32(SWIFTEP_CUDA), Int32(gpu))
    }
    made.dimension_count = Int32(tensor.shape.count)
    made.shape = UnsafePointer(owner.shape)
    made.owner = Unmanaged.passRetained(owner).toOpaque()
    (made.retain, made.release) = given
  }
  store(made, in: pointer, byteCount: byteCount)
}

@c @implementation
public func swiftep_tensor_release(_ tensor: UnsafeMutablePointer<swiftep_tensor>?) {
  guard let tensor, let byteCount = try? checkedSize(of: UnsafePointer(tensor), "tensor") else { return }
  guard let given = try? read(UnsafePointer(tensor), over: swiftep_tensor(), "tensor"), let release = given.release
  else { return }
  release(given.owner)
  var cleared = swiftep_tensor()
  cleared.size = byteCount
  store(cleared, in: tensor, byteCount: byteCount)
}

@c @implementation
public func swiftep_tensor_note_use(
  _ tensor: UnsafePointer<swiftep_tensor>?, _ stream: UnsafeMutableRawPointer?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let tensor = try read(tensor, over: swiftep_tensor(), "tensor")
    let address = { (function: (@convention(c) (UnsafeMutableRawPointer?) -> Void)?) in
      unsafeBitCast(function, to: Int.self)
    }
    guard address(tensor.release) == address(given.release), let owner = tensor.owner else {
      throw .unusable("tensor", expected: "one that this library has given", found: "another")
    }
    try Unmanaged<GivenTensor>.fromOpaque(owner).takeUnretainedValue().tensor
      .noteUse(on: CUDAStream(unsafeHandle: stream))
  }
}
