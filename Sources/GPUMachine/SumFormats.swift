import PTX

/// Sixteen bytes of a row.
typealias Vector = SIMD4<UInt32>

extension Address {
  @inline(__always) func vector(at byteOffset: Int32) -> Vector {
    advanced(byBytes: Int64(byteOffset)).load(Vector.self, at: 0)
  }
  @inline(__always) func store(_ vector: Vector, atByte byteOffset: Int32) {
    advanced(byBytes: Int64(byteOffset)).store(vector, at: 0)
  }

  /// Of an address that may be a multiple of 4 alone.
  @inline(__always) func unalignedVector(at byteOffset: Int32) -> Vector {
    if bits & 15 == 0 { return vector(at: byteOffset) }
    let words = advanced(byBytes: Int64(byteOffset))
    return Vector(
      words.load(UInt32.self, at: 0), words.load(UInt32.self, at: 1), words.load(UInt32.self, at: 2),
      words.load(UInt32.self, at: 3))
  }
  @inline(__always) func storeUnaligned(_ vector: Vector, atByte byteOffset: Int32) {
    if bits & 15 == 0 { return store(vector, atByte: byteOffset) }
    let words = advanced(byBytes: Int64(byteOffset))
    words.store(vector.x, at: 0)
    words.store(vector.y, at: 1)
    words.store(vector.z, at: 2)
    words.store(vector.w, at: 3)
  }
}

/// An element type that can be summed: how a vector becomes Floats and back.
protocol SumFormat {
  static var elementByteCount: Int32 { get }
  static func element(_ index: Int32, of row: Address) -> Float
  static func store(_ sum: Float, _ row: Address, at index: Int32)
  static func add(_ vector: Vector, weight: Float, to sums: inout Sums)
  static func rounded(_ sums: Sums) -> Vector
}

/// Eight sums in Float; FP32 uses the first four.
struct Sums {
  var low = SIMD4<Float>(repeating: 0)
  var high = SIMD4<Float>(repeating: 0)

  @inline(__always)
  mutating func add(_ values: (SIMD4<Float>, SIMD4<Float>), weight: Float) {
    // Each rounded for itself: nothing is contracted. A weight of one changes nothing.
    low = low + values.0 * SIMD4<Float>(repeating: weight)
    high = high + values.1 * SIMD4<Float>(repeating: weight)
  }
}

@inline(__always) private func float(_ bits: UInt32) -> Float { Float(bitPattern: bits) }

enum BF16: SumFormat {
  @inline(__always) static var elementByteCount: Int32 { 2 }
  @inline(__always) static func element(_ index: Int32, of row: Address) -> Float {
    float(UInt32(row.load(UInt16.self, at: index)) &<< 16)
  }
  @inline(__always) static func store(_ sum: Float, _ row: Address, at index: Int32) {
    row.store(UInt16(truncatingIfNeeded: ptx_bf16x2(sum, 0)), at: index)
  }

  @inline(__always) static func widened(_ vector: Vector) -> (SIMD4<Float>, SIMD4<Float>) {
    (
      SIMD4(
        float(vector.x &<< 16), float(vector.x & 0xffff_0000), float(vector.y &<< 16), float(vector.y & 0xffff_0000)),
      SIMD4(
        float(vector.z &<< 16), float(vector.z & 0xffff_0000), float(vector.w &<< 16), float(vector.w & 0xffff_0000))
    )
  }

  @inline(__always) static func add(_ vector: Vector, weight: Float, to sums: inout Sums) {
    sums.add(widened(vector), weight: weight)
  }

  @inline(__always) static func rounded(_ sums: Sums) -> Vector {
    Vector(
      ptx_bf16x2(sums.low.x, sums.low.y), ptx_bf16x2(sums.low.z, sums.low.w), ptx_bf16x2(sums.high.x, sums.high.y),
      ptx_bf16x2(sums.high.z, sums.high.w))
  }
}

enum FP16: SumFormat {
  @inline(__always) static var elementByteCount: Int32 { 2 }
  @inline(__always) static func element(_ index: Int32, of row: Address) -> Float {
    Float(row.load(Float16.self, at: index))
  }
  @inline(__always) static func store(_ sum: Float, _ row: Address, at index: Int32) {
    row.store(half(sum), at: index)
  }

  @inline(__always) private static func low(_ bits: UInt32) -> Float {
    Float(Float16(bitPattern: UInt16(truncatingIfNeeded: bits)))
  }
  @inline(__always) private static func high(_ bits: UInt32) -> Float { low(bits &>> 16) }
  @inline(__always) private static func pair(_ low: Float, _ high: Float) -> UInt32 {
    UInt32(half(low)) | UInt32(half(high)) &<< 16
  }
  /// NaN has one pattern.
  @inline(__always) private static func half(_ value: Float) -> UInt16 {
    value == value ? Float16(value).bitPattern : 0x7fff
  }

  @inline(__always) static func add(_ vector: Vector, weight: Float, to sums: inout Sums) {
    let (x, y, z, w) = (vector.x, vector.y, vector.z, vector.w)
    sums.add(
      (SIMD4(low(x), high(x), low(y), high(y)), SIMD4(low(z), high(z), low(w), high(w))), weight: weight)
  }

  @inline(__always) static func rounded(_ sums: Sums) -> Vector {
    Vector(
      pair(sums.low.x, sums.low.y), pair(sums.low.z, sums.low.w), pair(sums.high.x, sums.high.y),
      pair(sums.high.z, sums.high.w))
  }
}

enum FP32: SumFormat {
  @inline(__always) static var elementByteCount: Int32 { 4 }
  @inline(__always) static func element(_ index: Int32, of row: Address) -> Float { row.load(Float.self, at: index) }
  @inline(__always) static func store(_ sum: Float, _ row: Address, at index: Int32) {
    row.store(bits(sum), at: index)
  }

  @inline(__always) static func add(_ vector: Vector, weight: Float, to sums: inout Sums) {
    let values = SIMD4(float(vector.x), float(vector.y), float(vector.z), float(vector.w))
    sums.low = sums.low + values * SIMD4<Float>(repeating: weight)
  }

  @inline(__always) static func rounded(_ sums: Sums) -> Vector {
    Vector(bits(sums.low.x), bits(sums.low.y), bits(sums.low.z), bits(sums.low.w))
  }

  /// NaN has one pattern.
  @inline(__always) private static func bits(_ value: Float) -> UInt32 {
    value == value ? value.bitPattern : 0x7fff_ffff
  }
}
