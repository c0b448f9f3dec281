/// Who has connected to a server.
struct Guest {
  /// The server's, for this one.
  let nonce: Nonce
  /// When it is dropped; nil where it waits for others.
  var patienceEnd: ContinuousClock.Instant?
  var input = Input()
  /// To be sent to it.
  var output: [UInt8] = []
  /// Whether something is on its way to it.
  var isSending = false
  /// To be dropped when it has been sent the output.
  var isLeaving = false
  /// Its nonce, once it has said hello.
  var greeting: Nonce?
  /// Once it has proven to know the token, and has a seat.
  var member: Member?

  init(nonce: Nonce, patienceEnd: ContinuousClock.Instant) {
    self.nonce = nonce
    self.patienceEnd = patienceEnd
  }

  struct Member {
    let index: Int
    var incoming: SealedChannel
    var outgoing: SealedChannel
    /// Who it was told is missing.
    var toldMissing: Int
    /// The next part that it is to be sent: of which piece, from which byte on.
    var nextPart = (piece: 0, offset: 0)
  }
}
