/// What a run of faults has shown.
package struct ChaosSummary: Sendable {
  package struct Row: Sendable {
    package let fault: ChaosFault
    /// Whether the others went on with newcomers.
    package let joined: Bool
    /// From each fault until all others had right results in their new group. Nanoseconds.
    package fileprivate(set) var times: [UInt64]
  }

  package internal(set) var faultCount = 0
  package private(set) var rows: [Row] = []

  mutating func add(_ fault: ChaosFault, nanoseconds: UInt64, joined: Bool) {
    let index = rows.firstIndex { $0.fault == fault && $0.joined == joined }
    if let index {
      rows[index].times.append(nanoseconds)
    } else {
      rows.append(Row(fault: fault, joined: joined, times: [nanoseconds]))
    }
  }
}
