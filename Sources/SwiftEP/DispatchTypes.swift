import EPKernels
import HostMachine

/// Where tokens go.
public enum Routing: Sendable {
  /// Experts of each token, Int32 or Int64 `[tokens, topK]`, -1 for none, none twice in a token; weights fp32 `[tokens,
  /// topK]`.
  case topK(indices: Tensor, weights: Tensor? = nil)
  /// uint8 `[tokens, ranks]`: not zero where a token goes to a rank.
  case table(Tensor)
  /// As an earlier dispatch of the same buffer, without layout and counts; top-k indices and weights do not travel
  /// again.
  case cached(DispatchHandle)
}

/// How large the tensors are that a dispatch returns.
public enum Sizing: Codable, Sendable {
  /// As large as what arrives. The call returns when the counts are known.
  case exact
  /// For all tokens of all ranks, or as many as the plan allows. An asynchronous call waits for nothing; counts stay in
  /// memory, rows behind the last have -1 as origin and as indices.
  case worstCase
}

/// What waits for the peers of an operation: for their counts, then for their rows, or until they have read this rank's.
public enum Waiting: String, Codable, CaseIterable, Sendable {
  /// The workers, which is fastest.
  case workers
  /// On a GPU the stream, so that nothing occupies a multiprocessor meanwhile: the operation is launched in three parts.
  /// A peer that has departed or is late is noticed by the host, some milliseconds later than by workers; which peer came
  /// last is not in the flight record. On a CPU workers sleep while they wait, and there is no difference.
  case stream
}

public struct DispatchOptions: Sendable {
  /// Cached routing keeps the layout of its handle.
  public var layout: RowLayout = .bySource
  /// By expert: each group of rows begins at a multiple of this. By source: counts per expert are rounded up to it. Grouped:
  /// of no effect, as `zeroesPadding`.
  public var expertAlignment = 1
  /// By expert: fill the rows between groups with zero bytes. Their origins and indices are -1 in any case.
  public var zeroesPadding = false
  /// Grouped rows, and those of buffers whose ranks can be masked, are of worst-case size in any case.
  public var sizing: Sizing = .exact
  /// By source and by expert, of worst-case size: rows of the result, whatever the plan says; nil: as many as the plan does. Where
  /// more arrive on any rank, all throw `outOfMemory`.
  public var rowsMax: Int?
  /// BF16 rows arrive as FP8 E4M3 with scales in this format, or as NVFP4.
  public var quantization: ScaleFormat?
  /// Of NVFP4 rows: by what the scales of all rows have been multiplied (see `ScaleFormat.nvfp4`), 2^-118 to 2^118, the
  /// same on all ranks; 1 for others. Usually 448 * 6 / amax of what is sent, so that the largest scale is 448. A graph
  /// keeps it.
  public var globalScale: Float = 1
  /// Of grouped rows that are quantized on the way.
  public var scaleOrder: ScaleOrder = .rowMajor
  /// Of scales that are given: where they lie in columns, they are `[scales of a row, n]`, of which the first tokens count. The
  /// call brings them into rows, in memory that the plan knows of. Ranks need not all say the same.
  public var givenScaleOrder: ScaleOrder = .rowMajor
  /// Workers to use, where there is that much to do; nil: all that the buffer has.
  public var workers: Int?
  /// Ranks need not all say the same, but none lets streams wait while another has results to receive (`receivesLater`).
  public var waiting: Waiting = .workers
  /// int32 `[local experts]`: to each, the tokens that the expert has received are added; for finding the experts that are
  /// wanted most. Not of cached dispatches.
  public var expertStatistics: Tensor?
  /// int64 `[ranks]`: to each rank that was not there yet when all before it were, the nanoseconds are added from when this
  /// rank began to wait until that one was there; for finding the slow rank. For waits of streams there is mostly nothing to
  /// be added.
  public var waitStatistics: Tensor?
  /// The call only sends: it is over when this rank's rows are on their way, and `DispatchResult.receive` does the rest.
  /// Between the two, nothing of this library occupies a multiprocessor or a core. Of worst-case size only, and with
  /// workers that wait; further calls may lie in between, up to six (each step of a combine in steps counts), and other results may be received in any order. In a
  /// graph, both halves; a graph that a stream of the caller's has captured must not be launched in between.
  public var receivesLater = false
  /// Return while rows still travel; the result's event says when they have arrived.
  public var isAsynchronous = false
  /// What is given is ready only when these events are complete. With exact sizing the call itself waits for them,
  /// since it waits for the counts.
  public var after: [Event] = []
  /// A stream of the caller's on the buffer's GPU: the operation comes behind what is queued there, and what is queued there
  /// later comes behind the operation, without any wait of the host. What the call returns counts as used there (see
  /// `Tensor.noteUse`).
  ///
  /// While a graph is captured on the stream, an asynchronous call of worst-case size becomes part of it and keeps what it
  /// uses as long as the graph lives. All ranks then launch graphs of the same operations; of launches, those of graphs
  /// too, this buffer sees the order only as far as they name the same stream. The event of such a call is complete at
  /// once; waiting for it throws what the latest run failed with.
  public var stream: CUDAStream?

  public init() {}
}

/// What repeats a dispatch (`Routing.cached`) or undoes it (`combine`). Belongs to the buffer that made it.
public final class DispatchHandle: Sendable {
  let buffer: BufferIdentity
  let memory: any TensorStorage
  let layout: HandleLayout
  public let tokenCount: Int
  /// Rows of the tensors that the dispatch returned: all that arrived, or the worst case.
  public let rowCapacity: Int
  let expertAlignment: Int
  /// `BufferCore.returnCount`, when it was made.
  let returnCount: Int
  /// Whether the dispatch has been received.
  let isReceived: Guarded<Bool>

  init(
    core: BufferCore, memory: any TensorStorage, layout: HandleLayout, rowCapacity: Int, expertAlignment: Int,
    isReceived: Guarded<Bool> = Guarded(true)
  ) {
    buffer = core.identity
    self.memory = memory
    self.layout = layout
    tokenCount = Int(layout.chunks.tokenCount)
    self.rowCapacity = rowCapacity
    self.expertAlignment = expertAlignment
    returnCount = core.returnCount
    self.isReceived = isReceived
  }

  var view: HandleView { HandleView(block: memory.base, layout: layout) }

  /// int32 `[chunks, ranks or experts]`: the rows of this rank's chunks before each.
  package var places: Tensor {
    Tensor(
      dtype: .int32, shape: [Int(layout.chunks.chunkCount), Int(layout.keyCount)], storage: memory,
      byteOffset: layout.bases)
  }

  public var rowLayout: RowLayout {
    layout.layout == .bySource ? .bySource : layout.groupCapacity == 0 ? .byExpert : .grouped
  }
  /// The sizes before the last of tensors of rows: `[rowCapacity]`, or `[local experts, rows of a group]`.
  package var rowShape: [Int] {
    layout.groupCapacity == 0 ? [rowCapacity] : [Int(layout.localExpertCount), Int(layout.groupCapacity)]
  }
  public var topK: Int { Int(layout.topK) }

  fileprivate func counts(_ offset: Int64, _ count: Int32) -> Tensor {
    Tensor(dtype: .int32, shape: [Int(count)], storage: memory, byteOffset: offset)
  }
}

/// What arrived at this rank. The tensors of rows and their metadata are the arena memory that peers wrote; it is given
/// back when the last tensor is gone.
///
/// Where `[rows, …]` is written, grouped tensors have `[local experts, rows of a group, …]`.
public struct DispatchResult: Sendable {
  /// `[rows, hidden]`; NVFP4: `[rows, hidden / 2]`.
  public let rows: Tensor
  /// Of FP8 and NVFP4 rows; see `ScaleFormat`, and `ScaleOrder` for grouped ones.
  public let scales: Tensor?
  /// `[rows, …]`, as the sender's.
  public let sidecars: [Tensor]
  /// int32 `[rows, 2]`: source rank and source token; -1 in rows that no token fills, except grouped ones and where ranks can
  /// be masked.
  public let origins: Tensor
  /// `[rows, topK]` (by expert: `[rows, 1]`), in the sender's index type: local experts, -1 for experts of other ranks.
  /// Nil without top-k routing.
  public let topKIndices: Tensor?
  /// fp32, as `topKIndices`: 0 where that is -1.
  public let topKWeights: Tensor?
  public let handle: DispatchHandle
  /// Complete when all rows have arrived.
  public let event: Event
  let receiving: PendingReceive?
}

extension DispatchResult {
  /// int32 `[1]`: rows that arrived, padding between groups included. Valid, like all counts, once the event is
  /// complete; after a dispatch with exact sizing, at once.
  public var rowCount: Tensor { handle.counts(handle.layout.rowCount, 1) }
  /// int32 `[ranks]`: tokens from each source rank.
  public var tokensPerSource: Tensor { handle.counts(handle.layout.tokensPerSource, handle.layout.rankCount) }
  /// int32 `[ranks, ranks]`: tokens from each source rank, by row, to each rank. The same on all ranks.
  public var tokensPerPair: Tensor {
    let rankCount = Int(handle.layout.rankCount)
    return Tensor(
      dtype: .int32, shape: [rankCount, rankCount], storage: handle.memory, byteOffset: handle.layout.tokensPerPair)
  }
  /// int32 `[local experts]`: tokens of each, rounded up to `expertAlignment`. Zero without top-k routing.
  public var tokensPerExpert: Tensor {
    handle.counts(handle.layout.alignedTokensPerExpert, handle.layout.localExpertCount)
  }
  /// int32 `[local experts, ranks + 1]`, where there is a row per expert: in the group of expert `e`, counted from its first
  /// row, the rows of source rank `s` are `sourceOffsets[e, s]..<sourceOffsets[e, s + 1]`. Nil by source, where
  /// `tokensPerSource` says as much, and where ranks can be masked (`sourceCounts`).
  public var sourceOffsets: Tensor? {
    let (layout, width) = (handle.layout, Int(handle.layout.rankCount) + 1)
    if layout.layout == .bySource || layout.sourceCapacity > 0 { return nil }
    return Tensor(
      dtype: .int32, shape: [Int(layout.localExpertCount), width], storage: handle.memory,
      byteOffset: layout.sourceOffsets)
  }
  /// int32 `[local experts, ranks]`, where ranks can be masked: tokens of each local expert from each source rank. Source
  /// `s` has the rows from `s * tokensPerRankMax` on, of all rows or, grouped, of each group: as many as `tokensPerSource[s]`,
  /// grouped `sourceCounts[e, s]`. What lies behind those is whatever lay there. Nil otherwise.
  public var sourceCounts: Tensor? {
    let layout = handle.layout
    if layout.sourceCapacity == 0 { return nil }
    return Tensor(
      dtype: .int32, shape: [Int(layout.localExpertCount), Int(layout.rankCount)], storage: handle.memory,
      byteOffset: layout.sourceCounts)
  }
  /// int32 `[local experts]`: tokens of each, as they are.
  public var unalignedTokensPerExpert: Tensor {
    handle.counts(handle.layout.tokensPerExpert, handle.layout.localExpertCount)
  }
}

/// How rows travel in a combine.
public enum RowEncoding: String, CaseIterable, Codable, Sendable {
  /// As they are.
  case none
  /// BF16 rows of a multiple of 128 channels as 10 bits a channel: for each block of 128 channels a sign and the magnitude's
  /// logarithm, in 510 equal steps between the least and the largest of the block that are not zero. A block that this would
  /// change by more than 1.1% of a value (one with infinities, NaN or subnormals, or with magnitudes more than 2 to the power
  /// of 16 apart) is read as it is. Rows take 0.66 of their bytes on the way, and are coded in memory of the arena first,
  /// wherever they lie; all of them, also those of a rank's own tokens. (DeepEP's `use_logfmt`.)
  case logFMT
}

public struct CombineOptions: Sendable {
  /// By expert: fp32 `[tokens, topK]`, this rank's own weights, multiplied into its experts' rows as they are summed.
  /// Rows of weight 0 are not read: they may hold anything.
  public var rowWeights: Tensor?
  /// fp32 `[rows, topK]` (by expert `[rows, 1]`): weights to be brought back to the tokens' owners and summed, as
  /// gradients are.
  public var topKWeights: Tensor?
  /// Up to two tensors `[tokens, hidden]` in the rows' dtype, added last.
  public var biases: [Tensor] = []
  /// How rows travel, the same on all ranks. Where the plan has no memory for coded rows (`JobShape.combineEncoding`), the
  /// arena grows. Coded rows are combined all at once, whatever the plan says of steps.
  public var encoding = RowEncoding.none
  /// Where to put the sums, `[tokens, hidden]` in the rows' dtype, apart from the rows; nil: arena memory that the
  /// result owns.
  public var output: Tensor?
  /// Workers to use, where there is that much to do; nil: all that the buffer has.
  public var workers: Int?
  /// As `DispatchOptions.waiting`.
  public var waiting: Waiting = .workers
  /// As `DispatchOptions.waitStatistics`.
  public var waitStatistics: Tensor?
  /// The call only tells the peers that this rank's rows are ready, and `CombineResult.receive` does the rest; otherwise as
  /// `DispatchOptions.receivesLater`. Rows outside the arena must not be combined in steps then. What a rank has called
  /// wrongly, all learn when they receive.
  public var receivesLater = false
  /// Return at once; the result's event says when the sums are there and all peers have read this rank's rows.
  public var isAsynchronous = false
  /// What is given is ready only when these events are complete.
  public var after: [Event] = []
  /// As `DispatchOptions.stream`.
  public var stream: CUDAStream?

  public init() {}
}

/// What came back to this rank's tokens.
public struct CombineResult: Sendable {
  /// `[tokens, hidden]`.
  public let tokens: Tensor
  /// fp32 `[tokens, topK]`, where `CombineOptions.topKWeights` was given.
  public let topKWeights: Tensor?
  /// Complete when the sums are there and all peers have read this rank's rows, which may then be overwritten.
  public let event: Event
  let receiving: PendingReceive?
}
