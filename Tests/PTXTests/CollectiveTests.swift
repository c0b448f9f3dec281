import CCUDA
import Testing

/// How often each collective stands in each kernel. A compiler that does not know that lanes act together copies a
/// collective into both arms of a branch, and half the lanes wait for the others for ever; such a copy shows here. When the
/// protocol changes, look at what has changed before writing the new numbers down.
@Suite struct CollectiveTests {
  private static let collectives = [
    "bar.sync", "bar.warp.sync", "vote.sync", "shfl.sync.idx", "shfl.sync.up", "shfl.sync.bfly", "match.any.sync",
  ]

  @Test(arguments: [
    ("layout", [104, 4, 14, 0, 15, 0, 2]), ("dispatch_rows", [40, 7, 6, 15, 0, 4, 0]),
    ("dispatch", [133, 11, 16, 15, 15, 4, 2]), ("combine", [85, 29, 20, 18, 0, 32, 0]),
    ("combine_step", [92, 29, 22, 14, 0, 0, 0]),
  ])
  func sm90(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_90()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }

  @Test(arguments: [
    ("layout", [104, 4, 14, 0, 15, 0, 2]), ("dispatch_rows", [40, 0, 8, 25, 0, 7, 0]),
    ("dispatch", [133, 4, 18, 25, 15, 7, 2]), ("combine", [85, 0, 20, 29, 0, 32, 0]),
    ("combine_step", [92, 0, 22, 29, 0, 0, 0]),
  ])
  func sm80(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_80()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }
}
