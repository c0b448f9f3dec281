import SwiftEP

// Element formats, one scalar at a time, as their definitions read.

func floatFromBF16(_ bits: UInt16) -> Float { Float(bitPattern: UInt32(bits) << 16) }

/// Rounds to nearest, ties to even; NaN becomes 0x7fff.
func bf16FromFloat(_ value: Float) -> UInt16 {
  if value.isNaN { return 0x7fff }
  let upper = UInt16(value.bitPattern >> 16)
  let rest = value.bitPattern & 0xffff
  let roundsUp = rest > 0x8000 || (rest == 0x8000 && upper & 1 == 1)
  return roundsUp ? upper + 1 : upper
}

func floatFromFP16(_ bits: UInt16) -> Float { Float(Float16(bitPattern: bits)) }

/// Rounds to nearest, ties to even; NaN becomes 0x7fff.
func fp16FromFloat(_ value: Float) -> UInt16 { value.isNaN ? 0x7fff : Float16(value).bitPattern }

/// NaN becomes 0x7fffffff.
func canonicalFP32(_ value: Float) -> UInt32 { value.isNaN ? 0x7fff_ffff : value.bitPattern }

/// OCP FP8 E4M3, rounded to nearest, ties to even, saturating at 448; NaN becomes 0x7f.
func e4m3FromFloat(_ value: Float) -> UInt8 {
  if value.isNaN { return 0x7f }
  let sign: UInt8 = value.sign == .minus ? 0x80 : 0
  let magnitude = value.magnitude
  if magnitude >= 448 { return sign | 0x7e }
  // Below 2^-6 values are subnormal: steps of 2^-9, as in the lowest binade.
  let exponent = magnitude < 0x1p-6 ? -6 : Int(magnitude.exponent)
  let stepsPerUnit = Float(sign: .plus, exponent: 3 - exponent, significand: 1)
  let steps = (magnitude * stepsPerUnit).rounded(.toNearestOrEven)
  // A normal value has 8 to 16 steps, 16 being the first of the next binade: carried over by the addition.
  let code = Int(steps) + (exponent + 6) * 8
  return sign | UInt8(code)
}

/// Magnitudes of OCP FP4 E2M1 by code.
private let e2m1Magnitudes: [Float] = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

/// OCP FP4 E2M1.
package func floatFromE2M1(_ code: UInt8) -> Float {
  code < 8 ? e2m1Magnitudes[Int(code)] : -e2m1Magnitudes[Int(code - 8)]
}

/// OCP FP8 E4M3.
package func floatFromE4M3(_ code: UInt8) -> Float {
  if code & 0x7f == 0x7f { return .nan }
  let (exponent, mantissa) = (Int(code >> 3 & 15), Float(code & 7))
  let magnitude =
    exponent == 0 ? mantissa * 0x1p-9 : Float(sign: .plus, exponent: exponent - 10, significand: 8 + mantissa)
  return code & 0x80 == 0 ? magnitude : -magnitude
}

/// The nearest OCP FP4 E2M1, of two the one with the even code, saturating at 6. No NaN.
func e2m1FromFloat(_ value: Float) -> UInt8 {
  let sign: UInt8 = value.sign == .minus ? 8 : 0
  let magnitude = Double(min(value.magnitude, 6))
  var nearest = 0
  for (code, candidate) in e2m1Magnitudes.enumerated() {
    let distance = abs(Double(candidate) - magnitude)
    let shortest = abs(Double(e2m1Magnitudes[nearest]) - magnitude)
    if distance < shortest || (distance == shortest && code % 2 == 0) { nearest = code }
  }
  return sign | UInt8(nearest)
}

/// Blocks of channels that share a scale.
let oracleChannelsPerScale = 128

/// One BF16 row as E4M3, with its scales as they lie in memory.
func quantizedRow(
  _ source: UnsafeRawBufferPointer, format: ScaleFormat, globalScale: Float
) -> (values: [UInt8], scales: [UInt8]) {
  if format == .nvfp4 { return nvfp4Row(source, globalScale: globalScale) }
  let channelCount = source.count / 2
  var values = [UInt8](repeating: 0, count: channelCount)
  var scales: [UInt8] = []
  for first in stride(from: 0, to: channelCount, by: oracleChannelsPerScale) {
    let end = min(channelCount, first + oracleChannelsPerScale)
    var largest: UInt16 = 0
    for channel in first..<end {
      largest = max(largest, source.loadUnaligned(fromByteOffset: 2 * channel, as: UInt16.self) & 0x7fff)
    }
    // Patterns of magnitudes are ordered as the magnitudes are, NaN last.
    let amax = floatFromBF16(largest)
    let clamped = amax < 1e-4 ? 1e-4 : amax
    let scale = clamped / 448
    var inverse = 448 / clamped
    switch format {
    case .float:
      withUnsafeBytes(of: scale) { scales.append(contentsOf: $0) }
    case .ue8m0:
      let biasedExponent = biasedExponentRoundedUp(scale)
      scales.append(biasedExponent)
      inverse = powerOfTwo(254 - Int(biasedExponent))
    case .powerOfTwo:
      let biasedExponent = biasedExponentRoundedUp(scale)
      withUnsafeBytes(of: powerOfTwo(Int(biasedExponent))) { scales.append(contentsOf: $0) }
      inverse = powerOfTwo(254 - Int(biasedExponent))
    case .nvfp4: preconditionFailure("no FP8")
    }
    for channel in first..<end {
      let value = floatFromBF16(source.loadUnaligned(fromByteOffset: 2 * channel, as: UInt16.self))
      values[channel] = e4m3FromFloat(value * inverse)
    }
  }
  if format == .ue8m0 {
    while scales.count % 4 != 0 { scales.append(0) }
  }
  return (values, scales)
}

/// One BF16 row as NVFP4, with its scales.
private func nvfp4Row(_ source: UnsafeRawBufferPointer, globalScale: Float) -> (values: [UInt8], scales: [UInt8]) {
  let channels = (0..<source.count / 2).map {
    floatFromBF16(source.loadUnaligned(fromByteOffset: 2 * $0, as: UInt16.self))
  }
  var codes: [UInt8] = []
  var scales: [UInt8] = []
  for first in stride(from: 0, to: channels.count, by: 16) {
    let block = channels[first..<first + 16]
    if block.contains(where: { !$0.isFinite }) {
      scales.append(0x7f)
      codes += block.map { $0.sign == .minus ? 0xf : 7 }
      continue
    }
    let scale = e4m3FromFloat(block.map(\.magnitude).max()! / 6 * globalScale)
    scales.append(scale)
    let factor = scale == 0 ? 0 : globalScale / floatFromE4M3(scale)
    codes += block.map { e2m1FromFloat($0 * factor) }
  }
  let values = stride(from: 0, to: codes.count, by: 2).map { codes[$0] | codes[$0 + 1] << 4 }
  return (values, scales)
}

/// Of a biased exponent; NaN where there is none.
private func powerOfTwo(_ biasedExponent: Int) -> Float {
  (0..<255).contains(biasedExponent) ? Float(sign: .plus, exponent: biasedExponent - 127, significand: 1) : .nan
}

/// The least power of two that is not below `scale`, as its biased exponent; 255 where `scale` is not finite.
private func biasedExponentRoundedUp(_ scale: Float) -> UInt8 {
  if !scale.isFinite { return 255 }
  let exponent = Int(scale.exponent) + (scale.significand > 1 ? 1 : 0)
  return UInt8(127 + exponent)
}

/// One BF16 row after it has travelled as LogFMT.
package func logFMTRow(_ row: [Float]) -> [Float] {
  stride(from: 0, to: row.count, by: 128).flatMap { logFMTBlock(Array(row[$0..<$0 + 128])) }
}

private func logFMTBlock(_ block: [Float]) -> [Float] {
  let magnitudes = block.map(\.magnitude).filter { $0 != 0 }
  guard let least = magnitudes.min(), let largest = magnitudes.max() else { return block }
  if magnitudes.contains(where: { !$0.isFinite || $0 < .leastNormalMagnitude }) { return block }
  let start = logFMTLogarithm(least)
  let span = logFMTLogarithm(largest) - start
  if span > 16 << 23 { return block }
  let step = (span + 509) / 510
  let inverse = step == 0 ? 0 : 1 / Float(step)
  return block.map { channel in
    if channel == 0 { return channel }
    let steps = (Float(logFMTLogarithm(channel.magnitude) - start) * inverse).rounded(.toNearestOrEven)
    let magnitude = logFMTPower(start + Int(steps) * step)
    return channel.sign == .minus ? -magnitude : magnitude
  }
}

/// In units of 2 to the power of -23, from the exponent's zero on.
private func logFMTLogarithm(_ value: Float) -> Int {
  let one = Int(Float(1).bitPattern)
  let coefficients: [Float] = [
    0.04514904320240021, -0.41932088136672974, 1.6413991451263428, -3.568859100341797, 5.10697603225708,
    -1.8053442239761353,
  ]
  return Int(value.exponentBitPattern) << 23 + Int(polynomial(coefficients, value.significand).bitPattern) - one
}

private func logFMTPower(_ logarithm: Int) -> Float {
  let one = Int(Float(1).bitPattern)
  let (exponent, fraction) = (logarithm >> 23, logarithm & 0x7f_ffff)
  let coefficients: [Float] = [
    0.013701998628675938, -0.003063733922317624, 0.16852903366088867, 0.3103290796279907, 0.5105036497116089,
  ]
  let significand = polynomial(coefficients, 1 + Float(fraction) * 0x1p-23)
  return Float(bitPattern: UInt32(exponent << 23 + Int(significand.bitPattern) - one))
}

private func polynomial(_ coefficients: [Float], _ x: Float) -> Float {
  coefficients.dropFirst().reduce(coefficients[0]) { $0 * x + $1 }
}
