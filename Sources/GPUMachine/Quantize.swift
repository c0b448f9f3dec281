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
    let top = Self.top(largest, laneCount: laneCount)
    let isSpecial = top >= 0x7f80
    let found = top &<< 16
    let amax = max(Float(bitPattern: isSpecial ? 0 : found), 1e-4)
    let quotient = Self.divided(by448: amax).bitPattern
    if isPowerOfTwo {
      let exponent = isSpecial ? 255 : (quotient &>> 23) &+ (quotient & 0x7f_ffff != 0 ? 1 : 0)
      factor = Float(bitPattern: isSpecial ? 0x7fc0_0000 : (254 &- exponent) &<< 23)
      scale = exponent
    } else {
      // A NaN keeps its payload, as on a CPU.
      let nan: UInt32 = top > 0x7f80 ? 0x40_0000 : 0
      let special = Float(bitPattern: nan == 0 ? 0 : 0x7fc0_0000)
      factor = isSpecial ? special : Self.divided448(by: amax)
      scale = isSpecial ? found | nan : quotient
    }
  }

  /// The quotient, rounded: what the first one lacks is found without rounding, and so small that what is added for it is off by
  /// far less than any quotient is away from the middle between two Floats. For magnitudes of BF16, and the least one allowed.
  @inline(__always)
  private static func divided(by448 value: Float) -> Float {
    let reciprocal: Float = 1 / 448
    let first = value * reciprocal
    return first.addingProduct(value.addingProduct(first, -448), reciprocal)
  }

  /// 448 / `value`, in the same way; powers of two are divided by apart, since the reciprocals of great numbers are not normal.
  @inline(__always)
  private static func divided448(by value: Float) -> Float {
    let one: UInt32 = 0x3f80_0000
    let digits = Float(bitPattern: value.bitPattern & 0x7f_ffff | one)
    let reciprocal = ptx_reciprocal(digits)
    let first = reciprocal * 448
    let quotient = first.addingProduct(Float(448).addingProduct(first, -digits), reciprocal)
    return Float(bitPattern: quotient.bitPattern &+ one &- (value.bitPattern & 0x7f80_0000))
  }

  /// The largest magnitude of a block as BF16 bits: NaN above infinity above all else.
  @inline(__always)
  static func top(_ largest: UInt32, laneCount: UInt32) -> UInt32 {
    var pair = largest
    var mask = laneCount &>> 1
    while mask > 0 {
      pair = ptx_max_pair(pair, ptx_shuffle_xor(pair, mask))
      mask = mask &>> 1
    }
    return max(pair & 0xffff, pair &>> 16)
  }

  /// The greatest magnitude of the channels at even places, and of those at odd ones.
  @inline(__always)
  static func largest(_ vector: Vector) -> UInt32 { Largest(vector).magnitudes }
  @inline(__always)
  static func largest(_ a: Vector, _ b: Vector) -> UInt32 { Largest(a).and(Largest(b)).magnitudes }
  @inline(__always)
  static func largest(_ a: Vector, _ b: Vector, _ c: Vector, _ d: Vector) -> UInt32 {
    Largest(a).and(Largest(b)).and(Largest(c)).and(Largest(d)).magnitudes
  }

  /// The codes of eight channels.
  @inline(__always)
  func codes(_ vector: Vector) -> (UInt32, UInt32) {
    let (low, high) = BF16.widened(vector)
    let factor = SIMD4<Float>(repeating: factor)
    return (encode(low * factor), encode(high * factor))
  }
}

/// The greatest of BF16 bits, of channels at even and at odd places. As unsigned numbers that is the greatest magnitude of negative
/// values, if there is one, and as signed ones that of positive values.
private struct Largest {
  private let unsigned: UInt32
  private let signed: UInt32

  @inline(__always)
  init(_ vector: Vector) {
    unsigned = ptx_max_pair(ptx_max_pair(vector.x, vector.y), ptx_max_pair(vector.z, vector.w))
    signed = ptx_max_signed_pair(ptx_max_signed_pair(vector.x, vector.y), ptx_max_signed_pair(vector.z, vector.w))
  }

  @inline(__always)
  private init(unsigned: UInt32, signed: UInt32) {
    self.unsigned = unsigned
    self.signed = signed
  }

  @inline(__always)
  func and(_ other: Largest) -> Largest {
    Largest(
      unsigned: ptx_max_pair(unsigned, other.unsigned), signed: ptx_max_signed_pair(signed, other.signed))
  }

  @inline(__always)
  var magnitudes: UInt32 { ptx_max_pair(unsigned & 0x7fff_7fff, signed & 0x7fff_7fff) }
}

/// Quotients of a global scale, made once, since a division takes many instructions and registers: of 8 to 15, which are the
/// significands of E4M3. Lane `l` has that of 8 and the lowest bits of `l`.
struct GlobalScale {
  fileprivate let value: Float
  private let quotient: Float

  @inline(__always)
  init(_ value: Float, lane: Int32) {
    self.value = value
    quotient = value / Float(8 &+ (lane & 7))
  }

  /// The scale divided by what a code that is not zero stands for: of scales that dispatches allow, the power of two that
  /// the quotient is multiplied by loses nothing.
  @inline(__always)
  fileprivate func divided(byCode code: UInt32) -> Float {
    // A Float with the code's exponent and digits, and the difference of the exponents' zeros made up for.
    let divisor = (Float(bitPattern: code &<< 20) * 0x1p120).bitPattern
    let quotient = Float(bitPattern: ptx_shuffle(self.quotient.bitPattern, divisor &>> 20 & 7))
    return quotient * Float(bitPattern: (257 &- divisor &>> 23) &<< 23)
  }
}

/// How a block of 16 BF16 channels becomes NVFP4; see `swiftep_quantize_nvfp4`.
struct NVFP4Block {
  /// An E4M3 code.
  let scale: UInt32
  /// What magnitudes are multiplied by.
  private let factor: Float

  /// - Parameters: as `BlockScale`'s.
  @inline(__always)
  init(largest: UInt32, laneCount: UInt32, _ globalScale: GlobalScale) {
    let top = BlockScale.top(largest, laneCount: laneCount)
    let isSpecial = top >= 0x7f80
    // Rounded as a division is: of eight bits, the sixth is never so near to the middle between two Floats.
    let sixth = Float(Double(Float(bitPattern: top &<< 16)) * (1.0 / 6))
    let code = encode(Float(bitPattern: min((sixth * globalScale.value).bitPattern, 0x43e0_0000)))
    let found = globalScale.divided(byCode: code)
    factor = isSpecial ? .nan : code == 0 ? 0 : found
    scale = isSpecial ? 0x7f : code
  }

  /// The codes of eight channels.
  @inline(__always)
  func codes(_ vector: Vector) -> UInt32 {
    pair(vector.x) | pair(vector.y) &<< 8 | pair(vector.z) &<< 16 | pair(vector.w) &<< 24
  }

  @inline(__always)
  private func pair(_ channels: UInt32) -> UInt32 {
    let low = magnitude(Float(bitPattern: (channels & 0x7fff) &<< 16))
    let high = magnitude(Float(bitPattern: channels & 0x7fff_0000))
    return low | high &<< 4 | (channels &>> 12) & 8 | (channels &>> 24) & 0x80
  }

  /// The E2M1 nearest to a positive value times the factor; 6 where there is no nearer one, and for NaN.
  @inline(__always)
  private func magnitude(_ value: Float) -> UInt32 {
    let bits = min((value * factor).bitPattern, 0x40c0_0000)
    let large = (bits &+ 0x1f_ffff &+ ((bits &>> 22) & 1)) &>> 22 &- 252
    // The sum rounds to halves.
    let small = (Float(bitPattern: bits) + 0x1p22).bitPattern &- 0x4a80_0000
    return bits < 0x4000_0000 ? small : large
  }
}

/// The E4M3 code of a value of at most 448.
@inline(__always)
private func encode(_ value: Float) -> UInt32 {
  #if BULK_COPIES
    ptx_e4m3x2(value, 0) & 0xff
  #else
    code(value)
  #endif
}

/// Four E4M3 codes, the first in the lowest byte.
@inline(__always)
private func encode(_ values: SIMD4<Float>) -> UInt32 {
  #if BULK_COPIES
    ptx_e4m3x4(values.x, values.y, values.z, values.w)
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
