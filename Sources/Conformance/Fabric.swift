import Glibc
import HostMachine
import SwiftEP

/// What the suite asks of the way in which ranks are run: a group of them. It knows nothing else of them, so it is the
/// same for threads, processes and GPUs.
package protocol Fabric: Sendable {
  /// What their operations run on: each rank on one, in turn.
  var machines: [Machine] { get }

  /// Makes a group and runs `body` on every rank, all at the same time. Returns, by rank, what it returned, when all
  /// are done; throws what the first to fail has thrown. Nothing else that `body` does need be seen here.
  ///
  /// - Parameter timeout: how long ranks have to find each other.
  func values<Value: Codable & Sendable>(
    rankCount: Int, timeout: Duration, _ body: @escaping @Sendable (Communicator) throws -> Value
  ) throws -> [Value]
}

extension Fabric {
  package var machines: [Machine] { [.cpu] }

  package func machine(ofRank rank: Int) -> Machine { machines[rank % machines.count] }

  /// The same with a buffer on every rank, closed at the end.
  package func values<Value: Codable & Sendable>(
    plan: ExpertBuffer.Plan, workers: Int, timeout: Duration,
    _ body: @escaping @Sendable (ExpertBuffer) throws -> Value
  ) throws -> [Value] {
    try values(rankCount: plan.shape.rankCount, timeout: timeout) { communicator in
      let buffer = try ExpertBuffer(
        communicator, plan: plan, workers: workers, timeout: timeout, machine: machine(ofRank: communicator.rank))
      defer { buffer.close() }
      return try body(buffer)
    }
  }

  package func run(
    plan: ExpertBuffer.Plan, workers: Int, timeout: Duration, _ body: @escaping @Sendable (ExpertBuffer) throws -> Void
  ) throws {
    _ = try values(plan: plan, workers: workers, timeout: timeout) { buffer in
      try body(buffer)
      return true
    }
  }
}

/// Ranks are threads of this process.
package struct ThreadFabric: Fabric {
  package let machines: [Machine]

  package init(_ machines: [Machine] = [.cpu]) { self.machines = machines }

  package func values<Value: Codable & Sendable>(
    rankCount: Int, timeout: Duration, _ body: @escaping @Sendable (Communicator) throws -> Value
  ) throws -> [Value] {
    let communicators = try Communicator.threads(rankCount: rankCount)
    return try valuesInParallel(rankCount) { try body(communicators[$0]) }
  }
}

/// Ranks are threads of this process that reach each other as processes do: over sockets, each with a mapping of its own
/// of every arena.
package struct SocketFabric: Fabric {
  package let machines: [Machine]

  package init(_ machines: [Machine] = [.cpu]) { self.machines = machines }

  package func values<Value: Codable & Sendable>(
    rankCount: Int, timeout: Duration, _ body: @escaping @Sendable (Communicator) throws -> Value
  ) throws -> [Value] {
    let meeting = Meeting(count: rankCount)
    return try valuesInParallel(rankCount) { rank in
      let communicator = try Communicator.processes(rank: rank, rankCount: rankCount, timeout: timeout) { bytes in
        try meeting.gather(bytes, from: rank)
      }
      return try body(communicator)
    }
  }
}

/// An all-gather of bytes between threads, once.
package final class Meeting: Sendable {
  package let count: Int
  private let pieces: Guarded<[[UInt8]?]>

  package struct Incomplete: Error {}

  package init(count: Int) {
    self.count = count
    pieces = Guarded(Array(repeating: nil, count: count))
  }

  /// - Throws: `Incomplete` after 30 seconds.
  package func gather(_ bytes: [UInt8], from index: Int) throws -> [[UInt8]] {
    pieces.withLock { $0[index] = bytes }
    let deadline = monotonicNow() + 30_000_000_000
    while monotonicNow() < deadline {
      if let all = pieces.withLock({ pieces in pieces.contains { $0 == nil } ? nil : pieces.map { $0! } }) {
        return all
      }
      usleep(100)
    }
    throw Incomplete()
  }
}

/// Runs `body` on `count` threads and waits for all; throws what the first to fail has thrown. Where the system allows
/// fewer threads, none runs.
package func inParallel(_ count: Int, _ body: @escaping @Sendable (Int) throws -> Void) throws {
  let state = Guarded(ParallelState())
  var threads: [pthread_t] = []
  for index in 0..<count {
    let thread = startThread {
      while !state.withLock({ $0.hasBegun || $0.failure != nil }) { usleep(50) }
      guard state.withLock({ $0.hasBegun }) else { return }
      do { try body(index) } catch { state.withLock { $0.failure = $0.failure ?? error } }
    }
    guard let thread else {
      state.withLock { $0.failure = EPError.systemCall(rank: -1, name: "pthread_create", code: EAGAIN) }
      break
    }
    threads.append(thread)
  }
  if threads.count == count { state.withLock { $0.hasBegun = true } }
  for thread in threads { pthread_join(thread, nil) }
  if let error = state.withLock({ $0.failure }) { throw error }
}

/// Runs `body` on `count` threads and returns what it returned, by index.
package func valuesInParallel<Value: Sendable>(
  _ count: Int, _ body: @escaping @Sendable (Int) throws -> Value
) throws -> [Value] {
  let values = Guarded([Value?](repeating: nil, count: count))
  try inParallel(count) { index in
    let value = try body(index)
    values.withLock { $0[index] = value }
  }
  return values.withLock { $0.map { $0! } }
}

private struct ParallelState {
  /// All threads are there.
  var hasBegun = false
  /// The first in time: later ones tend to be its consequences.
  var failure: (any Error)?
}
