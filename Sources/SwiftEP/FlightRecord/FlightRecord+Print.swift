import Glibc

extension FlightRecord {
  /// Writes what led to the loss of a buffer to standard error, in a few lines: unless peers have merely closed theirs,
  /// or `SWIFTEP_FLIGHT_RECORDER=off` is in the environment. Never waits for who reads it.
  func print(becauseOf cause: EPError) {
    guard case .rankMissing(_, _, let absence) = cause, absence != .closed else { return }
    print(lossReport(cause))
  }

  /// The same where the buffer goes on without the ranks.
  func print(withoutRanks ranks: [Int]) {
    let names = ranks.map { name(ofRank: $0) }.joined(separator: ", ")
    print("swiftep: rank \(rank) of \(rankCount) goes on without \(names)\n" + history(operationCountMax: 5))
  }

  private func print(_ report: String) {
    if !Self.isPrinted { return }
    var bytes = Array(report.utf8.prefix(Self.atomicByteCount - 1))
    bytes.append(UInt8(ascii: "\n"))
    var request = pollfd(fd: STDERR_FILENO, events: Int16(POLLOUT), revents: 0)
    // A pipe that can be written to takes this much whole; one that nobody reads any more would be a signal.
    guard poll(&request, 1, 0) == 1, request.revents == Int16(POLLOUT) else { return }
    _ = write(STDERR_FILENO, bytes, bytes.count)
  }

  /// PIPE_BUF: at most so much is not mixed with what others write.
  private static let atomicByteCount = 4096

  private static var isPrinted: Bool {
    guard let value = getenv("SWIFTEP_FLIGHT_RECORDER") else { return true }
    return strcmp(value, "off") != 0
  }

  /// What somebody wants to know first: who waited for whom, where and how long; then how it came to that.
  func lossReport(_ cause: EPError) -> String {
    var lines = ["swiftep: rank \(rank) of \(rankCount) has lost its buffer: \(cause)"]
    if let last = operations.last, let span = last.spans.last {
      let end = span.endNanoseconds ?? readNanoseconds
      let elapsed = durationText(end - min(end, span.beginNanoseconds))
      let step = "rank \(rank): \(last.title), \(span.step)"
      switch (last.outcome, span.step) {
      case (.timeout, .input): lines.append("\(step): waited \(elapsed) for the events that the call was given")
      case (.timeout, _): lines.append("\(step): waited \(elapsed) for \(name(ofRank: last.culprit ?? -1))")
      case (.departed, _):
        lines.append("\(step): waited \(elapsed), until \(name(ofRank: last.culprit ?? -1)) was gone or had given up")
      default: lines.append("\(step): \(last.result)")
      }
    }
    return (lines + [history(operationCountMax: 5)]).joined(separator: "\n")
  }
}
