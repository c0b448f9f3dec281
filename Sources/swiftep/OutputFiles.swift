import Foundation

/// Prints a document; a stdout that cannot take it is an error.
func printDocument(_ data: Data) throws(UsageError) {
  do {
    try FileHandle.standardOutput.write(contentsOf: data)
  } catch {
    throw UsageError("stdout", expected: "an output that can be written", found: "one that cannot")
  }
}

/// Prints a line that is out even if the next moment brings a crash.
func printNow(_ line: String) throws(UsageError) { try printDocument(Data((line + "\n").utf8)) }

func writeFile(_ data: Data, _ path: String, flag: String) throws(UsageError) {
  do {
    try data.write(to: URL(fileURLWithPath: path))
  } catch {
    throw UsageError("--\(flag) \(path)", expected: "a file that can be written", found: "one that cannot")
  }
}

/// Before the work is done, rather than after it.
func checkWritable(_ path: String, flag: String) throws(UsageError) {
  let folder = URL(fileURLWithPath: path).deletingLastPathComponent().path
  if path.isEmpty { throw UsageError("--\(flag)", expected: "a file's path", found: "none") }
  var isFolder = ObjCBool(false)
  if FileManager.default.fileExists(atPath: path, isDirectory: &isFolder) {
    if !isFolder.boolValue && FileManager.default.isWritableFile(atPath: path) { return }
  } else if FileManager.default.isWritableFile(atPath: folder) {
    return
  }
  throw UsageError("--\(flag) \(path)", expected: "a file that can be written", found: "one that cannot")
}
