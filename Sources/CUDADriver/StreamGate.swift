/// A word of a GPU's memory that streams wait for. Not of the host's: such waits notice it late, one after the other.
package struct StreamGate: Sendable {
  private let openings: VirtualMemory
  private let opener: Stream

  package init(_ gpu: GPU) throws(DriverError) {
    openings = try VirtualMemory(gpu, reservedByteCount: 64)
    try openings.grow(to: 64)
    opener = try Stream(gpu)
    try opener.fill(openings.base, byteCount: 64, with: 0)
    try opener.synchronize()
  }

  /// Lets go all streams that wait for this opening, or one before it.
  package func open(_ opening: UInt64) throws(DriverError) { try opener.write(opening, to: openings.base) }

  /// Lets go all streams, those that will wait, too. The driver compares as in a cycle: this is ahead of every opening.
  package func openForGood() { try? open(1 << 62) }

  package func hold(_ stream: Stream, until opening: UInt64) throws(DriverError) {
    try stream.wait(until: openings.base, isAtLeast: opening)
  }
}
