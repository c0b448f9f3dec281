import SwiftEP

/// Stands for experts whose output is BF16 while their input is not: FP8 rows times their scales, bytes as numbers.
///
/// - Parameter rows: BF16 `[rows, hidden]`, written.
func writeExpertRows(of dispatched: DispatchResult, to rows: Tensor) {
  let table = (0...255).map { dispatched.scales == nil ? Float($0) / 128 - 1 : e4m3Value(UInt8($0)) }
  let hidden = rows.shape.last!
  let rowCount = rows.elementCount / hidden
  let scales = try! dispatched.scales?.elements(Float.self)
  let scalesPerRow = dispatched.scales?.shape.last ?? 0
  dispatched.rows.withUnsafeBytes { source in
    rows.withUnsafeMutableBytes { bytes in
      let target = bytes.bindMemory(to: UInt16.self)
      for row in 0..<rowCount {
        for channel in 0..<hidden {
          let cell = row * hidden + channel
          let scale = scales.map { $0[row * scalesPerRow + channel / 128] } ?? 1
          target[cell] = bf16Bits(table[Int(source[cell])] * scale)
        }
      }
    }
  }
}

/// OCP E4M3.
func e4m3Value(_ bits: UInt8) -> Float {
  if bits & 0x7f == 0x7f { return .nan }
  let (exponent, mantissa) = (Int(bits >> 3 & 15), Float(bits & 7))
  let magnitude =
    exponent == 0 ? mantissa * 0x1p-9 : Float(sign: .plus, exponent: exponent - 10, significand: 8 + mantissa)
  return bits & 0x80 == 0 ? magnitude : -magnitude
}

/// A finite value rounded to nearest, ties to even.
func bf16Bits(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  return UInt16(truncatingIfNeeded: (bits &+ 0x7fff &+ (bits >> 16 & 1)) >> 16)
}
