/// What happens to a rank.
package enum ChaosFault: String, CaseIterable, Sendable {
  /// `kill -9`.
  case kill
  /// `kill -9` of two at the same moment.
  case killTwo
  /// `kill -9` at some moment of the regrouping that follows another fault, or of a buffer's creation.
  case killRegrouping
  /// The process ends by itself, its buffer open.
  case exit
  /// The process closes its buffer, then ends.
  case close
  /// `SIGSTOP` until the others have given it up, then `SIGCONT`.
  case stop
  /// The process may open no more files when the next buffer is made.
  case descriptors
  /// The process may map no more memory when the next buffer is made.
  case memory

  /// Most of them quick: one that is silent takes a timeout.
  static func random(_ random: inout SplitMix64) -> ChaosFault {
    let draw = random.pick(0...99)
    return switch draw {
    case ..<40: .kill
    case ..<50: .killTwo
    case ..<72: .killRegrouping
    case ..<79: .exit
    case ..<86: .close
    case ..<90: .stop
    case ..<95: .descriptors
    default: .memory
    }
  }
}
