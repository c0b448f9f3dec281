import Foundation
import Testing

@testable import Rendezvous

@Suite struct CorpusTests {
  static var files: [URL] {
    get throws {
      let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("Corpus")
      return try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
    }
  }

  /// What the fuzzer has found to lead somewhere new.
  @Test func everyProgram() throws {
    let files = try Self.files
    #expect(files.count >= 10)
    for file in files {
      let violations = Interpreter.run(Array(try Data(contentsOf: file)))
      #expect(violations.isEmpty, "\(file.lastPathComponent)")
    }
  }
}
