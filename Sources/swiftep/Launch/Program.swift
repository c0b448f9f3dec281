import Glibc

/// An executable file, found as shells find it.
struct Program: Equatable {
  let path: String
  /// Its name as it was given, and what follows.
  let arguments: [String]

  /// - Parameter searchedFolders: as in PATH; nil where that is not set.
  init(_ words: [String], searchedFolders: String?) throws(ProgramError) {
    arguments = words
    let name = words[0]
    if name.contains("/") {
      path = name
      try Self.check(name)
      return
    }
    let searched = searchedFolders ?? "/usr/local/bin:/usr/bin:/bin"
    var refused: ProgramError?
    for folder in searched.split(separator: ":", omittingEmptySubsequences: false) {
      let candidate = (folder.isEmpty ? "." : folder) + "/" + name
      do {
        try Self.check(candidate)
        path = candidate
        return
      } catch {
        if error.code == ProgramError.notExecutable { refused = refused ?? error }
      }
    }
    throw refused
      ?? ProgramError(
        code: ProgramError.notFound, expected: "a program in PATH (\(searched))", found: "none named '\(name)'")
  }

  private static func check(_ path: String) throws(ProgramError) {
    var status = stat()
    guard stat(path, &status) == 0 else {
      let code = errno == ENOENT || errno == ENOTDIR ? ProgramError.notFound : ProgramError.notExecutable
      throw ProgramError(
        code: code, expected: "an executable file '\(path)'", found: String(cString: strerror(errno)).lowercased())
    }
    let isExecutable = status.st_mode & S_IFMT == S_IFREG && access(path, X_OK) == 0
    if !isExecutable {
      let found = status.st_mode & S_IFMT == S_IFREG ? "one that may not be executed" : "something else"
      throw ProgramError(code: ProgramError.notExecutable, expected: "an executable file '\(path)'", found: found)
    }
  }
}

/// A program that cannot be started.
struct ProgramError: Error, Equatable, CustomStringConvertible {
  /// The launcher's exit code, as a shell's.
  let code: Int32
  let expected: String
  let found: String

  static let notExecutable: Int32 = 126
  static let notFound: Int32 = 127

  var description: String { "program: expected \(expected), found \(found)" }
}
