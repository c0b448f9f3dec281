/// Rows of text under a title row. The first column is aligned left, the others right.
package struct TextTable: CustomStringConvertible {
  private var rows: [[String]]

  package init(_ titles: [String]) { rows = [titles] }

  package mutating func append(_ cells: [String]) {
    precondition(cells.count == rows[0].count)
    rows.append(cells)
  }

  package var description: String {
    let widths = rows[0].indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    var lines = rows.map { row in
      row.enumerated().map { column, cell in
        column == 0 ? cell.padding(to: widths[0]) : cell.paddingLeft(to: widths[column])
      }.joined(separator: "  ")
    }
    let ruleWidth = widths.reduce(0, +) + 2 * (widths.count - 1)
    lines.insert(String(repeating: "-", count: ruleWidth), at: 1)
    return lines.joined(separator: "\n")
  }
}

extension BinaryInteger {
  /// With a comma between thousands.
  package var grouped: String {
    let digits = String(magnitude)
    var text = self < 0 ? "-" : ""
    for (index, digit) in digits.enumerated() {
      if index > 0 && (digits.count - index) % 3 == 0 { text += "," }
      text.append(digit)
    }
    return text
  }
}

extension Double {
  package func rounded(toPlaces places: Int) -> String {
    var scale = 1.0
    for _ in 0..<places { scale *= 10 }
    let scaled = Int((magnitude * scale).rounded())
    let whole = "\(self < 0 ? "-" : "")\(scaled / Int(scale))"
    if places == 0 { return whole }
    let fraction = String(scaled % Int(scale))
    return whole + "." + String(repeating: "0", count: places - fraction.count) + fraction
  }
}

extension String {
  package func padding(to width: Int) -> String { self + String(repeating: " ", count: Swift.max(0, width - count)) }
  package func paddingLeft(to width: Int) -> String {
    String(repeating: " ", count: Swift.max(0, width - count)) + self
  }
}
