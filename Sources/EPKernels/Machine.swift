/// What the protocol asks of the hardware it runs on. A machine value is one *worker*: a CPU thread, or a block of
/// threads on a GPU multiprocessor.
///
/// All workers of a rank run the same kernel. Kernel code is uniform across a worker: all its lanes, if it has several,
/// take the same branches and call the same methods, and it never speaks of lanes, blocks or address spaces. Closures
/// passed here run on single lanes: of the machine they call nothing but what stands under "Single lanes", their results
/// depend on their arguments alone, and stores made in them go to places that no other call of the closure touches, unless
/// with the same value. When a method returns, the worker sees all stores that its own lanes made in it.
public protocol Machine {
  /// This worker, in `0..<workerCount`.
  var workerIndex: Int32 { get }
  /// Workers that run this launch.
  var workerCount: Int32 { get }
  /// Whether some lanes of a worker wait for signals while others end what came before.
  static var waitsBeside: Bool { get }

  // MARK: Loops

  /// The first index from `index` on at which lanes begin that act together: work of several kinds is best kept apart there.
  func firstOfLanes(from index: Int32) -> Int32

  /// Calls `body` for indices of `0..<count` such that over all workers each index is visited once. What other workers
  /// have stored is seen only after they have arrived.
  func shareOut(_ count: Int32, _ body: (Int32) -> Void)

  /// Calls `body` for every index of `0..<count`, all by this worker, in any order.
  func forEach(_ count: Int32, _ body: (Int32) -> Void)

  /// The first of `indices` for which `predicate` holds, or -1. By this worker alone. All are asked where there is none; behind
  /// one, some may not be.
  func first(of indices: Range<Int32>, where predicate: (Int32) -> Bool) -> Int32

  /// Visits every index of `0..<count` with the sum of the values before it and its own. By this worker alone.
  func scan(
    _ count: Int32, value: (_ index: Int32) -> Int32, visit: (_ index: Int32, _ before: Int32, _ value: Int32) -> Void)

  /// A lane's part of the sum of the values of `0..<count`, each of which is asked for once, in any order, on lanes that have the least
  /// to do next. By this worker alone, which sees what its lanes stored meanwhile when it has called `total`.
  func part(ofTotal count: Int32, _ value: (_ index: Int32) -> SIMD2<Int32>) -> SIMD2<Int32>

  /// The sum of all lanes' parts.
  func total(_ part: SIMD2<Int32>) -> SIMD2<Int32>

  /// Numbers, in token order, the tokens of `tokens` that go to each of at most 64 destinations. By this worker alone.
  ///
  /// - Parameters:
  ///   - counters: Int32 for each destination: the number of tokens that go there.
  ///   - members: bit `d` says that the token goes to destination `d`.
  ///   - visit: called once per token and destination, with the number of earlier tokens that go there, or -1 where this one
  ///     does not.
  func numberTokens(
    _ tokens: Range<Int32>, destinationCount: Int32, counters: Address, members: (_ token: Int32) -> UInt64,
    visit: (_ token: Int32, _ destination: Int32, _ index: Int32) -> Void)

  /// Numbers, in their order, the cells that name each key. By this worker alone.
  ///
  /// - Parameters:
  ///   - keyCount: keys are `0..<keyCount`.
  ///   - counters: Int32 `[keyCount]`: the number of cells that name each key.
  ///   - key: what a cell names, -1 for nothing.
  ///   - visit: called once per cell, with the number of earlier ones that name the same key, or -1 where it names nothing.
  func numberCells(
    _ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (_ cell: Int32) -> Int32,
    visit: (_ cell: Int32, _ index: Int32) -> Void)

  /// As `numberCells`, where the numbers themselves are not wanted, only the counters.
  func countCells(_ cells: Range<Int32>, keyCount: Int32, counters: Address, key: (_ cell: Int32) -> Int32)

  // MARK: Rows

  /// What a worker has begun of a `scatterRows` before it is known where rows go, and of a `reduceRows` before it is known where
  /// they lie: while it waits for that. A job's `counter` need be zero only when that is called.
  associatedtype ScatterStart = NothingStarted
  associatedtype ReduceStart = NothingStarted
  /// Of no rows.
  var noScatter: ScatterStart { get }
  var noReduce: ReduceStart { get }
  /// Ended once, by `scatterRows` or `abandon`; until then, nothing else of rows or of numbers is called.
  ///
  /// - Parameter job: as it will be, but for `writtenByteCount`.
  func startScatter(_ job: ScatterJob) -> ScatterStart
  /// These rows do not move after all.
  func abandon(_ start: ScatterStart)
  func startReduce(_ job: ReduceJob, place: (_ row: Int32, _ slot: Int32) -> WeightedPlace) -> ReduceStart

  /// Copies every row of `job` to each of its destinations, and labels it there; shared out over all workers.
  ///
  /// When this worker's part of it returns, its stores are ordered before its next `arriveLocal` or `signal`.
  ///
  /// - Parameters:
  ///   - labelCount: what is written beside each row and slot, in so many parts.
  ///   - content: what a part says, wherever it goes: found before its label, so that neither waits for the other.
  ///   - label: what the parts of one row and slot have in common; made once for all of them, or for each. Nil: nothing is
  ///     written there.
  ///   - write: called once for each row, slot and part that has a label.
  func scatterRows<Content, Label>(
    _ job: ScatterJob, from start: ScatterStart, route: (_ row: Int32, _ slot: Int32) -> RowTarget, labelCount: Int32,
    content: (_ row: Int32, _ slot: Int32, _ part: Int32) -> Content, label: (_ row: Int32, _ slot: Int32) -> Label?,
    write: (Label, Content, _ part: Int32) -> Void)

  /// Sums, for each of `job`'s output rows, the source rows of its slots in slot order, then the biases: accumulated in
  /// Float from zero, rounded once to nearest even. Shared out over all workers; ordered as `scatterRows` is.
  ///
  /// - Parameter meanwhile: called once on each lane, where rows can be on their way while others work: when the first are.
  func reduceRows(
    _ job: ReduceJob, from start: ReduceStart, meanwhile: () -> Void,
    place: (_ row: Int32, _ slot: Int32) -> WeightedPlace,
    source: (WeightedPlace) -> RowSource)

  /// Copies rows that lie in runs, be they many and short; shared out over all workers, ordered as `scatterRows` is.
  func copyRows(_ job: CopyJob, runCount: Int32, run: (_ index: Int32) -> RowRun)

  /// Codes BF16 rows that lie in runs as LogFMT; shared out and ordered as in `copyRows`.
  func encodeRows(_ job: EncodeJob, runCount: Int32, run: (_ index: Int32) -> RowRun)

  /// Copies `count` small records, shared out over all workers. `byteCount` is a multiple of 4, all addresses are
  /// aligned to 4; a record whose target is null is left out.
  func copyRecords(_ count: Int32, byteCount: Int32, route: (_ record: Int32) -> RecordRoute)

  /// Fills `byteCount` bytes, a multiple of 4, with a repeated 32-bit pattern, by this worker alone, on lanes that have the least to do
  /// next; ordered as `scatterRows` is.
  func fill(_ destination: Address, byteCount: Int64, pattern: UInt32)

  /// This worker reads of those bytes soon, and nobody changes them before: some may be brought closer meanwhile.
  func expect(_ address: Address, byteCount: Int64)

  /// Calls `body` with every word of the header of this launch's arguments, so many times. By this worker alone.
  func forEachWord(
    of header: ExchangeHeader, copyCount: Int32, _ body: (_ copy: Int32, _ index: Int32, _ word: Int64) -> Void)

  // MARK: Order

  /// This launch waits for nothing any more but what kernels that run already will do: the queue may start the next one, which waits
  /// for the end of this one.
  func startNext()

  /// Orders this worker's earlier loads before its later stores. To be called between reading a word and changing it,
  /// since all lanes read it.
  func settle()

  /// Counts this worker in at `counter` (a UInt32 in this rank's own memory, zero at first). Returns true to the last
  /// of `workerCount` workers, which then sees everything that the others wrote before they arrived; the counter is
  /// zero again.
  ///
  /// - Parameter audience: who is to see that, too, since the last worker signals it to them.
  func arriveLocal(_ counter: Address, for audience: Audience) -> Bool

  /// Stores `count` signal words' epochs with release order for the audience, and wakes who waits there.
  func signal(_ count: Int32, to audience: Audience, word: (_ index: Int32) -> SignalWord)

  /// Waits until `count` signal words of one arena are all at least `epoch`. Its acquire pairs with the release in
  /// `signal`. Ends without that when `deadline` (see `now`) passes first, or when `alarm` is not `heard` any more; what
  /// the words say counts more than either.
  ///
  /// - Parameters:
  ///   - audience: to whom the signals are given.
  ///   - awaited: called, in the order of the signals, for each that is not there when its turn comes.
  ///   - seen: called when that one is there.
  func await(
    _ arena: Address, count: Int32, epoch: UInt64, as audience: Audience, deadline: UInt64, alarm: Address,
    heard: UInt64, offset: (_ index: Int32) -> Int64, awaited: (_ index: Int32) -> Void,
    seen: (_ index: Int32) -> Void
  ) -> Wait

  /// The alarm's value; what the host wrote before it raised the alarm is seen.
  func hear(_ alarm: Address) -> UInt64

  /// As `note` of zero, in so many words from `address` on.
  func noteZeros(_ count: Int32, at address: Address)

  // MARK: Single lanes
  //
  // What these give may differ between a worker's lanes. Only what the first lane notes, and what it does in
  // `forEach(1)`, `awaited` and `seen`, is for others.

  /// The sum of the values of `0..<count`. A value may be asked for more than once, and counts once.
  ///
  /// - Parameter before: called for each index in order, with the sum of the values before it.
  func sum(
    over count: Int32, _ value: (_ index: Int32) -> Int32, before: (_ index: Int32, _ sum: Int32) -> Void
  ) -> Int32

  /// Calls `body` with the place of every index of `0..<count`, in order. Some places may be found before `body` is called with
  /// earlier ones, and more than once.
  func forEachPlace(_ count: Int32, at place: (_ index: Int32) -> Address, _ body: (Address) -> Void)

  /// Whether the signal word is at least `epoch` already; acquires as `await` does.
  func isSignalled(_ arena: Address, offset: Int64, epoch: UInt64) -> Bool

  /// Nanoseconds of a clock that never goes back, the same for all ranks of a host or a GPU.
  var now: UInt64 { get }

  /// Stores a word that others may read at any time. Who sees it need not see what was noted before.
  func note(_ word: UInt64, at address: Address)

  /// As `note`; who sees it sees everything that this worker noted before.
  func publish(_ word: UInt64, at address: Address)

  /// A word that some rank notes or publishes.
  func read(_ address: Address) -> UInt64

  /// As `read`, where what else that rank has noted does not matter.
  func peek(_ address: Address) -> UInt64
}

/// Whom stores are for.
@frozen public enum Audience: Sendable {
  /// This rank's own workers.
  case rank
  /// All ranks, which share one device.
  case device
  /// All ranks, on several devices.
  case system
}

/// A signal, and where it goes.
@frozen public struct SignalWord {
  /// The gate of a peer's signal, where the machine has any: it opens it with the signal, and closes it when the signal is
  /// seen.
  @inlinable public static func gate(of word: Address) -> Address {
    Address(bits: word.bits & ~127).advanced(byBytes: ControlLayout.gateDistance)
  }

  public var arena: Address
  public var offset: Int64
  public var epoch: UInt64

  @inlinable public init(arena: Address, offset: Int64, epoch: UInt64) {
    self.arena = arena
    self.offset = offset
    self.epoch = epoch
  }
}

/// How a wait for several signals ended.
@frozen public struct Wait {
  public var result: WaitResult
  /// The first signal that was missing at a deadline; -1 otherwise.
  public var missing: Int32

  @inlinable public init(_ result: WaitResult, missing: Int32 = -1) {
    self.result = result
    self.missing = missing
  }
}

/// From where to where a record is copied.
@frozen public struct RecordRoute {
  public var source: Address
  public var target: Address

  @inlinable public init(source: Address, target: Address) {
    self.source = source
    self.target = target
  }

  @inlinable public static var none: RecordRoute { RecordRoute(source: .null, target: .null) }
}

/// How a wait ended.
@frozen public enum WaitResult: Sendable {
  case signalled, timedOut, alarmed
}

extension Machine {
  /// Begun and ended at once.
  @inlinable @inline(__always) public func reduceRows(
    _ job: ReduceJob, place: (_ row: Int32, _ slot: Int32) -> WeightedPlace, source: (WeightedPlace) -> RowSource
  ) {
    reduceRows(job, from: startReduce(job, place: place), meanwhile: {}, place: place, source: source)
  }
}

/// What a machine has begun that begins nothing early.
@frozen public struct NothingStarted {
  @inlinable public init() {}
}

extension Machine where ScatterStart == NothingStarted {
  @inlinable public var noScatter: ScatterStart { NothingStarted() }
  @inlinable public func startScatter(_ job: ScatterJob) -> ScatterStart { NothingStarted() }
  @inlinable public func abandon(_ start: ScatterStart) {}
}

extension Machine where ReduceStart == NothingStarted {
  @inlinable public var noReduce: ReduceStart { NothingStarted() }
  @inlinable public func startReduce(
    _ job: ReduceJob, place: (_ row: Int32, _ slot: Int32) -> WeightedPlace
  ) -> ReduceStart { NothingStarted() }
}

/// Rows to send: what `Machine.scatterRows` reads.
@frozen public struct ScatterJob {
  /// Row 0; the rows are contiguous.
  public var source: Address
  public var rowCount: Int32
  /// Bytes of one source row, a multiple of 16.
  public var rowByteCount: Int32
  /// A row has at most this many destinations.
  public var slotCount: Int32
  public var transform: RowTransform
  /// Bytes from four bytes of a row's scales to the next four.
  public var scaleStride: Int32
  /// Of NVFP4 rows: a channel is its element times its block's scale, divided by this.
  public var globalScale: Float
  /// A record of each row that is copied beside it, to where its scales go: row 0's, of `besideByteCount` bytes, a multiple of 16
  /// and at most `besideByteCountMax`. Null where there is none: with rows that are quantized, which have scales of their
  /// own, and with more than 32 slots.
  public var beside: Address
  public var besideByteCount: Int32
  /// Bytes that all workers of this rank together will write, at most: lets a machine choose between cached and streaming
  /// stores.
  public var writtenByteCount: Int64
  /// UInt32 in this rank's own memory, zero at first, by which workers may count what they have begun; null where there
  /// is none.
  public var counter: Address
  /// Ranks whose workers are known to share this one's memory, itself included: all of them, or one.
  public var sharerCount: Int32

  @inlinable public init(
    source: Address, rowCount: Int32, rowByteCount: Int32, slotCount: Int32, transform: RowTransform,
    scaleStride: Int32 = 4, globalScale: Float = 1, beside: Address = .null, besideByteCount: Int32 = 0,
    writtenByteCount: Int64, counter: Address = .null, sharerCount: Int32 = 1
  ) {
    self.source = source
    self.rowCount = rowCount
    self.rowByteCount = rowByteCount
    self.slotCount = slotCount
    self.transform = transform
    self.scaleStride = scaleStride
    self.globalScale = globalScale
    self.beside = beside
    self.besideByteCount = besideByteCount
    self.writtenByteCount = writtenByteCount
    self.counter = counter
    self.sharerCount = sharerCount
  }

  @inlinable public static var besideByteCountMax: Int32 { 256 }
}

/// One destination of a row.
@frozen public struct RowTarget {
  /// Null: this slot has no destination.
  public var row: Address
  /// Where the scales of a quantized row go, or what is copied beside a row; null where there is neither.
  public var scales: Address

  @inlinable public init(row: Address, scales: Address) {
    self.row = row
    self.scales = scales
  }

  @inlinable public static var none: RowTarget { RowTarget(row: .null, scales: .null) }
}

/// Rows to sum: what `Machine.reduceRows` writes and reads.
@frozen public struct ReduceJob {
  /// Output row 0; the rows are contiguous, `elementCount` elements of `format` each.
  public var output: Address
  /// So many rows are summed, from this one on.
  public var firstRow: Int32
  public var rowCount: Int32
  public var elementCount: Int32
  /// A row has at most this many sources.
  public var slotCount: Int32
  /// BF16, FP16 or FP32, of sources, biases and output alike. LogFMT: of sources; the others are BF16.
  public var format: RowFormat
  /// Multiply each source row by its weight.
  public var isWeighted: Bool
  /// Tensors of the output's shape that are added last, in this order; null when absent.
  public var biases: (Address, Address)
  /// As `ScatterJob.counter`.
  public var counter: Address

  @inlinable public init(
    output: Address, firstRow: Int32 = 0, rowCount: Int32, elementCount: Int32, slotCount: Int32, format: RowFormat,
    isWeighted: Bool, biases: (Address, Address), counter: Address = .null
  ) {
    self.output = output
    self.firstRow = firstRow
    self.rowCount = rowCount
    self.elementCount = elementCount
    self.slotCount = slotCount
    self.format = format
    self.isWeighted = isWeighted
    self.biases = biases
    self.counter = counter
  }
}

/// Rows that follow each other.
@frozen public struct RowRun {
  /// Of a tensor, the run's first row.
  public var first: Int32
  /// Where there is nothing, not above zero.
  public var count: Int32
  /// The row that its first one is copied to.
  public var place: Int32

  /// - Parameter place: the same row, unless said.
  @inlinable public init(first: Int32, count: Int32, place: Int32? = nil) {
    self.first = first
    self.count = count
    self.place = place ?? first
  }
}

/// Rows to copy: what `Machine.copyRows` reads and writes.
@frozen public struct CopyJob {
  /// Row 0 of each.
  public var source: Address
  public var target: Address
  /// A multiple of 16.
  public var rowByteCount: Int32

  @inlinable public init(source: Address, target: Address, rowByteCount: Int32) {
    self.source = source
    self.target = target
    self.rowByteCount = rowByteCount
  }
}

/// Rows to code as LogFMT: what `Machine.encodeRows` reads and writes. A row has the same number everywhere.
@frozen public struct EncodeJob {
  /// BF16, `elementCount` a row: row 0.
  public var source: Address
  /// A multiple of `LogFMT.channelsPerBlock`.
  public var elementCount: Int32
  /// Where the records go, `LogFMT.byteCount` a row.
  public var records: Address
  /// As `source`: where blocks go that are sent as they are. The same address: they lie there.
  public var exact: Address

  @inlinable public init(source: Address, elementCount: Int32, records: Address, exact: Address) {
    self.source = source
    self.elementCount = elementCount
    self.records = records
    self.exact = exact
  }
}

/// Where one source of an output row lies, as the handle has it, and its weight.
@frozen public struct WeightedPlace {
  public var place: Place
  public var weight: Float

  @inlinable public init(_ place: Place, weight: Float) {
    self.place = place
    self.weight = weight
  }

  @inlinable public static var none: WeightedPlace { WeightedPlace(.none, weight: 0) }
}

/// One source of an output row.
@frozen public struct RowSource {
  /// Null: this slot has no row.
  public var row: Address
  /// 1 unless the job is weighted: machines may multiply by it then, or not.
  public var weight: Float
  /// Of a LogFMT row: where its channels lie of blocks that are sent as they are.
  public var exact: Address

  @inlinable public init(row: Address, weight: Float, exact: Address = .null) {
    self.row = row
    self.weight = weight
    self.exact = exact
  }

  @inlinable public static var none: RowSource { RowSource(row: .null, weight: 0) }
}
