import Rendezvous

extension EPError {
  /// What a rendezvous error means to a group.
  ///
  /// - Parameters:
  ///   - ranks: of the participants, by index.
  ///   - own: this process's rank.
  init(_ error: RendezvousError, ranks: [Int], own: Int, step: Step, timeout: Duration) {
    switch error {
    case .missing(let index) where ranks.indices.contains(index):
      self = .rankMissing(rank: ranks[index], step: step, because: .silent(timeout))
    case .countsDiffer(let index, let expected, let found) where ranks.indices.contains(index):
      self = .ranksDisagree(
        about: "the number of ranks", rank: ranks[index], expected: "\(expected)", found: "\(found)")
    case .taken(let index) where ranks.indices.contains(index):
      let expected = ranks[index] < 0 ? "to be the only one that joins" : "to be rank \(ranks[index])"
      self = .rendezvousFailed("expected \(expected), found that another process has proven to be that one")
    case .systemCall(let name, let code): self = .systemCall(rank: own, name: name, code: code)
    default: self = .rendezvousFailed("\(error)")
    }
  }

  static func mapping<Result>(_ body: () throws(InputFault) -> Result) throws(EPError) -> Result {
    do throws(InputFault) {
      return try body()
    } catch {
      throw .invalidArgument(rank: -1, argument: error.subject, expected: error.expected, found: error.found)
    }
  }
}
