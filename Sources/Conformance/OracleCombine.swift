import SwiftEP

extension Oracle {
  /// `rows[r]` is the `[rows, hidden]` tensor that rank `r` gives to combine. Returns the sums for the tokens of
  /// `rank`, as bytes: in Float, from zero, in the order of ranks (by expert: of top-k slots), each row as it is after it has
  /// travelled, times its weight where there are weights, but for those of weight 0, then the biases, rounded once.
  package func combined(
    at rank: Int, rows: [Tensor], encoding: RowEncoding = .none, rowWeights: Tensor?, biases: [Tensor]
  ) -> [UInt8] {
    let (dtype, hidden) = (rows[rank].dtype, rows[rank].shape[1])
    let tokenCount = choices[rank].tokenCount
    let slotCount = layout == .bySource ? tokens.count : choices[rank].topK
    let weights = try! rowWeights?.elements(Float.self)
    var sums = [Float](repeating: 0, count: hidden)
    var bytes = [UInt8](repeating: 0, count: tokenCount * hidden * dtype.byteCount)
    for token in 0..<tokenCount {
      for channel in 0..<hidden { sums[channel] = 0 }
      for slot in 0..<slotCount {
        let cell = token * slotCount + slot
        guard let destination = destinations[rank][cell], weights?[cell] != 0 else { continue }
        let source = rows[destination.rank]
        add(row: destination.row, of: source, encoding: encoding, times: weights?[cell], to: &sums)
      }
      for bias in biases { add(row: token, of: bias, times: nil, to: &sums) }
      store(sums, dtype, row: token, of: &bytes)
    }
    return bytes
  }

  /// `topKWeights[r]` is what rank `r` gives to combine. By source, weights are summed over ranks in their order; by
  /// expert, each slot's comes from its one row, as it is.
  package func combinedWeights(at rank: Int, topKWeights: [Tensor]) -> [Float] {
    let (tokenCount, topK) = (choices[rank].tokenCount, choices[rank].topK)
    let given = topKWeights.map { try! $0.elements(Float.self) }
    var weights = [Float](repeating: 0, count: tokenCount * topK)
    for token in 0..<tokenCount {
      for slot in 0..<topK {
        let cell = token * topK + slot
        if layout.hasRowPerExpert {
          if let destination = destinations[rank][cell] { weights[cell] = given[destination.rank][destination.row] }
          continue
        }
        for source in tokens.indices {
          guard let destination = destinations[rank][token * tokens.count + source] else { continue }
          weights[cell] += given[destination.rank][destination.row * topK + slot]
        }
        weights[cell] = Float(bitPattern: canonicalFP32(weights[cell]))
      }
    }
    return weights
  }

  private func add(
    row: Int, of tensor: Tensor, encoding: RowEncoding = .none, times weight: Float?, to sums: inout [Float]
  ) {
    let hidden = tensor.shape[1]
    let first = row * hidden
    tensor.withUnsafeBytes { bytes in
      let sent = encoding == .logFMT ? logFMTRow((first..<first + hidden).map { element($0, of: bytes, .bf16) }) : nil
      for channel in 0..<hidden {
        var value = sent?[channel] ?? element(first + channel, of: bytes, tensor.dtype)
        if let weight { value *= weight }
        sums[channel] += value
      }
    }
  }

  private func element(_ index: Int, of bytes: UnsafeRawBufferPointer, _ dtype: DType) -> Float {
    switch dtype {
    case .bf16: floatFromBF16(bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self))
    case .fp16: floatFromFP16(bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self))
    case .fp32: bytes.loadUnaligned(fromByteOffset: 4 * index, as: Float.self)
    default: preconditionFailure("combine does not sum \(dtype)")
    }
  }

  private func store(_ sums: [Float], _ dtype: DType, row: Int, of bytes: inout [UInt8]) {
    let first = row * sums.count
    bytes.withUnsafeMutableBytes { bytes in
      for (channel, sum) in sums.enumerated() {
        let index = first + channel
        switch dtype {
        case .bf16: bytes.storeBytes(of: bf16FromFloat(sum), toByteOffset: 2 * index, as: UInt16.self)
        case .fp16: bytes.storeBytes(of: fp16FromFloat(sum), toByteOffset: 2 * index, as: UInt16.self)
        default: bytes.storeBytes(of: canonicalFP32(sum), toByteOffset: 4 * index, as: UInt32.self)
        }
      }
    }
  }
}
