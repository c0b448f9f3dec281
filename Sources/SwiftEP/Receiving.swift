import EPKernels

/// The second half of a call that returned when its first had been queued (`DispatchOptions.receivesLater`).
final class PendingReceive: Sendable {
  private let pending: PendingOperation
  private let launch: KernelLaunch
  private let workerCount: Int
  /// Whether the first half is part of a graph.
  private let isGraphed: Bool
  private let isAsynchronous: Bool
  private let stream: CUDAStream?
  private let number: Int

  /// - Parameters:
  ///   - pending: whose first half is queued.
  ///   - launch: the second.
  init(
    _ pending: PendingOperation, _ launch: KernelLaunch, workerCount: Int, keeping resources: OperationResources,
    isAsynchronous: Bool, stream: CallStream?
  ) {
    (self.pending, self.launch, self.workerCount) = (pending, launch, workerCount)
    (self.isAsynchronous, self.stream) = (isAsynchronous, stream?.stream)
    isGraphed = pending.core.isGraphed(stream)
    number = pending.core.receives.withLock { $0.expect(resources.again()) }
    pending.handOver(resources, stream: stream)
  }

  func receive() throws(EPError) {
    let core = pending.core
    try core.callLock.withLock { _ throws(EPError) in
      // What a masked rank has not received, it has to receive before it can return.
      try core.checkNotLost()
      let stream = try core.find(stream)
      if core.isGraphed(stream) != isGraphed {
        throw .invalidArgument(
          rank: core.rank, argument: "receive", expected: "one in the same graph as the call, or both in none",
          found: "the other way")
      }
      guard let resources = core.receives.withLock({ $0.remove(number) }) else {
        throw .invalidArgument(
          rank: core.rank, argument: "receive", expected: "one call for each result", found: "another")
      }
      pending.enqueue(launch, workerCount: workerCount, keeping: resources, isUrgent: isAsynchronous, stream: stream)
      pending.handOver(resources, stream: stream)
      pending.isReceived.withLock { $0 = true }
      if !isAsynchronous { try pending.finish() }
    }
  }
}

/// Which results of a buffer are still to be received, and how many exchanges lie between.
struct Receives {
  /// Exchanges that calls may have begun.
  private var exchangeCount = 0
  private var expected: [(number: Int, resources: OperationResources)] = []

  var count: Int { expected.count }

  /// Whether so many exchanges more can be under way: fewer than a cycle is long, since who has completed one may still read what it has
  /// brought, until its launch is over. Behind the completion of the next one, it is.
  fileprivate func hasRoom(for more: Int) -> Bool {
    guard let oldest = expected.first else { return true }
    return exchangeCount + more - oldest.number < Int(ControlLayout.cycleLength)
  }

  fileprivate mutating func begin(_ more: Int) { exchangeCount += more }

  /// What the call uses that has begun the last exchange. It is kept until the result is received: peers use it.
  fileprivate mutating func expect(_ resources: OperationResources) -> Int {
    expected.append((exchangeCount - 1, resources))
    return exchangeCount - 1
  }

  /// What the call uses; nil where nothing is expected.
  fileprivate mutating func remove(_ number: Int) -> OperationResources? {
    guard let index = expected.firstIndex(where: { $0.number == number }) else { return nil }
    return expected.remove(at: index).resources
  }

  mutating func removeAll() { expected = [] }
}

extension BufferCore {
  /// To be asked by every call before anything else. Throws, without a word to the peers, where it has to come later: once
  /// results are received, it can be made again.
  ///
  /// - Parameters:
  ///   - exchangeCount: that the call begins; nil where that depends.
  ///   - later: whether its result is itself to be received later.
  func beginCall(exchangeCount: Int?, waiting: Waiting, receivesLater later: Bool) throws(EPError) {
    func fail(_ argument: String, expected: String, found: String) -> EPError {
      .invalidArgument(rank: rank, argument: argument, expected: expected, found: found)
    }
    if masks != nil && waiting == .stream {
      throw fail("waiting", expected: "workers where ranks can be masked", found: "stream")
    }
    try receives.withLock { receives throws(EPError) in
      if later || receives.count > 0 {
        let state = "while results are to be received"
        guard exchangeCount != nil else { throw fail("sizing", expected: "worstCase \(state)", found: "exact") }
        if waiting == .stream { throw fail("waiting", expected: "workers \(state)", found: "stream") }
      }
      if !receives.hasRoom(for: exchangeCount ?? 1) {
        throw fail(
          "receive", expected: "a call for each result, before \(ControlLayout.cycleLength - 1) others are begun",
          found: "none")
      }
      receives.begin(exchangeCount ?? 1)
    }
  }

  /// Throws unless all results have been received.
  func checkReceived(_ argument: String) throws(EPError) {
    let count = receives.withLock { $0.count }
    if count > 0 {
      throw .invalidArgument(
        rank: rank, argument: argument, expected: "no results that are still to be received", found: "\(count)")
    }
  }
}

extension DispatchResult {
  /// Lets the rows arrive: the second half of a dispatch that was to be received later. To be called once; returns as its
  /// options say, at once or when `event` is complete. Not collective: ranks may receive their dispatches in any order. To be
  /// called even where nobody wants the rows any more: peers write them.
  ///
  /// - Throws: what the dispatch failed with, unless it is asynchronous; `invalidArgument` where there is nothing to be
  ///   received.
  public func receive() throws(EPError) { try SwiftEP.receive(receiving) }
}

extension CombineResult {
  /// Sums the rows: the second half of a combine that was to be received later; as `DispatchResult.receive`, but collective:
  /// it has the same place among the calls of all ranks, since it ends when all peers have read this rank's rows.
  public func receive() throws(EPError) { try SwiftEP.receive(receiving) }
}

private func receive(_ receiving: PendingReceive?) throws(EPError) {
  guard let receiving else {
    throw .invalidArgument(
      rank: -1, argument: "receive", expected: "a result of a call with receivesLater", found: "one without")
  }
  try receiving.receive()
}
