/// Never shows what it holds: not when printed, and not to a mirror.
package protocol Secret: CustomStringConvertible, CustomDebugStringConvertible, CustomReflectable, Sendable {}

extension Secret {
  package var description: String { "(secret)" }
  package var debugDescription: String { description }
  package var customMirror: Mirror { Mirror(self, children: []) }
}
