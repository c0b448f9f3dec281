import Glibc
import SwiftEP

// The bytes of a job: all follow from its seed.

extension Job {
  /// Streams of random numbers.
  private enum Stream: Int {
    case x = 1, scales, sidecars, routing, weights, expertRows, rowWeights, topKWeights, biases
  }

  /// The same calls with other tokens, other routing and other weights.
  package func reseeded(_ step: Int) -> Job {
    var job = self
    job.seed = seed &+ 1_000_003 &* UInt64(step)
    return job
  }

  /// A rank's input to the first dispatch.
  package func makeTokens(rank: Int) -> RankTokens { makeTokens(rank: rank, step: 0) }

  /// A rank's input to dispatch `step`: routed as the first, with rows, scales and sidecars of its own.
  package func makeTokens(rank: Int, step: Int) -> RankTokens {
    let tokenCount = tokensPerRank[rank]
    let x = makeRows([tokenCount, hidden], dtype, .x, rank, step)
    let scaleTensor = scales.map { format in
      makeRows(
        [tokenCount, format.byteCount(hidden: hidden) / 4], format.dtype, .scales, rank, step)
    }
    let sidecars = sidecarByteCounts.enumerated().map { index, byteCount in
      makeRows([tokenCount, byteCount], .uint8, .sidecars, rank, step * 3 + index)
    }
    var tokens = RankTokens(x: x, scales: scaleTensor, sidecars: sidecars, routing: makeRouting(rank: rank))
    if givenScaleOrder == .columnMajor { tokens.scaleColumns = scaleTensor.map(columns(of:)) }
    return tokens
  }

  /// A tensor of elements of 4 bytes, transposed, with what nobody may read behind each column.
  private func columns(of rows: Tensor) -> Tensor {
    let (rowCount, width) = (rows.shape[0], rows.shape[1])
    let stride = rowCount + Int(seed % 4)
    var columns = [UInt32](repeating: 0xffff_ffff, count: width * stride)
    for (cell, word) in try! rows.elements(UInt32.self).enumerated() {
      columns[cell % width * stride + cell / width] = word
    }
    return try! Tensor(copying: columns, shape: [width, stride], rows.dtype)
  }

  /// The rows that a rank's experts return, in combine `step`.
  package func makeExpertRows(rank: Int, rowCount: Int, step: Int) -> Tensor {
    makeRows([rowCount, combineHidden ?? hidden], combineDType, .expertRows, rank, step)
  }

  package func makeBiases(rank: Int, step: Int) -> [Tensor] {
    (0..<biasCount).map { index in
      makeRows([tokensPerRank[rank], combineHidden ?? hidden], combineDType, .biases, rank, 2 * step + index)
    }
  }

  package func makeRowWeights(rank: Int, step: Int) -> Tensor? {
    usesRowWeights ? makeWeights(rowCount: tokensPerRank[rank], width: topK, .rowWeights, rank, step) : nil
  }

  /// Top-k weights to be brought back.
  package func makeTopKWeights(rank: Int, rowCount: Int, step: Int) -> Tensor? {
    if !combinesTopKWeights { return nil }
    return makeWeights(rowCount: rowCount, width: layout == .bySource ? topK : 1, .topKWeights, rank, step)
  }

  // MARK: Routing

  private func makeRouting(rank: Int) -> Routing {
    let tokenCount = tokensPerRank[rank]
    var random = SplitMix64(seed: seed, Stream.routing.rawValue, rank)
    if usesTable {
      let cells = (0..<tokenCount * rankCount).map { _ in random.chance(0.4) ? UInt8(random.pick(1...255)) : 0 }
      return .table(try! Tensor(copying: cells, shape: [tokenCount, rankCount], .uint8))
    }
    let popularity = makePopularity()
    var cells: [Int64] = []
    for _ in 0..<tokenCount {
      for expert in chooseExperts(popularity, &random) {
        cells.append(random.chance(missingProbability) ? -1 : Int64(expert))
      }
    }
    let shape = [tokenCount, topK]
    let indices =
      indexDType == .int64
      ? try! Tensor(copying: cells, shape: shape, .int64)
      : try! Tensor(copying: cells.map { Int32($0) }, shape: shape, .int32)
    let weights = isWeighted ? makeWeights(rowCount: tokenCount, width: topK, .weights, rank, 0) : nil
    return .topK(indices: indices, weights: weights)
  }

  /// How much each expert is wanted: Zipf's law over a random order of experts, the same on all ranks.
  private func makePopularity() -> [Double] {
    var random = SplitMix64(seed: seed, Stream.routing.rawValue, -1)
    let places = Array(0..<expertCount).shuffled(using: &random)
    return places.map { 1 / pow(Double($0 + 1), skew) }
  }

  /// `topK` different experts: the first arrivals of as many exponential processes (Efraimidis and Spirakis).
  private func chooseExperts(_ popularity: [Double], _ random: inout SplitMix64) -> ArraySlice<Int> {
    let arrivals = popularity.map { -log(1 - random.fraction()) / $0 }
    return popularity.indices.sorted { arrivals[$0] < arrivals[$1] }.prefix(topK)
  }

  private func makeWeights(rowCount: Int, width: Int, _ stream: Stream, _ rank: Int, _ step: Int) -> Tensor {
    var random = SplitMix64(seed: seed, stream.rawValue, rank, step)
    // Zeros, too, of either sign: a combine does not read their rows.
    let weights = (0..<rowCount * width).map { _ in
      random.chance(0.1) ? random.pick([0, -0.0]) : Float(random.fraction()) - 0.25
    }
    return try! Tensor(copying: weights, shape: [rowCount, width], .fp32)
  }

  // MARK: Rows

  /// Rows of moderate values of either sign, all bits of their significands used. Some rows have a few values of the
  /// odd kind.
  private func makeRows(_ shape: [Int], _ dtype: DType, _ stream: Stream, _ rank: Int, _ step: Int) -> Tensor {
    let tensor = try! Tensor(zeros: shape, dtype)
    let width = shape[1] * dtype.byteCount
    tensor.withUnsafeMutableBytes { bytes in
      for row in 0..<shape[0] {
        var random = SplitMix64(seed: seed, stream.rawValue, rank, step, row)
        let rowBytes = UnsafeMutableRawBufferPointer(rebasing: bytes[row * width..<(row + 1) * width])
        dtype.fillModestly(rowBytes, &random)
        if random.next() % 8 == 0 { dtype.plantOddities(rowBytes, &random) }
      }
    }
    return tensor
  }
}

extension DType {
  /// Which bits of eight bytes are random, and which are set: of floats, sign and significand are random and the
  /// exponent varies over three bits below one.
  private var randomBits: (random: UInt64, set: UInt64) {
    switch self {
    case .bf16: (0x83ff_83ff_83ff_83ff, 0x3c00_3c00_3c00_3c00)
    case .fp16: (0x9fff_9fff_9fff_9fff, 0x2000_2000_2000_2000)
    case .fp32: (0x83ff_ffff_83ff_ffff, 0x3c00_0000_3c00_0000)
    default: (.max, 0)
    }
  }

  fileprivate func fillModestly(_ bytes: UnsafeMutableRawBufferPointer, _ random: inout SplitMix64) {
    let (mask, set) = randomBits
    var offset = 0
    while offset + 8 <= bytes.count {
      bytes.storeBytes(of: random.next() & mask | set, toByteOffset: offset, as: UInt64.self)
      offset += 8
    }
    if offset < bytes.count {
      bytes.storeBytes(
        of: UInt32(truncatingIfNeeded: random.next() & mask | set), toByteOffset: offset, as: UInt32.self)
    }
  }

  /// Zeros, subnormals, the largest values, infinities, NaNs.
  fileprivate func plantOddities(_ bytes: UnsafeMutableRawBufferPointer, _ random: inout SplitMix64) {
    for _ in 0..<3 {
      let offset = Int(random.next() % UInt64(bytes.count / byteCount)) * byteCount
      switch self {
      case .bf16:
        let oddities: [UInt16] = [0x8000, 0x0001, 0x807f, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc0, 0xff81, 0x3f80]
        bytes.storeBytes(of: random.pick(oddities), toByteOffset: offset, as: UInt16.self)
      case .fp16:
        let oddities: [UInt16] = [0x8000, 0x0001, 0x83ff, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0xfc01, 0x3c00]
        bytes.storeBytes(of: random.pick(oddities), toByteOffset: offset, as: UInt16.self)
      case .fp32:
        let oddities: [UInt32] = [
          0x8000_0000, 1, 0x807f_ffff, 0x7f7f_ffff, 0xff7f_ffff, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0xff80_0001,
        ]
        bytes.storeBytes(of: random.pick(oddities), toByteOffset: offset, as: UInt32.self)
      default: break
      }
    }
  }
}
