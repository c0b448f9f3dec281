import Glibc

/// Hands on to rank 0 what is typed. The rank cannot read it itself: it is not in the terminal's foreground.
final class TerminalRelay {
  let pipe: OpenFile
  private var pending: ArraySlice<UInt8> = []
  private var hasEnded = false

  init(to pipe: OpenFile) { self.pipe = pipe }

  var isEmpty: Bool { pending.isEmpty }
  /// Nothing more comes, or the rank reads no more: the pipe is to be closed.
  var isOver: Bool { hasEnded && isEmpty }

  /// Whether what is typed is taken now: not while the launcher itself is in the background.
  var isReading: Bool { !hasEnded && isEmpty && tcgetpgrp(STDIN_FILENO) == getpgrp() }

  func read() {
    guard isReading else { return }
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = Glibc.read(STDIN_FILENO, &bytes, bytes.count)
    if count < 0 && errno == EINTR { return }
    hasEnded = count <= 0
    pending = bytes[..<max(0, count)]
    flush()
  }

  func flush() {
    while !isEmpty {
      let count = pending.withUnsafeBytes { write(pipe.raw, $0.baseAddress, $0.count) }
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return }
      if count < 0 { hasEnded = true }
      pending = count < 0 ? [] : pending.dropFirst(count)
    }
  }
}
