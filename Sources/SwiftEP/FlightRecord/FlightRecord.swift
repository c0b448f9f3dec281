import EPKernels
import HostMachine

/// What one rank's buffer is doing, and what its last operations did: read from its arena, where the rank notes it as it
/// goes. The same rank's record can be had from outside its process with `swiftep inspect`.
///
/// Times are nanoseconds of the host's monotonic clock (`CLOCK_MONOTONIC`), which all processes of a host share.
public struct FlightRecord: Equatable, Codable, Sendable {
  public var rank: Int
  public var rankCount: Int
  public var expertCount: Int
  /// How often the group had changed when the buffer was made, and which of the group's buffers it is.
  public var generation: Int
  public var buffer: Int
  /// A random number that the ranks of a group have in common, in hexadecimal.
  public var group: String
  /// The rank's process, by its own count.
  public var process: Int
  /// Process of each rank; 0 where it is not known.
  public var processes: [Int]
  /// How long this rank waits for a peer before it gives up.
  public var timeoutNanoseconds: UInt64
  /// When this was read.
  public var readNanoseconds: UInt64
  public var current: Current
  /// The last ones, at most 64, the oldest first. One that is under way is the last.
  public var operations: [Operation]
  /// Of each peer that was ever waited for, in rank order: the longest wait.
  public var longestWaits: [LongestWait]

  /// Where the rank is now.
  public struct Current: Equatable, Codable, Sendable {
    public var step: Step
    /// Nil when `idle`.
    public var operation: Kind?
    /// Nil until the operation has one.
    public var epoch: UInt64?
    /// The peer that is waited for.
    public var peer: Int?
    public var sinceNanoseconds: UInt64
  }

  public enum Step: String, CaseIterable, Codable, Sendable {
    /// In no operation.
    case idle
    /// Waiting for the events that the call was to wait for.
    case input
    /// Laying out tokens (dispatch), copying rows to where peers can read them (combine), telling the peers.
    case prepare
    /// Waiting for the peers to begin the operation, too.
    case exchange
    /// Comparing what the peers said, and finding every row's place.
    case place
    /// Writing rows to their receivers (dispatch), reading and summing them (combine).
    case deliver
    /// Waiting for the peers to have delivered.
    case completion
  }

  public enum Kind: String, Codable, Sendable {
    case dispatch, cachedDispatch, combine
    /// The second halves of a dispatch and a combine that are received later; the first ones are recorded as those.
    case receiveDispatch, receiveCombine
  }

  public struct Operation: Equatable, Codable, Sendable {
    /// Which of the buffer's operations, counted from 1.
    public var index: Int
    public var kind: Kind
    /// Nil until the rank has begun the exchange.
    public var epoch: UInt64?
    public var outcome: Outcome
    /// The rank at fault, where there is one.
    public var culprit: Int?
    /// The steps that it has come to, each beginning where the one before ends.
    public var spans: [Span]
    public var tokenCount: Int
    /// Dispatch: rows written to all ranks, and received from all. Combine: rows that ranks read here, and rows read from
    /// them. This rank's own are counted, padding is not. Zero until
    /// they are known and, of a dispatch, nobody waits for this rank: on a GPU that can be when all ranks have completed.
    public var rowsSent: Int
    public var rowsReceived: Int
    /// The same in bytes: rows with what travels with them (scales, sidecars, indices, weights, origins).
    public var bytesSent: Int64
    public var bytesReceived: Int64
    /// The last peer to come among those that were not there when the rank began to wait.
    public var exchangeWait: Wait?
    public var completionWait: Wait?
  }

  public enum Outcome: String, Codable, Sendable {
    case underWay, ok
    /// Arguments of a rank that cannot be used, or ranks that disagree: the same on all ranks.
    case inputFault, disagreement
    /// The output did not fit. With exact sizing, another try follows.
    case overflow
    /// A peer was silent for too long; a peer was gone, or had given up.
    case timeout, departed
    /// In a checked build: something was not as it must be.
    case checkFailed
    /// Another rank goes on without this one.
    case masked
  }

  public struct Span: Equatable, Codable, Sendable {
    public var step: Step
    public var beginNanoseconds: UInt64
    /// Nil while the step lasts.
    public var endNanoseconds: UInt64?
  }

  /// How long a peer was waited for that was not there when the rank began to wait.
  public struct Wait: Equatable, Codable, Sendable {
    public var peer: Int
    public var nanoseconds: UInt64
  }

  public struct LongestWait: Equatable, Codable, Sendable {
    public var peer: Int
    public var nanoseconds: UInt64
    /// `exchange` or `completion`.
    public var step: Step
    public var epoch: UInt64
  }
}

extension ExpertBuffer {
  /// What this rank is doing and has done last. Can be read at any time, from any thread, also after the buffer is lost
  /// or closed. Not collective; waits for nobody and disturbs nobody. On a GPU it is copied from there; of a GPU that is
  /// lost there is nothing to be had but who the rank was.
  public var flightRecord: FlightRecord {
    (try? FlightRecord(of: core.arena)) ?? FlightRecord(empty: core)
  }

  /// From now on, `longestWaits` are of later operations only. To be called while none is under way. On a GPU, nothing
  /// happens.
  package func forgetLongestWaits() {
    if core.arena.memory.copier == nil { FlightRecorder(core.view).forgetWaits(HostMachine.host) }
  }
}

extension FlightRecord {
  /// Without operations.
  fileprivate init(empty core: BufferCore) {
    let now = monotonicNow()
    let (membership, view) = (core.membership, core.view)
    (rank, rankCount, expertCount) = (core.rank, core.rankCount, Int(view.expertCount))
    (generation, buffer) = (membership.key.generation, membership.key.index)
    group = String(membership.group.members[0], radix: 16)
    process = Int(membership.group.mesh.card.process)
    processes = (0..<core.rankCount).map { Int(membership.group.process(ofRank: $0) ?? 0) }
    timeoutNanoseconds = view.timeoutNanoseconds
    (readNanoseconds, current) = (now, Current(step: .idle, sinceNanoseconds: now))
    (operations, longestWaits) = ([], [])
  }
}
