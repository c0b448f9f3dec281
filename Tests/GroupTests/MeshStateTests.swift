import HostMachine
import Testing

@testable import SwiftEP

@Suite struct MeshStateTests {
  private final class Recorder: Link {
    let parcels = Guarded<[Parcel]>([])
    func enqueue(_ parcel: Parcel) { parcels.withLock { $0.append(parcel) } }
    func flush() {}
    func close() {}

    var departures: [BufferKey] {
      parcels.withLock { parcels in
        parcels.compactMap { parcel in
          if case .departure(let key, _) = parcel.message { return key }
          return nil
        }
      }
    }
  }

  private func parcel(_ index: Int) -> Parcel {
    Parcel(message: .departure(BufferKey(generation: 0, index: index), .closed))
  }

  @Test func messagesWaitForTheConnection() {
    var state = MeshState()
    let link = Recorder()
    for index in 0..<3 { state.send(parcel(index), to: 7) }
    state.send(parcel(9), to: 8)
    #expect(state.unflushed.isEmpty)
    let isTaken1 = state.add(link, to: 7, of: 0)
    #expect(isTaken1)
    state.send(parcel(3), to: 7)
    #expect(link.departures.map(\.index) == [0, 1, 2, 3])
    #expect(state.unflushed.count == 1)
    // Once, even if the connection is taken twice.
    let isTaken2 = state.add(Recorder(), to: 7, of: 0)
    #expect(!isTaken2)
    #expect(link.departures.count == 4)
  }

  /// One whom the group has gone on without comes too late; a newcomer of the latest generation does not.
  @Test func whoComesTooLate() {
    var state = MeshState()
    state.enter(0, members: [1, 2], own: 1)
    state.enter(1, members: [1, 3], own: 1)
    let isTaken3 = state.add(Recorder(), to: 7, of: 0)
    #expect(!isTaken3)
    let isTaken4 = state.add(Recorder(), to: 7, of: 1)
    #expect(isTaken4)
    let isTaken5 = state.add(Recorder(), to: 3, of: 0)
    #expect(isTaken5)
  }

  @Test func nothingIsKeptForOneThatIsGone() {
    var state = MeshState()
    state.exited = [7]
    state.send(parcel(0), to: 7)
    #expect(state.unsent.isEmpty)
  }

  /// The decision that lets somebody in can come before its connection, at every member.
  @Test func theNewcomerGetsTheDecision() throws {
    let newcomer = try Card.make(rank: 2)
    var state = MeshState()
    state.enter(0, members: [1], own: 1)
    state.regroup(0) {
      $0.begin()
      $0.decide(newcomer: newcomer, refusal: nil)
    }
    #expect(state.generations[1] == [1, newcomer.id])
    let link = Recorder()
    let isTaken6 = state.add(link, to: newcomer.id, of: 0)
    #expect(isTaken6)
    let decisions = link.parcels.withLock { parcels in
      parcels.compactMap { parcel -> Regrouping.Decision? in
        if case .regrouping(0, .decision(let decision)) = parcel.message { return decision }
        return nil
      }
    }
    #expect(decisions == [Regrouping.Decision(members: [1], newcomer: newcomer, refusal: nil)])
  }
}
