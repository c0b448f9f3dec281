import EmulatedGPU
import Testing

/// How a GPU's block waits for signals, on emulated lanes.
@Suite struct WaitTests {
  private static let counts: [Int32] = [0, 1, 31, 32, 33, 70]

  /// Signals in memory of their own; behind them the alarm.
  private final class Signals: @unchecked Sendable {
    let count: Int32
    let memory: Memory
    var told: [String] = []

    /// - Parameter isThere: of each signal, whether it has been given.
    init(count: Int32, isThere: (Int32) -> Bool) {
      self.count = count
      memory = Memory([UInt64](repeating: 0, count: 16 * Int(count + 1)))
      for index in 0..<count where isThere(index) { word(index).store(UInt64(4), at: 0) }
    }

    private func word(_ index: Int32) -> Address { memory.address.advanced(byBytes: 128 * Int64(index)) }

    func give(_ machine: GPUMachine, _ index: Int32) { machine.note(4, at: word(index)) }

    /// - Parameter awaited: called with the first signal that is not there.
    func wait(
      deadline: UInt64 = .max, heard: UInt64 = 0, _ awaited: @escaping (GPUMachine, Int32) -> Void = { _, _ in }
    ) -> Wait? {
      let result = Memory([Int32](repeating: -7, count: 512))
      var wait: Wait?
      let fault = emulate(blockCount: 1) { machine in
        let found = machine.await(
          memory.address, count: count, epoch: 4, as: .rank, deadline: deadline, alarm: word(count), heard: heard,
          offset: { 128 * Int64($0) },
          awaited: {
            self.told.append("awaited \($0)")
            awaited(machine, $0)
          },
          seen: { self.told.append("seen \($0)") })
        machine.forEach(512) { result.address.store(found.missing, at: $0) }
        machine.forEach(1) { _ in wait = found }
      }
      #expect(fault == nil)
      // All lanes know the same.
      #expect(Set(result.elements(Int32.self)) == [wait?.missing])
      return wait
    }
  }

  /// Of signals that are not there, each is waited for in its turn, in their order.
  @Test(arguments: counts)
  func signalsThatCome(count: Int32) {
    let signals = Signals(count: count) { $0 % 3 == 1 }
    let wait = signals.wait { signals.give($0, $1) }
    #expect(wait?.result == .signalled && wait?.missing == -1)
    let late = (0..<count).filter { $0 % 3 != 1 }
    #expect(signals.told == late.flatMap { ["awaited \($0)", "seen \($0)"] })
  }

  /// What comes while another is waited for need not be waited for; some lanes may look before it has come.
  @Test(arguments: counts)
  func signalsThatComeTogether(count: Int32) {
    let signals = Signals(count: count) { _ in false }
    let wait = signals.wait { machine, _ in for index in 0..<count { signals.give(machine, index) } }
    #expect(wait?.result == .signalled)
    let awaited = (0..<count).filter { signals.told.contains("awaited \($0)") }
    #expect(
      signals.told == awaited.flatMap { ["awaited \($0)", "seen \($0)"] } && awaited.first == (count == 0 ? nil : 0))
  }

  @Test(arguments: [(1, 0), (33, 5), (70, 31), (70, 32), (70, 69)] as [(Int32, Int32)])
  func theFirstThatIsMissing(count: Int32, missing: Int32) {
    let signals = Signals(count: count) { $0 < missing }
    let wait = signals.wait(deadline: 0)
    #expect(wait?.result == .timedOut && wait?.missing == missing)
    #expect(signals.told == ["awaited \(missing)"])
  }

  @Test(arguments: [(1, 0), (70, 40)] as [(Int32, Int32)])
  func anAlarmEndsIt(count: Int32, missing: Int32) {
    let signals = Signals(count: count) { $0 != missing }
    let wait = signals.wait(heard: 1)
    #expect(wait?.result == .alarmed && wait?.missing == -1)
  }

  @Test(arguments: [0, 1, 19, 32, 40] as [Int32])
  func zerosThatAreNoted(count: Int32) {
    let memory = Memory([UInt64](repeating: 7, count: 48))
    let fault = emulate(blockCount: 1) { $0.noteZeros(count, at: memory.address) }
    #expect(fault == nil)
    #expect(memory.elements(UInt64.self) == (0..<48).map { $0 < count ? 0 : 7 })
  }

  @Test(arguments: 0...9 as ClosedRange<Int32>)
  func places(count: Int32) {
    let memory = Memory([Int32](repeating: 0, count: 10))
    let fault = emulate(blockCount: 1) { machine in
      machine.forEach(1) { _ in
        machine.forEachPlace(count, at: { memory.address.advanced(byBytes: 4 * Int64($0)) }) {
          $0.store($0.load(Int32.self, at: 0) + 1, at: 0)
        }
      }
    }
    #expect(fault == nil)
    #expect(memory.elements(Int32.self) == (0..<10).map { $0 < count ? 1 : 0 })
  }
}
