import Conformance
import SwiftEP

/// Stands for experts whose output is BF16 while their input is not: FP8 or NVFP4 rows times their scales, bytes as numbers.
///
/// - Parameter rows: BF16 `[rows, hidden]`, written.
func writeExpertRows(of dispatched: DispatchResult, to rows: Tensor) {
  let dtype = dispatched.rows.dtype
  let table = (0...UInt8.max).map { code in
    switch dtype {
    case .fp4E2M1x2: floatFromE2M1(code & 15)
    case .fp8E4M3: floatFromE4M3(code)
    default: Float(code) / 128 - 1
    }
  }
  let (channelsPerElement, channelsPerScale) = (dtype.channelsPerElement, dtype == .fp4E2M1x2 ? 16 : 128)
  let hidden = rows.shape.last!
  let rowCount = rows.elementCount / hidden
  let scales = dispatched.scales?.floats
  let scalesPerRow = dispatched.scales?.shape.last ?? 0
  dispatched.rows.withUnsafeBytes { source in
    rows.withUnsafeMutableBytes { bytes in
      let target = bytes.bindMemory(to: UInt16.self)
      for row in 0..<rowCount {
        for channel in 0..<hidden {
          let cell = row * hidden + channel
          let code = source[cell / channelsPerElement] >> UInt8(cell % channelsPerElement * 4)
          let scale = scales.map { $0[row * scalesPerRow + channel / channelsPerScale] } ?? 1
          target[cell] = bf16Bits(table[Int(code)] * scale)
        }
      }
    }
  }
}

extension Tensor {
  /// Of scales, Floats or E4M3.
  fileprivate var floats: [Float] {
    dtype == .fp8E4M3 ? try! elements(UInt8.self).map(floatFromE4M3) : try! elements(Float.self)
  }
}

/// A finite value rounded to nearest, ties to even.
func bf16Bits(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  return UInt16(truncatingIfNeeded: (bits &+ 0x7fff &+ (bits >> 16 & 1)) >> 16)
}
