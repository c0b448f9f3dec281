import EPKernels
import Glibc
import HostMachine

/// Sees to it that a stream's waits between the parts of operations end. When a peer takes part no more, or the time is over,
/// it opens all gates; the kernels behind find out what has happened.
final class PauseWatch: @unchecked Sendable {
  private let view: RankView
  private let arena: RankArena
  private let isOver = Guarded(false)
  private var thread: pthread_t?

  /// Often enough for a departure to be learnt soon.
  private static let period: UInt64 = 5_000_000

  /// - Parameter view: its words must be there until `stop` has returned, which must be called: the thread keeps this object.
  init(_ view: RankView, _ arena: RankArena) throws(EPError) {
    (self.view, self.arena) = (view, arena)
    let started = startThread { self.run() }
    guard let started else { throw .systemCall(rank: Int(view.rank), name: "pthread_create", code: EAGAIN) }
    thread = started
  }

  func stop() {
    guard let thread else { return }
    isOver.withLock { $0 = true }
    pthread_join(thread, nil)
    self.thread = nil
  }

  private func run() {
    var (pause, seenAt): (UInt64, UInt64) = (0, 0)
    while !isOver.withLock({ $0 }) {
      usleep(UInt32(Self.period / 1000))
      let (now, current) = (monotonicNow(), loadAcquiring(view.pause))
      // By the host's clock, since when it has seen this one.
      if current != pause { (pause, seenAt) = (current, now) }
      if pause == 0 || !isDeparture && now &- seenAt <= view.timeoutNanoseconds { continue }
      // What the GPU's driver says against it, the rank's own thread learns.
      try? openGates()
    }
  }

  private var isDeparture: Bool {
    (0..<view.rankCount).contains { loadAcquiring(view.departures.advanced(byBytes: 8 * Int64($0))) != 0 }
  }

  private func openGates() throws(EPError) {
    for slot in [SignalSlot.exchange, .completion] {
      for source in 0..<view.rankCount where source != view.rank {
        let gate = arena.base.advanced(byBytes: view.control.gateOffset(slot, source: source))
        guard let copier = arena.memory.copier else {
          storeReleasing(1, in: gate)
          continue
        }
        let open = try HostMemory(byteCount: 8)
        open.base.store(UInt64(1), at: 0)
        try copier.write(UnsafeRawBufferPointer(start: open.base.hostPointer, count: 8), to: gate)
      }
    }
  }
}
