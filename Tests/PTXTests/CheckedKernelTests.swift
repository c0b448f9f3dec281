import CUDADriver
import Foundation
import Testing

/// `scripts/build-kernels --checked` makes kernels that check themselves; those that the library carries do not. With
/// `SWIFTEP_KERNELS` in the environment, that folder's kernels must be checked ones.
@Suite struct CheckedKernelTests {
  private static let folder = ProcessInfo.processInfo.environment[KernelText.variable].flatMap { $0.isEmpty ? nil : $0 }

  /// What a failed check stores: two numbers at once. Nothing else is stored in this way.
  private static let finding = "st.v2.b64"

  @Test(arguments: [80, 90])
  func theLibrarysCheckNothing(architecture: Int) throws {
    let text = PTXText(try KernelText(architecture: architecture, folder: nil).text)
    for kernel in text.kernels.keys { #expect(text.count(Self.finding, in: kernel) == 0) }
    #expect(text.kernels["ranks"] == nil)
  }

  /// Places, experts, arenas, what has arrived. They may need memory of a lane's own; all other rules hold for them,
  /// too.
  @Test(.enabled(if: folder != nil), arguments: [80, 90])
  func thoseOfAFolderCheck(architecture: Int) throws {
    let text = PTXText(try KernelText(architecture: architecture, folder: Self.folder).text)
    for (kernel, count) in [
      ("layout", 6), ("dispatch_rows", 10), ("dispatch", 18), ("dispatch_copying", 14), ("dispatch_quantizing", 14),
      ("dispatch_grouped", 16),
      ("combine", 10), ("combine_in_place", 8), ("ranks", 46),
    ] {
      #expect(text.count(Self.finding, in: kernel) >= count, "\(kernel)")
    }
    let violations = Rules.violations(text).filter { !$0.contains(".local") }
    #expect(violations == [])
  }
}
