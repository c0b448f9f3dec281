import EPKernels

extension EPError {
  /// - Parameter status: with the code `checkFailed`.
  init(failedCheck status: OperationStatus) {
    let (_, found, end, _) = status.details
    guard case (let check?, let step?) = status.failedCheck else { preconditionFailure("unknown check \(status)") }
    let isOpen = check == .order
    self = .checkFailed(
      rank: Int(status.rank), step: FlightRecord.Step(step), check: check.title,
      expected: isOpen ? "at least \(check.first)" : "one of \(check.first)..<\(end)", found: "\(found)")
  }
}

extension Check {
  fileprivate var title: String {
    switch self {
    case .expert: "an expert that a token names, when it is used"
    case .slotIndex: "a token's number in its chunk"
    case .count: "a count of an exchange"
    case .arenaOffset: "the beginning of memory in an arena"
    case .token: "a token"
    case .key: "the rank or expert of a row"
    case .row: "a row"
    case .source: "the source rank of a received row"
    case .order: "the distance of a received row's origin from the one before"
    }
  }
}
