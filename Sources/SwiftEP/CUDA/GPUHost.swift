import Arena
import CUDADriver
import EPKernels
import HostMachine

/// What the ranks of this process share of one GPU: its kernels, and memory that is handed out in pieces. Made once, and
/// kept: giving it back would wait for kernels of others.
package final class GPUHost: Sendable {
  package let gpu: GPU
  let module: KernelModule
  let copier: GPUCopier
  /// Memory of the GPU that no peer reaches.
  let pool: DevicePool
  /// Words that the host and the kernels both see.
  let notices: PinnedPool
  /// Streams that no rank has at present. Used again rather than made anew, since the driver counts those it has ever
  /// made when it divides them over what runs at the same time.
  private let idleStreams = Guarded<[CUDADriver.Stream]>([])

  private static let made = Guarded<[Int: GPUHost]>([:])

  /// - Throws: `driver` where there is no such GPU, or none that the kernels run on.
  package static func shared(_ index: Int) throws(EPError) -> GPUHost {
    try made.withLock { made throws(EPError) in
      if let host = made[index] { return host }
      let host = try GPUHost(index)
      made[index] = host
      return host
    }
  }

  private init(_ index: Int) throws(EPError) {
    let driver: Driver
    switch Driver.shared {
    case .success(let found): driver = found
    case .failure(let absence): throw .machineUnavailable("\(absence)")
    }
    guard (0..<driver.gpuCount).contains(index) else {
      throw .machineUnavailable("GPU \(index) of \(driver.gpuCount)")
    }
    do throws(DriverError) {
      gpu = try GPU(driver, index: index)
    } catch {
      throw EPError(error, rank: -1)
    }
    if gpu.architecture < KernelModule.architectureMin {
      throw .machineUnavailable(
        "GPU \(index), \(gpu.name), is of sm_\(gpu.architecture); needed is sm_\(KernelModule.architectureMin) or later"
      )
    }
    do throws(DriverError) {
      module = try KernelModule(gpu)
      copier = GPUCopier(try Stream(gpu))
      pool = try DevicePool(gpu, copier)
    } catch {
      throw EPError(error, rank: -1)
    }
    notices = PinnedPool(gpu)
  }
}

extension GPUHost {
  func takeStream() throws(DriverError) -> CUDADriver.Stream {
    if let stream = idleStreams.withLock({ $0.popLast() }) { return stream }
    return try CUDADriver.Stream(gpu)
  }

  /// Nothing may be queued on it any more.
  func give(_ stream: CUDADriver.Stream) { idleStreams.withLock { $0.append(stream) } }
}

extension EPError {
  init(_ error: DriverError, rank: Int) {
    self = .driver(rank: rank, call: error.call, code: error.code, name: error.name)
  }
}
