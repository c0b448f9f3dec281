import EPKernels
import Testing

@testable import SwiftEP

/// Memory that operations use again.
@Suite struct HostPoolTests {
  @Test func whatIsInUseIsNobodyElses() throws {
    let pool = HostPool()
    let pieces = try (0..<100).map { try pool.take(64 * Int64(1 + $0 % 3)) }
    #expect(Set(pieces.map(\.base.bits)).count == 100)
  }

  @Test func whatHasComeBackIsUsedAgain() throws {
    let pool = HostPool()
    var piece: PooledMemory? = try pool.take(192)
    let first = try #require(piece).base.bits
    piece = nil
    // Of another size.
    let other = try pool.take(128)
    #expect(other.base.bits != first)
    piece = try pool.take(192)
    #expect(piece?.base.bits == first && first % 64 == 0)
    // Once only, as long as it is in use.
    let third = try pool.take(192)
    #expect(third.base.bits != first)
    withExtendedLifetime(piece) {}
  }

  /// Few are kept, and no large ones.
  @Test func theRestGoesBackToTheSystem() throws {
    let pool = HostPool()
    for byteCount in [64, 1 << 20] as [Int64] {
      let pieces = try (0..<100).map { _ in try pool.take(byteCount) }
      withExtendedLifetime(pieces) {}
    }
    #expect(pool.unusedByteCount == 32 * 64)
  }
}
