import SwiftEP

/// What the one who makes trouble tells a rank.
enum ChaosOrder: Codable {
  case start(rank: Int, rankCount: Int)
  /// Join a group, then take part in admitting others, as its members do, until it has that generation.
  case join(untilGeneration: Int)
  /// Go on with those that are left.
  case shrink
  /// The same, admitting one after another who has been told to join.
  case admit(untilGeneration: Int)
  /// What others have brought to a gather of bytes; nothing where they are gone.
  case pieces([[UInt8]])
  /// To a rank at work: end, with the buffer closed before or not.
  case leave(closing: Bool)
  /// To a rank between two groups: make the next buffer with too little of something.
  case starve(Shortage)
}

/// What a process may not have more of.
enum Shortage: Codable, Sendable {
  /// Descriptors beyond those that are open.
  case descriptors(spare: Int)
  /// Address space beyond what is taken, so that no arena can be mapped.
  case memory
}

/// What a rank tells.
enum ChaosReport: Codable {
  case piece([UInt8])
  /// All results of the first job were right.
  case works(ChaosPlace, at: UInt64)
  /// Waits for an order.
  case failed(EPError, ChaosPlace, at: UInt64)
  /// The group goes on without this rank, or it came into none; it ends.
  case out(EPError)
  case wrong(String)
}

/// Where a rank is.
struct ChaosPlace: Codable, Equatable {
  let generation: Int
  let rank: Int
  let rankCount: Int
}
