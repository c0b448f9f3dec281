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
    ("layout", [96, 4, 21, 6, 35, 0, 2]), ("dispatch_rows", [40, 7, 9, 9, 0, 4, 0]),
    ("dispatch", [125, 11, 22, 15, 35, 4, 2]), ("dispatch_copying", [80, 7, 10, 10, 35, 0, 2]),
    ("dispatch_quantizing", [80, 11, 10, 15, 35, 4, 2]), ("combine", [83, 17, 32, 34, 20, 32, 0]),
    ("combine_in_place", [44, 3, 8, 3, 0, 0, 0]), ("combine_step", [90, 14, 32, 16, 10, 0, 0]),
  ])
  func sm90(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_90()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }

  @Test(arguments: [
    ("layout", [96, 4, 21, 6, 35, 0, 2]), ("dispatch_rows", [40, 0, 12, 25, 0, 7, 0]),
    ("dispatch", [125, 4, 25, 31, 35, 7, 2]), ("dispatch_copying", [80, 4, 10, 16, 35, 0, 2]),
    ("dispatch_quantizing", [80, 4, 13, 27, 35, 7, 2]), ("combine", [83, 0, 32, 45, 20, 32, 0]),
    ("combine_in_place", [44, 0, 8, 5, 0, 0, 0]), ("combine_step", [90, 0, 32, 28, 10, 0, 0]),
  ])
  func sm80(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_80()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }
}
