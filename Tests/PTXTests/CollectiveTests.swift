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
    ("layout", [92, 4, 21, 2, 15, 0, 2, 8]), ("dispatch_rows", [40, 7, 9, 9, 0, 4, 0, 0]),
    ("dispatch", [119, 11, 22, 11, 15, 4, 2, 8]), ("dispatch_copying", [74, 7, 10, 6, 15, 0, 2, 8]),
    ("dispatch_quantizing", [74, 11, 10, 11, 15, 4, 2, 8]), ("combine", [83, 17, 32, 34, 20, 32, 0, 0]),
    ("combine_in_place", [44, 3, 8, 3, 0, 0, 0, 0]), ("combine_step", [90, 14, 32, 16, 10, 0, 0, 0]),
  ])
  func sm90(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_90()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }

  @Test(arguments: [
    ("layout", [92, 4, 21, 2, 15, 0, 2, 8]), ("dispatch_rows", [40, 0, 12, 25, 0, 7, 0, 0]),
    ("dispatch", [119, 4, 25, 27, 15, 7, 2, 8]), ("dispatch_copying", [74, 4, 10, 12, 15, 0, 2, 8]),
    ("dispatch_quantizing", [74, 4, 13, 23, 15, 7, 2, 8]), ("combine", [83, 0, 32, 45, 20, 32, 0, 0]),
    ("combine_in_place", [44, 0, 8, 5, 0, 0, 0, 0]), ("combine_step", [90, 0, 32, 28, 10, 0, 0, 0]),
  ])
  func sm80(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_80()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }
}
