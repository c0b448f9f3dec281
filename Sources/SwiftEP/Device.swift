import EPKernels
import Glibc
import HostMachine

/// What the API asks of the hardware that runs the protocol: queues of launches, and memory that no peer touches.
package protocol Device: AnyObject, Sendable {
  /// The kind of hardware: `cpu`.
  var name: String { get }
  /// Workers that one call can use.
  var workerCountMax: Int { get }

  /// Queues a launch behind all earlier ones; `owner` is kept alive until it has finished. Returns its ticket.
  /// An urgent launch makes progress though nobody waits for it.
  func enqueue(_ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool) -> UInt64

  /// Queues a wait: later launches begin after `body` has returned.
  func enqueueWait(isUrgent: Bool, _ body: @escaping @Sendable () -> Void)

  func isFinished(_ ticket: UInt64) -> Bool
  func wait(for ticket: UInt64)

  /// Zeroed memory that this rank's kernels and its host can both reach.
  func makeLocalMemory(byteCount: Int64) throws(EPError) -> any TensorStorage

  /// Finishes what is queued and gives everything back.
  func close()
}

/// A rank whose workers are threads.
package final class HostDevice: Device {
  private let stream: HostStream

  package init(rank: Int, workerCount: Int, tuning: HostTuning) throws(EPError) {
    guard let stream = HostStream(workerCount: workerCount, tuning: tuning) else {
      throw .systemCall(rank: rank, name: "pthread_create", code: EAGAIN)
    }
    self.stream = stream
  }

  package var name: String { "cpu" }
  package var workerCountMax: Int { stream.workerCountMax }

  package func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool
  ) -> UInt64 {
    stream.enqueue(launch, workerCount: workerCount, keeping: owner, isUrgent: isUrgent)
  }

  package func enqueueWait(isUrgent: Bool, _ body: @escaping @Sendable () -> Void) {
    _ = stream.enqueue(isUrgent: isUrgent, body)
  }

  package func isFinished(_ ticket: UInt64) -> Bool { stream.isFinished(ticket) }
  package func wait(for ticket: UInt64) { _ = stream.wait(for: ticket) }
  package func makeLocalMemory(byteCount: Int64) throws(EPError) -> any TensorStorage {
    try HostMemory(byteCount: byteCount)
  }
  package func close() { stream.close() }
}
