import EPKernels
import Glibc
import HostMachine

/// Sees to it that a stream's waits between the parts of operations end, as long as it lives. When a peer takes part no more,
/// or the time is over, it opens all gates; the kernels behind find out what has happened.
///
/// Devices have one, and so have graphs, which may be launched when their buffer is closed.
final class PauseWatch: Sendable {
  private let loop: Loop

  /// - Parameter notices: memory that some words of the view lie in.
  init(_ view: RankView, _ arena: RankArena, notices: any TensorStorage) throws(EPError) {
    loop = Loop(view: view, arena: arena, notices: notices)
    guard let thread = startThread({ [loop] in loop.run() }) else {
      throw .systemCall(rank: Int(view.rank), name: "pthread_create", code: EAGAIN)
    }
    // It has all that it uses. Joined, it could be waited for by a thread of the driver's that it itself waits for.
    pthread_detach(thread)
  }

  deinit { loop.isOver.withLock { $0 = true } }
}

private final class Loop: Sendable {
  let isOver = Guarded(false)
  private let view: RankView
  /// Launches keep it; without any, nothing is to be opened, and its memory should not wait for this thread.
  private weak let arena: RankArena?
  private let notices: any TensorStorage

  init(view: RankView, arena: RankArena, notices: any TensorStorage) {
    (self.view, self.arena, self.notices) = (view, arena, notices)
  }

  func run() {
    var (pause, seenAt): (UInt64, UInt64) = (0, 0)
    while !isOver.withLock({ $0 }) {
      // Often enough for a departure to be learnt soon.
      usleep(5000)
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
    guard let arena else { return }
    let open = try HostMemory(byteCount: 8)
    open.base.store(UInt64(1), at: 0)
    let bytes = UnsafeRawBufferPointer(start: open.base.hostPointer, count: 8)
    for slot in [SignalSlot.exchange, .completion] {
      for source in 0..<view.rankCount where source != view.rank {
        let gate = arena.base.advanced(byBytes: view.control.gateOffset(slot, source: source))
        if let copier = arena.memory.copier { try copier.write(bytes, to: gate) } else { storeReleasing(1, in: gate) }
      }
    }
  }
}
