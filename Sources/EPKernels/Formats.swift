/// What one row's bytes mean.
@frozen public enum RowFormat: Int32, Sendable {
  case bf16 = 1
  case fp16 = 2
  case fp32 = 3
  /// OCP E4M3 without infinities (the largest finite value is 448).
  case fp8E4M3 = 4
  /// Opaque: moved, never looked at.
  case bytes = 5
  /// `LogFMT`.
  case logFMT = 6
}

/// What happens to a row between the sender's tensor and the receiver's.
@frozen public enum RowTransform: Int32, Sendable {
  case copy = 0
  /// BF16 to FP8 E4M3, one Float scale per 128 channels.
  case quantizeFloatScales = 1
  /// BF16 to FP8 E4M3, one power-of-two scale per 128 channels, stored as its 8-bit exponent (UE8M0), four to an Int32.
  case quantizeUE8M0Scales = 2
  /// The same scales as `quantizeUE8M0Scales`, as Floats; a NaN where its exponent would be 255.
  case quantizePowerOfTwoScales = 3
  /// BF16 to NVFP4: E2M1, two to a byte, with one E4M3 scale per 16 channels, and one Float for the whole tensor.
  case quantizeNVFP4 = 4

  @inlinable public var hasPowerOfTwoScales: Bool {
    self == .quantizeUE8M0Scales || self == .quantizePowerOfTwoScales
  }

  /// Bytes of a sent row that become one byte of a received one: 2 to the power of this.
  @inlinable public var narrowing: Int32 { self == .copy ? 0 : self == .quantizeNVFP4 ? 2 : 1 }

  /// Channels whose scales are stored at a time: those of one, or of NVFP4's four.
  @inlinable public var scaleStep: Int32 { self == .quantizeNVFP4 ? nvfp4Step : channelsPerScale }
}

/// How received rows are ordered.
@frozen public enum RowLayout: Int32, Sendable {
  /// One row a token, by source rank, then token.
  case bySource = 0
  /// One row a token and expert, grouped by local expert, then by source rank, then token.
  case byExpert = 1
}

/// Channels that share one FP8 scale.
@inlinable public var channelsPerScale: Int32 { 128 }

/// Channels whose NVFP4 scales, one for 16, are four bytes.
@inlinable public var nvfp4Step: Int32 { 64 }

/// Where rows that were received lie beside their metadata: the columns of a received block, in the order in which they
/// lie there.
///
/// Every column is an array with one fixed-width element a row.
@frozen public struct Columns: Equatable, Sendable {
  public static let count: Int32 = 8
  public static let rows: Int32 = 0
  public static let scales: Int32 = 1
  /// Of a combine of coded rows, in the place of scales.
  public static let records: Int32 = 1
  /// The first of three columns for a caller's own sidecar arrays.
  public static let sidecars: Int32 = 2
  public static let sidecarCountMax: Int32 = 3
  /// Source rank and source token, two Int32 a row; -1 where no token lies.
  public static let origins: Int32 = 5
  /// Local experts, -1 for none of this rank's.
  public static let indices: Int32 = 6
  public static let weights: Int32 = 7

  /// Bytes a row in each column; 0 for a column that is absent.
  public var widths: (Int32, Int32, Int32, Int32, Int32, Int32, Int32, Int32)

  @inlinable public init() { widths = (0, 0, 0, 0, 0, 0, 0, 0) }

  @inlinable public subscript(column: Int32) -> Int32 {
    get {
      switch column {
      case 0: widths.0
      case 1: widths.1
      case 2: widths.2
      case 3: widths.3
      case 4: widths.4
      case 5: widths.5
      case 6: widths.6
      default: widths.7
      }
    }
    set {
      switch column {
      case 0: widths.0 = newValue
      case 1: widths.1 = newValue
      case 2: widths.2 = newValue
      case 3: widths.3 = newValue
      case 4: widths.4 = newValue
      case 5: widths.5 = newValue
      case 6: widths.6 = newValue
      default: widths.7 = newValue
      }
    }
  }

  /// Bytes from the block's first byte to the first byte of `column`, for a block of `rowCapacity` rows.
  /// With `column` equal to `Columns.count`: the bytes of the whole block.
  @inlinable public func offset(of column: Int32, rowCapacity: Int64) -> Int64 {
    // Written out, without branches: a loop would look up every width.
    let size = { (index: Int32, width: Int32) -> Int64 in
      index < column ? alignUp(Int64(width) &* rowCapacity, to: 128) : 0
    }
    let first = size(0, widths.0) &+ size(1, widths.1) &+ size(2, widths.2) &+ size(3, widths.3)
    return first &+ size(4, widths.4) &+ size(5, widths.5) &+ size(6, widths.6) &+ size(7, widths.7)
  }

  /// One row's bytes in all columns.
  @inlinable public var byteCountPerRow: Int64 {
    var byteCount: Int64 = 0
    var column: Int32 = 0
    while column < Columns.count {
      byteCount = byteCount &+ Int64(self[column])
      column = column &+ 1
    }
    return byteCount
  }

  @inlinable public func byteCount(rowCapacity: Int64) -> Int64 {
    offset(of: Columns.count, rowCapacity: rowCapacity)
  }

  @inlinable public static func == (left: Columns, right: Columns) -> Bool {
    var column: Int32 = 0
    while column < Columns.count {
      if left[column] != right[column] { return false }
      column = column &+ 1
    }
    return true
  }
}

/// `value` rounded up to a multiple of `alignment`, a power of two.
@inlinable public func alignUp(_ value: Int64, to alignment: Int64) -> Int64 {
  (value &+ alignment &- 1) & (0 &- alignment)
}

extension Int32 {
  /// Divided, where neither is negative: a GPU takes a third fewer instructions for that.
  @inlinable @inline(__always) func over(_ divisor: Int32) -> Int32 {
    Int32(bitPattern: UInt32(bitPattern: self) / UInt32(bitPattern: divisor))
  }
}
