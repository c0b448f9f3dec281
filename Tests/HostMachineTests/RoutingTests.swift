import HostMachine
import SwiftEP
import Testing

@testable import EPKernels

/// What is wrong with a token's experts, and where a token goes, whether its experts are read in vectors or not.
@Suite struct RoutingTests {
  /// Every chunk has the tokens that say that they are in it, up to the highest numbers.
  @Test func tokensKnowTheirChunks() {
    for tokenCount in [1, 2, 3, 511, 512, 513, 4096, 5000, 65537, 1 << 24, 1 << 30, (1 << 30) + 1] as [Int32] {
      for chunkCount in [1, 2, 3, 4, 7, 16, 24, 33, 97, 132] as [Int32] {
        let chunks = Chunks(tokenCount: tokenCount, chunkCount: chunkCount)
        for chunk in 0..<chunkCount {
          let tokens = chunks.tokens(of: chunk)
          if tokens.isEmpty { continue }
          for token in [tokens.lowerBound, tokens.lowerBound + Int32(tokens.count) / 2, tokens.upperBound - 1] {
            #expect(chunks.chunk(ofToken: token) == chunk, "token \(token) of \(tokenCount) in \(chunkCount)")
          }
        }
      }
    }
  }

  private static let expertCount: Int32 = 300

  /// - Parameter shift: bytes that the experts lie behind an address that vectors are read from.
  @Test(arguments: [Int32(1), 3, 4, 5, 6, 8, 12, 16, 32], [(Int32(4), 0), (4, 4), (8, 0), (8, 8)] as [(Int32, Int)])
  func faultsAndMembers(topK: Int32, _ type: (byteCount: Int32, shift: Int)) throws {
    var random = Random(UInt64(topK))
    let tokenCount: Int32 = 400
    let tables = try HostMemory(byteCount: 4 * Int64(Self.expertCount))
    for expert in 0..<Self.expertCount { tables.base.store(expert % 5, at: expert) }
    let view = RankView(
      rank: 0, rankCount: 5, expertCount: Self.expertCount, localExpertCount: 60, arenas: .null, ownArena: .null,
      expertOwner: tables.base, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: .null,
      hostFailure: .null, departures: .null, alarm: .null, arrivals: .null, pause: .null, timeoutNanoseconds: 1)
    let memory = try HostMemory(byteCount: Int64(tokenCount * topK * type.byteCount) + Int64(type.shift))
    let indices = memory.base.advanced(byBytes: Int64(type.shift))
    let routing = RoutingView(
      tokenCount: tokenCount, topK: topK, indices: indices, indexByteCount: type.byteCount, weights: .null,
      table: .null)
    var faultCount = 0
    for token in 0..<tokenCount {
      var experts = (0..<topK).map { _ in Int64(random.next() % UInt64(Self.expertCount + 1)) - 1 }
      let slot = Int(random.next() % UInt64(topK))
      switch random.next() % 8 {
      case 0: experts[slot] = Int64(Self.expertCount)
      case 1: experts[slot] = -2
      case 4 where type.byteCount == 8: experts[slot] = random.next() % 2 == 0 ? .min : .max
      case 5: experts[slot] = Int64(random.next() % 2 == 0 ? Int32.min : .max)
      case 6 where type.byteCount == 8:
        experts[slot] = Int64([UInt32.max, 1 << 31, 0x7fff_ffff][Int(random.next() % 3)])
      // Equal in their low halves.
      case 2 where type.byteCount == 8: experts[slot] = experts[0] + 1 << 32
      case 3: experts[slot] = experts[Int(random.next() % UInt64(topK))]
      default: break
      }
      for (slot, expert) in experts.enumerated() {
        let cell = token * topK + Int32(slot)
        if type.byteCount == 8 { indices.store(expert, at: cell) } else { indices.store(Int32(expert), at: cell) }
      }
      let culprit = experts.indices.first { slot in
        let expert = experts[slot]
        return !(-1..<Int64(Self.expertCount)).contains(expert) || expert >= 0 && experts[..<slot].contains(expert)
      }
      let found = routing.fault(token: token, expertCount: Self.expertCount)
      let (members, others) = (
        routing.rankMembers(token: token, firstRank: 0, view), routing.rankMembers(token: token, firstRank: 2, view)
      )
      #expect(found.map { Int($0.slot) } == culprit)
      if let culprit {
        faultCount += 1
        let isRepeated = experts[..<culprit].contains(experts[culprit])
        #expect(found?.fault == (isRepeated ? .duplicateExpert : .expertOutOfRange))
        #expect(members == nil && others == nil)
      } else {
        let expected = experts.filter { $0 >= 0 }.reduce(UInt64(0)) { $0 | 1 << UInt64($1 % 5) }
        #expect(members == expected)
        #expect(others == expected >> 2)
      }
    }
    #expect(faultCount > 20 && faultCount < 395)
  }
}
