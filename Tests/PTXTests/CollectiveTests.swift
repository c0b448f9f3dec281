import CCUDA
import Testing

/// How often each collective stands in each kernel. A compiler that does not know that lanes act together copies a
/// collective into both arms of a branch, and half the lanes wait for the others for ever; such a copy shows here. When the
/// protocol changes, look at what has changed before writing the new numbers down.
@Suite struct CollectiveTests {
  private static let collectives = [
    "bar.sync", "bar.warp.sync", "vote.sync", "shfl.sync.idx", "shfl.sync.up", "shfl.sync.bfly", "match.any.sync",
    "redux.sync",
  ]

  @Test(arguments: [
    ("layout", [90, 5, 27, 2, 15, 0, 2, 8]), ("dispatch_rows", [32, 9, 12, 8, 0, 4, 0, 0]),
    ("dispatch", [112, 18, 31, 12, 15, 4, 2, 12]), ("dispatch_copying", [53, 9, 19, 5, 5, 0, 0, 4]),
    ("dispatch_quantizing", [53, 12, 19, 9, 5, 4, 0, 4]), ("dispatch_grouped", [57, 16, 19, 9, 5, 4, 2, 4]),
    ("combine", [79, 18, 41, 39, 20, 32, 0, 0]),
    ("combine_in_place", [41, 4, 17, 5, 0, 0, 0, 0]), ("combine_step", [86, 15, 41, 14, 10, 0, 0, 0]),
  ])
  func sm90(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_90()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }

  @Test(arguments: [
    ("layout", [90, 5, 27, 2, 15, 0, 2, 8]), ("dispatch_rows", [32, 1, 15, 25, 0, 7, 0, 0]),
    ("dispatch", [112, 6, 34, 29, 15, 7, 2, 12]), ("dispatch_copying", [53, 1, 19, 12, 5, 0, 0, 4]),
    ("dispatch_quantizing", [53, 1, 22, 22, 5, 7, 0, 4]), ("dispatch_grouped", [57, 5, 22, 22, 5, 7, 2, 4]),
    ("combine", [79, 1, 41, 44, 20, 32, 0, 0]),
    ("combine_in_place", [41, 1, 17, 6, 0, 0, 0, 0]), ("combine_step", [86, 1, 41, 26, 10, 0, 0, 0]),
  ])
  func sm80(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_80()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }
}
