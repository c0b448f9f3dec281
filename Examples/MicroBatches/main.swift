// Two micro-batches take turns: while the experts compute on one, the rows of the other travel. Prints what that gains
// over running them one after the other. `micro-batches [ranks]`: each rank wants two cores, one of them for its experts.
import Foundation
import SwiftEP

let tokenCount = 1024
let (hidden, topK, expertsPerRank) = (2048, 2, 4)

/// One rank, with a batch of tokens for each turn.
struct Layer {
  let buffer: ExpertBuffer
  let batches: [(x: Tensor, routing: Routing)]
  /// How often the experts go over each row.
  var rounds = 1

  init(_ communicator: Communicator, _ plan: ExpertBuffer.Plan) throws(EPError) {
    buffer = try ExpertBuffer(communicator, plan: plan, workers: 1)
    let expertCount = Int64(communicator.rankCount * expertsPerRank)
    batches = try (0..<2).map { batch throws(EPError) in
      let values = (0..<tokenCount * hidden).map { index -> Float in Float((index * 31 + batch) % 97) / 97 }
      var experts: [Int64] = []
      for token in 0..<Int64(tokenCount) {
        let first = 5 * token + Int64(batch)
        experts += [first % expertCount, (first + 1) % expertCount]
      }
      let x = try Tensor(copying: values, shape: [tokenCount, hidden], .fp32)
      return (x, .topK(indices: try Tensor(copying: experts, shape: [tokenCount, topK], .int64)))
    }
  }

  /// Sends only; `receive` lets the rows arrive.
  func send(_ batch: Int) throws(EPError) -> DispatchResult {
    var options = DispatchOptions()
    (options.sizing, options.receivesLater, options.isAsynchronous) = (.worstCase, true, true)
    return try buffer.dispatch(batches[batch].x, to: batches[batch].routing, options: options)
  }

  /// Stands for the experts: in place, on the thread that calls.
  func compute(_ dispatched: DispatchResult) throws(EPError) {
    let rowCount = Int(try dispatched.rowCount.elements(Int32.self)[0])
    dispatched.rows.withUnsafeMutableBytes { bytes in
      let values = bytes.bindMemory(to: Float.self)
      for row in 0..<rowCount {
        for _ in 0..<rounds {
          for index in row * hidden..<(row + 1) * hidden { values[index] = values[index] * 0.999 + 0.001 }
        }
      }
    }
  }

  /// Seconds that the experts take for one batch.
  func timeCompute(_ count: Int) throws(EPError) -> Double {
    let dispatched = try send(0)
    try dispatched.receive()
    try dispatched.event.wait()
    return try time(count) { () throws(EPError) in for _ in 0..<count { try compute(dispatched) } }
  }

  /// Says that the rows are ready; `receive` sums them.
  func combine(_ dispatched: DispatchResult) throws(EPError) -> CombineResult {
    var options = CombineOptions()
    (options.receivesLater, options.isAsynchronous) = (true, true)
    return try buffer.combine(dispatched.rows, with: dispatched.handle, options: options)
  }

  /// One batch after the other. Returns the sums of both.
  func runInTurn(computing: Bool = true) throws(EPError) -> [Tensor] {
    try (0..<2).map { batch throws(EPError) in
      let dispatched = try send(batch)
      try dispatched.receive()
      try dispatched.event.wait()
      if computing { try compute(dispatched) }
      let combined = try combine(dispatched)
      try combined.receive()
      try combined.event.wait()
      return combined.tokens
    }
  }

  /// The same so many times over, each batch a step ahead of the other. Returns the last sums.
  func runOverlapped(_ count: Int) throws(EPError) -> [Tensor] {
    var arrived = try send(0)
    try arrived.receive()
    var sums: [CombineResult] = []
    for turn in 0..<2 * count {
      try arrived.event.wait()
      // The other batch's rows leave, and its sums are made, while the experts have this one.
      let next = turn + 1 < 2 * count ? try send((turn + 1) % 2) : nil
      try compute(arrived)
      sums = sums.suffix(1) + [try combine(arrived)]
      try next?.receive()
      try sums.last!.receive()
      if let next { arrived = next }
    }
    for sum in sums { try sum.event.wait() }
    return sums.map(\.tokens)
  }
}

/// Seconds that one of `count` runs takes.
func time(_ count: Int, _ body: () throws(EPError) -> Void) throws(EPError) -> Double {
  let begin = ContinuousClock.now
  try body()
  return (ContinuousClock.now - begin) / .seconds(1) / Double(count)
}

func run(_ communicator: Communicator, _ plan: ExpertBuffer.Plan) throws(EPError) {
  var layer = try Layer(communicator, plan)
  let count = 20
  for _ in 0..<3 { _ = try layer.runInTurn() }
  let moving = try time(count) { () throws(EPError) in
    for _ in 0..<count { _ = try layer.runInTurn(computing: false) }
  }
  // As much to compute as there is to move.
  let computing = try layer.timeCompute(count)
  layer.rounds = max(1, Int((moving / (2 * computing)).rounded()))
  let expected = try layer.runInTurn()
  let inTurn = try time(count) { () throws(EPError) in for _ in 0..<count { _ = try layer.runInTurn() } }
  var sums: [Tensor] = []
  let overlapped = try time(count) { () throws(EPError) in sums = try layer.runOverlapped(count) }
  for (sum, wanted) in zip(sums, expected) where try sum.elements(Float.self) != wanted.elements(Float.self) {
    print("rank \(communicator.rank): other sums")
    exit(1)
  }
  let text = { (seconds: Double) in String(format: "%.2f ms", 1e3 * seconds) }
  let gain = Int((100 * (inTurn / overlapped - 1)).rounded())
  print(
    "rank \(communicator.rank): rows alone \(text(moving)), in turn \(text(inTurn)), overlapped \(text(overlapped)): "
      + "\(gain)% faster")
}

let rankCount =
  CommandLine.arguments.dropFirst().first.flatMap { Int($0) }
  ?? max(1, ProcessInfo.processInfo.activeProcessorCount / 2)
let shape = JobShape(
  rankCount: rankCount, tokensPerRankMax: tokenCount, hidden: hidden, topK: topK,
  expertCount: rankCount * expertsPerRank, dtype: .fp32, combineDType: .fp32)
let plan = try ExpertBuffer.Plan(shape, resultCount: 4)
let ranks = try Communicator.threads(rankCount: rankCount).map { communicator in
  Thread {
    do { try run(communicator, plan) } catch {
      print("rank \(communicator.rank): \(error)")
      exit(1)
    }
  }
}
for rank in ranks { rank.start() }
while ranks.contains(where: { !$0.isFinished }) { usleep(1000) }
