import HostMachine
import SwiftEP

@testable import EPKernels

/// A recorder with an arena of its own, and nothing else of a rank: tests write what kernels would.
final class Recording: @unchecked Sendable {
  let rankCount: Int32
  let control: ControlLayout
  let arena: UnsafeMutableRawPointer
  private let tables: UnsafeMutableRawPointer
  let view: RankView
  let machine = HostMachine.host

  init(rank: Int32 = 1, rankCount: Int32 = 4) {
    self.rankCount = rankCount
    control = ControlLayout(rankCount: rankCount, expertCount: 8)
    arena = .allocate(byteCount: Int(control.byteCount), alignment: 4096)
    arena.initializeMemory(as: UInt8.self, repeating: 0, count: Int(control.byteCount))
    tables = .allocate(byteCount: 64 + 8 * Int(rankCount), alignment: 64)
    tables.initializeMemory(as: UInt8.self, repeating: 0, count: 64 + 8 * Int(rankCount))
    let base = Address(tables)
    let arenas = base.advanced(byBytes: 64)
    arenas.store(Address(arena).bits, at: rank)
    view = RankView(
      rank: rank, rankCount: rankCount, expertCount: 8, localExpertCount: 2, arenas: arenas, ownArena: Address(arena),
      expertOwner: .null, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: base,
      hostFailure: .null, departures: .null, alarm: .null, arrivals: .null, pause: .null,
      timeoutNanoseconds: 1_000_000_000)
    var identity = ArenaIdentity()
    identity.magic = ArenaIdentity.magicNumber
    identity.version = ArenaIdentity.layoutVersion
    (identity.rank, identity.rankCount, identity.expertCount) = (rank, rankCount, 8)
    (identity.group, identity.createdAt) = (0xabc, 5)
    Address(arena).advanced(byBytes: ControlLayout.identityOffset).store(identity, at: 0)
  }

  deinit {
    arena.deallocate()
    tables.deallocate()
  }

  func read(at now: UInt64 = monotonicNow()) -> FlightRecord { FlightRecord(reading: Address(arena), now: now) }

  /// Overwrites the word of `field` in the record of operation `index`.
  func overwrite(_ field: FlightField, of index: Int, with word: UInt64) {
    let offset =
      control.recorderOffset + FlightLayout(rankCount: rankCount).offset(ofRecord: Int64(index)) + field.offset
    Address(arena).advanced(byBytes: offset).store(word, at: 0)
  }

  // MARK: What kernels do

  /// As a kernel knows the rank that begins now.
  var begun: RankView {
    var view = view.recorded(machine)
    view.earlierFailure = findEarlierFailure(view)
    return view
  }
  var recorder: FlightRecorder { FlightRecorder(begun) }

  /// Everything in operation `index` follows from its index, but the times that its begin was noted at.
  func begin(_ index: Int) {
    recorder.begin(
      machine, view: begun, operation: Int64(1 + index % 3), tokenCount: Int32(index), bytesPerRow: Int64(3 * index))
    recorder.exchange(machine, epoch: UInt64(index + 1000))
  }

  /// Waits `nanoseconds` for each of `peers`, as the recorder learns it.
  func wait(_ index: Int, in slot: SignalSlot, for peers: KeyValuePairs<Int32, UInt64>) {
    let step: FlightStep = slot == .exchange ? .exchange : .completion
    recorder.enter(machine, step, now: machine.now)
    for (peer, nanoseconds) in peers {
      recorder.await(machine, in: step, peer: peer)
      recorder.waited(
        machine, peer: peer, slot: slot, epoch: UInt64(index + 1000), nanoseconds: nanoseconds,
        longest: recorder.longestWait(forPeer: peer))
    }
  }

  func deliver(_ index: Int) {
    recorder.enter(machine, .place, now: machine.now)
    recorder.count(machine, CountedRows(sent: Int64(5 * index), received: Int64(7 * index)))
    recorder.enter(machine, .deliver, now: machine.now)
  }

  func finish(_ code: StatusCode = .ok, culprit: Int64 = 0) {
    if code == .ok { return recorder.finish(machine, now: machine.now) }
    recorder.finish(machine, OperationStatus(code, rank: culprit, (0, 0, 0, 0)), now: machine.now)
  }

  /// Operation `index`, from begin to end.
  func run(_ index: Int) {
    begin(index)
    wait(index, in: .exchange, for: [0: UInt64(index), 2: UInt64(2 * index)])
    deliver(index)
    wait(index, in: .completion, for: [3: UInt64(4 * index)])
    finish()
  }
}

/// What is wrong with a record of an operation that `Recording.run` made; nil: nothing. Times are checked for their
/// order.
func fault(in operation: FlightRecord.Operation) -> String? {
  let index = operation.index
  let kinds: [FlightRecord.Kind] = [.dispatch, .cachedDispatch, .combine]
  if operation.kind != kinds[index % 3] { return "\(operation.kind)" }
  let isComplete = operation.outcome == .ok
  var times: [UInt64] = []
  for span in operation.spans { times += [span.beginNanoseconds, span.endNanoseconds ?? .max] }
  if times != times.sorted() || times.isEmpty { return "times \(times)" }
  for (span, next) in zip(operation.spans, operation.spans.dropFirst())
  where span.endNanoseconds != next.beginNanoseconds { return "a gap in \(times)" }
  // Of one that is under way, words are zero or final.
  func check(_ name: String, _ found: Int, _ expected: Int) -> String? {
    found == expected || !isComplete && found == 0 ? nil : "\(name): \(found), not \(expected)"
  }
  if isComplete && operation.spans.map(\.step) != [.prepare, .exchange, .place, .deliver, .completion] {
    return "steps \(operation.spans)"
  }
  return check("tokens", operation.tokenCount, index) ?? check("epoch", Int(operation.epoch ?? 0), index + 1000)
    ?? check("rows sent", operation.rowsSent, 5 * index) ?? check("rows received", operation.rowsReceived, 7 * index)
    ?? check("bytes sent", Int(operation.bytesSent), 15 * index * index)
    ?? check("bytes received", Int(operation.bytesReceived), 21 * index * index)
    ?? check("exchange's peer", operation.exchangeWait?.peer ?? 0, 2)
    ?? check("exchange's wait", Int(operation.exchangeWait?.nanoseconds ?? 0), 2 * index)
    ?? check("completion's peer", operation.completionWait?.peer ?? 0, 3)
    ?? check("completion's wait", Int(operation.completionWait?.nanoseconds ?? 0), 4 * index)
}
