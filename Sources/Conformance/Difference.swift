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
  let rowCapacity = result.rows.rowCount
  if rowCapacity < rowCount { return "rows: expected \(rowCount), the tensor has \(rowCapacity)" }
  if result.handle.rowCapacity != rowCapacity {
    return "handle.rowCapacity: expected \(rowCapacity), found \(result.handle.rowCapacity)"
  }
  let comparingPaddingRows = comparingPaddingRows && !expected.hasFreeRows
  let checks: [() -> String?] = [
    { countDifference(result.rowCount, [rowCount], "rowCount") },
    { countDifference(result.tokensPerSource, expected.tokensPerSource, "tokensPerSource") },
    { countDifference(result.tokensPerPair, expected.tokensPerPair, "tokensPerPair") },
    { countDifference(result.tokensPerExpert, expected.tokensPerExpert, "tokensPerExpert") },
    {
      countDifference(result.unalignedTokensPerExpert, expected.unalignedTokensPerExpert, "unalignedTokensPerExpert")
    },
    { presenceDifference(result.sourceOffsets != nil, expected.sourceOffsets != nil, "sourceOffsets") },
    { result.sourceOffsets.flatMap { countDifference($0, expected.sourceOffsets!, "sourceOffsets") } },
    { presenceDifference(result.sourceCounts != nil, expected.sourceCounts != nil, "sourceCounts") },
    { result.sourceCounts.flatMap { countDifference($0, expected.sourceCounts!, "sourceCounts") } },
    { metadataDifference(result, expected) },
    { rowDifference(result.rows, expected.rows, expected, comparingPaddingRows, "rows") },
    { presenceDifference(result.scales != nil, expected.scales != nil, "scales") },
    {
      result.scales.flatMap {
        let scales = expected.scaleOrder == .rowMajor ? $0 : $0.columnsAsRows
        return rowDifference(scales, expected.scales!, expected, comparingPaddingRows, "scales")
      }
    },
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

extension Tensor {
  /// Of `[groups, columns, rows]` in four bytes each, or `[groups, columns, rows, 4]` in one.
  fileprivate var columnsAsRows: Tensor {
    let (groupCount, columnCount, rowCount) = (shape[0], shape[1], shape[2])
    let columns = withUnsafeBytes { Array($0.bindMemory(to: UInt32.self)) }
    var rows: [UInt32] = []
    for group in 0..<groupCount {
      for row in 0..<rowCount {
        for column in 0..<columnCount { rows.append(columns[(group * columnCount + column) * rowCount + row]) }
      }
    }
    return try! Tensor(copying: rows, shape: [groupCount, rowCount, columnCount], .int32)
  }

  /// Rows of one dimension.
  fileprivate var rowCount: Int { shape.dropLast().reduce(1, *) }
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
  let tailCount = result.rows.rowCount - expected.rowCount
  let origins = expected.origins + [Int32](repeating: -1, count: 2 * tailCount)
  // What nobody says of a row is taken as found.
  func known<Value>(_ values: [Value], _ found: [Value], width: Int) -> [Value] {
    guard expected.hasFreeRows, found.count == values.count else { return values }
    return values.indices.map { origins[2 * ($0 / width)] < 0 ? found[$0] : values[$0] }
  }
  let foundOrigins = try! result.origins.elements(Int32.self)
  let knownOrigins = known(origins, foundOrigins, width: 2)
  if let text = valueDifference(foundOrigins, knownOrigins, "origins", width: 2) { return text }

  if let text = presenceDifference(result.topKIndices != nil, expected.indices != nil, "topKIndices") { return text }
  if let tensor = result.topKIndices, let indices = expected.indices {
    let found =
      tensor.dtype == .int32 ? try! tensor.elements(Int32.self).map { Int64($0) } : try! tensor.elements(Int64.self)
    let width = tensor.shape.last!
    let tail = [Int64](repeating: -1, count: tailCount * width)
    let indices = known(indices + tail, found, width: width)
    if let text = valueDifference(found, indices, "topKIndices", width: width) { return text }
  }

  if let text = presenceDifference(result.topKWeights != nil, expected.weights != nil, "topKWeights") { return text }
  if let tensor = result.topKWeights, let weights = expected.weights {
    let width = tensor.shape.last!
    let tail = [Float](repeating: 0, count: tailCount * width)
    let found = try! tensor.elements(UInt32.self)
    let bits = known((weights + tail).map(\.bitPattern), found, width: width)
    if let text = valueDifference(found, bits, "topKWeights", width: width) { return text }
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
  let width = tensor.byteCount / max(1, tensor.rowCount)
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
