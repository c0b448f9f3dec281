/// What a rank knows of its group: the same in every kernel of a buffer.
@frozen public struct RankView {
  public var rank: Int32
  public var rankCount: Int32
  public var expertCount: Int32
  /// Experts that live on this rank.
  public var localExpertCount: Int32
  /// UInt64 `[2, rankCount]`: where each rank's arena is mapped here, then how many bytes it can have.
  public var arenas: Address
  /// This rank's, of those.
  public var ownArena: Address
  /// Int32 `[expertCount]`: the rank of each expert.
  public var expertOwner: Address
  /// Int32 `[expertCount]`: the index of each expert among those of its rank.
  public var expertLocal: Address
  /// Int32 `[expertCount]`: the experts of rank 0 in order, then those of rank 1, and so on.
  public var expertOrder: Address
  /// Int32 `[rankCount + 1]`: where each rank's experts begin in `expertOrder`, and where the last rank's end.
  public var firstPlaces: Address
  /// `OperationStatus` of the first operation that missed a rank: later ones then end at once. In this rank's own memory,
  /// with `findingsByteCount` zero bytes behind it.
  public var failure: Address
  /// `OperationStatus`: the same, where the host is the first to know, in memory that both reach. Null where it cannot be:
  /// for a GPU, the host's memory is far away.
  public var hostFailure: Address
  /// UInt64 `[rankCount]`: not zero for a rank that takes part no more. Noted by the host while kernels run.
  public var departures: Address
  /// UInt64: grows after each change of `departures`, and ends waits.
  public var alarm: Address
  /// UInt64 `[MaskWord]`, one bit a rank, with room for blocks of an exchange behind it, in this rank's own memory; null where
  /// no rank can be masked.
  public var masks: Address = .null
  /// Not zero: a missing rank is masked, and fails no operation. An integer, since kernels keep those in registers.
  public var masksMissing: Int32 = 0
  /// UInt32 `[2]`: where the workers of a launch count themselves in; the second for checks.
  public var arrivals: Address
  /// UInt64 that the host reads: since when, by `Machine.now`, the queue of launches waits between two parts of an
  /// operation; 0 while it does not.
  public var pause: Address
  /// Not zero: all ranks' kernels run on one device. An integer, since kernels keep those in registers.
  public var sharesDevice: Int32 = 0
  /// How long a wait for a peer may take.
  public var timeoutNanoseconds: UInt64
  /// Of the operation's exchange; kernels find it when they begin.
  public var epoch: UInt64 = 0
  /// All ranks' blocks of the operation's exchange, as kernels read them behind it.
  public var blocks: Address = .null
  /// Of the operation's flight record; kernels find it when they begin.
  public var flightIndex: Int64 = 0
  /// Where that record lies.
  public var flightRecord: Address = .null
  /// Not zero: that record has been begun, by the host or by an earlier launch. An integer, since kernels keep those in registers.
  public var isRecorded: Int32 = 0
  /// Where the status lies of an operation that missed a rank before this one; kernels look when they begin. Null where none has.
  public var earlierFailure: Address = .null

  @inlinable public init(
    rank: Int32, rankCount: Int32, expertCount: Int32, localExpertCount: Int32, arenas: Address, ownArena: Address,
    expertOwner: Address, expertLocal: Address, expertOrder: Address, firstPlaces: Address, failure: Address,
    hostFailure: Address, departures: Address, alarm: Address, arrivals: Address, pause: Address,
    timeoutNanoseconds: UInt64
  ) {
    self.rank = rank
    self.rankCount = rankCount
    self.expertCount = expertCount
    self.localExpertCount = localExpertCount
    self.arenas = arenas
    self.ownArena = ownArena
    self.expertOwner = expertOwner
    self.expertLocal = expertLocal
    self.expertOrder = expertOrder
    self.firstPlaces = firstPlaces
    self.failure = failure
    self.hostFailure = hostFailure
    self.departures = departures
    self.alarm = alarm
    self.arrivals = arrivals
    self.pause = pause
    self.timeoutNanoseconds = timeoutNanoseconds
  }

  /// Whom what is for all ranks has to reach.
  @inlinable var peers: Audience { sharesDevice == 0 ? .system : .device }

  @inlinable public func arena(of rank: Int32) -> Address {
    Address(bits: arenas.load(UInt64.self, at: rank))
  }

  /// Of the exchange that this rank begins next.
  @inlinable var nextEpoch: UInt64 {
    ownArena.advanced(byBytes: ControlLayout.epochOffset).load(UInt64.self, at: 0) &+ 1
  }

  @inlinable func arenaByteCount(of rank: Int32) -> Int64 { arenas.load(Int64.self, at: rankCount &+ rank) }

  @inlinable func firstPlace(ofRank rank: Int32) -> Int32 { firstPlaces.load(Int32.self, at: rank) }

  /// The other ranks, numbered from 0, this rank's successor first; behind them, this rank itself.
  @inlinable func peer(_ index: Int32) -> Int32 {
    let next = rank &+ 1 &+ index
    return next < rankCount ? next : next &- rankCount
  }
  /// The other ranks, numbered from 0, in order.
  @inlinable func other(_ index: Int32) -> Int32 { index < rank ? index : index &+ 1 }

  @inlinable public var control: ControlLayout {
    ControlLayout(rankCount: rankCount, expertCount: expertCount)
  }

  /// Whether that is one, not -1 or a number that a caller should not have given.
  @inlinable func hasExpert(_ expert: Int32) -> Bool {
    UInt32(bitPattern: expert) < UInt32(bitPattern: expertCount)
  }
  @inlinable public func owner(ofExpert expert: Int32) -> Int32 { expertOwner.load(Int32.self, at: expert) }
  @inlinable public func localIndex(ofExpert expert: Int32) -> Int32 { expertLocal.load(Int32.self, at: expert) }
}

/// The two signals of an operation. Each rank has one word per slot and source, written by that source alone.
@frozen public enum SignalSlot: Int32, Sendable {
  /// "My block of the exchange lies in your arena." For a combine also: "my rows are ready."
  case exchange = 0
  /// Of a dispatch: "my rows lie in your arena." Of a combine: "I have read your rows."
  case completion = 1
}

/// The first bytes of every arena: what peers write to coordinate. Sizes and offsets come from here alone.
///
///     doorbell, identity | own epoch, own turn | signal words [slot][source][cycle]
///     | exchange pages [cycle][source] | recorder
///
/// What an exchange has written is written again by the one that lies a *cycle* behind it. Who begins that has finished the one behind
/// the first, which no rank has completed before its launch of the first was over.
@frozen public struct ControlLayout {
  public var rankCount: Int32
  public var expertCount: Int32

  @inlinable public init(rankCount: Int32, expertCount: Int32) {
    self.rankCount = rankCount
    self.expertCount = expertCount
  }

  /// Reserved for the machine: how a sleeping waiter is woken.
  @inlinable public static var doorbellOffset: Int64 { 0 }
  /// `ArenaIdentity`: at a fixed place, since the others' follow from the counts in it.
  @inlinable public static var identityOffset: Int64 { 64 }
  /// UInt64: exchanges that this rank has begun. Only its own kernels touch it.
  @inlinable public static var epochOffset: Int64 { 128 }
  /// UInt64: how often this rank's workers have been let go on, all of them, behind what one of them did alone. Only its
  /// own kernels touch it.
  @inlinable static var turnOffset: Int64 { 192 }
  @inlinable public static var signalsOffset: Int64 { 256 }
  /// A power of two; one more than exchanges can be under way at a time.
  @inlinable public static var cycleLength: Int32 { 8 }
  @inlinable static func cycle(_ epoch: UInt64) -> Int32 {
    Int32(truncatingIfNeeded: epoch) & (cycleLength &- 1)
  }
  /// A cache line for the words of a slot and source, so that one source's store disturbs no other, and one for their gate.
  @inlinable static var signalStride: Int64 { 128 }
  @inlinable static var gateDistance: Int64 { 64 }

  @inlinable func linesOffset(_ slot: SignalSlot, source: Int32) -> Int64 {
    Self.signalsOffset &+ Int64(slot.rawValue &* rankCount &+ source) &* Self.signalStride
  }

  @inlinable public func signalOffset(_ slot: SignalSlot, source: Int32, epoch: UInt64) -> Int64 {
    linesOffset(slot, source: source) &+ 8 &* Int64(Self.cycle(epoch))
  }

  /// UInt64: not zero from when the signal is given until it is seen. Queues of launches wait for gates, since they wait for
  /// fixed values; kernels, which wait for signals, use nothing that a gate says. So a gate may be open too long, but is never
  /// closed again over a signal that nobody has seen: who gives a slot's next signal has seen the other slot's of who closed
  /// it. That does not hold where results are received later, since exchanges overlap: no rank's queue waits then.
  @inlinable public func gateOffset(_ slot: SignalSlot, source: Int32) -> Int64 {
    linesOffset(slot, source: source) &+ Self.gateDistance
  }

  @inlinable public var signalsByteCount: Int64 { 2 &* Int64(rankCount) &* Self.signalStride }

  @inlinable var pagesOffset: Int64 { alignUp(Self.signalsOffset &+ signalsByteCount, to: 128) }

  /// One source's contribution: its header, then its tokens per rank and per expert (Int32 each), or its rows of a step
  /// at each rank (`StepRows`).
  @inlinable public var exchangeBlockByteCount: Int64 {
    alignUp(ExchangeHeader.byteCount &+ 4 &* (Int64(rankCount) &+ Int64(max(rankCount, expertCount))), to: 128)
  }

  @inlinable public func exchangeOffset(source: Int32, epoch: UInt64) -> Int64 {
    pagesOffset &+ Int64(Self.cycle(epoch) &* rankCount &+ source) &* exchangeBlockByteCount
  }

  /// `FlightLayout`. Only this rank writes it.
  @inlinable public var recorderOffset: Int64 {
    pagesOffset &+ Int64(Self.cycleLength &* rankCount) &* exchangeBlockByteCount
  }

  @inlinable public var byteCount: Int64 {
    alignUp(recorderOffset &+ FlightLayout(rankCount: rankCount).byteCount, to: 4096)
  }
}

/// Says to whoever maps an arena whose it is, and by which counts its control words are laid out. Written by the host
/// before the first operation.
@frozen public struct ArenaIdentity {
  /// `magicNumber`, once the rest is there.
  public var magic: UInt64 = 0
  /// `layoutVersion` of the program that wrote it.
  public var version: Int32 = 0
  public var rank: Int32 = 0
  public var rankCount: Int32 = 0
  public var expertCount: Int32 = 0
  public var generation: Int32 = 0
  /// Which of the group's buffers.
  public var buffer: Int32 = 0
  public var process: Int64 = 0
  /// The same for all ranks of a group, and no other group's.
  public var group: UInt64 = 0
  public var timeoutNanoseconds: UInt64 = 0
  /// `Machine.now`, when this was written.
  public var createdAt: UInt64 = 0

  @inlinable public init() {}

  /// "SwiftEP" and a zero, as bytes.
  @inlinable public static var magicNumber: UInt64 { 0x0050_4574_6669_7753 }
  /// To be raised with every change to the place or the meaning of a control word.
  @inlinable public static var layoutVersion: Int32 { 9 }
  @inlinable public static var byteCount: Int64 { 64 }
}

/// What every rank tells every other when an operation begins.
///
/// The first fields, one for each case of `HeaderField`, must be the same on all ranks. All are Int64, so that they can
/// be compared by index.
@frozen public struct ExchangeHeader {
  public var operation: Int64 = 0
  public var handleEpoch: Int64 = 0
  public var format: Int64 = 0
  public var transform: Int64 = 0
  public var elementsPerRow: Int64 = 0
  public var topK: Int64 = 0
  public var indexByteCount: Int64 = 0
  public var isWeighted: Int64 = 0
  public var layout: Int64 = 0
  public var sizing: Int64 = 0
  public var expertAlignment: Int64 = 0
  /// Bytes of a row's scales, of each sidecar; above 32 bits, what they mean.
  public var scales: Int64 = 0
  public var sidecars: (Int64, Int64, Int64) = (0, 0, 0)
  /// Of a combine in steps; 0 otherwise.
  public var tokensPerStep: Int64 = 0
  /// Of a combine whose rows are coded; 0 otherwise.
  public var encoding: Int64 = 0

  /// Not zero: this rank was called wrongly; see `InputFault`.
  public var fault: Int64 = 0
  public var faultDetails: (Int64, Int64, Int64) = (0, 0, 0)
  /// Dispatch: a free hole in this rank's arena. Combine: where this rank's rows lie in it.
  public var outputOffset: Int64 = 0
  public var outputCapacity: Int64 = 0
  /// Rows that the output is laid out for; 0: as many as arrive.
  public var outputRowCapacity: Int64 = 0
  /// Combine: where this rank's top-k weights lie in its arena.
  public var weightsOffset: Int64 = 0
  /// The ranks that this one has masked, one bit each.
  public var masked: Int64 = 0
  /// Combine of LogFMT rows: where this rank's records lie in its arena.
  public var recordsOffset: Int64 = 0
  /// Not zero: this rank's completion comes from a launch that follows; kernels say so. Not that of exact sizing, which stands in
  /// no graph: nothing overlaps there.
  public var completesLater: Int64 = 0

  @inlinable public init() {}

  @inlinable public static var byteCount: Int64 { 256 }
  /// At most 32.
  @inlinable public static var wordCount: Int32 { Int32(truncatingIfNeeded: MemoryLayout<Self>.size / 8) }
  /// Where the arguments of every kernel have it: behind the view.
  @inlinable public static var offsetInArguments: Int64 { Int64(MemoryLayout<RankView>.stride) }
  /// Where `fault` and its details lie, counted in fields.
  @inlinable static var faultIndex: Int32 { Int32(truncatingIfNeeded: HeaderField.encoding.rawValue &+ 1) }
  @inlinable static var handleIndex: Int32 { Int32(truncatingIfNeeded: HeaderField.handle.rawValue) }
  @inlinable static var capacityIndex: Int32 { faultIndex &+ 5 }
  @inlinable static var maskedIndex: Int32 { faultIndex &+ 8 }
  @inlinable static var laterIndex: Int32 { faultIndex &+ 10 }
}

/// The fields of a header that all ranks must agree on, numbered as they lie in it.
@frozen public enum HeaderField: Int64, CaseIterable, Sendable {
  case operation, handle, format, transform, elementsPerRow, topK, indexByteCount, isWeighted, layout, sizing
  case expertAlignment, scales, sidecar0, sidecar1, sidecar2, tokensPerStep, encoding
}

@frozen public enum Operation: Int64, Sendable {
  case dispatch = 1
  case cachedDispatch = 2
  case combine = 3
  /// The second halves of a dispatch and of a combine, where those are called for by themselves.
  case receiveDispatch = 4
  case receiveCombine = 5
}

/// Why a rank's arguments cannot be used. The details' meanings stand beside each case; they travel in its header, so
/// that all ranks can report the same error.
@frozen public enum InputFault: Int64, CaseIterable, Sendable {
  /// Details: token, slot, expert found.
  case expertOutOfRange = 1
  /// Details: token, slot, expert that an earlier slot of the token names too.
  case duplicateExpert = 2
  /// Found while still on the host: the details are an index into what the host knows (see the public API's faults).
  case argument = 3
  /// The arena could not grow. Details: bytes needed, bytes allowed.
  case arenaExhausted = 4
  /// The handle is of a dispatch that failed.
  case emptyHandle = 5
}

/// How an operation ended; written by kernels, read by the host.
@frozen public struct OperationStatus {
  public var code: Int64 = 0
  /// The rank at fault.
  public var rank: Int64 = 0
  public var details: (Int64, Int64, Int64, Int64) = (0, 0, 0, 0)
  /// Bytes that this rank's output takes, and rows that it has: of a dispatch that is `ok`, or overflows.
  public var neededByteCount: Int64 = 0
  public var rowCount: Int64 = 0

  @inlinable public init() {}
  @inlinable public init(_ code: StatusCode, rank: Int64, _ details: (Int64, Int64, Int64, Int64)) {
    self.code = code.rawValue
    self.rank = rank
    self.details = details
  }
  /// Of an operation that has missed a rank: one that knows nothing of rows. Word by word, which kernels keep in registers.
  @inlinable init(failureAt place: Address) {
    let word = { (index: Int32) in place.load(Int64.self, at: index) }
    code = word(0)
    rank = word(1)
    details = (word(2), word(3), word(4), word(5))
  }
  /// - Parameter earlier: what this rank's buffer was lost to; `neededByteCount` is its code.
  @inlinable init(failedBefore earlier: OperationStatus) {
    self.init(.failedBefore, rank: earlier.rank, earlier.details)
    neededByteCount = earlier.code
  }
  /// What `failedBefore` tells of.
  @inlinable public var earlier: OperationStatus {
    var earlier = self
    (earlier.code, earlier.neededByteCount) = (neededByteCount, 0)
    return earlier
  }
  /// Of `checkFailed`.
  @inlinable public var failedCheck: (check: Check?, step: FlightStep?) {
    let (check, step) = (Int32(truncatingIfNeeded: details.0 & 0xff), Int32(truncatingIfNeeded: details.0 &>> 8))
    return (Check(rawValue: check), FlightStep(rawValue: step))
  }
  @inlinable public static var byteCount: Int64 { 64 }
}

@frozen public enum StatusCode: Int64, Sendable {
  /// Details, one bit a rank: those that are masked, and those of them that this rank has found missing.
  case ok = 0
  /// Details: the fault, then its three details.
  case inputFault = 1
  /// Details: the header field, rank 0's value, the other rank's value.
  case disagreement = 2
  /// Details: the signal slot that was waited for (or `inputSlot`), the epoch expected.
  case timeout = 3
  /// The output does not fit. Details: bytes needed, bytes available.
  case overflow = 4
  /// An earlier operation of this buffer missed a rank. Rank and details are that operation's.
  case failedBefore = 5
  /// The rank takes part no more, says the host. Details: as of a timeout.
  case departed = 6
  /// Only of checked builds. Details: the `Check` and, above 8 bits, the `FlightStep`; what was found; where the range ends
  /// in which that should be.
  case checkFailed = 7
  /// The rank has masked this one. Details: as of a timeout.
  case masked = 8

  /// In a timeout's details, beside the signal slots: this rank's own input was not ready in time.
  @inlinable public static var inputSlot: Int64 { 2 }
}
