import Foundation

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
  var isFolder = ObjCBool(false)
  if FileManager.default.fileExists(atPath: path, isDirectory: &isFolder) {
    if !isFolder.boolValue && FileManager.default.isWritableFile(atPath: path) { return }
  } else if FileManager.default.isWritableFile(atPath: folder) {
    return
  }
  throw UsageError("--\(flag) \(path)", expected: "a file that can be written", found: "one that cannot")
}
