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

func float(e4m3 code: UInt8) -> Float { code == 0x7f ? .nan : e4m3Magnitudes[Int(code)] }

/// The nearest E2M1, the even code of two; saturating.
func e2m1(_ value: Float) -> UInt8 {
  // Between each code and the next, the middle; it belongs to the even one.
  let middles: [Float] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
  let code = middles.indices.count { $0 % 2 == 0 ? value.magnitude > middles[$0] : value.magnitude >= middles[$0] }
  return UInt8(code) | (value.sign == .minus ? 8 : 0)
}

/// BF16 patterns as NVFP4, in blocks of 16.
func nvfp4(_ patterns: [UInt16], globalScale: Float) -> (values: [UInt8], scales: [UInt8]) {
  var (codes, scales): ([UInt8], [UInt8]) = ([], [])
  for first in stride(from: 0, to: patterns.count, by: 16) {
    let block = patterns[first..<first + 16].map { float(bf16: $0) }
    let isFinite = block.allSatisfy { $0.isFinite }
    let amax = block.reduce(0) { max($0, $1.magnitude) }
    let scale = isFinite ? e4m3(amax / 6 * globalScale) : 0x7f
    scales.append(scale)
    for value in block {
      let factor = scale == 0 ? 0 : isFinite ? globalScale / float(e4m3: scale) : .infinity
      codes.append(isFinite ? e2m1(value * factor) : value.sign == .minus ? 0xf : 7)
    }
  }
  return (stride(from: 0, to: codes.count, by: 2).map { codes[$0] | codes[$0 + 1] << 4 }, scales)
}

/// For each of many patterns a block in which it is the largest, or nearly so, and others go down from it in small steps.
let nvfp4Patterns: [UInt16] = stride(from: 0, through: 0xffff, by: 13).flatMap { pattern in
  (0..<16).map { UInt16(truncatingIfNeeded: pattern &- $0 * 37 ^ ($0 % 3) << 15) }
}

/// From the least to the greatest that dispatches allow, by which scales of most blocks saturate, or all, or are zero.
let nvfp4GlobalScales: [Float] = [0x1p-118, 1e-30, 1e-3, 1, 1344, 0.7e6, 1e30, 0x1p118]

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
