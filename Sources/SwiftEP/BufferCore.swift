import Arena
import EPKernels
import HostMachine

/// Tells one buffer's handles from another's: alive as long as a handle, so that no later buffer has the same.
final class BufferIdentity: Sendable {}

/// Where a rank's tables lie in one piece of its own memory: where workers count themselves in, what it failed with, which
/// ranks are masked, arenas, then experts' owners, local indices and order.
struct TableOffsets {
  let arrivals: Int64 = 0
  /// `RankView.failure`, with what is behind it.
  let failure: Int64 = 64
  let masks: Int64 = 64 + OperationStatus.byteCount + RankView.findingsByteCount
  let arenas: Int64
  let owners: Int64
  let locals: Int64
  let order: Int64
  let firstPlaces: Int64
  let byteCount: Int64

  /// - Parameter canMask: whether ranks can be masked.
  init(rankCount: Int, expertCount: Int, canMask: Bool) {
    let control = ControlLayout(rankCount: Int32(rankCount), expertCount: Int32(expertCount))
    arenas = masks + (canMask ? RankView.masksByteCount(control) : 0)
    owners = arenas + 16 * Int64(rankCount)
    locals = owners + 4 * Int64(expertCount)
    order = locals + 4 * Int64(expertCount)
    firstPlaces = order + 4 * Int64(expertCount)
    byteCount = firstPlaces + 4 * Int64(rankCount + 1)
  }
}

/// Where the words lie that kernels and the host both read and write: the host's own failure, the alarm and what it is
/// about, and whether the queue of launches waits.
struct NoticeOffsets {
  let hostFailure: Int64 = 0
  let alarm = OperationStatus.byteCount
  let pause = OperationStatus.byteCount + 64
  let departures = OperationStatus.byteCount + 128
  let byteCount: Int64

  init(rankCount: Int) { byteCount = departures + alignUp(8 * Int64(rankCount), to: 64) }
}

/// What the operations of one buffer share.
final class BufferCore: Sendable {
  let identity = BufferIdentity()
  let rank: Int
  let rankCount: Int
  let device: any Device
  let arena: RankArena
  /// Every rank's arena as this process has it mapped, by rank.
  let arenas: [any SymmetricMemory]
  let timeout: Duration
  let view: RankView
  let membership: Membership
  let plan: ExpertBuffer.Plan
  /// Nil where no rank can be masked.
  let masks: RankMasks?
  let owners: [Int32]
  /// Memory behind `view`'s addresses.
  private let tables: any TensorStorage
  private let notices: any TensorStorage
  private let state = Guarded(State())
  /// Calls of one buffer run one at a time.
  let callLock = Guarded(())
  /// What calls are recorded into, rather than run.
  let recording = Guarded<Recording?>(nil)
  let receives = Guarded(Receives())
  /// Of the launches queued so far.
  let lastTicket = Guarded<UInt64>(0)

  private struct State {
    var isClosed = false
  }

  init(
    membership: Membership, plan: ExpertBuffer.Plan, device: any Device, arena: RankArena,
    arenas: [any SymmetricMemory], sharesDevice: Bool, timeout: Duration
  ) throws(EPError) {
    self.membership = membership
    let group = membership.group
    rank = group.rank
    rankCount = group.rankCount
    self.device = device
    self.arena = arena
    self.arenas = arenas
    self.timeout = timeout
    self.plan = plan
    owners = plan.shape.owners
    let expertCount = owners.count
    let offsets = TableOffsets(
      rankCount: rankCount, expertCount: expertCount, canMask: plan.masking != .none)
    let noticeOffsets = NoticeOffsets(rankCount: rankCount)
    tables = try device.makeLocalMemory(byteCount: offsets.byteCount, for: nil)
    notices = try device.makeNotices(byteCount: noticeOffsets.byteCount)
    let (base, words) = (tables.base, notices.base)
    var view = RankView(
      rank: Int32(rank), rankCount: Int32(rankCount), expertCount: Int32(expertCount),
      localExpertCount: Int32(owners.count { $0 == group.rank }), arenas: base.advanced(byBytes: offsets.arenas),
      ownArena: arenas[rank].address,
      expertOwner: base.advanced(byBytes: offsets.owners), expertLocal: base.advanced(byBytes: offsets.locals),
      expertOrder: base.advanced(byBytes: offsets.order), firstPlaces: base.advanced(byBytes: offsets.firstPlaces),
      failure: base.advanced(byBytes: offsets.failure), hostFailure: .null,
      departures: words.advanced(byBytes: noticeOffsets.departures),
      alarm: words.advanced(byBytes: noticeOffsets.alarm), arrivals: base.advanced(byBytes: offsets.arrivals),
      pause: words.advanced(byBytes: noticeOffsets.pause), timeoutNanoseconds: timeout.nanoseconds)
    view.sharesDevice = sharesDevice ? 1 : 0
    if plan.masking == .none {
      masks = nil
    } else {
      view.masks = base.advanced(byBytes: offsets.masks)
      view.masksMissing = plan.masking == .automatic ? 1 : 0
      masks = RankMasks(rank: rank, words: view.masks, memory: tables)
    }
    self.view = view
    let image = try HostMemory(byteCount: offsets.byteCount)
    Self.fill(image.base, offsets, arenas: arenas, owners: owners)
    try tables.write(UnsafeRawBufferPointer(start: image.base.hostPointer, count: Int(offsets.byteCount)))
    try identify(membership)
    device.serve(view, arena: arena, notices: notices)
    group.mesh.register(arenas, for: membership.key)
    group.mesh.register(
      DepartureBoard(memory: notices, view: view, arena: arena, device: device), for: membership.key)
  }

  private static func fill(_ base: Address, _ offsets: TableOffsets, arenas: [any SymmetricMemory], owners: [Int32]) {
    let at = { (offset: Int64) in base.advanced(byBytes: offset) }
    for (rank, arena) in arenas.enumerated() {
      at(offsets.arenas).store(arena.address.bits, at: Int32(rank))
      at(offsets.arenas).store(arena.reservedByteCount, at: Int32(arenas.count + rank))
    }
    var counts = [Int32](repeating: 0, count: arenas.count)
    for (expert, owner) in owners.enumerated() {
      at(offsets.owners).store(owner, at: Int32(expert))
      at(offsets.locals).store(counts[Int(owner)], at: Int32(expert))
      counts[Int(owner)] += 1
    }
    var place: Int32 = 0
    for (rank, count) in counts.enumerated() {
      at(offsets.firstPlaces).store(place, at: Int32(rank))
      place += count
    }
    at(offsets.firstPlaces).store(place, at: Int32(arenas.count))
    for (expert, owner) in owners.enumerated() {
      let first = at(offsets.firstPlaces).load(Int32.self, at: owner)
      let local = at(offsets.locals).load(Int32.self, at: Int32(expert))
      at(offsets.order).store(Int32(expert), at: first + local)
    }
  }

  /// For whoever finds the arena from outside, and for this rank's flight record.
  private func identify(_ membership: Membership) throws(EPError) {
    guard let copier = arena.memory.copier else { return writeIdentity(to: arena.base, membership) }
    let image = try HostMemory(byteCount: view.control.byteCount)
    writeIdentity(to: image.base, membership)
    try copier.write(
      UnsafeRawBufferPointer(start: image.base.hostPointer, count: Int(view.control.byteCount)), to: arena.base)
  }

  private func writeIdentity(to arena: Address, _ membership: Membership) {
    var identity = ArenaIdentity()
    identity.version = ArenaIdentity.layoutVersion
    (identity.rank, identity.rankCount, identity.expertCount) = (view.rank, view.rankCount, view.expertCount)
    identity.generation = Int32(truncatingIfNeeded: membership.key.generation)
    identity.buffer = Int32(truncatingIfNeeded: membership.key.index)
    identity.process = Int64(membership.group.mesh.card.process)
    identity.group = membership.group.members[0]
    identity.timeoutNanoseconds = timeout.nanoseconds
    identity.createdAt = monotonicNow()
    let address = arena.advanced(byBytes: ControlLayout.identityOffset)
    address.store(identity, at: 0)
    for rank in 0..<rankCount {
      FlightRecorder(view, arena: arena).note(
        HostMachine.host, process: membership.group.process(ofRank: rank) ?? 0, ofPeer: Int32(rank))
    }
    // The first word, and the last to be written.
    HostMachine.host.publish(ArenaIdentity.magicNumber, at: address)
  }

  deinit {
    close()
    membership.group.mesh.unregister(membership.key)
    arena.endQuarantine()
  }

  func close() {
    let wasOpen = state.withLock { state in
      defer { state.isClosed = true }
      return !state.isClosed
    }
    if !wasOpen { return }
    callLock.withLock { _ in device.close() }
    receives.withLock { $0.removeAll() }
    membership.close()
  }

  /// Memory that the view's addresses lie in.
  var viewMemory: [any TensorStorage] { [tables, notices] }

  /// Throws unless the buffer can take another call.
  func checkOpen() throws(EPError) {
    try checkNotLost()
    try masks?.checkTakesPart()
  }

  /// Throws where there is no way to go on.
  func checkNotLost() throws(EPError) {
    try state.withLock { state throws(EPError) in
      if state.isClosed { throw .bufferClosed }
      if let cause = membership.lossCause { throw .bufferLost(cause: cause) }
    }
  }

  /// As kernels see it behind waits for events, which end in vain when those come too late.
  var viewBehindWaits: RankView {
    var view = view
    view.hostFailure = notices.base.advanced(byBytes: NoticeOffsets(rankCount: rankCount).hostFailure)
    return view
  }

  /// How often masked ranks have returned.
  var returnCount: Int { masks?.returnCount ?? 0 }

  // MARK: Control words

  /// Exchanges that this rank has begun; not while an operation is under way.
  var epoch: UInt64 {
    get throws(EPError) {
      let place = arena.base.advanced(byBytes: ControlLayout.epochOffset)
      guard let copier = arena.memory.copier else { return place.load(UInt64.self, at: 0) }
      var epoch: UInt64 = 0
      try withUnsafeMutableBytes(of: &epoch) { bytes throws(EPError) in try copier.read(place, into: bytes) }
      return epoch
    }
  }

  func set(epoch: UInt64) throws(EPError) {
    try withUnsafeBytes(of: epoch) { bytes throws(EPError) in
      try write(bytes, to: arena.base.advanced(byBytes: ControlLayout.epochOffset), by: arena.memory.copier)
    }
  }

  /// Signals that have come here. Word by word: a rank that is ahead may give one now.
  func forgetSignals() throws(EPError) {
    let byteCount = view.control.signalsByteCount
    if arena.memory.copier == nil {
      let signals = arena.base.advanced(byBytes: ControlLayout.signalsOffset)
      for offset in stride(from: 0, to: byteCount, by: 8) {
        HostMachine.host.note(0, at: signals.advanced(byBytes: offset))
      }
      return
    }
    let zeros = try HostMemory(byteCount: byteCount)
    try write(
      UnsafeRawBufferPointer(start: zeros.base.hostPointer, count: Int(byteCount)),
      to: arena.base.advanced(byBytes: ControlLayout.signalsOffset), by: arena.memory.copier)
  }

  /// What earlier operations have failed with.
  func forgetFailure() throws(EPError) {
    try withUnsafeBytes(of: OperationStatus()) { bytes throws(EPError) in
      try write(bytes, to: view.failure, by: tables.copier)
    }
  }

  private func write(
    _ bytes: UnsafeRawBufferPointer, to place: Address, by copier: (any MemoryCopier)?
  ) throws(EPError) {
    if let copier { return try copier.write(bytes, to: place) }
    place.hostPointer.copyMemory(from: bytes.baseAddress!, byteCount: bytes.count)
  }

  // MARK: Errors

  /// What a kernel's status means; nil when it means success.
  ///
  /// - Parameter count: `returnCount`, when the operation was called.
  func error(from status: OperationStatus, since count: Int) -> EPError? {
    let rank = Int(status.rank)
    let details = status.details
    switch StatusCode(rawValue: status.code) {
    case .ok: return nil
    case .inputFault: return inputError(rank: rank, details)
    case .disagreement: return disagreement(rank: rank, details)
    case .timeout, .departed, .checkFailed: return membership.lose(to: status)
    case .overflow: return .outOfMemory(rank: rank, neededByteCount: details.0, availableByteCount: details.1)
    case .failedBefore where status.earlier.code == StatusCode.masked.rawValue:
      return error(from: status.earlier, since: count)
    case .failedBefore: return .bufferLost(cause: membership.lose(to: status.earlier))
    case .masked:
      // Later, this rank may have returned.
      if count == returnCount { masks!.learn(masker: rank) }
      return .rankMasked(rank: self.rank, by: rank)
    case nil: preconditionFailure("unknown status \(status.code)")
    }
  }

  private func inputError(rank: Int, _ details: (Int64, Int64, Int64, Int64)) -> EPError {
    let (fault, a, b, c) = details
    switch InputFault(rawValue: fault) {
    case .expertOutOfRange:
      return .invalidArgument(
        rank: rank, argument: "indices[\(a), \(b)]", expected: "-1 or an expert of 0..<\(owners.count)", found: "\(c)")
    case .duplicateExpert:
      return .invalidArgument(
        rank: rank, argument: "indices[\(a), \(b)]", expected: "an expert that the token names once",
        found: "\(c) again")
    case .argument:
      guard let argument = ArgumentFault((a, b, c)) else { preconditionFailure("unknown fault \(details)") }
      return argument.error(rank: rank)
    case .emptyHandle:
      return .invalidArgument(
        rank: rank, argument: "handle", expected: "one of a dispatch that succeeded",
        found: "one of a dispatch that failed")
    case .arenaExhausted: return .outOfMemory(rank: rank, neededByteCount: a, availableByteCount: b)
    case nil: preconditionFailure("unknown fault \(fault)")
    }
  }

  private func disagreement(rank: Int, _ details: (Int64, Int64, Int64, Int64)) -> EPError {
    guard let field = HeaderField(rawValue: details.0) else { preconditionFailure("unknown field \(details.0)") }
    return .ranksDisagree(
      about: field.title, rank: rank, expected: field.describe(details.1), found: field.describe(details.2))
  }
}

extension HeaderField {
  fileprivate var title: String {
    switch self {
    case .operation: "the operation"
    case .handle: "the handle (its dispatch's epoch)"
    case .format: "the rows' dtype"
    case .transform: "quantization"
    case .elementsPerRow: "hidden"
    case .topK: "topK"
    case .indexByteCount: "bytes of an index"
    case .isWeighted: "whether weights are given"
    case .layout: "the layout"
    case .sizing: "sizing"
    case .expertAlignment: "expertAlignment"
    case .scales: "a row of scales"
    case .sidecar0, .sidecar1, .sidecar2: "a row of sidecar \(rawValue - HeaderField.sidecar0.rawValue)"
    case .tokensPerStep: "how rows outside the arena are combined"
    case .encoding: "how combined rows travel"
    }
  }

  fileprivate func describe(_ value: Int64) -> String {
    switch self {
    case .operation: Operation(rawValue: value).map { "\($0)" } ?? "\(value)"
    case .format: DType(rawValue: Int(value)).map { "\($0)" } ?? "\(value)"
    case .transform: transformDescription(value)
    case .isWeighted: value == 0 ? "none" : "weights"
    case .layout: RowLayout(code: value).map { "\($0)" } ?? "\(value)"
    case .sizing: value == 0 ? "exact" : "worstCase"
    case .scales, .sidecar0, .sidecar1, .sidecar2: rowDescription(value)
    case .encoding: RowEncoding(code: value).map { "\($0)" } ?? "\(value)"
    case .tokensPerStep: value == 0 ? "not in steps" : "in steps of \(value) tokens"
    default: "\(value)"
    }
  }

  /// Of `DispatchOptions.transformCode`.
  private func transformDescription(_ code: Int64) -> String {
    let transform = RowTransform(rawValue: Int32(code & 0xff))
    let globalScale = Float(bitPattern: UInt32(truncatingIfNeeded: code >> 32))
    return (transform.map { "\($0)" } ?? "\(code)") + (code >> 8 & 1 == 1 ? " in columns" : "")
      + (transform == .quantizeNVFP4 ? " with global scale \(globalScale)" : "")
  }

  /// Of a tensor's `rowCode`.
  private func rowDescription(_ code: Int64) -> String {
    if code == 0 { return "none" }
    let dtype = DType(rawValue: Int(code >> 32) - 1).map { " of \($0)" } ?? ""
    return "\(code & 0xffff_ffff) bytes\(dtype)"
  }
}

extension ExchangeHeader {
  mutating func set(_ fault: ArgumentFault) {
    self.fault = InputFault.argument.rawValue
    faultDetails = fault.details
  }

  /// Memory for an output that the arena cannot give.
  mutating func set(_ error: EPError) {
    fault = InputFault.arenaExhausted.rawValue
    if case .outOfMemory(_, let needed, let available) = error { faultDetails = (needed, available, 0) }
  }
}
