/// A variable, a file or an argument that cannot be used.
package struct InputFault: Error, Equatable, CustomStringConvertible {
  package let subject: String
  package let expected: String
  package let found: String

  package init(_ subject: String, expected: String, found: String) {
    self.subject = subject
    self.expected = expected
    self.found = found
  }

  package var description: String { "\(subject): expected \(expected), found \(found)" }
}
