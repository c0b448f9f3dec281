import Arena
import Rendezvous

/// A secret that the processes of a job share: by it they know each other.
///
/// It never travels, and is not shown when a value of this type is printed or reflected. Whoever has it can take the
/// place of a rank that has not come yet, and can then read and write the memory of the others if of the same user.
public struct JobToken: Sendable, Equatable {
  let token: Token

  /// - Parameter text: 16 to 1024 bytes of UTF-8; white space around it does not count. It has to be as hard to guess
  ///   as a key: what `random` makes, or `swiftep token` prints.
  /// - Throws: `invalidArgument`.
  public init(_ text: String) throws(EPError) {
    token = try EPError.mapping { () throws(InputFault) in try Token(text, from: "token") }
  }

  /// Read from a regular file that belongs to this user and that nobody else can read or write (mode 600 or 400).
  ///
  /// - Throws: `invalidArgument`.
  public init(contentsOfFile path: String) throws(EPError) {
    token = try EPError.mapping { () throws(InputFault) in try Token(file: path, from: "file") }
  }

  /// 256 random bits.
  public static func random() throws(EPError) -> JobToken {
    do throws(SystemCallError) {
      return JobToken(try Token.random())
    } catch {
      throw .systemCall(rank: -1, name: error.call, code: error.code)
    }
  }

  private init(_ token: Token) { self.token = token }

  /// The secret itself, to be passed to the processes of the job in a way that others cannot read.
  public var secretText: String { token.text }
}

extension JobToken: CustomStringConvertible, CustomDebugStringConvertible, CustomReflectable {
  public var description: String { token.description }
  public var debugDescription: String { token.description }
  public var customMirror: Mirror { Mirror(self, children: []) }
}
