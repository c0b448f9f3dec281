import Arena
import CPlatform
import Glibc

/// Feeds a client from a socket, and does what it directs, until it has finished or failed.
struct ClientLoop {
  private var client: Client
  private let places: [SocketAddress]
  private var socket: StreamSocket?
  private var isConnecting = false

  /// - Parameter places: those of the client, in the same order.
  static func run(_ client: Client, places: [SocketAddress]) throws(RendezvousError) -> [[UInt8]] {
    var loop = ClientLoop(client: client, places: places)
    return try loop.run()
  }

  private init(client: Client, places: [SocketAddress]) {
    self.client = client
    self.places = places
  }

  private mutating func run() throws(RendezvousError) -> [[UInt8]] {
    while true {
      if let pieces = try perform(client.tick(now: .now)) { return pieces }
      let events = isConnecting ? POLLOUT : socket?.hasOutput == true ? POLLIN | POLLOUT : POLLIN
      var polled = [pollfd(fd: socket?.descriptor.raw ?? -1, events: Int16(events), revents: 0)]
      wait(for: &polled, until: client.nextTick)
      if polled[0].revents != 0, let pieces = try serve() { return pieces }
    }
  }

  private mutating func serve() throws(RendezvousError) -> [[UInt8]]? {
    guard let descriptor = socket?.descriptor else { return nil }
    if isConnecting {
      guard swiftep_connection_error(descriptor.raw) == 0 else { return try end() }
      isConnecting = false
      return try perform(client.connected(nonce: try newNonce()))
    }
    if socket?.flush() == .ended { return try end() }
    guard let bytes = socket?.receive() else { return try end() }
    return bytes.isEmpty ? nil : try perform(client.received(bytes))
  }

  private mutating func end() throws(RendezvousError) -> [[UInt8]]? {
    socket = nil
    return try perform(client.ended())
  }

  /// Returns the pieces if that was all.
  private mutating func perform(_ directives: [Client.Directive]) throws(RendezvousError) -> [[UInt8]]? {
    for directive in directives {
      switch directive {
      case .connect(let place):
        let raw = places[place].withPointer { swiftep_connect_tcp($0, $1) }
        if raw >= 0 {
          socket = StreamSocket(Descriptor(owning: raw))
          isConnecting = true
        } else {
          if [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(errno) { throw .systemCall(name: "socket", code: errno) }
          return try end()
        }
      case .send(let bytes):
        socket?.enqueue(bytes)
        if socket?.flush() == .ended { return try end() }
      case .close: socket = nil
      case .finish(let pieces): return pieces
      case .fail(let error): throw error
      }
    }
    return nil
  }
}
