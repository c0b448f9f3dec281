import Arena
import CPlatform
import Glibc

/// Signals that are read when it suits, rather than interrupt.
final class SignalQueue {
  let file: OpenFile
  /// What was blocked before, and is in programs that are started.
  let before: sigset_t

  /// Takes the signals over, but for those that are ignored.
  init(_ signals: [Int32]) throws(SystemCallError) {
    var before = sigset_t()
    file = try OpenFile("signalfd") { swiftep_take_signals(signals, Int32(signals.count), &before) }
    self.before = before
  }

  func next() -> Int32? {
    let signal = swiftep_next_signal(file.raw)
    return signal > 0 ? signal : nil
  }
}
