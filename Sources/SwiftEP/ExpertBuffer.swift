/// One rank's end of an expert-parallel group: dispatches tokens to the ranks of their experts and combines what comes
/// back.
///
/// Every operation is collective: all ranks call the same operations in the same order, each from its own thread or
/// process. A call that this rank cannot make sense of still meets its peers', so that all ranks throw the same error
/// and can go on. Calls on one buffer may come from any thread, one at a time; further ones wait.
public final class ExpertBuffer: Sendable {
  public let plan: Plan
  public let rank: Int
  public let rankCount: Int
  let core: BufferCore

  /// Creates this rank's buffer. Collective. Takes the memory of the plan at once.
  ///
  /// - Parameters:
  ///   - communicator: the group; its rank count must be the plan's.
  ///   - plan: what to hold; the same on all ranks.
  ///   - workers: threads, or multiprocessors, that one call can use; nil: this rank's share of the host's cores or of
  ///     half of the GPU's multiprocessors, at least one. On a GPU, those of all ranks and buffers must run at the same
  ///     time: more are refused.
  ///   - timeout: how long a rank is waited for before it is reported missing.
  ///   - machine: what this rank's operations run on; of the same kind on all ranks.
  /// - Throws: `invalidArgument`, `ranksDisagree`, `outOfMemory` before any is taken, `rankMissing` (step `setup`),
  ///   `systemCall`; the same on all ranks.
  public init(
    _ communicator: Communicator, plan: Plan, workers: Int? = nil, timeout: Duration = .seconds(100),
    machine: Machine = .cpu
  ) throws(EPError) {
    let setup = BufferSetup(
      group: communicator.group, plan: plan, workers: workers, timeout: timeout, machine: machine)
    core = try setup.run()
    self.plan = plan
    rank = communicator.rank
    rankCount = communicator.rankCount
  }

  /// Ends the buffer after what was queued has finished. Results and handles stay readable; their use in operations is
  /// an error. Not collective, but to be called when this rank has made its last call: ranks that call on find it
  /// missing at once.
  public func close() { core.close() }

  /// Bytes of this rank's arena now: the plan's, or more where routing made it grow.
  public var arenaByteCount: Int64 { core.arena.byteCount }

  /// Where this buffer's operations are queued; nil where it is no GPU's.
  package var cudaDevice: CUDADevice? { core.device as? CUDADevice }

  /// The machine that runs the protocol.
  public var machineName: String { core.device.name }

  /// A new tensor of zeros that this buffer's calls can be given. Not collective.
  ///
  /// - Throws: as `Tensor.init(zeros:_:)`; `outOfMemory`, `driver`.
  public func makeTensor(zeros shape: [Int], _ dtype: DType) throws(EPError) -> Tensor {
    let byteCount = try Tensor.byteCount(shape, dtype)
    return Tensor(
      dtype: dtype, shape: shape, storage: try core.device.makeTensorMemory(byteCount: Int64(byteCount)), byteOffset: 0)
  }

  /// `tensor` itself where this buffer's machine reaches its memory, otherwise a copy where it does. Not collective.
  ///
  /// - Throws: as `makeTensor`.
  public func reachable(_ tensor: Tensor) throws(EPError) -> Tensor {
    if core.device.reaches(tensor) { return tensor }
    let storage = try core.device.makeLocalMemory(byteCount: Int64(tensor.byteCount), for: nil)
    let copy = Tensor(dtype: tensor.dtype, shape: tensor.shape, storage: storage, byteOffset: 0)
    try tensor.withUnsafeBytes { source throws(EPError) in try copy.storage.write(source) }
    return copy
  }

  /// Workers that one call can use.
  public var workerCountMax: Int { core.device.workerCountMax }
}
