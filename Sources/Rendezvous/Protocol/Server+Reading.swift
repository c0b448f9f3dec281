extension Server {
  /// Reads one message and notes what it means for the guest; false when more bytes have to come first.
  mutating func readMessage(from guest: inout Guest) throws(Malformed) -> Bool {
    if guest.greeting == nil { return try readGreeting(from: &guest) }
    guard let member = guest.member else { return try readClaim(from: &guest) }
    if pieces[member.index] == nil { return try readPiece(from: &guest) }
    // It has nothing more to say.
    if guest.input.count > 0 { throw Malformed() }
    return false
  }

  private func readGreeting(from guest: inout Guest) throws(Malformed) -> Bool {
    guard let greeting = try Handshake.Greeting(of: .client, from: &guest.input) else { return false }
    guest.output += Handshake.Greeting.bytes(of: .server, guest.nonce)
    // It sees the difference, too.
    if greeting.version != Handshake.version { throw Malformed() }
    guest.greeting = greeting.nonce
    return true
  }

  private mutating func readClaim(from guest: inout Guest) throws(Malformed) -> Bool {
    guard let claim = try Handshake.readClaim(from: &guest.input) else { return false }
    let handshake = Handshake(clientNonce: guest.greeting!, serverNonce: guest.nonce, seat: claim.seat)
    guard key.isProof(claim.proof, of: .client, in: handshake) else { throw Malformed() }
    let refusal = refusal(of: claim.seat)
    let missing = lowestMissing ?? seat.count
    var outgoing = key.channel(from: .server, after: handshake)
    guest.output += key.proof(of: .server, in: handshake)
    guest.output += outgoing.seal((refusal.map { .refusal($0) } ?? Message.waiting(missing: missing)).bytes)
    if refusal != nil { throw Malformed() }
    isTaken[claim.seat.index] = true
    guest.patienceEnd = now + patience.guest
    guest.member = Guest.Member(
      index: claim.seat.index, incoming: key.channel(from: .client, after: handshake), outgoing: outgoing,
      toldMissing: missing)
    return true
  }

  private func refusal(of claimed: Seat) -> Message.Refusal? {
    if claimed.room != seat.room { return .room(expected: seat.room) }
    if claimed.index == 0 { return .taken }
    if claimed.count != seat.count { return .count(expected: seat.count) }
    // One that does not exist is nobody's to take.
    return claimed.index >= seat.count || isTaken[claimed.index] ? .taken : nil
  }

  private mutating func readPiece(from guest: inout Guest) throws(Malformed) -> Bool {
    guard let text = try guest.member!.incoming.open(&guest.input) else { return false }
    guard case .part(let piece, isLast: true) = try Message(text) else { throw Malformed() }
    pieces[guest.member!.index] = piece
    guest.patienceEnd = nil
    return true
  }
}
