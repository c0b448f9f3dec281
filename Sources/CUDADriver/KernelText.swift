import CCUDA
import Glibc

/// The kernels as PTX: those that the library carries, or those of the folder that `SWIFTEP_KERNELS` names.
package struct KernelText: Sendable {
  package let text: String
  /// The file that it comes from; nil where the library carries it.
  package let file: String?

  package static let variable = "SWIFTEP_KERNELS"

  /// Why a folder's kernels cannot be used.
  package struct Fault: Error, Equatable, CustomStringConvertible {
    package let file: String
    package let expected: String
    package let found: String

    package var description: String { "\(KernelText.variable): \(file): expected \(expected), found \(found)" }
  }

  /// The best kernels for a GPU of `architecture`, as 90 for sm_90.
  ///
  /// - Parameter folder: nil or empty: the library's own.
  /// - Throws: where the folder has none, or those of another version: with other arguments than the library's.
  package init(architecture: Int, folder: String?) throws(Fault) {
    let target = architecture >= 90 ? "sm_90" : "sm_80"
    let carried = String(cString: architecture >= 90 ? swiftep_kernels_sm_90() : swiftep_kernels_sm_80())
    guard let folder, !folder.isEmpty else {
      (text, file) = (carried, nil)
      return
    }
    let file = "\(folder)/\(target).ptx"
    guard let text = Self.read(file) else {
      throw Fault(
        file: file, expected: "kernels, as from scripts/build-kernels --checked",
        found: String(cString: strerror(errno)))
    }
    let (expected, found) = (Self.declarations(carried), Self.declarations(text))
    for (name, declaration) in expected.sorted(by: { $0.key < $1.key }) where found[name] != declaration {
      throw Fault(file: file, expected: declaration, found: found[name] ?? "no \(name)")
    }
    (self.text, self.file) = (text, file)
  }

  /// As the environment says.
  package init(architecture: Int) throws(Fault) {
    try self.init(architecture: architecture, folder: getenv(Self.variable).map { String(cString: $0) })
  }

  /// Whether each kernel begins by waiting for the end of the launch before it, where it was started earlier.
  package var awaitPrevious: Bool { Self.declarations(text)[".target"]?.contains("sm_90") == true }

  package func has(kernel: String) -> Bool { Self.declarations(text)[kernel] != nil }

  private static func read(_ file: String) -> String? {
    guard let stream = fopen(file, "r") else { return nil }
    defer { fclose(stream) }
    var bytes: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let count = fread(&piece, 1, piece.count, stream)
      if count == 0 { return ferror(stream) == 0 ? String(decoding: bytes, as: UTF8.self) : nil }
      bytes += piece[..<count]
    }
  }

  /// What must be the same for the host to launch kernels: their target, and each kernel's parameters, by name.
  private static func declarations(_ text: String) -> [String: String] {
    var found: [String: String] = [:]
    var open: (name: String, parts: [Substring])?
    for line in text.utf8.split(separator: UInt8(ascii: "\n")) {
      if open == nil && line.first != UInt8(ascii: ".") { continue }
      let words = Substring(line).split { $0 == " " || $0 == "\t" }
      guard let first = words.first else { continue }
      if first == ".target" { found[".target"] = words.joined(separator: " ") }
      if let place = words.firstIndex(of: ".entry"), place + 1 < words.count {
        open = (String(words[place + 1].prefix { $0 != "(" }), [])
      }
      guard open != nil else { continue }
      open!.parts += words
      if words.contains(where: { $0.contains(")") }) {
        found[open!.name] = open!.parts.joined(separator: " ")
        open = nil
      }
    }
    return found
  }
}
