import EPKernels
import Glibc
import HostMachine

/// Element types.
public enum DType: Int, CaseIterable, Codable, Sendable {
  case bf16, fp16, fp32
  /// OCP FP8 E4M3: no infinities, the largest finite value is 448.
  case fp8E4M3
  /// Two OCP FP4 E2M1 (OCP Microscaling Formats, MX v1.0) in a byte, the even channel in the low four bits: one element is
  /// two channels, `[rows, hidden / 2]`. Magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
  case fp4E2M1x2
  case uint8, int32, int64

  /// Bytes of one element.
  public var byteCount: Int {
    switch self {
    case .fp8E4M3, .fp4E2M1x2, .uint8: 1
    case .bf16, .fp16: 2
    case .fp32, .int32: 4
    case .int64: 8
    }
  }

  /// Channels that one element holds.
  public var channelsPerElement: Int { self == .fp4E2M1x2 ? 2 : 1 }
}

/// A dense row-major array, in host memory or a GPU's: a reference to storage, as in other frameworks. Copying a tensor
/// copies the reference.
///
/// Reading and writing the elements is not synchronized; an operation that was given a tensor uses it until its event
/// is complete.
public struct Tensor: Sendable {
  public let dtype: DType
  public let shape: [Int]
  package let storage: any TensorStorage
  package let byteOffset: Int64
  /// Why no call can use it.
  let fault: ArgumentFault?

  package init(dtype: DType, shape: [Int], storage: any TensorStorage, byteOffset: Int64) {
    self.dtype = dtype
    self.shape = shape
    self.storage = storage
    self.byteOffset = byteOffset
    fault = nil
  }

  /// What stands for a caller's array that cannot be a tensor: calls that are given it fail on all ranks, as with any other
  /// argument that cannot be used.
  package init(unusable fault: ArgumentFault) {
    (dtype, shape, byteOffset) = (.uint8, [0, 0], 0)
    storage = BorrowedMemory(base: .null, owner: nil)
    self.fault = fault
  }

  /// New memory, filled with zero bytes, aligned to 64 bytes.
  ///
  /// - Throws: `invalidArgument` for a negative size, or more bytes than an Int counts; `systemCall` where the system
  ///   has no more memory.
  public init(zeros shape: [Int], _ dtype: DType) throws(EPError) {
    let byteCount = try Self.byteCount(shape, dtype)
    self.init(dtype: dtype, shape: shape, storage: try HostMemory(byteCount: Int64(byteCount)), byteOffset: 0)
  }

  /// The caller's memory, not copied. It must stay valid until this tensor and every operation that was given it are
  /// gone; `owner`, if given, is kept alive as long.
  ///
  /// - Throws: as `init(zeros:_:)`.
  public init(
    unsafeMemory pointer: UnsafeMutableRawPointer, shape: [Int], _ dtype: DType, owner: (AnyObject & Sendable)? = nil
  ) throws(EPError) {
    _ = try Self.byteCount(shape, dtype)
    let storage = BorrowedMemory(base: Address(pointer), owner: owner)
    self.init(dtype: dtype, shape: shape, storage: storage, byteOffset: 0)
  }

  /// New memory with a copy of `values`.
  ///
  /// - Throws: `invalidArgument` unless there are as many values as `shape` says and `Element` has the dtype's size.
  public init<Element: BitwiseCopyable>(copying values: [Element], shape: [Int], _ dtype: DType) throws(EPError) {
    try self.init(zeros: shape, dtype)
    try checkElement(Element.self)
    if values.count != elementCount {
      throw .invalidArgument(
        rank: -1, argument: "values", expected: "\(elementCount) values for shape \(shape)", found: "\(values.count)")
    }
    values.withUnsafeBytes { source in withUnsafeMutableBytes { $0.copyMemory(from: source) } }
  }

  /// The caller's memory on a GPU, not copied; otherwise as `init(unsafeMemory:shape:_:owner:)`. `address` is a
  /// `CUdeviceptr` of the GPU's primary context, which calls want to be a multiple of 16; `gpu` is its index among those
  /// that the driver shows.
  ///
  /// - Throws: as `init(zeros:_:)`; `machineUnavailable`, `driver`.
  public init(
    unsafeDeviceAddress address: UInt64, gpu: Int, shape: [Int], _ dtype: DType, owner: (AnyObject & Sendable)? = nil
  ) throws(EPError) {
    _ = try Self.byteCount(shape, dtype)
    let storage = BorrowedDeviceMemory(base: Address(bits: address), try GPUHost.shared(gpu).copier, owner: owner)
    self.init(dtype: dtype, shape: shape, storage: storage, byteOffset: 0)
  }

  /// Where the elements lie: an address of this process, or of its GPU. Valid as long as a tensor on the same memory.
  public var unsafeAddress: UInt64 { address.bits }

  /// The stream uses the tensor's memory: once the last tensor on it is gone, the memory is used again only behind what
  /// the stream has been told to do by then. A call's own stream (`DispatchOptions.stream`) needs no such word for what the
  /// call returns; nor does a caller's own memory. While a graph is captured on the stream, the graph keeps the memory.
  ///
  /// - Throws: `driver`.
  public func noteUse(on stream: CUDAStream) throws(EPError) { try storage.noteUse(on: stream) }

  static func byteCount(_ shape: [Int], _ dtype: DType) throws(EPError) -> Int {
    // Counted as if no size were zero, so that every part of a shape has a size that can be counted.
    var byteCount = dtype.byteCount
    for size in shape {
      let (product, overflows) = byteCount.multipliedReportingOverflow(by: max(1, size))
      if size < 0 || overflows {
        throw .invalidArgument(
          rank: -1, argument: "shape", expected: "sizes of at least 0 that memory can hold", found: "\(shape)")
      }
      byteCount = product
    }
    return shape.contains(0) ? 0 : byteCount
  }

  private func checkElement<Element>(_ type: Element.Type) throws(EPError) {
    if MemoryLayout<Element>.stride != dtype.byteCount {
      throw .invalidArgument(
        rank: -1, argument: "Element", expected: "a type of \(dtype.byteCount) bytes for \(dtype)",
        found: "\(type) of \(MemoryLayout<Element>.stride)")
    }
  }

  public var elementCount: Int { shape.reduce(1, *) }
  public var byteCount: Int { elementCount * dtype.byteCount }

  /// The same elements in the same order.
  func reshaped(_ shape: [Int]) -> Tensor {
    Tensor(dtype: dtype, shape: shape, storage: storage, byteOffset: byteOffset)
  }

  /// Whether it lies where the host reaches it only by copies.
  package var isOnGPU: Bool { storage.copier != nil }

  package var address: Address { storage.base.advanced(byBytes: byteOffset) }

  /// The bytes, in row-major order: a copy of them where the tensor lies in a GPU's memory. The pointer is valid only
  /// during the call.
  ///
  /// - Throws: what `body` throws; of a GPU that is lost `EPError.driver`, where `body` may throw an `EPError`. Where it
  ///   may not, all bits are ones: no number in any floating point format, and -1.
  public func withUnsafeBytes<Result, Failure: Error>(
    _ body: (UnsafeRawBufferPointer) throws(Failure) -> Result
  ) throws(Failure) -> Result {
    guard let copier = storage.copier else {
      return try body(UnsafeRawBufferPointer(start: address.hostPointer, count: byteCount))
    }
    let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 64)
    defer { copy.deallocate() }
    try read(by: copier, into: copy, Failure.self)
    return try body(UnsafeRawBufferPointer(copy))
  }

  /// As `withUnsafeBytes`, for writing; a copy is written back.
  public func withUnsafeMutableBytes<Result, Failure: Error>(
    _ body: (UnsafeMutableRawBufferPointer) throws(Failure) -> Result
  ) throws(Failure) -> Result {
    guard let copier = storage.copier else {
      return try body(UnsafeMutableRawBufferPointer(start: address.hostPointer, count: byteCount))
    }
    let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: byteCount, alignment: 64)
    defer { copy.deallocate() }
    try read(by: copier, into: copy, Failure.self)
    // Of a GPU that is lost, there is nothing to be written back to; every call says so.
    defer { try? copier.write(UnsafeRawBufferPointer(copy), to: address) }
    return try body(copy)
  }

  private func read<Failure: Error>(
    by copier: any MemoryCopier, into copy: UnsafeMutableRawBufferPointer, _: Failure.Type
  ) throws(Failure) {
    do throws(EPError) {
      try copier.read(address, into: copy)
    } catch {
      if let failure = error as? Failure { throw failure }
      copy.initializeMemory(as: UInt8.self, repeating: 0xff)
    }
  }

  /// A copy of the elements.
  ///
  /// - Throws: `invalidArgument` unless `Element` has the dtype's size.
  public func elements<Element: BitwiseCopyable>(_ type: Element.Type) throws(EPError) -> [Element] {
    try checkElement(type)
    return withUnsafeBytes { bytes in Array(bytes.bindMemory(to: type)) }
  }
}

/// Memory that tensors refer to; freed when the last of them is gone.
package protocol TensorStorage: AnyObject, Sendable {
  var base: Address { get }
  /// How the host reads and writes it; nil where it does so itself.
  var copier: (any MemoryCopier)? { get }
  /// What the stream has been told to do by the time when the last reference is gone, is to be done before the memory is
  /// used for something else.
  func noteUse(on stream: CUDAStream) throws(EPError)
  /// The same of a call's own stream, behind its launch.
  func noteUse(by call: CallStream) throws(EPError)
}

extension TensorStorage {
  package var copier: (any MemoryCopier)? { nil }
  package func noteUse(on stream: CUDAStream) throws(EPError) {}
  package func noteUse(by call: CallStream) throws(EPError) {}

  /// Writes the first bytes.
  func write(_ bytes: UnsafeRawBufferPointer) throws(EPError) {
    if let copier { return try copier.write(bytes, to: base) }
    if let source = bytes.baseAddress { base.hostPointer.copyMemory(from: source, byteCount: bytes.count) }
  }
}

/// Zeroed memory of this process, aligned to 64 bytes.
package final class HostMemory: TensorStorage {
  package let base: Address

  /// - Throws: `systemCall` where the system has no more memory.
  package init(byteCount: Int64) throws(EPError) {
    var pointer: UnsafeMutableRawPointer?
    let code = posix_memalign(&pointer, 64, max(64, Int(byteCount)))
    guard code == 0, let pointer else {
      throw .systemCall(rank: -1, name: "posix_memalign of \(byteCount) bytes", code: code)
    }
    memset(pointer, 0, max(64, Int(byteCount)))
    base = Address(pointer)
  }

  deinit { free(base.hostPointer) }
}

private final class BorrowedMemory: TensorStorage {
  let base: Address
  private let owner: (AnyObject & Sendable)?

  init(base: Address, owner: (AnyObject & Sendable)?) {
    self.base = base
    self.owner = owner
  }
}
