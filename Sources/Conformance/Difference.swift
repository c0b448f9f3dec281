import Glibc
import SwiftEP

/// Nil when `result` is what `expected` says, otherwise a sentence that names the first difference.
///
/// A result may have more rows than arrived (worst-case sizing): their origins and indices must be -1, their weights 0,
/// their bytes may be anything.
///
/// - Parameter comparingPaddingRows: whether the bytes of padding rows between groups of experts must be zero.
package func difference(
  _ result: DispatchResult, from expected: ExpectedDispatch, comparingPaddingRows: Bool
) -> String? {
  let rowCount = expected.rowCount
  let rowCapacity = result.rows.shape[0]
  if rowCapacity < rowCount { return "rows: expected \(rowCount), the tensor has \(rowCapacity)" }
  if result.handle.rowCapacity != rowCapacity {
    return "handle.rowCapacity: expected \(rowCapacity), found \(result.handle.rowCapacity)"
  }
  let checks: [() -> String?] = [
    { countDifference(result.rowCount, [rowCount], "rowCount") },
    { countDifference(result.tokensPerSource, expected.tokensPerSource, "tokensPerSource") },
    { countDifference(result.tokensPerExpert, expected.tokensPerExpert, "tokensPerExpert") },
    {
      countDifference(result.unalignedTokensPerExpert, expected.unalignedTokensPerExpert, "unalignedTokensPerExpert")
    },
    { metadataDifference(result, expected) },
    { rowDifference(result.rows, expected.rows, expected, comparingPaddingRows, "rows") },
    { presenceDifference(result.scales != nil, expected.scales != nil, "scales") },
    { result.scales.flatMap { rowDifference($0, expected.scales!, expected, comparingPaddingRows, "scales") } },
    {
      result.sidecars.count == expected.sidecars.count
        ? nil : "sidecars: expected \(expected.sidecars.count), found \(result.sidecars.count)"
    },
  ]
  for check in checks {
    if let difference = check() { return difference }
  }
  for (index, sidecar) in result.sidecars.enumerated() {
    let name = "sidecars[\(index)]"
    if let difference = rowDifference(sidecar, expected.sidecars[index], expected, comparingPaddingRows, name) {
      return difference
    }
  }
  return nil
}

/// Nil when the tensor holds exactly `bytes`, otherwise a sentence that names the first difference.
package func difference(_ tensor: Tensor, from bytes: [UInt8], named name: String) -> String? {
  if tensor.byteCount != bytes.count {
    return "\(name): expected \(bytes.count) bytes, found \(tensor.byteCount) (shape \(tensor.shape))"
  }
  return tensor.withUnsafeBytes { found in
    bytes.withUnsafeBytes { expected in
      let width = tensor.shape.dropFirst().reduce(tensor.dtype.byteCount, *)
      for row in 0..<(tensor.shape.first ?? 0) {
        let range = row * width..<(row + 1) * width
        if let difference = byteDifference(found, expected, range, tensor.dtype) {
          return "\(name): row \(row), \(difference)"
        }
      }
      return nil
    }
  }
}

private func presenceDifference(_ found: Bool, _ expected: Bool, _ name: String) -> String? {
  if found == expected { return nil }
  return "\(name): expected \(expected ? "a tensor" : "none"), found \(found ? "a tensor" : "none")"
}

private func countDifference(_ tensor: Tensor, _ expected: [Int], _ name: String) -> String? {
  let found = try! tensor.elements(Int32.self).map { Int($0) }
  return found == expected ? nil : "\(name): expected \(expected), found \(found)"
}

/// Origins, indices and weights, those of the tail included.
private func metadataDifference(_ result: DispatchResult, _ expected: ExpectedDispatch) -> String? {
  let tailCount = result.rows.shape[0] - expected.rowCount
  let origins = expected.origins + [Int32](repeating: -1, count: 2 * tailCount)
  if let text = valueDifference(try! result.origins.elements(Int32.self), origins, "origins", width: 2) { return text }

  if let text = presenceDifference(result.topKIndices != nil, expected.indices != nil, "topKIndices") { return text }
  if let tensor = result.topKIndices, let indices = expected.indices {
    let found =
      tensor.dtype == .int32 ? try! tensor.elements(Int32.self).map { Int64($0) } : try! tensor.elements(Int64.self)
    let tail = [Int64](repeating: -1, count: tailCount * tensor.shape[1])
    if let text = valueDifference(found, indices + tail, "topKIndices", width: tensor.shape[1]) { return text }
  }

  if let text = presenceDifference(result.topKWeights != nil, expected.weights != nil, "topKWeights") { return text }
  if let tensor = result.topKWeights, let weights = expected.weights {
    let tail = [Float](repeating: 0, count: tailCount * tensor.shape[1])
    let bits = (weights + tail).map(\.bitPattern)
    if let text = valueDifference(try! tensor.elements(UInt32.self), bits, "topKWeights", width: tensor.shape[1]) {
      return text
    }
  }
  return nil
}

private func valueDifference<Value: Equatable>(
  _ found: [Value], _ expected: [Value], _ name: String, width: Int
) -> String? {
  if found.count != expected.count { return "\(name): expected \(expected.count) elements, found \(found.count)" }
  if found == expected { return nil }
  let index = found.indices.first { found[$0] != expected[$0] }!
  return "\(name): row \(index / width), column \(index % width): expected \(expected[index]), found \(found[index])"
}

/// The bytes of the rows that arrived.
private func rowDifference(
  _ tensor: Tensor, _ expected: [UInt8], _ dispatch: ExpectedDispatch, _ comparesPadding: Bool, _ name: String
) -> String? {
  let width = tensor.shape.dropFirst().reduce(tensor.dtype.byteCount, *)
  if expected.count != dispatch.rowCount * width {
    return "\(name): expected rows of \(expected.count / max(1, dispatch.rowCount)) bytes, found \(width)"
  }
  return tensor.withUnsafeBytes { found in
    expected.withUnsafeBytes { expected in
      for row in 0..<dispatch.rowCount where comparesPadding || dispatch.origins[2 * row] >= 0 {
        let range = row * width..<(row + 1) * width
        if let difference = byteDifference(found, expected, range, tensor.dtype) {
          let (source, token) = (dispatch.origins[2 * row], dispatch.origins[2 * row + 1])
          return "\(name): row \(row) (token \(token) of rank \(source)), \(difference)"
        }
      }
      return nil
    }
  }
}

/// The first element of `range` that differs, as patterns.
private func byteDifference(
  _ found: UnsafeRawBufferPointer, _ expected: UnsafeRawBufferPointer, _ range: Range<Int>, _ dtype: DType
) -> String? {
  if range.isEmpty
    || memcmp(found.baseAddress! + range.lowerBound, expected.baseAddress! + range.lowerBound, range.count) == 0
  {
    return nil
  }
  let byte = range.first { found[$0] != expected[$0] }!
  let channel = (byte - range.lowerBound) / dtype.byteCount
  let first = range.lowerBound + channel * dtype.byteCount
  func pattern(_ bytes: UnsafeRawBufferPointer) -> String {
    "0x" + bytes[first..<first + dtype.byteCount].reversed().map { hexadecimal($0) }.joined()
  }
  return "channel \(channel): expected \(pattern(expected)), found \(pattern(found))"
}

private func hexadecimal(_ byte: UInt8) -> String {
  let digits = String(byte, radix: 16)
  return digits.count == 1 ? "0" + digits : digits
}
