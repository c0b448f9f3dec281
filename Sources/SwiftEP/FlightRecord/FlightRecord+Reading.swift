import EPKernels
import HostMachine

extension FlightRecord {
  /// Reads the record in an arena of this process.
  ///
  /// - Throws: `driver` where the arena is on a GPU that is lost.
  init(of arena: RankArena) throws(EPError) {
    guard let copier = arena.memory.copier else {
      self.init(reading: arena.base, now: monotonicNow())
      return
    }
    let image = try HostMemory(byteCount: arena.controlByteCount)
    let bytes = UnsafeMutableRawBufferPointer(start: image.base.hostPointer, count: Int(arena.controlByteCount))
    try copier.read(arena.base, into: bytes)
    self.init(reading: image.base, now: monotonicNow(), clockOffset: arena.memory.clockOffset)
  }

  /// Reads the record in the arena at `arena`, whose identity has been found to be there and is believed.
  ///
  /// - Parameter clockOffset: what to add to the times in it, to have this host's.
  package init(reading arena: Address, now: UInt64, clockOffset: UInt64 = 0) {
    let identity = arena.advanced(byBytes: ControlLayout.identityOffset).load(ArenaIdentity.self, at: 0)
    let control = ControlLayout(rankCount: identity.rankCount, expertCount: identity.expertCount)
    let reader = FlightReader(
      base: arena.advanced(byBytes: control.recorderOffset), layout: FlightLayout(rankCount: identity.rankCount),
      clockOffset: clockOffset)
    let (progress, operations) = reader.operations()
    rank = Int(identity.rank)
    rankCount = Int(identity.rankCount)
    expertCount = Int(identity.expertCount)
    generation = Int(identity.generation)
    buffer = Int(identity.buffer)
    group = String(identity.group, radix: 16)
    process = Int(identity.process)
    processes = (0..<identity.rankCount).map { Int(truncatingIfNeeded: reader.word(of: .process, peer: $0)) }
    timeoutNanoseconds = identity.timeoutNanoseconds
    self.operations = operations
    longestWaits = (0..<identity.rankCount).compactMap { reader.longestWait(for: $0) }
    current = reader.current(progress, ofRank: identity.rank, last: operations.last, createdAt: identity.createdAt)
    // A step can have begun since `now` was taken.
    readNanoseconds = max(now, current.sinceNanoseconds)
  }
}

/// Reads a recorder while its rank may be writing: see `FlightLayout`.
private struct FlightReader {
  let base: Address
  let layout: FlightLayout
  let clockOffset: UInt64

  /// An operation whose end is not to be seen yet is still on its way there.
  private var progress: FlightProgress {
    let noted = FlightProgress(word: base.advanced(byBytes: FlightLayout.progressOffset).noted())
    if noted.step != .idle || noted.index == 0 || word(.ended, ofRecord: noted.index) != 0 { return noted }
    return FlightProgress(index: noted.index, step: .completion)
  }

  private func word(_ field: FlightField, ofRecord index: Int64) -> UInt64 {
    base.advanced(byBytes: layout.offset(ofRecord: index) + field.offset).noted()
  }

  /// The operations that can be read whole, up to the one that is under way, and where that is.
  func operations() -> (FlightProgress, [FlightRecord.Operation]) {
    var best: (progress: FlightProgress, operations: [FlightRecord.Operation]) = (progress, [])
    // Whoever is overtaken looks again; but not for ever, since the rank may be faster.
    for _ in 0..<8 {
      let before = progress
      let last = before.index
      let first = max(1, last - FlightLayout.recordCount + 1)
      let found = (first..<last + 1).compactMap { index in
        operation(index, until: index == last ? before.step : .idle)
      }
      let after = progress
      let whole = found.filter { Int64($0.index) > after.index - FlightLayout.recordCount }
      if whole.count >= best.operations.count { best = (before, whole) }
      if after.index == before.index { break }
    }
    return best
  }

  /// - Parameter end: the step that it is in; `idle`: it has ended.
  private func operation(_ index: Int64, until end: FlightStep) -> FlightRecord.Operation? {
    func word(_ field: FlightField) -> UInt64 { self.word(field, ofRecord: index) }
    func count(_ field: FlightField) -> Int { Int(truncatingIfNeeded: word(field)) }
    func wait(_ peer: FlightField, _ nanoseconds: FlightField, in step: FlightStep) -> FlightRecord.Wait? {
      let waited = word(nanoseconds)
      let isOver = end == .idle || end > step
      return isOver && waited != 0 ? FlightRecord.Wait(peer: count(peer), nanoseconds: waited) : nil
    }
    let status = StatusCode(rawValue: Int64(bitPattern: word(.statusCode)))
    guard let kind = FlightRecord.Kind(Int64(bitPattern: word(.operation))),
      // The end of one that went well need not be seen with the next one's beginning.
      end != .idle || word(.ended) != 0,
      let outcome = end != .idle ? .underWay : status.flatMap({ FlightRecord.Outcome($0) })
    else { return nil }
    let bytesPerRow = Int64(bitPattern: word(.bytesPerRow))
    let (sent, received) = (count(.rowsSent), count(.rowsReceived))
    let epoch = word(.epoch)
    return FlightRecord.Operation(
      index: Int(index), kind: kind, epoch: epoch == 0 ? nil : epoch, outcome: outcome,
      culprit: outcome == .underWay || outcome == .ok ? nil : count(.statusRank), spans: spans(word, until: end),
      tokenCount: count(.tokenCount), rowsSent: sent, rowsReceived: received, bytesSent: Int64(sent) &* bytesPerRow,
      bytesReceived: Int64(received) &* bytesPerRow, exchangeWait: wait(.exchangePeer, .exchangeWait, in: .exchange),
      completionWait: wait(.completionPeer, .completionWait, in: .completion))
  }

  private func spans(_ word: (FlightField) -> UInt64, until end: FlightStep) -> [FlightRecord.Span] {
    var spans: [FlightRecord.Span] = []
    for step in [FlightStep.input, .prepare, .exchange, .place, .deliver, .completion] where end == .idle || step <= end
    {
      let noted = word(step.beganField)
      if noted == 0 { continue }
      let began = noted &+ clockOffset
      if !spans.isEmpty { spans[spans.count - 1].endNanoseconds = began }
      spans.append(FlightRecord.Span(step: FlightRecord.Step(step), beginNanoseconds: began))
    }
    if !spans.isEmpty && end == .idle { spans[spans.count - 1].endNanoseconds = word(.ended) &+ clockOffset }
    return spans
  }

  func word(of field: PeerField, peer: Int32) -> UInt64 {
    base.advanced(byBytes: layout.offset(of: field, peer: peer)).noted()
  }

  func longestWait(for peer: Int32) -> FlightRecord.LongestWait? {
    for _ in 0..<8 {
      let nanoseconds = word(of: .longestWait, peer: peer)
      let epoch = word(of: .longestWaitEpoch, peer: peer)
      let step = FlightStep(rawValue: Int32(truncatingIfNeeded: word(of: .longestWaitStep, peer: peer)))
      // While it is written, it is zero.
      if nanoseconds != 0, let step, word(of: .longestWait, peer: peer) == nanoseconds {
        return FlightRecord.LongestWait(
          peer: Int(peer), nanoseconds: nanoseconds, step: FlightRecord.Step(step), epoch: epoch)
      }
    }
    return nil
  }

  func current(
    _ progress: FlightProgress, ofRank rank: Int32, last: FlightRecord.Operation?, createdAt: UInt64
  ) -> FlightRecord.Current {
    if progress.step == .idle {
      return FlightRecord.Current(step: .idle, sinceNanoseconds: last?.spans.last?.endNanoseconds ?? createdAt)
    }
    let operation = last.flatMap { Int64($0.index) == progress.index ? $0 : nil }
    // Itself: for anybody.
    let isWaiting = progress.peer >= 0 && progress.peer < layout.rankCount && progress.peer != rank
    return FlightRecord.Current(
      step: FlightRecord.Step(progress.step), operation: operation?.kind, epoch: operation?.epoch,
      peer: isWaiting ? Int(progress.peer) : nil,
      sinceNanoseconds: operation?.spans.last?.beginNanoseconds ?? createdAt)
  }
}

extension FlightStep: Comparable {
  public static func < (left: FlightStep, right: FlightStep) -> Bool { left.rawValue < right.rawValue }
}

extension FlightRecord.Step {
  init(_ step: FlightStep) {
    switch step {
    case .idle: self = .idle
    case .input: self = .input
    case .prepare: self = .prepare
    case .exchange: self = .exchange
    case .place: self = .place
    case .deliver: self = .deliver
    case .completion: self = .completion
    }
  }
}

extension FlightRecord.Kind {
  fileprivate init?(_ operation: Int64) {
    switch Operation(rawValue: operation) {
    case .dispatch: self = .dispatch
    case .cachedDispatch: self = .cachedDispatch
    case .combine: self = .combine
    case .receiveDispatch: self = .receiveDispatch
    case .receiveCombine: self = .receiveCombine
    case nil: return nil
    }
  }
}

extension FlightRecord.Outcome {
  /// Nil for what is not noted.
  fileprivate init?(_ code: StatusCode) {
    switch code {
    case .ok: self = .ok
    case .inputFault: self = .inputFault
    case .disagreement: self = .disagreement
    case .timeout: self = .timeout
    case .overflow: self = .overflow
    case .departed: self = .departed
    case .checkFailed: self = .checkFailed
    case .masked: self = .masked
    case .failedBefore: return nil
    }
  }
}
