import Glibc
import SwiftEP

/// What the suite asks of a machine and of the way its ranks are run: buffers, one for each rank. The suite knows
/// nothing else of them, so it is the same for threads, processes and GPUs.
package protocol Fabric: Sendable {
  /// Makes a buffer on every rank and runs `body` with each, all at the same time. Returns when all are done; throws
  /// what the first to fail has thrown.
  func run(
    plan: ExpertBuffer.Plan, workers: Int, timeout: Duration, _ body: @escaping @Sendable (ExpertBuffer) throws -> Void
  ) throws
}

/// Ranks are threads of this process.
package struct ThreadFabric: Fabric {
  package init() {}

  package func run(
    plan: ExpertBuffer.Plan, workers: Int, timeout: Duration, _ body: @escaping @Sendable (ExpertBuffer) throws -> Void
  ) throws {
    let communicators = try Communicator.threads(rankCount: plan.shape.rankCount)
    try inParallel(communicators.count) { rank in
      let buffer = try ExpertBuffer(communicators[rank], plan: plan, workers: workers, timeout: timeout)
      defer { buffer.close() }
      try body(buffer)
    }
  }
}

/// Runs `body` on `count` threads and waits for all; throws what the first to fail has thrown.
package func inParallel(_ count: Int, _ body: @escaping @Sendable (Int) throws -> Void) throws {
  let failure = FirstFailure()
  let threads = (0..<count).map { index in
    Thread {
      do { try body(index) } catch { failure.record(error) }
    }
  }
  for thread in threads { thread.join() }
  if let error = failure.error { throw error }
}

/// A thread that runs until its body returns.
package struct Thread {
  private let thread: pthread_t

  private final class Body: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
  }

  package init(_ body: @escaping @Sendable () -> Void) {
    let argument = Unmanaged.passRetained(Body(body))
    var thread = pthread_t()
    let code = pthread_create(
      &thread, nil,
      { argument in
        Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue().run()
        return nil
      }, argument.toOpaque())
    precondition(code == 0, "pthread_create failed: errno \(code)")
    self.thread = thread
  }

  package func join() { pthread_join(thread, nil) }
}

/// Of several threads' errors the first in time: later ones tend to be its consequences.
private final class FirstFailure: @unchecked Sendable {
  private let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private var first: (any Error)?

  init() {
    lock.initialize(to: pthread_mutex_t())
    pthread_mutex_init(lock, nil)
  }

  deinit {
    pthread_mutex_destroy(lock)
    lock.deallocate()
  }

  func record(_ error: any Error) {
    pthread_mutex_lock(lock)
    if first == nil { first = error }
    pthread_mutex_unlock(lock)
  }

  /// To be read when all threads have been joined.
  var error: (any Error)? { first }
}
