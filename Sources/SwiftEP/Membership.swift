import EPKernels
import HostMachine

/// A rank's part in one buffer of its group: how the others learn that it ends, and why it did.
final class Membership: Sendable {
  let group: Group
  let key: BufferKey
  private let timeout: Duration
  /// Where this rank's flight record is.
  private let arena: RankArena
  /// Why peers may still write to this rank's arena though it has given up on them.
  private let cause = Guarded<EPError?>(nil)

  init(group: Group, key: BufferKey, timeout: Duration, arena: RankArena) {
    self.group = group
    self.key = key
    self.timeout = timeout
    self.arena = arena
  }

  var lossCause: EPError? { cause.withLock { $0 } }

  /// This rank makes no more calls.
  func close() { group.mesh.tell(.closed, of: key) }

  /// A rank is missing, or a check has failed, says a kernel, and so the buffer is lost: all others are told, since they would wait for this
  /// one in vain. The first time, what led to it is printed. Returns the first cause.
  @discardableResult
  func lose(to status: OperationStatus) -> EPError {
    let found = error(from: status)
    let (first, isNew) = cause.withLock { cause in
      defer { cause = cause ?? found }
      return (cause ?? found, cause == nil)
    }
    group.mesh.tell(.lost(first), of: key)
    if isNew, let record = try? FlightRecord(of: arena) { record.print(becauseOf: first) }
    return first
  }

  /// Operations go on without these ranks: says so, and what led to it, unless they have merely closed their buffers.
  func report(missing ranks: [Int]) {
    let ranks = ranks.filter { group.mesh.departure(of: $0, in: key) != .closed }
    if !ranks.isEmpty, let record = try? FlightRecord(of: arena) { record.print(withoutRanks: ranks) }
  }

  private func error(from status: OperationStatus) -> EPError {
    if status.code == StatusCode.checkFailed.rawValue { return EPError(failedCheck: status) }
    let step: EPError.Step =
      switch status.details.0 {
      case StatusCode.inputSlot: .input
      case Int64(SignalSlot.exchange.rawValue): .exchange
      default: .completion
      }
    let rank = Int(status.rank)
    if status.code == StatusCode.departed.rawValue, let departure = group.mesh.departure(of: rank, in: key) {
      return departure.error(rank: rank, step: step)
    }
    return .rankMissing(rank: rank, step: step, because: .silent(timeout))
  }
}
