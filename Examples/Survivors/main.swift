import Foundation
import SwiftEP

// swift build && swiftep launch -n 3 --keep-going -- .build/debug/survivors: rank 1 is killed, the others go on.

func makePlan(_ rankCount: Int) throws -> ExpertBuffer.Plan {
  try ExpertBuffer.Plan(JobShape(rankCount: rankCount, tokensPerRankMax: 4, hidden: 8, topK: 2, expertCount: 6))
}

/// Every token to its two experts and back.
func step(_ buffer: ExpertBuffer) throws {
  let x = try Tensor(copying: [Float](repeating: 1, count: 4 * 8), shape: [4, 8], .fp32)
  let indices = try Tensor(copying: [0, 5, 1, 4, 2, 3, 5, 0] as [Int64], shape: [4, 2], .int64)
  let received = try buffer.dispatch(x, to: .topK(indices: indices))
  _ = try buffer.combine(received.rows, with: received.handle)
}

var communicator = try Communicator.fromEnvironment()
var buffer = try ExpertBuffer(communicator, plan: try makePlan(communicator.rankCount))
var stepCount = 0
while stepCount < 100 {
  if communicator.generation == 0 && communicator.rank == 1 && stepCount == 50 { kill(getpid(), SIGKILL) }
  do {
    try step(buffer)
    stepCount += 1
  } catch EPError.rankMissing(let rank, _, let absence) {
    // All that are left are here, and all name the same rank: at once if it has ended, after the timeout if it is silent.
    print("rank \(communicator.rank): rank \(rank) is missing, \(absence)")
    buffer.close()
    communicator = try communicator.shrink()  // or admit(), while a new process calls join
    buffer = try ExpertBuffer(communicator, plan: try makePlan(communicator.rankCount))
  }
}
print("rank \(communicator.rank) of \(communicator.rankCount): \(stepCount) steps")
