/// How much is borne from whom.
package struct Patience: Sendable {
  /// How long a guest may take to prove that it knows the token, then to send its piece, then for each part that it is
  /// sent.
  package var guest: Duration = .seconds(10)
  /// How often those who wait are told who is missing, if that changes.
  package var notice: Duration = .milliseconds(500)
  /// How long a client waits for proof at one place before it tries the next; twice as long in each round.
  package var place: Duration = .milliseconds(250)
  package var placeMax: Duration = .seconds(16)
  /// How long a client rests before it tries the places again; twice as long in each round.
  package var rest: Duration = .milliseconds(10)
  package var restMax: Duration = .milliseconds(160)

  package init() {}

  /// Guests that have proven nothing, at the same time.
  static func strangerCountMax(participantCount: Int) -> Int { 64 + 2 * participantCount }
}
