import EPKernels
import HostMachine

/// Where a buffer's kernels see which ranks take part no more: written by whoever learns it, while kernels wait.
final class DepartureBoard: Sendable {
  private let memory: any TensorStorage
  private let departures: Address
  private let alarm: Address
  private let arena: RankArena
  private let device: any Device

  /// - Parameters:
  ///   - memory: keeps `departures` (UInt64 `[rankCount]`) and `alarm` (UInt64) alive.
  ///   - arena: on whose doorbell kernels sleep.
  init(memory: any TensorStorage, view: RankView, arena: RankArena, device: any Device) {
    self.memory = memory
    departures = view.departures
    alarm = view.alarm
    self.arena = arena
    self.device = device
  }

  /// To be called once a rank at most, by one thread at a time.
  func note(rank: Int) {
    HostMachine.host.note(1, at: departures.advanced(byBytes: 8 * Int64(rank)))
    device.raise(alarm, arena: arena.base)
  }
}
