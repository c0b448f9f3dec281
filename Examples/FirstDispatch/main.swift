import Foundation
import SwiftEP

let shape = JobShape(rankCount: 2, tokensPerRankMax: 4, hidden: 8, topK: 2, expertCount: 4)
let plan = try ExpertBuffer.Plan(shape)
print("\(plan.byteCount) bytes a rank")

let ranks = try Communicator.threads(rankCount: 2).map { communicator in
  Thread {
    do {
      let buffer = try ExpertBuffer(communicator, plan: plan)
      let x = try Tensor(copying: [Float](repeating: 1, count: 4 * 8), shape: [4, 8], .fp32)
      let indices = try Tensor(copying: [0, 2, 1, 0, 3, 2, 1, 3] as [Int64], shape: [4, 2], .int64)
      let received = try buffer.dispatch(x, to: .topK(indices: indices))
      // The experts of this rank compute here, on received.rows, in place.
      let y = try buffer.combine(received.rows, with: received.handle).tokens
      print("rank \(communicator.rank): \(received.rows.shape[0]) rows, first sum \(try y.elements(Float.self)[0])")
    } catch { print("rank \(communicator.rank): \(error)") }
  }
}
for rank in ranks { rank.start() }
while ranks.contains(where: { !$0.isFinished }) { usleep(1000) }
