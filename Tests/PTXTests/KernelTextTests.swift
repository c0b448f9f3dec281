import CUDADriver
import Foundation
import Testing

/// Kernels from a folder are those that the library would launch, or are refused with what is wrong.
@Suite struct KernelTextTests {
  private struct Folder: ~Copyable {
    let path: String

    init() throws {
      path = NSTemporaryDirectory() + "swiftep-kernels-\(UUID())"
      try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    func write(_ text: String, to name: String) throws {
      try text.write(toFile: "\(path)/\(name)", atomically: false, encoding: .utf8)
    }
  }

  private func fault(_ architecture: Int, _ folder: String) -> KernelText.Fault? {
    do throws(KernelText.Fault) { _ = try KernelText(architecture: architecture, folder: folder) } catch {
      return error
    }
    return nil
  }

  @Test(arguments: [(80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "sm_90")])
  func thoseOfTheArchitecture(architecture: Int, target: String) throws {
    let carried = try KernelText(architecture: architecture, folder: nil)
    #expect(carried.file == nil && carried.text.contains(".target \(target)"))
    #expect(try KernelText(architecture: architecture, folder: "").file == nil)
    let folder = try Folder()
    try folder.write(carried.text + "// changed", to: "\(target).ptx")
    let found = try KernelText(architecture: architecture, folder: folder.path)
    #expect(found.text == carried.text + "// changed" && found.file == "\(folder.path)/\(target).ptx")
    #expect(found.has(kernel: "_ZN7swiftep7combineEv") && !found.has(kernel: "_ZN7swiftep4noneEv"))
  }

  @Test func aMissingFile() throws {
    let folder = try Folder()
    let found = try #require(fault(90, folder.path))
    #expect(found.file == "\(folder.path)/sm_90.ptx" && found.found == "No such file or directory")
    #expect(found.description.hasPrefix("SWIFTEP_KERNELS: \(folder.path)/sm_90.ptx: expected kernels"))
  }

  /// Another target, a kernel that is not there, arguments of another size, and what is no PTX at all.
  @Test(arguments: [
    (".target sm_90", ".target sm_80", ".target sm_80"),
    (".entry _ZN7swiftep7combineEv(", ".entry _ZN7swiftep5otherEv(", "no _ZN7swiftep7combineEv"),
    ("_ZN7swiftep8dispatchEv_param_0[", "_ZN7swiftep8dispatchEv_param_0[1", "_ZN7swiftep8dispatchEv_param_0[1"),
    ("", "", "no .target"),
  ])
  func kernelsThatDoNotFit(found: String, replacement: String, fault: String) throws {
    let carried = try KernelText(architecture: 90, folder: nil).text
    let folder = try Folder()
    try folder.write(found.isEmpty ? "" : carried.replacingOccurrences(of: found, with: replacement), to: "sm_90.ptx")
    let refused = try #require(self.fault(90, folder.path))
    #expect(refused.found.contains(fault), "\(refused)")
  }
}
