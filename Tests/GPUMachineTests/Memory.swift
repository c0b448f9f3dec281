import EmulatedGPU

/// Memory of a GPU: aligned as its tensors are, and read as bytes.
final class Memory: @unchecked Sendable {
  /// What bytes are that nobody has written.
  static let untouched: UInt8 = 0xee

  let base: UnsafeMutableRawPointer
  private let byteCount: Int

  init(byteCount: Int) {
    self.byteCount = byteCount
    base = .allocate(byteCount: max(16, byteCount), alignment: 128)
    base.initializeMemory(as: UInt8.self, repeating: Self.untouched, count: byteCount)
  }

  convenience init<Element: BitwiseCopyable>(_ elements: [Element]) {
    let byteCount = elements.count * MemoryLayout<Element>.stride
    self.init(byteCount: byteCount)
    elements.withUnsafeBytes { if byteCount > 0 { base.copyMemory(from: $0.baseAddress!, byteCount: byteCount) } }
  }

  deinit { base.deallocate() }

  var address: Address { Address(bits: UInt64(UInt(bitPattern: base))) }
  var bytes: [UInt8] { Array(UnsafeRawBufferPointer(start: base, count: byteCount)) }

  func elements<Element: BitwiseCopyable>(_: Element.Type) -> [Element] {
    Array(UnsafeRawBufferPointer(start: base, count: byteCount).bindMemory(to: Element.self))
  }
}

extension Int32 {
  var bytes: [UInt8] { withUnsafeBytes(of: self) { Array($0) } }
}

extension GPUMachine {
  /// - Parameter source: of each row and slot.
  func reduceRows(_ job: ReduceJob, source: (_ row: Int32, _ slot: Int32) -> RowSource) {
    reduceRows(job) {
      WeightedPlace(Place(rank: $1, row: $0), weight: 1)
    } source: {
      $0.place.isNone ? .none : source($0.place.row, $0.place.rank)
    }
  }
}
