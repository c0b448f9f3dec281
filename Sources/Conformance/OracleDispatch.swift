import SwiftEP

/// What one rank receives. Padding rows have origin -1, index -1, weight 0 and zero bytes, unless they are free.
package struct ExpectedDispatch: Sendable {
  package var rowCount: Int
  /// What rows hold that no token fills, nobody says.
  package var hasFreeRows: Bool
  package var scaleOrder: ScaleOrder
  package var rows: [UInt8]
  package var scales: [UInt8]?
  package var sidecars: [[UInt8]]
  /// `[rowCount, 2]`.
  package var origins: [Int32]
  /// `[rowCount, slots]`.
  package var indices: [Int64]?
  package var weights: [Float]?
  package var tokensPerSource: [Int]
  /// `[ranks, ranks]`: from each, by row, to each.
  package var tokensPerPair: [Int]
  /// Rounded up to the alignment.
  package var tokensPerExpert: [Int]
  package var unalignedTokensPerExpert: [Int]
  /// `[local experts, ranks + 1]`, where there is a row per expert.
  package var sourceOffsets: [Int]?
  /// `[local experts, ranks]`, where sources have slots.
  package var sourceCounts: [Int]?
}

extension Oracle {
  package func dispatched(to rank: Int) -> ExpectedDispatch {
    let received = origins[rank]
    let counts = tokenCounts(at: rank)
    let expertAlignment = layout == .grouped ? 1 : expertAlignment
    var expected = ExpectedDispatch(
      rowCount: received.count, hasFreeRows: layout == .grouped || sourceCapacity > 0, scaleOrder: scaleOrder, rows: [],
      scales: nil,
      sidecars: [], origins: [], indices: nil, weights: nil,
      tokensPerSource: choices.map { tokenCount($0, to: rank) },
      tokensPerPair: choices.flatMap { choice in choices.indices.map { tokenCount(choice, to: $0) } },
      tokensPerExpert: counts.map { ($0 + expertAlignment - 1) / expertAlignment * expertAlignment },
      unalignedTokensPerExpert: counts,
      sourceOffsets: layout == .bySource || sourceCapacity > 0 ? nil : sourceOffsets(at: rank),
      sourceCounts: sourceCapacity == 0 ? nil : sourceCounts(at: rank))
    if let quantization {
      (expected.rows, expected.scales) = quantizedRows(received, format: quantization)
    } else {
      expected.rows = gather(received) { $0.x }
      if tokens[0].scales != nil { expected.scales = gather(received) { $0.scales! } }
    }
    expected.sidecars = tokens[0].sidecars.indices.map { index in gather(received) { $0.sidecars[index] } }
    for origin in received {
      expected.origins.append(Int32(origin?.source ?? -1))
      expected.origins.append(Int32(origin?.token ?? -1))
    }
    if choices[0].topK > 0 {
      expected.indices = received.flatMap { slots(of: $0).map { localExpert($0, of: rank) } }
    }
    if choices[0].weights != nil {
      expected.weights = received.flatMap { slots(of: $0).map { weight($0, at: rank) } }
    }
    return expected
  }

  private func tokenCount(_ choice: Choices, to rank: Int) -> Int {
    (0..<choice.tokenCount).count { choice.goes($0, to: rank, expertOwners) }
  }

  /// A top-k slot of some rank's token.
  private struct Slot {
    let source: Int
    let cell: Int
  }

  /// The slots that a received row carries: by source all of its token, by expert its own. Nil stands for padding.
  private func slots(of origin: Origin?) -> [Slot?] {
    let topK = choices[0].topK
    guard let origin else { return [Slot?](repeating: nil, count: layout == .bySource ? topK : 1) }
    let slots = layout == .bySource ? 0..<topK : origin.slot..<origin.slot + 1
    return slots.map { Slot(source: origin.source, cell: origin.token * topK + $0) }
  }

  private func localExpert(_ slot: Slot?, of rank: Int) -> Int64 {
    guard let slot else { return -1 }
    let expert = choices[slot.source].experts[slot.cell]
    return expert >= 0 && expertOwners[expert] == rank ? Int64(localExperts[expert]) : -1
  }

  private func weight(_ slot: Slot?, at rank: Int) -> Float {
    guard let slot, localExpert(slot, of: rank) >= 0 else { return 0 }
    return choices[slot.source].weights![slot.cell]
  }

  /// Where each source's rows begin among those of each of the rank's experts.
  private func sourceOffsets(at rank: Int) -> [Int] {
    expertOwners.indices.filter { expertOwners[$0] == rank }.flatMap { expert in
      tokens.indices.map { source in choices[..<source].reduce(0) { $0 + $1.experts.count { $0 == expert } } }
        + [choices.reduce(0) { $0 + $1.experts.count { $0 == expert } }]
    }
  }

  /// Each source's tokens of each of the rank's experts.
  private func sourceCounts(at rank: Int) -> [Int] {
    expertOwners.indices.filter { expertOwners[$0] == rank }.flatMap { expert in
      choices.map { $0.experts.count { $0 == expert } }
    }
  }

  /// Tokens of each of the rank's experts; zero without top-k routing.
  private func tokenCounts(at rank: Int) -> [Int] {
    var counts = [Int](repeating: 0, count: expertOwners.count)
    for choice in choices {
      for expert in choice.experts where expert >= 0 { counts[expert] += 1 }
    }
    return expertOwners.indices.filter { expertOwners[$0] == rank }.map { counts[$0] }
  }

  /// The rows of one array of all ranks, in the order in which they are received.
  private func gather(_ received: [Origin?], _ array: (RankTokens) -> Tensor) -> [UInt8] {
    let arrays = tokens.map(array)
    let width = arrays[0].shape.dropFirst().reduce(arrays[0].dtype.byteCount, *)
    var bytes = [UInt8](repeating: 0, count: received.count * width)
    bytes.withUnsafeMutableBytes { bytes in
      for (row, origin) in received.enumerated() {
        guard let origin else { continue }
        arrays[origin.source].withUnsafeBytes { source in
          let from = UnsafeRawBufferPointer(rebasing: source[origin.token * width..<(origin.token + 1) * width])
          UnsafeMutableRawBufferPointer(rebasing: bytes[row * width..<(row + 1) * width]).copyMemory(from: from)
        }
      }
    }
    return bytes
  }

  private func quantizedRows(_ received: [Origin?], format: ScaleFormat) -> (rows: [UInt8], scales: [UInt8]) {
    let hidden = tokens[0].x.shape[1]
    var rows: [UInt8] = []
    var scales: [UInt8] = []
    let byteCount = hidden / format.rowDType.channelsPerElement
    rows.reserveCapacity(received.count * byteCount)
    for origin in received {
      guard let origin else {
        rows += [UInt8](repeating: 0, count: byteCount)
        scales += [UInt8](repeating: 0, count: format.byteCount(hidden: hidden))
        continue
      }
      let quantized = tokens[origin.source].x.withUnsafeBytes { x in
        let row = x[2 * hidden * origin.token..<2 * hidden * (origin.token + 1)]
        return quantizedRow(UnsafeRawBufferPointer(rebasing: row), format: format, globalScale: globalScale)
      }
      rows += quantized.values
      scales += quantized.scales
    }
    return (rows, scales)
  }
}
