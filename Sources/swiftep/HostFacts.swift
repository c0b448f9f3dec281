import CPlatform
import Foundation

/// Memory of this process that is in RAM, shared pages counted in part. Bytes.
func residentByteCount() throws -> Int {
  let text = try String(contentsOfFile: "/proc/self/smaps_rollup", encoding: .utf8)
  return kilobytes(after: "Pss:", in: text).map { 1024 * $0 } ?? 0
}

/// Memory that the host can still give; nil where it does not say. Bytes.
func availableByteCount() -> Int? {
  guard let text = try? String(contentsOfFile: "/proc/meminfo", encoding: .utf8) else { return nil }
  return kilobytes(after: "MemAvailable:", in: text).map { 1024 * $0 }
}

func processorName() -> String {
  let text = (try? String(contentsOfFile: "/proc/cpuinfo", encoding: .utf8)) ?? ""
  let line = text.split(separator: "\n").first { $0.hasPrefix("model name") }
  let name = line?.split(separator: ":", maxSplits: 1).last.map { $0.trimmingCharacters(in: .whitespaces) }
  return name ?? "unknown"
}

var usableCoreCount: Int { Int(swiftep_usable_core_count()) }

/// The number in a line such as `Pss:    123 kB`.
private func kilobytes(after title: String, in text: String) -> Int? {
  let line = text.split(separator: "\n").first { $0.hasPrefix(title) }
  return line?.split(separator: " ").dropFirst().first.flatMap { Int($0) }
}
