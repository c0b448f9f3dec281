import Glibc

/// Everything that can go wrong, as a value.
///
/// Where all ranks are concerned, all of them receive the same value from the same collective call.
public indirect enum EPError: Error, Equatable, Codable, Sendable {
  /// An argument cannot be used. `rank` is the rank that passed it; -1 where no rank is involved, as in a plan.
  case invalidArgument(rank: Int, argument: String, expected: String, found: String)
  /// The ranks made calls that do not belong together. `expected` is what rank 0 passed, `found` what `rank` passed.
  case ranksDisagree(about: String, rank: Int, expected: String, found: String)
  /// `rank` did not reach `step`. The buffer that reports this is lost. All ranks that are still there name the same
  /// rank; it may be the caller's own.
  case rankMissing(rank: Int, step: Step, because: Absence)
  /// The arena of `rank` can hold no more; or, when a buffer is created, `rank` and those that share a limit with it
  /// would need more together than can be had. Bytes.
  case outOfMemory(rank: Int, neededByteCount: Int64, availableByteCount: Int64)
  /// An earlier operation of this buffer failed in a way that leaves peers' writes possible; the buffer can only be
  /// closed.
  case bufferLost(cause: EPError)
  /// Only of checked builds: at `step` of an operation, a kernel of `rank` would have gone astray, since `check` was `found`.
  /// The buffer that reports this is lost; all ranks report the same.
  case checkFailed(rank: Int, step: FlightRecord.Step, check: String, expected: String, found: String)
  /// Rank `by` has masked `rank`, which is the caller's own, and goes on without it. The buffer takes no calls until the
  /// others take this rank back (`ExpertBuffer.unmask`).
  case rankMasked(rank: Int, by: Int)
  case bufferClosed
  /// The ranks could not find each other.
  case rendezvousFailed(String)
  /// The system refused `rank` a call; `code` is its errno. -1 where no rank is involved.
  case systemCall(rank: Int, name: String, code: Int32)

  /// The NVIDIA driver refused `rank` a call; `name` is the driver's for `code`. -1 where no rank is involved.
  case driver(rank: Int, call: String, code: Int32, name: String)
  /// The machine that was asked for is not here, or cannot do what was asked.
  case machineUnavailable(String)

  /// Why a rank is not there.
  public enum Absence: Equatable, Codable, Sendable {
    /// Its process has ended, or has let go of its communicator.
    case exited
    /// It has closed its buffer.
    case closed
    /// It may be alive, but nothing was heard of it for so long.
    case silent(Duration)
  }

  /// Where a rank was waited for.
  public enum Step: String, Codable, Sendable {
    /// The creation of a group or of a buffer.
    case setup
    /// A change of the group: `shrink`, `admit`, `join`; or of a buffer's mask: `unmask`.
    case regrouping
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
    case .rankMissing(let rank, let step, let absence):
      return "rank \(rank) did not reach step '\(step.rawValue)': \(absence)"
    case .outOfMemory(let rank, let needed, let available):
      return "rank \(rank) needs memory of \(needed) bytes, \(available) can be had"
    case .bufferLost(let cause): return "the buffer was lost earlier: \(cause)"
    case .checkFailed(let rank, let step, let check, let expected, let found):
      return "a check failed on rank \(rank) at step '\(step.rawValue)': \(check): expected \(expected), found \(found)"
    case .rankMasked(let rank, let masker): return "rank \(rank) is masked: rank \(masker) goes on without it"
    case .bufferClosed: return "the buffer is closed"
    case .rendezvousFailed(let why): return "rendezvous failed: \(why)"
    case .driver(let rank, let call, let code, let name):
      return "\(call)\(rank < 0 ? "" : " of rank \(rank)") failed: \(name) (\(code))"
    case .machineUnavailable(let what): return "not available: \(what)"
    case .systemCall(let rank, let name, let code):
      return "\(name)\(rank < 0 ? "" : " of rank \(rank)") failed: \(String(cString: strerror(code)))"
    }
  }
}

extension EPError.Absence: CustomStringConvertible {
  public var description: String {
    switch self {
    case .exited: "it has exited"
    case .closed: "it has closed its buffer"
    case .silent(let timeout): "it was silent for \(timeout)"
    }
  }
}
