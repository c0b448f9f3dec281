import HostMachine
import SwiftEP
import Testing

@testable import EPKernels

@Suite struct CompletionTests {
  /// Whoever looks at a rank's record while the rank waits for completions, or when it has done so in vain, sees what is known of its
  /// rows: they are noted before.
  @Test func rowsAreNotedBeforeTheWait() throws {
    let control = ControlLayout(rankCount: 2, expertCount: 1)
    let arenas = try (0..<2).map { _ in try HostMemory(byteCount: control.byteCount) }
    let own = try HostMemory(byteCount: 8192)
    let at = { own.base.advanced(byBytes: $0) }
    for rank in 0..<2 { at(0).store(arenas[rank].base.bits, at: Int32(rank)) }
    let view = RankView(
      rank: 0, rankCount: 2, expertCount: 1, localExpertCount: 1, arenas: at(0), ownArena: arenas[0].base,
      expertOwner: .null, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: at(1024),
      hostFailure: .null, departures: at(2048), alarm: at(2112), arrivals: at(2176), pause: at(2240),
      timeoutNanoseconds: 1)
    let operation = OperationView(
      block: at(4096), report: at(3072), layout: OperationLayout(rankCount: 2, expertCount: 1, chunkCount: 0),
      part: .whole)
    let machine = HostMachine.host
    var (begun, noted) = (view.recorded(machine), [StatusCode.RawValue]())
    begun.epoch = 1
    FlightRecorder(begun).begin(machine, view: begun, operation: 1, tokenCount: 1, bytesPerRow: 1)
    complete(machine, view: begun, operation: operation, Outcome(.ok)) {
    } then: { view in
      FlightRecorder(view).count(machine, CountedRows(sent: 3, received: 5))
      noted.append(operation.status.code)
    } behind: {
      Issue.record("rank 1 has not come")
    }
    #expect(noted == [StatusCode.ok.rawValue])
    #expect(operation.reported.code == StatusCode.timeout.rawValue && operation.reported.rank == 1)
    let word = { begun.flightRecord.advanced(byBytes: ($0 as FlightField).offset).load(Int64.self, at: 0) }
    #expect(word(.rowsSent) == 3 && word(.rowsReceived) == 5 && word(.statusCode) == StatusCode.timeout.rawValue)
  }
}
