/// Notes what a rank's operations do, in its arena, where anybody who maps it can read at any time: see `FlightLayout`.
///
/// One worker at a time writes: one of them until the workers are counted in, then the last to arrive; but how many rows there are is
/// noted by the one that counts them, be it beside the last. Nothing is noted of operations that end at once because an earlier one
/// has missed a rank: they would push out what explains it.
@frozen public struct FlightRecorder {
  public var base: Address
  public var layout: FlightLayout
  /// `RankView.flightIndex`, and where that record lies.
  @usableFromInline let index: Int64
  @usableFromInline let record: Address

  /// Of the operation that the view is of.
  @inlinable public init(_ view: RankView) { self.init(view, arena: view.ownArena) }

  /// That of the rank whose arena it is; of an operation only where it is the view's own.
  @inlinable public init(_ view: RankView, arena: Address) {
    base = arena.advanced(byBytes: view.control.recorderOffset)
    layout = FlightLayout(rankCount: view.rankCount)
    (index, record) = (view.flightIndex, view.flightRecord)
  }

  @inlinable func at(_ offset: Int64) -> Address { base.advanced(byBytes: offset) }

  /// Of the operation that has begun last.
  @inlinable func progress<M: Machine>(_ machine: M) -> FlightProgress {
    FlightProgress(word: machine.peek(at(FlightLayout.progressOffset)))
  }

  @inlinable func note<M: Machine>(_ machine: M, _ field: FlightField, in record: Address, _ value: UInt64) {
    machine.note(value, at: record.advanced(byBytes: field.offset))
  }

  // MARK: Progress

  /// This rank waits for the events that its call is to wait for; the operation's record begins, unless it has. Of a view that
  /// knows its record and earlier failures, behind which nothing is noted. Returns whether there is a record.
  @inlinable public func awaitInput<M: Machine>(_ machine: M, view: RankView, operation: Int64) -> Bool {
    if !view.earlierFailure.isNull { return false }
    if view.isRecorded == 0 { open(machine, operation: operation, .input) }
    return true
  }

  /// The operation begins, and its record unless that has begun already.
  @inlinable func begin<M: Machine>(
    _ machine: M, view: RankView, operation: Int64, tokenCount: Int32, bytesPerRow: Int64
  ) {
    if !view.earlierFailure.isNull { return }
    if view.isRecorded != 0 {
      enter(machine, .prepare, now: machine.now)
    } else {
      open(machine, operation: operation, .prepare)
    }
    note(machine, .tokenCount, in: record, UInt64(truncatingIfNeeded: tokenCount))
    note(machine, .bytesPerRow, in: record, UInt64(bitPattern: bytesPerRow))
  }

  /// The operation's record begins.
  @inlinable func open<M: Machine>(_ machine: M, operation: Int64, _ step: FlightStep) {
    machine.noteZeros(FlightField.count, at: at(layout.offset(ofRecord: index &+ 1)))
    note(machine, .operation, in: record, UInt64(bitPattern: operation))
    enter(machine, step, now: machine.now)
  }

  /// This rank's exchange of `epoch` begins.
  @inlinable func exchange<M: Machine>(_ machine: M, epoch: UInt64) { note(machine, .epoch, in: record, epoch) }

  /// The step before ends at `now`, and this one begins.
  @inlinable func enter<M: Machine>(_ machine: M, _ step: FlightStep, now: UInt64) {
    note(machine, step.beganField, in: record, now)
    machine.note(
      FlightProgress(index: index, step: step).word, at: at(FlightLayout.progressOffset))
  }

  /// Of this rank, as both follow from an exchange; its own rows included.
  @inlinable func count<M: Machine>(_ machine: M, _ rows: CountedRows) {
    note(machine, .rowsSent, in: record, UInt64(bitPattern: rows.sent))
    note(machine, .rowsReceived, in: record, UInt64(bitPattern: rows.received))
  }

  /// The operation has ended, well or not.
  @inlinable public func finish<M: Machine>(_ machine: M, _ status: OperationStatus, now: UInt64) {
    note(machine, .statusCode, in: record, UInt64(bitPattern: status.code))
    note(machine, .statusRank, in: record, UInt64(bitPattern: status.rank))
    note(machine, .ended, in: record, now)
    machine.publish(
      FlightProgress(index: index, step: .idle).word, at: at(FlightLayout.progressOffset))
  }

  /// It has ended well. Not published, since the rank's next operation would wait for that.
  @inlinable func finish<M: Machine>(_ machine: M, now: UInt64) {
    note(machine, .ended, in: record, now)
    machine.note(FlightProgress(index: index, step: .idle).word, at: at(FlightLayout.progressOffset))
  }

  // MARK: Waits

  /// The wait of this step is now for `peer`; for this rank itself: for all whose signals are not there.
  @inlinable func await<M: Machine>(_ machine: M, in step: FlightStep, peer: Int32) {
    machine.note(FlightProgress(index: index, step: step, peer: peer).word, at: at(FlightLayout.progressOffset))
  }

  @inlinable func longestWait(forPeer peer: Int32) -> UInt64 {
    at(layout.offset(of: .longestWait, peer: peer)).load(UInt64.self, at: 0)
  }

  /// The wait for `peer`, which was not there when this rank began to wait, has ended after so long. Within a step, each
  /// such wait is longer than the one before.
  ///
  /// - Parameter longest: `longestWait`, looked up while that lasted.
  @inlinable func waited<M: Machine>(
    _ machine: M, peer: Int32, slot: SignalSlot, epoch: UInt64, nanoseconds: UInt64, longest: UInt64
  ) {
    let isExchange = slot == .exchange
    note(machine, isExchange ? .exchangePeer : .completionPeer, in: record, UInt64(truncatingIfNeeded: peer))
    note(machine, isExchange ? .exchangeWait : .completionWait, in: record, nanoseconds)
    if nanoseconds <= longest { return }
    let place = at(layout.offset(of: .longestWait, peer: peer))
    // Zero while the other two change.
    machine.note(0, at: place)
    machine.note(epoch, at: at(layout.offset(of: .longestWaitEpoch, peer: peer)))
    machine.note(
      UInt64(truncatingIfNeeded: isExchange ? FlightStep.exchange.rawValue : FlightStep.completion.rawValue),
      at: at(layout.offset(of: .longestWaitStep, peer: peer)))
    machine.note(nanoseconds, at: place)
  }

  /// Forgets the longest waits. Not to be called while an operation is under way.
  @inlinable public func forgetWaits<M: Machine>(_ machine: M) {
    var peer: Int32 = 0
    while peer < layout.rankCount {
      machine.note(0, at: at(layout.offset(of: .longestWait, peer: peer)))
      peer = peer &+ 1
    }
  }

  /// The process of `peer`, 0 where nobody knows; written by the host before the first operation.
  @inlinable public func note<M: Machine>(_ machine: M, process: Int32, ofPeer peer: Int32) {
    machine.note(UInt64(truncatingIfNeeded: process), at: at(layout.offset(of: .process, peer: peer)))
  }
}

extension RankView {
  /// The view of an operation that begins, or goes on: there is one at a time.
  @inlinable public func recorded<M: Machine>(_ machine: M) -> RankView {
    let recorder = FlightRecorder(self)
    let last = recorder.progress(machine)
    var view = self
    view.isRecorded = last.step == .idle ? 0 : 1
    view.flightIndex = last.index &+ 1 &- Int64(view.isRecorded)
    view.flightRecord = recorder.at(recorder.layout.offset(ofRecord: view.flightIndex))
    return view
  }
}
