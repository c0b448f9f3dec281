import CPlatform
import EPKernels

// What the row loops compute, one scalar at a time.

func bf16(_ value: Float) -> UInt16 {
  if value.isNaN { return 0x7fff }
  let bits = value.bitPattern
  let (below, rest) = (bits >> 16, bits & 0xffff)
  return UInt16(rest > 0x8000 || (rest == 0x8000 && below % 2 == 1) ? below + 1 : below)
}

func float(bf16 bits: UInt16) -> Float { Float(bitPattern: UInt32(bits) << 16) }

/// Magnitudes of E4M3 by code, 0x7e (448) being the last.
private let e4m3Magnitudes: [Float] = (0...0x7e).map { code in
  let (exponent, significand) = (code >> 3, Float(code & 7))
  return exponent == 0
    ? significand * 0x1p-9 : (8 + significand) * Float(sign: .plus, exponent: exponent - 10, significand: 1)
}

/// The nearest value, the even code of two; saturating.
func e4m3(_ value: Float) -> UInt8 {
  if value.isNaN { return 0x7f }
  let sign: UInt8 = value.sign == .minus ? 0x80 : 0
  let magnitude = Double(value.magnitude)
  if magnitude >= 448 { return sign | 0x7e }
  let above = e4m3Magnitudes.firstIndex { Double($0) > magnitude }!
  let (low, high) = (Double(e4m3Magnitudes[above - 1]), Double(e4m3Magnitudes[above]))
  let distances = (magnitude - low, high - magnitude)
  if distances.0 == distances.1 { return sign | UInt8(above % 2 == 0 ? above : above - 1) }
  return sign | UInt8(distances.0 < distances.1 ? above - 1 : above)
}

/// Elements of one format.
struct Elements {
  let format: RowFormat
  var size: Int { format == .fp32 ? 4 : 2 }

  func load(_ bytes: [UInt8], _ index: Int) -> Float {
    bytes.withUnsafeBytes { bytes in
      switch format {
      case .bf16: float(bf16: bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self))
      case .fp16: Float(Float16(bitPattern: bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)))
      default: bytes.loadUnaligned(fromByteOffset: 4 * index, as: Float.self)
      }
    }
  }

  /// The pattern of a sum.
  func pattern(_ sum: Float) -> [UInt8] {
    switch format {
    case .bf16: withUnsafeBytes(of: bf16(sum)) { Array($0) }
    case .fp16: withUnsafeBytes(of: sum.isNaN ? 0x7fff : Float16(sum).bitPattern) { Array($0) }
    default: withUnsafeBytes(of: sum.isNaN ? 0x7fff_ffff : sum.bitPattern) { Array($0) }
    }
  }
}

struct Random {
  private var state: UInt64
  init(_ seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }

  mutating func next() -> UInt64 {
    state ^= state << 13
    state ^= state >> 7
    state ^= state << 17
    return state
  }

  mutating func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8(truncatingIfNeeded: next() >> 24) } }
}
