import Glibc
import Testing

@testable import SwiftEP

/// Blocks of ranks that share GPUs, as all ranks count them alike.
@Suite struct BlockNeedTests {
  private func need(
    _ gpu: String, _ blockCount: Int?, room: Int = 132, process: Int32? = nil
  ) -> BlockNeed {
    BlockNeed(
      gpu: gpu, name: "GPU \(gpu)", process: process, blockCount: blockCount, multiprocessorCount: 132, room: room)
  }

  @Test func sharesAreOfTheGPUsOwnRanks() {
    let needs = [need("a", nil), need("b", nil), need("a", nil), need("a", 5)]
    #expect((0..<4).map { BlockNeed.blockCount(of: $0, in: needs) } == [22, 66, 22, 5])
  }

  @Test func ranksOfOneGPU() {
    #expect(BlockNeed.areOfOneGPU([need("a", 1)]) && BlockNeed.areOfOneGPU([need("a", 1), need("a", nil)]))
    #expect(!BlockNeed.areOfOneGPU([need("a", 1), need("b", 1)]))
    #expect(!BlockNeed.areOfOneGPU([need("a", 1), nil]) && !BlockNeed.areOfOneGPU([nil, need("a", 1)]))
    #expect(!BlockNeed.areOfOneGPU([nil, nil]))
  }

  /// Of the environment, which only GPUs' ranks ask.
  @Test func wishesForArenas() throws {
    defer { unsetenv("SWIFTEP_GPU_ARENAS") }
    for (wish, place) in [("host", ArenaPlace.host), ("", .machine)] {
      setenv("SWIFTEP_GPU_ARENAS", wish, 1)
      #expect(try Machine.cuda(gpu: 0).wantedArenaPlace(rank: 3) == place)
    }
    setenv("SWIFTEP_GPU_ARENAS", "Host", 1)
    let expected = EPError.invalidArgument(
      rank: 3, argument: "SWIFTEP_GPU_ARENAS", expected: "host, or nothing", found: "Host")
    #expect(throws: expected) { try Machine.cuda(gpu: 0).wantedArenaPlace(rank: 3) }
    #expect(try Machine.cpu.wantedArenaPlace(rank: 3) == .machine)
  }

  @Test func whatFitsPasses() throws {
    try BlockNeed.check([nil, nil])
    try BlockNeed.check([need("a", 66), need("a", 66), need("b", 132)])
    // Parts that MPS has given are each process's own.
    try BlockNeed.check([need("a", 60, room: 66, process: 1), need("a", 60, room: 66, process: 2)])
  }

  @Test func whatDoesNotFitIsRefusedWithTheNumbers() {
    let found = #expect(throws: EPError.self) { try BlockNeed.check([need("a", 100), need("b", 9), need("a", 33)]) }
    #expect(
      found
        == .invalidArgument(
          rank: 2, argument: "workers",
          expected: "at most 32: GPU a has room for 132 blocks, 100 of them of other ranks", found: "33"))
    let many = [BlockNeed?](repeating: need("a", 1), count: 33)
    guard
      case .invalidArgument(0, "rankCount", "at most 32 ranks on one GPU a", "33") =
        #expect(throws: EPError.self, performing: { try BlockNeed.check(many) })
    else { return #expect(Bool(false), "33 ranks on one GPU") }
  }
}
