// Several kernels are compiled of one operation: one for everything, and others for what most calls are, without what those do
// not need. A GPU's caches hold few instructions, and to load them is a good part of what a small operation takes:
// `docs/performance.md` has how much.

extension DispatchArguments {
  /// Rows by source as they are given, with at most one column beside them.
  @inlinable @inline(__always) public var isPlainCopy: Bool {
    isPlain && transform == .copy && handle.layout.layout == .bySource
  }

  /// BF16 rows that become FP8, by source.
  @inlinable @inline(__always) public var isPlainQuantizing: Bool {
    isPlain && quantizesBF16ToFP8 && handle.layout.layout == .bySource
  }

  /// BF16 rows that become FP8, in groups that have a capacity.
  @inlinable @inline(__always) public var isPlainGrouped: Bool {
    isPlain && quantizesBF16ToFP8 && handle.layout.layout == .byExpert && handle.layout.groupCapacity != 0
  }

  @inlinable @inline(__always) var quantizesBF16ToFP8: Bool {
    transform != .copy && transform != .quantizeNVFP4 && !isCached && beside.isNull && scaleColumns.isNull
  }

  /// Up to eight experts a token, 64 ranks.
  @inlinable @inline(__always) var isPlain: Bool {
    view.masks.isNull && handle.layout.sourceCapacity == 0 && operation.part == .whole && zeroesPadding == 0
      && copiesColumns == 0 && UInt32(bitPattern: routing.topK &- 1) < 8 && view.rankCount <= 64
  }
}

extension CombineArguments {
  /// BF16 rows that lie in the arenas, and nothing but them.
  @inlinable @inline(__always) public var isPlainInPlace: Bool {
    view.masks.isNull && handle.layout.sourceCapacity == 0 && operation.part == .whole && format == .bf16 && !stages
      && weightsOutput.isNull
  }
}
