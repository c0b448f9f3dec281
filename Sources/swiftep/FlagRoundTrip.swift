import Arena
import EPKernels
import HostMachine

/// How long it takes until a rank that signals another has its answer, by the machine's own signals.
final class FlagRoundTrip: Sendable {
  private let region: SharedRegion

  init() throws(SystemCallError) { region = try SharedRegion(byteCount: 2 * Self.stride) }

  private static let stride = 4096

  /// Ranks 0 and 1 call this at the same time; others return at once. Nanoseconds, the mean over the fastest of some
  /// batches: in the others, somebody waited for a core. Nil where a rank does not answer.
  func measure(rank: Int) -> Double? {
    if rank > 1 { return nil }
    let (batchCount, turnsPerBatch) = (20, 200)
    let machine = HostMachine(spinNanoseconds: 50_000)
    let own = Address(region.base + rank * Self.stride)
    let peer = Address(region.base + (1 - rank) * Self.stride)
    let alarm = own.advanced(byBytes: 512)
    var turn: UInt64 = 0
    var best: UInt64?
    for _ in 0..<batchCount {
      let begin = machine.now
      for _ in 0..<turnsPerBatch {
        turn += 1
        if rank == 0 { machine.signal(1, to: .system) { _ in SignalWord(arena: peer, offset: 256, epoch: turn) } }
        let wait = machine.await(
          own, count: 1, epoch: turn, as: .system, deadline: begin &+ 10_000_000_000, alarm: alarm, heard: 0,
          offset: { _ in 256 }, awaited: { _ in }, seen: { _ in })
        if wait.result != .signalled { return nil }
        if rank == 1 { machine.signal(1, to: .system) { _ in SignalWord(arena: peer, offset: 256, epoch: turn) } }
      }
      best = min(best ?? .max, machine.now - begin)
    }
    return best.map { Double($0) / Double(turnsPerBatch) }
  }
}
