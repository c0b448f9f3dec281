/// Everything that can go wrong, as a value.
///
/// Where all ranks are concerned, all of them receive the same value from the same collective call.
public indirect enum EPError: Error, Equatable, Sendable {
  /// An argument cannot be used. `rank` is the rank that passed it; -1 where no rank is involved, as in a plan.
  case invalidArgument(rank: Int, argument: String, expected: String, found: String)
  /// The ranks made calls that do not belong together. `expected` is what rank 0 passed, `found` what `rank` passed.
  case ranksDisagree(about: String, rank: Int, expected: String, found: String)
  /// `rank` did not reach `step` within the buffer's timeout. The buffer that reports this is lost.
  case rankMissing(rank: Int, step: Step, timeout: Duration)
  /// The arena of `rank` can hold no more. Bytes.
  case outOfMemory(rank: Int, neededByteCount: Int64, availableByteCount: Int64)
  /// An earlier operation of this buffer failed in a way that leaves peers' writes possible; the buffer can only be
  /// closed.
  case bufferLost(cause: EPError)
  case bufferClosed
  /// The system refused a call; `code` is its errno.
  case systemCall(name: String, code: Int32)

  /// Where a rank was waited for.
  public enum Step: String, Sendable {
    /// The creation of a buffer.
    case setup
    /// The events that a call was to wait for (`after`): the rank that is missing is the caller's own.
    case input
    /// The beginning of an operation, where all ranks tell each other what they are about to do.
    case exchange
    /// The end of an operation: rows written (dispatch) or read (combine).
    case completion
  }
}

extension EPError: CustomStringConvertible {
  public var description: String {
    switch self {
    case .invalidArgument(let rank, let argument, let expected, let found):
      let whose = rank < 0 ? "" : " of rank \(rank)"
      return "\(argument)\(whose): expected \(expected), found \(found)"
    case .ranksDisagree(let about, let rank, let expected, let found):
      return "ranks disagree about \(about): rank 0 has \(expected), rank \(rank) has \(found)"
    case .rankMissing(let rank, let step, let timeout):
      return "rank \(rank) did not reach step '\(step.rawValue)' within \(timeout)"
    case .outOfMemory(let rank, let needed, let available):
      return "the arena of rank \(rank) needs \(needed) bytes, \(available) can be had"
    case .bufferLost(let cause): return "the buffer was lost earlier: \(cause)"
    case .bufferClosed: return "the buffer is closed"
    case .systemCall(let name, let code): return "\(name) failed: errno \(code)"
    }
  }
}
