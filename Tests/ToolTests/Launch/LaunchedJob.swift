import Foundation
import Testing

@testable import swiftep

/// A job of `swiftep launch` that runs a shell script, and the folder where its ranks leave files: `$FOLDER` for them.
final class LaunchedJob {
  let folder: URL
  private let process = Process()
  private let (output, errors) = (TemporaryOutput(), TemporaryOutput())
  private static let patience = 60.0

  /// - Parameters:
  ///   - script: what each rank runs; `mark NAME` in it makes the file `NAME.RANK`, holding the shell's process id;
  ///     `await_go` waits for `letGo`.
  ///   - shell: a shell command that execs the launcher, in place of running it directly; `$0` is the launcher, `$@`
  ///     its arguments.
  init(_ flags: [String], script: String, input: Data? = nil, shell: String? = nil) throws {
    folder = FileManager.default.temporaryDirectory.appendingPathComponent("launch-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let prelude = #"""
      mark() { echo $$ > "$FOLDER/.$1.$SWIFTEP_RANK" && mv "$FOLDER/.$1.$SWIFTEP_RANK" "$FOLDER/$1.$SWIFTEP_RANK"; }
      await_go() { while [ ! -e "$FOLDER/go" ]; do sleep 0.01; done; }
      """#
    let words = ["launch"] + flags + ["--", "/bin/sh", "-c", prelude + "\n" + script]
    if let shell {
      process.executableURL = URL(fileURLWithPath: "/bin/sh")
      process.arguments = ["-c", shell, Binary.url.path] + words
    } else {
      process.executableURL = Binary.url
      process.arguments = words
    }
    process.environment = ProcessInfo.processInfo.environment.merging(["FOLDER": folder.path]) { $1 }
    process.standardOutput = output.handle
    process.standardError = errors.handle
    if let input {
      let pipe = Pipe()
      process.standardInput = pipe
      pipe.fileHandleForWriting.write(input)
      try pipe.fileHandleForWriting.close()
    } else {
      process.standardInput = FileHandle.nullDevice
    }
    // The threads that run tests have blocked most signals, and children inherit that.
    var (none, before) = (sigset_t(), sigset_t())
    sigemptyset(&none)
    pthread_sigmask(SIG_SETMASK, &none, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
    try process.run()
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    try? FileManager.default.removeItem(at: folder)
  }

  var launcher: pid_t { process.processIdentifier }

  func letGo() throws { try Data().write(to: folder.appendingPathComponent("go")) }

  func send(_ signal: Int32) { kill(launcher, signal) }

  /// Waits until the rank has made its mark; returns the process id in it.
  @discardableResult
  func mark(_ name: String, of rank: Int) throws -> pid_t {
    let file = folder.appendingPathComponent("\(name).\(rank)")
    var process: pid_t?
    // A file is there before its line is.
    try eventually("\(name) of rank \(rank)") {
      let text = try? String(contentsOf: file, encoding: .utf8)
      process = text.flatMap { $0.hasSuffix("\n") ? pid_t($0.dropLast()) : nil }
      return process != nil
    }
    return process!
  }

  func hasMark(_ name: String, of rank: Int) -> Bool {
    FileManager.default.fileExists(atPath: folder.appendingPathComponent("\(name).\(rank)").path)
  }

  /// Waits for the launcher's end. A negative status is the signal that ended it.
  func end() throws -> Binary.Run {
    try eventually("the launcher's end") { !process.isRunning }
    process.waitUntilExit()
    return Binary.Run(
      status: process.terminationReason == .exit ? process.terminationStatus : -process.terminationStatus,
      output: output.text, errors: errors.text)
  }

  static func run(_ flags: [String], script: String, input: Data? = nil, shell: String? = nil) throws -> Binary.Run {
    try LaunchedJob(flags, script: script, input: input, shell: shell).end()
  }

  struct Late: Error, CustomStringConvertible {
    let description: String
  }

  func eventually(_ what: String, _ condition: () -> Bool) throws {
    let end = Date().addingTimeInterval(Self.patience)
    while !condition() {
      if Date() > end { throw Late(description: "\(what) did not come; stderr: \(errors.text)") }
      usleep(5000)
    }
  }
}

/// Whether a process is there that has not ended.
func isAlive(_ process: pid_t) -> Bool {
  guard let text = try? String(contentsOfFile: "/proc/\(process)/stat", encoding: .utf8),
    let state = text.split(separator: ")").last?.split(separator: " ").first
  else { return false }
  return state != "Z" && state != "X"
}

/// A file without a name that a process writes to: unlike a pipe's, its writer never waits, and its reader never
/// waits for those who keep it open.
private struct TemporaryOutput {
  let handle: FileHandle
  private let descriptor: Int32

  init() {
    var template = Array("\(NSTemporaryDirectory())output-XXXXXX".utf8CString)
    descriptor = mkstemp(&template)
    unlink(&template)
    handle = FileHandle(fileDescriptor: descriptor, closeOnDealloc: true)
  }

  var text: String {
    var bytes: [UInt8] = []
    var portion = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let count = pread(descriptor, &portion, portion.count, off_t(bytes.count))
      if count <= 0 { return String(decoding: bytes, as: UTF8.self) }
      bytes += portion[..<count]
    }
  }
}
