import HostMachine
import SwiftEP

/// A rank's process as the one who makes trouble knows it.
final class ChaosMember {
  enum State {
    /// Has an order and has not reported since.
    case busy
    case works
    case failed(EPError, ChaosPlace)
    case out(EPError)
    case wrong(String)
  }

  let number: Int
  let process: ForkedProcess
  private(set) var state = State.busy
  private(set) var place: ChaosPlace?
  /// When it last had right results in a new group.
  private(set) var workedAt: UInt64 = 0
  /// What it wants to gather.
  var piece: [UInt8]?
  var isStarting = false
  var isJoining = false
  /// Has joined, or tries to, since all were at work last.
  var isNew = false

  init(_ number: Int, _ process: ForkedProcess) { (self.number, self.process) = (number, process) }

  func order(_ order: ChaosOrder) throws {
    switch order {
    case .start: isStarting = true
    case .join: isJoining = true
    case .shrink, .admit: state = .busy
    default: break
    }
    try process.channel.send(order)
  }

  /// Takes one report; returns false when there is none by then.
  func receive(until deadline: UInt64) throws -> Bool {
    guard Channel.firstReady([process.channel], until: deadline) != nil else { return false }
    switch try process.channel.receive(ChaosReport.self, until: deadline) {
    case .piece(let bytes): piece = bytes
    case .works(let place, let time): (state, self.place, workedAt) = (.works, place, time)
    case .failed(let error, let place, _): (state, self.place) = (.failed(error, place), place)
    case .out(let error): state = .out(error)
    case .wrong(let what): state = .wrong(what)
    }
    return true
  }

  func works(in rankCount: Int) -> Bool {
    if case .works = state { return place?.rankCount == rankCount }
    return false
  }

  var hasFailed: Bool {
    if case .failed = state { return true }
    return false
  }
}

extension ChaosMember: CustomStringConvertible {
  var description: String {
    let place = place.map { "rank \($0.rank) of \($0.rankCount) in generation \($0.generation)" } ?? "nowhere"
    let traits = [(isNew, "new"), (isJoining, "joining"), (piece != nil, "with a piece to gather")].filter(\.0).map(\.1)
    return "process \(number) (\(process.id)), \(place): \(state) \(traits.joined(separator: ", "))"
  }
}
