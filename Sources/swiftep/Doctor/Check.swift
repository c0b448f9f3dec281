/// One thing that was looked at.
struct Check: Codable, Equatable {
  enum State: String, Codable {
    case ok
    /// Jobs run, but not as well as they could.
    case warning
    /// Something is not there that jobs do without.
    case missing
    /// Jobs cannot run, at least in one of the ways.
    case failed
  }

  let name: String
  var state = State.ok
  let found: String
  /// Empty where nothing in particular is.
  var needed = ""
  /// How to get what is needed; empty where all is well.
  var remedy = ""
  /// Ways of running a job that are impossible for this.
  var blocks: [JobPath] = []
}

/// A way of running the ranks of a job.
enum JobPath: String, Codable, CaseIterable {
  case threads, processes, gpu

  var title: String {
    switch self {
    case .threads: "threads of one process"
    case .processes: "processes of this host, over shared memory"
    case .gpu: "GPUs"
    }
  }
}

/// As in "1.5 GiB".
func binaryUnits(_ byteCount: Int64) -> String {
  let units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
  var (value, unit) = (Double(byteCount), 0)
  while value >= 1024 && unit < units.count - 1 { (value, unit) = (value / 1024, unit + 1) }
  return "\(value.rounded(toPlaces: unit == 0 || value >= 100 ? 0 : 1)) \(units[unit])"
}
