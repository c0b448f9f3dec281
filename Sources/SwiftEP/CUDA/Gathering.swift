import HostMachine

/// Where ranks meet, time and again, each with an item: the last to come does something with all of them, and all go on
/// when that is done.
final class Gathering<Item: Sendable>: Sendable {
  private let state: Guarded<State>
  private let bell = SharedBell()

  private struct State {
    var items: [Item?]
    var round = 0
    var failure: EPError?
  }

  init(rankCount: Int) { state = Guarded(State(items: Array(repeating: nil, count: rankCount))) }

  /// - Parameter body: what the last to come does; is given the items by rank.
  /// - Throws: what `body` throws, to all; `machineUnavailable` where a rank has left.
  func meet(as rank: Int, with item: Item, _ body: ([Item]) throws(EPError) -> Void) throws(EPError) {
    let (round, all) = try state.withLock { state throws(EPError) -> (Int, [Item]?) in
      if let failure = state.failure { throw failure }
      state.items[rank] = item
      let all = state.items.compactMap { $0 }
      return (state.round, all.count == state.items.count ? all : nil)
    }
    if let all {
      var failure: EPError?
      do throws(EPError) { try body(all) } catch { failure = error }
      state.withLock { [failure] state in
        state.items = Array(repeating: nil, count: state.items.count)
        if failure == nil { state.round += 1 }
        state.failure = state.failure ?? failure
      }
      bell.ring()
      if let failure { throw failure }
      return
    }
    _ = bell.wait(until: .max, spinningFor: 0) { state.withLock { $0.round > round || $0.failure != nil } }
    try state.withLock { state throws(EPError) in
      if state.round == round, let failure = state.failure { throw failure }
    }
  }

  /// Who waits for this rank, now or later, does so in vain.
  func leave(_ rank: Int) {
    state.withLock { state in
      state.failure = state.failure ?? .machineUnavailable("one launch for all ranks: rank \(rank) launches no more")
    }
    bell.ring()
  }
}
