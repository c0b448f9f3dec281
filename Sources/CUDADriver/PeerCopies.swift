/// How fast GPUs copy to and from each other's memory by the driver's own copies: all at once, each with all of its peers.
package struct PeerCopies: Codable, Equatable, Sendable {
  /// Bytes a nanosecond that the slowest GPU stores into its peers' memory.
  package var writtenBytesPerNanosecond: Double
  /// Bytes a nanosecond that the slowest GPU loads from its peers' memory.
  package var readBytesPerNanosecond: Double

  package init(writtenBytesPerNanosecond: Double, readBytesPerNanosecond: Double) {
    self.writtenBytesPerNanosecond = writtenBytesPerNanosecond
    self.readBytesPerNanosecond = readBytesPerNanosecond
  }

  /// Measures them: the best of some rounds, each as slow as its slowest GPU. Takes two buffers of `byteCount` on each GPU.
  ///
  /// - Parameters:
  ///   - gpus: at least two.
  ///   - byteCount: what a GPU copies at a time, divided over its peers.
  /// - Returns: nil where some GPU does not reach another's memory.
  package static func measured(
    on gpus: [GPU], byteCount: Int = 512 << 20, roundCount: Int = 6
  ) throws(DriverError) -> PeerCopies? {
    for gpu in gpus {
      for peer in gpus where try !gpu.reaches(uuid: peer.uuid) { return nil }
    }
    let copiers = try gpus.map { gpu throws(DriverError) in
      try Copier(gpu, peers: gpus, pieceByteCount: byteCount / (gpus.count - 1) / 16 * 16)
    }
    var rounds = Rounds(copiers)
    return PeerCopies(
      writtenBytesPerNanosecond: try rounds.best(of: roundCount, by: .write),
      readBytesPerNanosecond: try rounds.best(of: roundCount, by: .read))
  }
}

private enum Direction {
  case write, read
}

/// One GPU's part.
private struct Copier {
  let gate: StreamGate
  /// What goes to each peer, and what comes from each: a piece for each peer.
  private let (source, target): (VirtualMemory, VirtualMemory)
  private let pieceByteCount: Int
  private let stream: Stream
  private let (start, end): (StreamEvent, StreamEvent)
  /// By peer.
  private let lanes: [(stream: Stream, end: StreamEvent)]

  /// Each piece goes so often in a round: what comes before and behind is then little beside it.
  private static let repeatCount = 4

  init(_ gpu: GPU, peers: [GPU], pieceByteCount: Int) throws(DriverError) {
    self.pieceByteCount = pieceByteCount
    gate = try StreamGate(gpu)
    let byteCount = Int64(pieceByteCount * (peers.count - 1))
    source = try VirtualMemory(gpu, reservedByteCount: byteCount)
    target = try VirtualMemory(gpu, reservedByteCount: byteCount)
    stream = try Stream(gpu)
    for memory in [source, target] {
      try memory.grow(to: byteCount)
      for peer in peers { try memory.letIn(peer) }
      try stream.fill(memory.base, byteCount: Int(byteCount), with: 1)
    }
    try stream.synchronize()
    (start, end) = (try StreamEvent(gpu, isTimed: true), try StreamEvent(gpu, isTimed: true))
    lanes = try peers.dropFirst().map { _ throws(DriverError) in
      (try Stream(gpu), try StreamEvent(gpu, isTimed: false))
    }
  }

  /// Queues the copies of GPU `index` behind its gate.
  func queue(_ direction: Direction, of index: Int, _ all: [Copier], opening: UInt64) throws(DriverError) {
    try gate.hold(stream, until: opening)
    try start.record(on: stream)
    for (place, lane) in lanes.enumerated() {
      // The peers in turn, each GPU beginning with the next, so that no two begin with the same.
      let peer = all[(index + place + 1) % all.count]
      let placeOfThis = lanes.count - 1 - place
      try lane.stream.wait(for: start)
      for _ in 0..<Self.repeatCount {
        switch direction {
        case .write: try copy(source, place, to: peer.target, placeOfThis, on: lane.stream)
        case .read: try copy(peer.source, placeOfThis, to: target, place, on: lane.stream)
        }
      }
      try lane.end.record(on: lane.stream)
      try stream.wait(for: lane.end)
    }
    try end.record(on: stream)
  }

  private func copy(
    _ source: VirtualMemory, _ from: Int, to target: VirtualMemory, _ to: Int, on stream: Stream
  ) throws(DriverError) {
    try stream.copy(
      from: source.base.advanced(byBytes: Int64(from * pieceByteCount)),
      to: target.base.advanced(byBytes: Int64(to * pieceByteCount)), byteCount: pieceByteCount)
  }

  /// Of what was queued last, once it is done.
  func bytesPerNanosecond() throws(DriverError) -> Double {
    try end.synchronize()
    let byteCount = Self.repeatCount * lanes.count * pieceByteCount
    return Double(byteCount) / (1000 * (try end.microseconds(since: start)))
  }
}

private struct Rounds {
  private let copiers: [Copier]
  private var opening: UInt64 = 0

  init(_ copiers: [Copier]) { self.copiers = copiers }

  /// Bytes a nanosecond of the slowest GPU, in the round in which that is most.
  mutating func best(of count: Int, by direction: Direction) throws(DriverError) -> Double {
    // Not counted, and with open gates: what the driver makes for a first copy may wait for all that is queued.
    _ = try slowest(direction, isHeld: false)
    var best = 0.0
    for _ in 0..<count { best = max(best, try slowest(direction, isHeld: true)) }
    return best
  }

  private mutating func slowest(_ direction: Direction, isHeld: Bool) throws(DriverError) -> Double {
    opening += 1
    do throws(DriverError) {
      if !isHeld { for copier in copiers { try copier.gate.open(opening) } }
      for (index, copier) in copiers.enumerated() { try copier.queue(direction, of: index, copiers, opening: opening) }
      if isHeld { for copier in copiers { try copier.gate.open(opening) } }
      var slowest = Double.infinity
      for copier in copiers { slowest = min(slowest, try copier.bytesPerNanosecond()) }
      return slowest
    } catch {
      for copier in copiers { copier.gate.openForGood() }
      throw error
    }
  }
}
