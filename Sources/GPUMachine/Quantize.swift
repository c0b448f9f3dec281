import PTX

/// BF16 to FP8 E4M3: sixteen lanes have a block of 128 channels, eight channels each.
struct QuantizedLane {
  /// Eight codes.
  let codes: (UInt32, UInt32)
  /// The block's scale: a Float's bits, or its exponent.
  let scale: UInt32

  @inline(__always)
  init(_ vector: Vector, isPowerOfTwo: Bool) {
    // As BF16 bits: NaN above infinity above all else.
    var top = Self.largest(vector)
    var mask: UInt32 = 8
    while mask > 0 {
      top = max(top, ptx_shuffle_xor(top, mask))
      mask = mask &>> 1
    }
    let isSpecial = top >= 0x7f80
    let isNaN = top > 0x7f80
    let found = Float(bitPattern: top &<< 16)
    let amax = isNaN ? found : max(found, 1e-4)
    let quotient = amax / 448
    var inverse = 448 / amax
    if isPowerOfTwo {
      let bits = quotient.bitPattern
      let exponent = isSpecial ? 255 : (bits &>> 23) &+ (bits & 0x7f_ffff != 0 ? 1 : 0)
      inverse = Float(bitPattern: isSpecial ? 0x7fc0_0000 : (254 &- exponent) &<< 23)
      scale = exponent
    } else {
      // A NaN keeps its payload, as on a CPU.
      scale = isNaN ? top &<< 16 | 0x40_0000 : quotient.bitPattern
    }
    let (low, high) = BF16.widened(vector)
    let factor = SIMD4<Float>(repeating: inverse)
    codes = (encode(low * factor), encode(high * factor))
  }

  @inline(__always)
  private static func largest(_ vector: Vector) -> UInt32 {
    let magnitudes = vector & Vector(repeating: 0x7fff_7fff)
    let (low, high) = (magnitudes & Vector(repeating: 0xffff), magnitudes &>> Vector(repeating: 16))
    return max(max(max(low.x, high.x), max(low.y, high.y)), max(max(low.z, high.z), max(low.w, high.w)))
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
