import PTX

/// How a block of 128 BF16 channels becomes FP8 E4M3: neighbouring lanes have equal parts of it.
struct BlockScale {
  /// A Float's bits, or its exponent.
  let scale: UInt32
  /// What channels are multiplied by.
  private let factor: Float

  /// - Parameters:
  ///   - largest: the largest magnitudes of this lane's channels, as `largest(_:)` finds them.
  ///   - laneCount: lanes that have the block, a power of two.
  @inline(__always)
  init(largest: UInt32, laneCount: UInt32, isPowerOfTwo: Bool) {
    var pair = largest
    var mask = laneCount &>> 1
    while mask > 0 {
      pair = ptx_max_pair(pair, ptx_shuffle_xor(pair, mask))
      mask = mask &>> 1
    }
    // As BF16 bits: NaN above infinity above all else.
    let top = max(pair & 0xffff, pair &>> 16)
    let isSpecial = top >= 0x7f80
    let isNaN = top > 0x7f80
    let found = Float(bitPattern: top &<< 16)
    let amax = isNaN ? found : max(found, 1e-4)
    let quotient = amax / 448
    if isPowerOfTwo {
      let bits = quotient.bitPattern
      let exponent = isSpecial ? 255 : (bits &>> 23) &+ (bits & 0x7f_ffff != 0 ? 1 : 0)
      factor = Float(bitPattern: isSpecial ? 0x7fc0_0000 : (254 &- exponent) &<< 23)
      scale = exponent
    } else {
      factor = 448 / amax
      // A NaN keeps its payload, as on a CPU.
      scale = isNaN ? top &<< 16 | 0x40_0000 : quotient.bitPattern
    }
  }

  /// The greater of each two magnitudes, of the channels at even places and of those at odd ones.
  @inline(__always)
  static func largest(_ vector: Vector) -> UInt32 {
    let magnitudes = vector & Vector(repeating: 0x7fff_7fff)
    return ptx_max_pair(ptx_max_pair(magnitudes.x, magnitudes.y), ptx_max_pair(magnitudes.z, magnitudes.w))
  }

  /// The codes of eight channels.
  @inline(__always)
  func codes(_ vector: Vector) -> (UInt32, UInt32) {
    let (low, high) = BF16.widened(vector)
    let factor = SIMD4<Float>(repeating: factor)
    return (encode(low * factor), encode(high * factor))
  }
}

/// Four E4M3 codes, the first in the lowest byte.
@inline(__always)
private func encode(_ values: SIMD4<Float>) -> UInt32 {
  #if BULK_COPIES
    ptx_e4m3x2(values.x, values.y) | ptx_e4m3x2(values.z, values.w) &<< 16
  #else
    code(values.x) | code(values.y) &<< 8 | code(values.z) &<< 16 | code(values.w) &<< 24
  #endif
}

#if !BULK_COPIES
  /// The E4M3 nearest to a value whose magnitude is at most 448, an infinity or NaN.
  @inline(__always)
  private func code(_ value: Float) -> UInt32 {
    let bits = value.bitPattern
    let magnitude = bits & 0x7fff_ffff
    if magnitude > 0x7f80_0000 { return 0x7f }
    let sign = (bits &>> 24) & 0x80
    if magnitude == 0x7f80_0000 { return sign | 0x7e }
    if magnitude < 0x3c80_0000 {
      // The sum rounds at the smallest E4M3's digit.
      return sign | ((Float(bitPattern: magnitude) + 0x1p14).bitPattern &- 0x4680_0000)
    }
    return sign | (magnitude &+ 0x7ffff &+ ((magnitude &>> 20) & 1) &- (120 &<< 23)) &>> 20
  }
#endif
