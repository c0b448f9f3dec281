import EPKernels

/// A call's argument that cannot be used, as three integers: they travel to all ranks in the exchange, so that every
/// rank throws the same error.
package struct ArgumentFault: Error, Equatable {
  package enum Kind: Int64 {
    /// Numbers of dimensions.
    case dimensionCount = 1
    /// The size of one dimension.
    case dimension
    /// `expected` is a set of dtypes, one bit each.
    case dtype
    /// Bytes of a row: `expected` is what they must be a multiple of.
    case rowByteCount
    /// 1: to be given, 0: not to be given.
    case presence
    case atLeast
    case atMost
    /// A handle that another buffer made.
    case foreign
    /// Memory that lies apart from the rows' is expected.
    case overlap
    /// `RowLayout.code`.
    case layout
    /// Memory that kernels do not reach.
    case memory
    /// Of scales that lie in rows only.
    case order
    /// Of a dispatch, or a call, that is still to be received.
    case unreceived
    /// More rows than kernels count.
    case rowCount
    /// Rows outside the arena, which would be combined in steps.
    case steps
    /// What cannot be where ranks can be masked: rows by expert; a handle made before some have returned.
    case masks
    /// `found` are a Float's bits. 1: one that NVFP4 can have, 0: of no effect.
    case globalScale
    /// The distance of two elements of one dimension, in elements.
    case stride
  }

  package enum Name: Int64 {
    case x = 1, scales, sidecars, indices, weights, table, handle, layout, expertAlignment, workers
    case rows, topKWeights, rowWeights, biases, output
    case stream, handleTokens, expertStatistics, waitStatistics, scaleOrder, after, globalScale
    case sizing, quantization, waiting, rowsMax, encoding
  }

  package let kind: Kind
  package let name: Name
  package let dimension: Int
  package let expected: Int64
  package let found: Int64

  package init(_ kind: Kind, _ name: Name, dimension: Int = 0, expected: Int, found: Int) {
    self.kind = kind
    self.name = name
    self.dimension = dimension
    self.expected = Int64(expected)
    self.found = Int64(found)
  }

  var details: (Int64, Int64, Int64) {
    (kind.rawValue | name.rawValue << 8 | Int64(dimension) << 16, expected, found)
  }

  init?(_ details: (Int64, Int64, Int64)) {
    guard let kind = Kind(rawValue: details.0 & 0xff), let name = Name(rawValue: details.0 >> 8 & 0xff) else {
      return nil
    }
    self.init(
      kind, name, dimension: Int(details.0 >> 16), expected: Int(details.1), found: Int(details.2))
  }

  func error(rank: Int) -> EPError {
    var argument = "\(name)"
    let texts: (expected: String, found: String)
    switch kind {
    case .dimensionCount: texts = ("\(expected) dimensions", "\(found)")
    case .dimension:
      argument += ".shape[\(dimension)]"
      texts = ("\(expected)", "\(found)")
    case .dtype:
      let allowed = DType.allCases.filter { expected >> $0.rawValue & 1 == 1 }
      texts = (
        allowed.map { "\($0)" }.joined(separator: " or "), DType(rawValue: Int(found)).map { "\($0)" } ?? "another"
      )
    case .rowByteCount: texts = ("rows of a positive multiple of \(expected) bytes, at most 2^30", "\(found) bytes")
    case .stride:
      argument += ".strides[\(dimension)]"
      texts = ("\(expected) elements, since rows lie without gaps", "\(found)")
    case .presence where name == .stream: texts = ("none on a machine without streams", "one")
    case .presence where name == .rowsMax:
      texts = ("none but for new routing of worst-case size, not grouped and without masks", "one")
    case .presence: texts = expected == 1 ? ("a tensor", "none") : ("none", "a tensor")
    case .atLeast: texts = ("at least \(expected)", "\(found)")
    case .atMost: texts = ("at most \(expected)", "\(found)")
    case .foreign: texts = ("a handle of this buffer", "one of another buffer")
    case .overlap: texts = ("memory apart from that of the rows", "memory that overlaps it")
    case .memory:
      texts = ("memory that the buffer's machine reaches, on a GPU at a multiple of 16 bytes", "other memory")
    case .unreceived: texts = ("one of a call that has been received", "one that is still to be received")
    case .rowCount: texts = ("one of at most \(expected) rows", "one of \(found)")
    case .steps: texts = ("rows in the arena, where others are combined in steps", "others")
    case .masks where name == .handle:
      texts = ("one of a dispatch since masked ranks have returned", "one of an earlier dispatch")
    case .masks: texts = ("bySource or grouped where ranks can be masked", "byExpert")
    case .globalScale:
      texts = (
        expected == 1 ? "2^-118 to 2^118" : "1 but for rows that become NVFP4",
        "\(Float(bitPattern: UInt32(truncatingIfNeeded: found)))"
      )
    case .order: texts = ("rowMajor but for grouped rows that are quantized on the way", "columnMajor")
    case .layout:
      let name = { (code: Int64) in RowLayout(code: code).map { "\($0)" } ?? "\(code)" }
      texts = (name(expected), name(found))
    }
    return .invalidArgument(rank: rank, argument: argument, expected: texts.expected, found: texts.found)
  }
}

extension [DType] {
  /// One bit a dtype.
  package var mask: Int { reduce(0) { $0 | 1 << $1.rawValue } }
}

// MARK: - Checks

extension Tensor {
  func check(_ name: ArgumentFault.Name, dimensionCount: Int) throws(ArgumentFault) {
    if shape.count != dimensionCount {
      throw ArgumentFault(.dimensionCount, name, expected: dimensionCount, found: shape.count)
    }
  }

  func check(_ name: ArgumentFault.Name, dtype allowed: [DType]) throws(ArgumentFault) {
    if !allowed.contains(dtype) {
      throw ArgumentFault(.dtype, name, expected: allowed.mask, found: dtype.rawValue)
    }
  }

  /// A nil size may be anything.
  func check(_ name: ArgumentFault.Name, shape expected: [Int?]) throws(ArgumentFault) {
    try check(name, dimensionCount: expected.count)
    for (dimension, size) in expected.enumerated() where size != nil && size != shape[dimension] {
      throw ArgumentFault(.dimension, name, dimension: dimension, expected: size!, found: shape[dimension])
    }
  }

  /// Bytes of one row, and what they mean: different for tensors whose rows must not be mixed.
  var rowCode: Int64 { Int64(rowByteCount) | Int64(dtype.rawValue + 1) << 32 }

  func overlaps(_ other: Tensor) -> Bool {
    address.bits < other.address.bits + UInt64(other.byteCount) && other.address.bits < address.bits + UInt64(byteCount)
  }

  /// Bytes of one element of the first dimension.
  var rowByteCount: Int { shape.dropFirst().reduce(dtype.byteCount, *) }

  func check(_ name: ArgumentFault.Name, rowByteCountMultipleOf multiple: Int) throws(ArgumentFault) {
    try check(name, rowByteCount: rowByteCount, multipleOf: multiple)
  }

  func check(_ name: ArgumentFault.Name, rowByteCount: Int, multipleOf multiple: Int) throws(ArgumentFault) {
    if rowByteCount == 0 || rowByteCount % multiple != 0 || rowByteCount > 1 << 30 {
      throw ArgumentFault(.rowByteCount, name, expected: multiple, found: rowByteCount)
    }
  }
}

func check(_ name: ArgumentFault.Name, _ value: Int, in range: ClosedRange<Int>) throws(ArgumentFault) {
  if value < range.lowerBound { throw ArgumentFault(.atLeast, name, expected: range.lowerBound, found: value) }
  if value > range.upperBound { throw ArgumentFault(.atMost, name, expected: range.upperBound, found: value) }
}
