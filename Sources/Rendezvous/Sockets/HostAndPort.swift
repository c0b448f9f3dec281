/// `host:port`, `[v6]:port`: an address as a user writes it.
package struct HostAndPort: Equatable, Sendable, CustomStringConvertible {
  package let host: String
  package let port: UInt16

  /// - Parameter source: where it comes from, for the error.
  package init(_ text: String, from source: String) throws(InputFault) {
    let fault = InputFault(source, expected: "host:port or [v6]:port, with a port of 1 to 65535", found: "'\(text)'")
    let host: Substring
    let rest: Substring
    if text.hasPrefix("[") {
      guard let end = text.firstIndex(of: "]") else { throw fault }
      host = text[text.index(after: text.startIndex)..<end]
      rest = text[text.index(after: end)...]
    } else {
      guard let colon = text.lastIndex(of: ":") else { throw fault }
      host = text[..<colon]
      rest = text[colon...]
      // Which of the colons would be the one?
      if host.contains(":") { throw fault }
    }
    let digits = rest.dropFirst()
    guard !host.isEmpty, host.utf8.count <= 255, host.allSatisfy({ !$0.isWhitespace && $0 != "\0" }),
      rest.first == ":", digits.allSatisfy({ "0"..."9" ~= $0 }), let port = UInt16(digits), port > 0
    else { throw fault }
    self.host = String(host)
    self.port = port
  }

  package var description: String { host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)" }
}
