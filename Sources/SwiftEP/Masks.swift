import EPKernels
import HostMachine

extension ExpertBuffer {
  /// Whether the buffer can go on without some of its ranks.
  public enum Masking: String, Codable, CaseIterable, Sendable {
    /// A missing rank fails the operation, and the buffer is lost.
    case none
    /// Ranks can be masked. One that is missing and not masked fails the operation, and the buffer is lost.
    case manual
    /// A rank that is missing, since it has departed or has been silent for the buffer's timeout, is masked, and the operation
    /// goes on without it.
    case automatic
  }

  /// The ranks that this one goes on without, in order: those that `mask` has been given here, and those that operations have
  /// found missing, or masked by another rank. Not collective.
  ///
  /// - Throws: `driver`.
  public var maskedRanks: [Int] {
    get throws(EPError) {
      guard let masks = core.masks else { return [] }
      return try masks.current.ranks
    }
  }

  /// Goes on without `ranks`: they are neither sent to nor waited for, their tokens and those for their experts count as
  /// absent. Not collective: other ranks mask them in the next operation that begins here, since its exchange tells them. A
  /// masked rank finds out in the operation that it calls next, or waits in: that throws `rankMasked`.
  ///
  /// - Throws: `invalidArgument` where the plan has no masks, or a rank is the caller's own or does not exist; `driver`.
  public func mask(_ ranks: [Int]) throws(EPError) {
    let masks = try core.checkedMasks(ranks)
    if let own = ranks.first(where: { $0 == rank }) {
      let isEverybody = Set(ranks).union(try masks.current.ranks).count == rankCount
      throw .invalidArgument(
        rank: rank, argument: "ranks",
        expected: isEverybody ? "a mask that leaves somebody" : "ranks other than the caller's own", found: "\(own)")
    }
    try masks.want(ranks)
  }

  /// Takes masked ranks back. Collective for all ranks that are not masked, and those that return, all of which name the same;
  /// nothing of the buffer's may be under way on any of them. Handles of earlier dispatches are of no use any more, since
  /// some ranks have gone on with them and others not; nor are graphs with such handles, unless the dispatch is in the graph
  /// (one that a stream of the caller's has captured must not be launched then).
  ///
  /// - Throws: `invalidArgument` as `mask`, or where results are to be received; `rankMissing` (step `regrouping`) where one
  ///   does not take part: the mask stays as it was here, and the call can be made again, by all; `driver`, `bufferLost`,
  ///   `bufferClosed`.
  public func unmask(_ ranks: [Int]) throws(EPError) {
    try core.callLock.withLock { _ throws(EPError) in
      try core.checkNotLost()
      let masks = try core.checkedMasks(ranks)
      try core.checkReceived("ranks")
      if core.isRecording {
        throw .invalidArgument(rank: rank, argument: "body", expected: "no unmask in a recording", found: "one")
      }
      core.device.wait(for: core.lastTicket.withLock { $0 })
      try core.takeBack(UInt64(ranks: ranks), masks)
    }
  }
}

extension UInt64 {
  /// One bit a rank.
  fileprivate init(ranks: [Int]) { self = ranks.reduce(0) { $0 | 1 << UInt64($1) } }

  fileprivate var ranks: [Int] { (0..<64).filter { self >> UInt64($0) & 1 != 0 } }
}

/// The ranks that one rank's buffer goes on without, where the host and its kernels say so.
final class RankMasks: Sendable {
  private let rank: Int
  private let words: Address
  private let memory: any TensorStorage
  private let state = Guarded(State())

  private struct State {
    var wanted: UInt64 = 0
    /// Known from operations that have ended.
    var found: UInt64 = 0
    /// Who has masked this rank.
    var masker: Int?
    var returnCount = 0
  }

  /// - Parameter words: `RankView.masks`, in `memory`.
  init(rank: Int, words: Address, memory: any TensorStorage) {
    (self.rank, self.words, self.memory) = (rank, words, memory)
  }

  /// As the host knows it without asking a GPU.
  var known: UInt64 { state.withLock { $0.wanted | $0.found } }

  /// How often masked ranks have returned.
  var returnCount: Int { state.withLock { $0.returnCount } }

  var current: UInt64 {
    get throws(EPError) {
      let wanted = state.withLock { $0.wanted }
      guard let copier = memory.copier else { return wanted | HostMachine.host.read(place(of: .masked)) }
      var found: UInt64 = 0
      try withUnsafeMutableBytes(of: &found) { bytes throws(EPError) in
        try copier.read(place(of: .masked), into: bytes)
      }
      return wanted | found
    }
  }

  func want(_ ranks: [Int]) throws(EPError) {
    try state.withLock { state throws(EPError) in
      state.wanted |= UInt64(ranks: ranks)
      try write(state.wanted, to: .wanted)
    }
  }

  private func write(_ ranks: UInt64, to word: MaskWord) throws(EPError) {
    guard let copier = memory.copier else { return HostMachine.host.note(ranks, at: place(of: word)) }
    try withUnsafeBytes(of: ranks) { bytes throws(EPError) in try copier.write(bytes, to: place(of: word)) }
  }

  private func place(of word: MaskWord) -> Address { words.advanced(byBytes: 8 * Int64(word.rawValue)) }

  /// What an operation has ended with; returns what is new of those that this rank has found missing.
  ///
  /// - Parameter count: `returnCount`, when it was called: later, they may have returned.
  func learn(_ ranks: UInt64, missing: UInt64, since count: Int) -> [Int] {
    state.withLock { state in
      if count != state.returnCount { return [] }
      defer { state.found |= ranks }
      return (missing & ~state.found).ranks
    }
  }

  /// This rank's operation has ended with the news that it is masked.
  func learn(masker: Int) { state.withLock { $0.masker = $0.masker ?? masker } }

  /// Throws where this rank is masked itself.
  func checkTakesPart() throws(EPError) {
    if let masker = state.withLock({ $0.masker }) { throw .rankMasked(rank: rank, by: masker) }
  }

  /// While nothing is under way: from now on, these are masked, and this rank is not.
  fileprivate func set(_ ranks: UInt64) throws(EPError) {
    try state.withLock { state throws(EPError) in
      for word in [MaskWord.wanted, .masked, .agreed] { try write(ranks, to: word) }
      try write(0, to: .missed)
      state = State(wanted: ranks, returnCount: state.returnCount + 1)
    }
  }
}

extension BufferCore {
  /// Throws unless the buffer has masks, and these ranks.
  fileprivate func checkedMasks(_ ranks: [Int]) throws(EPError) -> RankMasks {
    guard let masks else {
      throw .invalidArgument(rank: rank, argument: "plan.masking", expected: "manual or automatic", found: "none")
    }
    if let found = ranks.first(where: { !(0..<rankCount).contains($0) }) {
      throw .invalidArgument(rank: rank, argument: "ranks", expected: "ranks of 0..<\(rankCount)", found: "\(found)")
    }
    return masks
  }

  /// When all have found the same, nobody waits for what the masked had been told.
  fileprivate func takeBack(_ ranks: UInt64, _ masks: RankMasks) throws(EPError) {
    // Who returns does not know who is masked.
    let returns = ranks >> UInt64(rank) & 1 != 0
    let mine = Contribution.Place(
      masked: returns ? 0 : try masks.current & ~ranks, epoch: try epoch, attempt: .random(in: 1 ... .max))
    let places = try membership.group.mesh.gather(mine, for: membership.key, timeout: timeout) { () throws(EPError) in
      try forgetSignals()
    }.compactMap { $0 }
    try set(epoch: places.map(\.epoch).max()!)
    try forgetFailure()
    try masks.set(places.reduce(0) { $0 | $1.masked })
  }
}
