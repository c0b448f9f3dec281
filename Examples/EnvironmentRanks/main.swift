import Foundation
import SwiftEP

// One rank of a job whose processes somebody else starts: swiftep launch, mpirun, torchrun, srun.
do {
  let communicator = try Communicator.fromEnvironment()
  let (rank, count) = (communicator.rank, communicator.rankCount)
  let shape = JobShape(rankCount: count, tokensPerRankMax: 1, hidden: 8, topK: count, expertCount: count)
  let buffer = try ExpertBuffer(communicator, plan: .init(shape))
  defer { buffer.close() }
  // One token, its rank's number in every channel, for the one expert of every rank.
  let x = try Tensor(copying: [Float](repeating: Float(rank), count: 8), shape: [1, 8], .fp32)
  let indices = try Tensor(copying: (0..<count).map { Int64($0) }, shape: [1, count], .int64)
  let received = try buffer.dispatch(x, to: .topK(indices: indices))
  let tokens = try received.rows.elements(Float.self)
  // The expert of this rank computes here, on received.rows, in place. This one changes nothing, so the sum over all
  // experts is the token times their number.
  let sums = try buffer.combine(received.rows, with: received.handle).tokens.elements(Float.self)
  let sources = stride(from: 0, to: tokens.count, by: 8).map { "\(Int(tokens[$0]))" }.joined(separator: ", ")
  print("rank \(rank) of \(count): tokens of ranks \(sources); sum \(sums[0])")
} catch {
  FileHandle.standardError.write(Data("\(error)\n".utf8))
  exit(1)
}
