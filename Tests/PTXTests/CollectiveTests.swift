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
    ("swiftep_prepare_dispatch", [83, 4, 8, 0, 15, 0, 2]), ("swiftep_deliver_dispatch", [32, 6, 3, 17, 0, 2, 0]),
    ("swiftep_dispatch", [109, 10, 10, 17, 15, 2, 2]), ("swiftep_combine", [63, 24, 12, 19, 0, 0, 0]),
    ("swiftep_combine_step", [70, 24, 14, 16, 0, 0, 0]),
  ])
  func sm90(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_90()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }

  @Test(arguments: [
    ("swiftep_prepare_dispatch", [83, 4, 8, 0, 15, 0, 2]), ("swiftep_deliver_dispatch", [32, 0, 4, 17, 0, 4, 0]),
    ("swiftep_dispatch", [109, 4, 11, 17, 15, 4, 2]), ("swiftep_combine", [63, 0, 12, 28, 0, 0, 0]),
    ("swiftep_combine_step", [70, 0, 14, 28, 0, 0, 0]),
  ])
  func sm80(_ kernel: String, _ expected: [Int]) {
    let text = PTXText(String(cString: swiftep_kernels_sm_80()))
    #expect(Self.collectives.map { text.count($0, in: kernel) } == expected)
  }
}
