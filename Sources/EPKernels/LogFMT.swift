/// LogFMT: how BF16 rows can travel in a combine, ten bits a channel.
///
/// For each block of 128 channels, a sign and the magnitude's logarithm in 510 equal steps between the least and the largest
/// of the block; code 0 is zero. A block that this would change by more than 1.1% of a value is sent as it is: one with
/// infinities, NaN or subnormals, or whose magnitudes are more than 2 to the power of 16 apart. (DeepEP has the format for its
/// low-latency combine; logarithms, bounds and layout are our own.)
///
/// Logarithms are fixed-point numbers that look like Floats: the integer part is a Float's biased exponent, and lies where
/// the exponent lies. So both directions change significands only, by polynomials that map 1...2 onto itself, each operation
/// rounded in Float: all machines find the same bits.
///
/// A block's record is its start and its step, UInt32 each, then the lower eight bits of all codes, then for each channel the
/// ninth bit and the sign, four channels to a byte. A step of all ones says that the block is sent as it is, apart.
@frozen public enum LogFMT {
  @inlinable public static var channelsPerBlock: Int32 { 128 }
  @inlinable public static var recordByteCount: Int32 { 168 }
  @inlinable public static var lowBitsOffset: Int32 { 8 }
  @inlinable public static var highBitsOffset: Int32 { 136 }
  /// The step of a block that is sent as it is.
  @inlinable public static var apart: UInt32 { .max }

  /// Of a row's records, in whole bulk copies.
  @inlinable public static func byteCount(channelCount: Int32) -> Int32 {
    (channelCount / channelsPerBlock &* recordByteCount &+ 15) & ~15
  }

  /// Of the bits of a positive Float.
  @inlinable @inline(__always) public static func logarithm(_ bits: UInt32) -> UInt32 {
    let u = significand(bits)
    var y: Float = 0.04514904320240021
    y = y * u - 0.41932088136672974
    y = y * u + 1.6413991451263428
    y = y * u - 3.568859100341797
    y = y * u + 5.10697603225708
    y = y * u - 1.8053442239761353
    return exponent(bits) &+ y.bitPattern &- one
  }

  /// The bits of a positive Float.
  @inlinable @inline(__always) public static func power(_ logarithm: UInt32) -> UInt32 {
    let u = significand(logarithm)
    var y: Float = 0.013701998628675938
    y = y * u - 0.003063733922317624
    y = y * u + 0.16852903366088867
    y = y * u + 0.3103290796279907
    y = y * u + 0.5105036497116089
    return exponent(logarithm) &+ y.bitPattern &- one
  }

  @inlinable @inline(__always) static var one: UInt32 { 0x3f80_0000 }
  @inlinable @inline(__always) static func exponent(_ bits: UInt32) -> UInt32 { bits & 0x7f80_0000 }
  @inlinable @inline(__always) static func significand(_ bits: UInt32) -> Float {
    Float(bitPattern: bits & 0x7f_ffff | one)
  }
}

/// How one block is coded.
@frozen public struct LogFMTBlock {
  public let start: UInt32
  public let step: UInt32

  @inlinable @inline(__always) public init(start: UInt32, step: UInt32) {
    self.start = start
    self.step = step
  }

  /// - Parameters:
  ///   - largest: BF16 bits of the largest magnitude.
  ///   - least: those of the least that is not zero, minus one; 0xffff where there is none.
  @inlinable @inline(__always) public init(largest: UInt32, least: UInt32) {
    let isZero = least == 0xffff
    let (low, high) = (LogFMT.logarithm((least &+ 1) &<< 16), LogFMT.logarithm(largest &<< 16))
    let span = high &- low
    let isApart = largest >= 0x7f80 || (!isZero && least < 0x7f) || (!isZero && span > 16 &<< 23)
    start = isZero ? 0 : low
    step = isApart ? LogFMT.apart : isZero ? 0 : (span &+ 509) / 510
  }

  @inlinable @inline(__always) public var isApart: Bool { step == LogFMT.apart }

  /// What distances from the start are multiplied by: see `code`.
  @inlinable @inline(__always) public var inverse: Float { step == 0 ? 0 : 1 / Float(step) }

  /// Of a channel's BF16 bits; the sign is bit 9.
  @inlinable @inline(__always) public func code(_ channel: UInt32, inverse: Float) -> UInt32 {
    let magnitude = channel & 0x7fff
    let distance = Int32(truncatingIfNeeded: LogFMT.logarithm(magnitude &<< 16) &- start)
    // The sum rounds to whole steps.
    let steps = (Float(distance) * inverse + 0x1p23).bitPattern & 0x1ff
    let code = magnitude == 0 ? 0 : steps &+ 1
    return code | (channel & 0x8000) &>> 6
  }

  /// - Parameters:
  ///   - code: nine bits.
  ///   - sign: 0 or 1.
  @inlinable @inline(__always) public func value(_ code: UInt32, sign: UInt32) -> Float {
    let magnitude = LogFMT.power(start &+ (code &- 1) &* step)
    return Float(bitPattern: (code == 0 ? 0 : magnitude) | sign &<< 31)
  }
}
