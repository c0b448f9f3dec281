extension FlightRecord: CustomStringConvertible {
  /// Whose record it is, what the rank is doing, its operations as a table, and the longest waits.
  public var description: String { description(operationCountMax: operations.count) }

  /// The same with the last few operations only.
  package func description(operationCountMax: Int) -> String {
    """
    rank \(rank) of \(rankCount)\(process == 0 ? "" : ", process \(process)"), buffer \(buffer) of generation \(generation)
    now: \(situation)
    \(history(operationCountMax: operationCountMax))
    """
  }

  /// As in "rank 2 has waited 3.2 s for rank 5 in exchange of dispatch, epoch 12".
  public var situation: String {
    let elapsed = durationText(readNanoseconds - min(readNanoseconds, current.sinceNanoseconds))
    if current.step == .idle {
      guard let last = operations.last else {
        return "rank \(rank) has begun no operation, \(elapsed) after its creation"
      }
      return "rank \(rank) has been in no operation for \(elapsed); the last one: \(last.title), \(last.result)"
    }
    let what = title(current.operation, current.epoch)
    if current.step == .input {
      return "rank \(rank) has waited \(elapsed) for the events that its \(what) was given"
    }
    guard let peer = current.peer else { return "rank \(rank) has been in \(current.step) of \(what), for \(elapsed)" }
    return "rank \(rank) has waited \(elapsed) for \(name(ofRank: peer)) in \(current.step) of \(what)"
  }

  /// The last operations as a table, and the longest waits.
  package func history(operationCountMax: Int) -> String {
    if operations.isEmpty { return "no operations" }
    var lines: [String] = []
    let shown = operations.suffix(operationCountMax)
    if !shown.isEmpty {
      lines.append("the last \(shown.count == 1 ? "operation" : "\(shown.count) operations"):")
      lines += "\(table(of: shown))".split(separator: "\n").map { "  \($0)" }
    }
    if !longestWaits.isEmpty {
      let longest = longestWaits.sorted { $0.nanoseconds > $1.nanoseconds }.prefix(3).map { wait in
        "\(durationText(wait.nanoseconds)) for \(name(ofRank: wait.peer)) (\(wait.step), epoch \(wait.epoch))"
      }
      lines.append("the longest waits: \(longest.joined(separator: ", "))")
    }
    return lines.joined(separator: "\n")
  }

  private static let columns: [Step] = [.prepare, .exchange, .place, .deliver, .completion]

  private func table(of operations: ArraySlice<Operation>) -> TextTable {
    var table = TextTable(
      ["operation", "epoch", "tokens", "rows sent", "received"] + Self.columns.map(\.rawValue)
        + ["result", "waited for"])
    for operation in operations {
      let times = Self.columns.map { step in
        guard let span = operation.spans.first(where: { $0.step == step }) else { return "-" }
        let end = span.endNanoseconds ?? readNanoseconds
        return durationText(end - min(end, span.beginNanoseconds)) + (span.endNanoseconds == nil ? "+" : "")
      }
      table.append(
        [
          "\(operation.kind)", operation.epoch.map { "\($0)" } ?? "-", "\(operation.tokenCount)",
          "\(operation.rowsSent)", "\(operation.rowsReceived)",
        ] + times + [operation.result, waitedFor(operation)])
    }
    return table
  }

  private func waitedFor(_ operation: Operation) -> String {
    let waits = [operation.exchangeWait, operation.completionWait]
    return waits.map { wait in wait.map { "\($0.peer)" } ?? "-" }.joined(separator: ", ")
  }

  /// As in "rank 5 (process 4711)".
  package func name(ofRank rank: Int) -> String {
    guard processes.indices.contains(rank), processes[rank] != 0, processes[rank] != process else {
      return "rank \(rank)"
    }
    return "rank \(rank) (process \(processes[rank]))"
  }
}

extension FlightRecord.Operation {
  /// As in "dispatch, epoch 12".
  package var title: String { SwiftEP.title(kind, epoch) }

  /// As in "ok", or "timeout of rank 5".
  package var result: String {
    switch outcome {
    case .underWay: "under way"
    case .ok: "ok"
    case .inputFault: "input fault" + blame
    case .disagreement: "disagreement" + blame
    case .overflow: "overflow" + blame
    case .timeout: "timeout" + blame
    case .departed: "departure" + blame
    case .checkFailed: "failed check" + blame
    case .masked: "masked" + (culprit.map { " by rank \($0)" } ?? "")
    }
  }

  private var blame: String { culprit.map { " of rank \($0)" } ?? "" }
}

private func title(_ kind: FlightRecord.Kind?, _ epoch: UInt64?) -> String {
  "\(kind.map(\.title) ?? "an operation")\(epoch.map { ", epoch \($0)" } ?? "")"
}

extension FlightRecord.Kind: CustomStringConvertible {
  public var description: String { title }

  package var title: String {
    switch self {
    case .dispatch, .combine: rawValue
    case .cachedDispatch: "cached dispatch"
    case .receiveDispatch: "receive of a dispatch"
    case .receiveCombine: "receive of a combine"
    }
  }
}

extension FlightRecord.Step: CustomStringConvertible {
  public var description: String { rawValue }
}

/// Three digits or so: "640 ns", "12.3 us", "4.51 ms", "100.0 s".
package func durationText(_ nanoseconds: UInt64) -> String {
  let value = Double(nanoseconds)
  switch nanoseconds {
  case ..<1_000: return "\(nanoseconds) ns"
  case ..<1_000_000: return "\((value / 1e3).rounded(toPlaces: 1)) us"
  case ..<1_000_000_000: return "\((value / 1e6).rounded(toPlaces: 1)) ms"
  default: return "\((value / 1e9).rounded(toPlaces: 1)) s"
  }
}
