/// Why a gather did not come about.
package enum RendezvousError: Error, Equatable, Sendable {
  /// This participant, the lowest of those, did not come in time.
  case missing(index: Int)
  /// Another process has proven to be this participant.
  case taken(index: Int)
  case countsDiffer(index: Int, expected: Int, found: Int)
  case roomsDiffer(expected: String, found: String)
  /// Somebody listens at `place`, and neither takes this one's proof nor has one.
  case unproven(place: String, found: String)
  case pieceTooLong(byteCountMax: Int, found: Int)
  /// The address cannot be used; `expected` says what for.
  case badAddress(String, expected: String, found: String)
  case systemCall(name: String, code: Int32)
}

extension RendezvousError: CustomStringConvertible {
  package var description: String {
    switch self {
    case .missing(let index): "participant \(index) did not come in time"
    case .taken(let index):
      "expected to be participant \(index), found that another process has proven to be that one"
    case .countsDiffer(let index, let expected, let found):
      "participant 0 expected \(expected) participants, found that participant \(index) expects \(found)"
    case .roomsDiffer(let expected, let found):
      "the one that listens expected who wants to \(expected), found this one, which wants to \(found)"
    case .unproven(let place, let found): "expected the job's own listener at \(place), found \(found)"
    case .pieceTooLong(let byteCountMax, let found): "expected at most \(byteCountMax) bytes, found \(found)"
    case .badAddress(let address, let expected, let found): "\(address): expected \(expected), found \(found)"
    case .systemCall(let name, let code): "\(name) failed with error \(code)"
    }
  }
}
