import Foundation

/// Times over tokens, both axes logarithmic: of each operation the median, the 99th percentile and the copy floor.
struct LatencyPlot {
  private let report: LatencyReport
  private let title: String
  private let times: ClosedRange<Double>

  private static let (width, height) = (860.0, 480.0)
  private static let (left, right, top, bottom) = (70.0, 230.0, 50.0, 50.0)
  private static let colors = ["#0072b2", "#d55e00", "#009e73"]

  init(_ report: LatencyReport, title: String) {
    self.report = report
    self.title = title
    let all = report.sizes.flatMap(\.operations)
      .flatMap { [$0.medianMicroseconds, $0.p99Microseconds, $0.floorMicroseconds] }.filter { $0 > 0 }
    // Whole decades, at least one.
    let first = floor(log10(all.min() ?? 1))
    times = first...max(first + 1, ceil(log10(all.max() ?? 1)))
  }

  var svg: String {
    """
    <svg xmlns="http://www.w3.org/2000/svg" width="\(text(Self.width))" height="\(text(Self.height))" \
    font-family="sans-serif" font-size="12">
    <rect width="100%" height="100%" fill="white"/>
    <text x="\(text(Self.left))" y="24">\(title.escapedForXML)</text>
    \((grid + curves + legend).joined(separator: "\n"))
    </svg>

    """
  }

  // MARK: Places

  private func x(_ tokens: Int) -> Double {
    let last = max(1, log2(Double(report.sizes.map(\.tokens).max() ?? 1)))
    return Self.left + (Self.width - Self.left - Self.right) * log2(Double(tokens)) / last
  }

  private func y(_ microseconds: Double) -> Double {
    let share = (log10(microseconds) - times.lowerBound) / (times.upperBound - times.lowerBound)
    return Self.height - Self.bottom - (Self.height - Self.top - Self.bottom) * share
  }

  private func text(_ number: Double) -> String { number.rounded(toPlaces: 1) }

  // MARK: Parts

  private var grid: [String] {
    let (right, bottom) = (Self.width - Self.right, Self.height - Self.bottom)
    let across = stride(from: times.lowerBound, to: times.upperBound, by: 1).flatMap { decade in
      [1, 2, 5].map { $0 * pow(10, decade) }
    }
    let rows = (across + [pow(10, times.upperBound)]).flatMap { time in
      [
        line(from: (Self.left, y(time)), to: (right, y(time))),
        label(time < 1 ? "\(time)" : "\(Int(time.rounded()))", (Self.left - 8, y(time) + 4), anchor: "end"),
      ]
    }
    let columns = report.sizes.map(\.tokens).flatMap { tokens in
      [
        line(from: (x(tokens), Self.top), to: (x(tokens), bottom)),
        label("\(tokens)", (x(tokens), bottom + 18), anchor: "middle"),
      ]
    }
    return rows + columns + [
      label("tokens of a rank", ((Self.left + right) / 2, Self.height - 10), anchor: "middle"),
      label("us", (Self.left - 8, Self.top - 12), anchor: "end"),
    ]
  }

  private var operations: [String] { report.sizes.first?.operations.map(\.name) ?? [] }

  private var curves: [String] {
    operations.indices.flatMap { index in
      [
        curve(index, \.floorMicroseconds, dashes: "1 4"), curve(index, \.p99Microseconds, dashes: "6 4"),
        curve(index, \.medianMicroseconds, dashes: nil),
      ]
    }
  }

  private var legend: [String] {
    let kinds: [(String, String?)] = [("median", nil), ("99th percentile", "6 4"), ("copy floor", "1 4")]
    return operations.enumerated().flatMap { index, name in
      kinds.enumerated().flatMap { row, kind in
        let place = (Self.width - Self.right + 16, Self.top + 8 + 18 * Double(3 * index + row) + 10 * Double(index))
        return [
          line(from: place, to: (place.0 + 28, place.1), color: Self.colors[index % Self.colors.count], dashes: kind.1),
          label("\(row == 0 ? name : kind.0)", (place.0 + 36, place.1 + 4), anchor: "start"),
        ]
      }
    }
  }

  private func curve(_ index: Int, _ time: KeyPath<BenchReport.Operation, Double>, dashes: String?) -> String {
    let points = report.sizes.compactMap { size -> String? in
      let microseconds = size.operations[index][keyPath: time]
      return microseconds > 0 ? "\(text(x(size.tokens))),\(text(y(microseconds)))" : nil
    }
    return """
      <polyline fill="none" stroke-width="2" stroke="\(Self.colors[index % Self.colors.count])"\(dashed(dashes)) \
      points="\(points.joined(separator: " "))"/>
      """
  }

  private func line(
    from start: (Double, Double), to end: (Double, Double), color: String = "#dddddd", dashes: String? = nil
  ) -> String {
    """
    <line x1="\(text(start.0))" y1="\(text(start.1))" x2="\(text(end.0))" y2="\(text(end.1))" \
    stroke-width="\(color == "#dddddd" ? 1 : 2)" stroke="\(color)"\(dashed(dashes))/>
    """
  }

  private func label(_ words: String, _ place: (Double, Double), anchor: String) -> String {
    """
    <text x="\(text(place.0))" y="\(text(place.1))" text-anchor="\(anchor)">\(words.escapedForXML)</text>
    """
  }

  private func dashed(_ dashes: String?) -> String { dashes.map { #" stroke-dasharray="\#($0)""# } ?? "" }
}

extension String {
  fileprivate var escapedForXML: String {
    replacing("&", with: "&amp;").replacing("<", with: "&lt;").replacing(">", with: "&gt;")
  }
}
