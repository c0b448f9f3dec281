import Foundation
import Glibc

/// A line on stderr that is written over; nothing where stderr is no terminal.
struct StatusLine: Sendable {
  private let isVisible = isatty(STDERR_FILENO) == 1

  func show(_ text: String) { write("\r\(text)") }
  func clear() { write("\r\u{1b}[K") }

  private func write(_ text: String) {
    if isVisible { FileHandle.standardError.write(Data(text.utf8)) }
  }
}

/// `bench [####....] 4/8`
struct ProgressBar: Sendable {
  let title: String
  let count: Int

  func text(_ done: Int) -> String {
    let width = 40
    let filled = count == 0 ? width : width * min(done, count) / count
    let bar = String(repeating: "#", count: filled) + String(repeating: ".", count: width - filled)
    return "\(title) [\(bar)] \(done)/\(count)"
  }
}
