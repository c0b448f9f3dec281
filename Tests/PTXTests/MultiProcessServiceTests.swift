import CUDADriver
import Foundation
import Testing

/// Whether the Multi-Process Service runs is seen by what lies in its pipe directory.
@Suite struct MultiProcessServiceTests {
  private let directory = NSTemporaryDirectory() + "mps-\(UUID().uuidString.prefix(8))"
  private var control: String { directory + "/control" }

  init() throws { try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true) }

  private func remove() { try? FileManager.default.removeItem(atPath: directory) }

  @Test func nothingIsThere() {
    defer { remove() }
    #expect(!MultiProcessService.isThere(in: directory))
    #expect(!MultiProcessService.isThere(in: directory + "/missing"))
  }

  @Test func aPipeThatSomebodyReads() throws {
    defer { remove() }
    try #require(mkfifo(control, 0o600) == 0)
    #expect(!MultiProcessService.isThere(in: directory))
    let reader = open(control, O_RDONLY | O_NONBLOCK)
    #expect(MultiProcessService.isThere(in: directory))
    close(reader)
    #expect(!MultiProcessService.isThere(in: directory))
  }

  @Test func aSocketThatSomebodyListensTo() throws {
    defer { remove() }
    let listener = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: control.utf8) }
    let isBound = withUnsafeBytes(of: address) {
      bind(listener, $0.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t($0.count)) == 0
    }
    try #require(isBound && listen(listener, 4) == 0)
    #expect(MultiProcessService.isThere(in: directory))
    close(listener)
    #expect(!MultiProcessService.isThere(in: directory))
  }

  /// What cannot be asked counts as there: fewer queues are slower, too many for all processes are refused.
  @Test func whatIsNoPipe() throws {
    defer { remove() }
    try #require(FileManager.default.createFile(atPath: control, contents: nil))
    #expect(MultiProcessService.isThere(in: directory))
  }
}
