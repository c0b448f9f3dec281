import Arena
import CPlatform
import Glibc

/// Feeds a server from sockets, and does what it directs, until it has finished or failed.
struct ServerLoop {
  private var server: Server
  private var listener: Descriptor?
  private var sockets: [Server.Connection: StreamSocket] = [:]
  private var nextConnection = 0
  /// Why nobody could be let in at the last attempt.
  private var acceptFailure: Int32?

  /// So that those who have connected are served while many more do.
  private static let acceptCountMax = 64
  /// How long to wait for descriptors to become free.
  private static let acceptRetry: Duration = .milliseconds(20)

  static func run(_ server: Server, on listener: Descriptor) throws(RendezvousError) -> [[UInt8]] {
    var loop = ServerLoop(server: server, listener: listener)
    return try loop.run()
  }

  private init(server: Server, listener: Descriptor) {
    self.server = server
    self.listener = listener
  }

  private mutating func run() throws(RendezvousError) -> [[UInt8]] {
    while true {
      if let pieces = try perform(server.tick(now: .now)) { return pieces }

      let connections = sockets.keys.sorted()
      var polled = connections.map { connection in
        let socket = sockets[connection]!
        let events = socket.hasOutput ? POLLIN | POLLOUT : POLLIN
        return pollfd(fd: socket.descriptor.raw, events: Int16(events), revents: 0)
      }
      let canAccept = acceptFailure == nil
      polled.append(pollfd(fd: canAccept ? listener?.raw ?? -1 : -1, events: Int16(POLLIN), revents: 0))
      let retry = ContinuousClock.now + Self.acceptRetry
      wait(for: &polled, until: canAccept ? server.nextTick : min(server.nextTick ?? retry, retry))
      if let pieces = try perform(server.tick(now: .now)) { return pieces }

      // In the order in which they have come, so that the end of one is seen before its successor's beginning.
      for (connection, entry) in zip(connections, polled) where entry.revents != 0 {
        if let pieces = try serve(connection) { return pieces }
      }
      if polled.last!.revents != 0 || !canAccept {
        if let pieces = try acceptGuests() { return pieces }
      }
    }
  }

  private mutating func serve(_ connection: Server.Connection) throws(RendezvousError) -> [[UInt8]]? {
    if sockets[connection]?.hasOutput == true {
      if let pieces = try perform(flush(connection)) { return pieces }
    }
    guard let bytes = sockets[connection].map({ $0.receive() }) else { return nil }
    guard let bytes else {
      sockets[connection] = nil
      return try perform(server.ended(connection))
    }
    return bytes.isEmpty ? nil : try perform(server.received(connection, bytes))
  }

  private mutating func flush(_ connection: Server.Connection) -> [Server.Directive] {
    switch sockets[connection]?.flush() {
    case .done: return server.sent(connection)
    case .blocked, nil: return []
    case .ended:
      sockets[connection] = nil
      return server.ended(connection)
    }
  }

  private mutating func acceptGuests() throws(RendezvousError) -> [[UInt8]]? {
    acceptFailure = nil
    for _ in 0..<Self.acceptCountMax {
      guard let listener else { return nil }
      let raw = swiftep_accept(listener.raw)
      if raw < 0 {
        if errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM { acceptFailure = errno }
        return nil
      }
      let connection = nextConnection
      nextConnection += 1
      sockets[connection] = StreamSocket(Descriptor(owning: raw))
      if let pieces = try perform(server.accepted(connection, nonce: try newNonce())) { return pieces }
    }
    return nil
  }

  /// Returns the pieces if that was all.
  private mutating func perform(_ directives: [Server.Directive]) throws(RendezvousError) -> [[UInt8]]? {
    var queue = directives[...]
    while let directive = queue.popFirst() {
      switch directive {
      case .send(let connection, let bytes):
        sockets[connection]?.enqueue(bytes)
        queue += flush(connection)
      case .drop(let connection): sockets[connection] = nil
      case .stopListening: listener = nil
      case .finish(let pieces): return pieces
      case .fail(let error):
        if let acceptFailure { throw .systemCall(name: "accept", code: acceptFailure) }
        throw error
      }
    }
    return nil
  }
}

func newNonce() throws(RendezvousError) -> Nonce {
  do throws(SystemCallError) {
    return Nonce(try randomBytes(Nonce.byteCount))
  } catch {
    throw .systemCall(name: error.call, code: error.code)
  }
}
