import FoundationEssentials
import Glibc
import HostMachine
import SwiftEP

/// Ranks are processes, forked from this one for each run.
package struct ProcessFabric: Fabric {
  /// How long a run may take: then its processes are killed.
  package var patience: Duration
  package let machines: [Machine]

  /// - Parameter machines: which this process itself must not have used: what a driver holds is not the children's.
  package init(patience: Duration = .seconds(600), machines: [Machine] = [.cpu]) {
    (self.patience, self.machines) = (patience, machines)
  }

  package func values<Value: Codable & Sendable>(
    rankCount: Int, timeout: Duration, _ body: @escaping @Sendable (Communicator) throws -> Value
  ) throws -> [Value] {
    try processValues(rankCount, patience: patience) { rank, gather in
      try body(
        try Communicator.processes(rank: rank, rankCount: rankCount, timeout: timeout, allGather: gather))
    }
  }
}

/// Runs `body` in `count` forked processes and returns what it returned, by rank. Each is given an all-gather of bytes
/// between them, to be called once, by all.
///
/// - Throws: what the first to fail has thrown, if it is an `EPError` or a `ConformanceFailure`; otherwise a
///   `ProcessFailure` that describes it.
package func processValues<Value: Codable>(
  _ count: Int, patience: Duration, _ body: (_ rank: Int, _ gather: ([UInt8]) throws -> [[UInt8]]) throws -> Value
) throws -> [Value] {
  let deadline = monotonicNow() &+ patience.nanoseconds
  let processes = try (0..<count).map { rank in
    try withoutActuallyEscaping(body) { body in
      try ForkedProcess { channel in
        let report = RankMessage<Value>(catching: {
          try body(rank) { bytes in
            try channel.send(RankMessage<Value>.piece(bytes))
            return try channel.receive([[UInt8]].self, until: deadline)
          }
        })
        do { try channel.send(report) } catch { return 1 }
        return 0
      }
    }
  }
  var run = ProcessRun<Value>(processes)
  try run.finish(until: deadline)
  return run.values
}

/// What is not one of the library's own errors, in the words of the process that saw it.
package struct ProcessFailure: Error, CustomStringConvertible {
  package let rank: Int
  package let what: String
  package var description: String { "rank \(rank): \(what)" }
}

/// What a forked rank tells its parent.
private enum RankMessage<Value: Codable>: Codable {
  case piece([UInt8])
  case value(Value)
  case error(EPError)
  case failure(ConformanceFailure)
  case other(String)

  init(catching body: () throws -> Value) {
    do {
      self = .value(try body())
    } catch let error as EPError {
      self = .error(error)
    } catch let error as ConformanceFailure {
      self = .failure(error)
    } catch {
      self = .other("\(error)")
    }
  }
}

private struct ProcessRun<Value: Codable> {
  private let processes: [ForkedProcess]
  private var pieces: [[UInt8]?]
  private var results: [Value?]
  private var isOver: [Bool]
  /// The first in time: later ones tend to be its consequences.
  private var failure: (any Error)?

  init(_ processes: [ForkedProcess]) {
    self.processes = processes
    pieces = Array(repeating: nil, count: processes.count)
    results = Array(repeating: nil, count: processes.count)
    isOver = Array(repeating: false, count: processes.count)
  }

  var values: [Value] { results.map { $0! } }

  /// Serves the processes until all have ended.
  mutating func finish(until deadline: UInt64) throws {
    while isOver.contains(false) {
      let waiting = zip(processes, isOver).map { process, isOver in isOver ? nil : process.channel }
      guard let rank = Channel.firstReady(waiting, until: deadline) else {
        throw failure ?? ProcessFailure(rank: isOver.firstIndex(of: false)!, what: "did not end in time")
      }
      do {
        try take(try processes[rank].channel.receive(RankMessage<Value>.self, until: deadline), from: rank)
      } catch {
        let end = processes[rank].wait(until: deadline)
        fail(ProcessFailure(rank: rank, what: end.map { "ended by \($0)" } ?? "closed its connection"), rank)
      }
      // Who waits for a piece that will never come.
      if failure != nil && pieces.contains(where: { $0 == nil }) { throw failure! }
    }
    for process in processes { _ = process.wait(until: deadline) }
    if let failure { throw failure }
  }

  private mutating func take(_ message: RankMessage<Value>, from rank: Int) throws {
    switch message {
    case .piece(let bytes):
      pieces[rank] = bytes
      if pieces.contains(where: { $0 == nil }) { return }
      // One that is gone by now shows when its channel is read.
      for process in processes { try? process.channel.send(pieces.map { $0! }) }
    case .value(let value): (results[rank], isOver[rank]) = (value, true)
    case .error(let error): fail(error, rank)
    case .failure(let error): fail(error, rank)
    case .other(let what): fail(ProcessFailure(rank: rank, what: what), rank)
    }
  }

  private mutating func fail(_ error: any Error, _ rank: Int) {
    failure = failure ?? error
    isOver[rank] = true
  }
}
