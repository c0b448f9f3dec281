import CSwiftEP
import Glibc
import SwiftEP

// What C passes, as Swift has it.

// MARK: Objects

/// A value that C holds by a pointer.
final class Box<Value: Sendable>: Sendable {
  let value: Value
  init(_ value: Value) { self.value = value }
}

/// A reference that belongs to the caller, until it is freed.
func give(_ object: some AnyObject) -> OpaquePointer { OpaquePointer(Unmanaged.passRetained(object).toOpaque()) }

/// Takes a reference back that `give` has given.
func take(_ pointer: OpaquePointer?) {
  if let pointer { Unmanaged<AnyObject>.fromOpaque(UnsafeRawPointer(pointer)).release() }
}

/// What `give` has given; nil of NULL.
func object<Object: AnyObject>(_ pointer: OpaquePointer?, _ type: Object.Type = Object.self) -> Object? {
  // SAFETY: each function is declared with the type that it gives, and C's compiler keeps those apart.
  pointer.map { Unmanaged<Object>.fromOpaque(UnsafeRawPointer($0)).takeUnretainedValue() }
}

func object<Object: AnyObject>(
  _ pointer: OpaquePointer?, _ argument: String, _ type: Object.Type = Object.self
) throws(EPError) -> Object {
  if let object = object(pointer, type) { return object }
  throw .unusable(argument, expected: "an object", found: "NULL")
}

/// Where a function stores what it makes: NULL, until it has made it.
func place<Value>(
  _ pointer: UnsafeMutablePointer<Value?>?, _ argument: String
) throws(EPError) -> UnsafeMutablePointer<Value?> {
  guard let pointer else { throw .unusable(argument, expected: "a place for the result", found: "NULL") }
  pointer.pointee = nil
  return pointer
}

// MARK: Structs that begin with their size

/// The caller's struct as this library knows it: what an older caller's does not have is zero, and what this library does not
/// know has to be.
func read<Value>(_ pointer: UnsafePointer<Value>?, over zero: Value, _ argument: String) throws(EPError) -> Value {
  guard let pointer else { throw .unusable(argument, expected: "a struct", found: "NULL") }
  let byteCount = try checkedSize(of: pointer, argument)
  var value = zero
  withUnsafeMutableBytes(of: &value) { bytes in
    bytes.copyMemory(from: UnsafeRawBufferPointer(start: pointer, count: min(bytes.count, byteCount)))
  }
  let known = MemoryLayout<Value>.size
  if byteCount > known {
    let rest = UnsafeRawBufferPointer(start: pointer, count: byteCount)[known...]
    if rest.contains(where: { $0 != 0 }) {
      throw .unusable(
        "\(argument).size", expected: "\(known), or zeros behind so many bytes: this library is older than its caller",
        found: "\(byteCount)")
    }
  }
  return value
}

/// Stores as much as the caller's struct has room for.
func store<Value>(_ value: Value, in pointer: UnsafeMutablePointer<Value>, byteCount: Int) {
  withUnsafeBytes(of: value) { bytes in
    UnsafeMutableRawPointer(pointer).copyMemory(from: bytes.baseAddress!, byteCount: min(bytes.count, byteCount))
  }
}

func checkedSize<Value>(of pointer: UnsafePointer<Value>, _ argument: String) throws(EPError) -> Int {
  let byteCount = UnsafeRawPointer(pointer).load(as: Int.self)
  // Nothing that size has ever been is less, nor will be more.
  if (16...65536).contains(byteCount) { return byteCount }
  throw .unusable("\(argument).size", expected: "sizeof(\(Value.self))", found: "\(byteCount)")
}

// MARK: Numbers

func duration(_ timeout: swiftep_nanoseconds) throws(EPError) -> Duration {
  if timeout < 0 { throw .unusable("timeout", expected: "at least 0 nanoseconds", found: "\(timeout)") }
  return timeout == 0 ? .seconds(100) : .nanoseconds(timeout)
}

/// One of an enumeration's values, which C counts from `first` on.
func value<Value>(_ number: Int32, of values: [Value], from first: Int32 = 0, _ argument: String) throws(EPError)
  -> Value
{
  let index = Int(number) - Int(first)
  if values.indices.contains(index) { return values[index] }
  let last = Int(first) + values.count - 1
  throw .unusable(argument, expected: "one of \(first)...\(last)", found: "\(number)")
}

/// A number for which 0 means what the caller does not say.
func unlessZero(_ number: Int32) -> Int? { number == 0 ? nil : Int(number) }

func text(_ pointer: UnsafePointer<CChar>?) -> String? { pointer.map { String(cString: $0) } }

func callerStream(_ isUsed: Int32, _ handle: UnsafeMutableRawPointer?) -> CUDAStream? {
  isUsed == 0 ? nil : CUDAStream(unsafeHandle: handle)
}

/// Elements of a C array; none where there is none.
func array<Element>(_ pointer: UnsafePointer<Element>?, _ count: Int32, _ argument: String) throws(EPError) -> [Element]
{
  if count == 0 { return [] }
  guard let pointer, count > 0 else {
    throw .unusable(argument, expected: "an array and how many elements it has", found: "\(count) elements")
  }
  return Array(UnsafeBufferPointer(start: pointer, count: Int(count)))
}
