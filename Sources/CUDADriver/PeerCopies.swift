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
    let rounds = Rounds(copiers)
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
  /// What goes to each peer, and what comes from each: a piece for each peer.
  private let (source, target): (VirtualMemory, VirtualMemory)
  private let pieceByteCount: Int
  private let stream: Stream
  private let (start, end): (StreamEvent, StreamEvent)
  /// By peer.
  private let lanes: [(stream: Stream, end: StreamEvent)]

  /// Each piece goes so often in a round: that GPUs begin one after the other, as the host comes to them, is then little beside
  /// it. Nothing holds them back until all are queued: where streams are more than the driver's queues, that could be never.
  private static let repeatCount = 16

  init(_ gpu: GPU, peers: [GPU], pieceByteCount: Int) throws(DriverError) {
    self.pieceByteCount = pieceByteCount
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

  /// Queues the copies of GPU `index`.
  func queue(_ direction: Direction, of index: Int, _ all: [Copier]) throws(DriverError) {
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

  init(_ copiers: [Copier]) { self.copiers = copiers }

  /// Bytes a nanosecond of the slowest GPU, in the round in which that is most.
  func best(of count: Int, by direction: Direction) throws(DriverError) -> Double {
    // Not counted: the driver makes things for a first copy.
    _ = try slowest(direction)
    var best = 0.0
    for _ in 0..<count { best = max(best, try slowest(direction)) }
    return best
  }

  private func slowest(_ direction: Direction) throws(DriverError) -> Double {
    for (index, copier) in copiers.enumerated() { try copier.queue(direction, of: index, copiers) }
    var slowest = Double.infinity
    for copier in copiers { slowest = min(slowest, try copier.bytesPerNanosecond()) }
    return slowest
  }
}
