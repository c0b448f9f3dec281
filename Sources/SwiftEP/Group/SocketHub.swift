import Arena
import CPlatform
import Glibc
import HostMachine

/// A process's end of all its control connections: an abstract socket that takes them, and a thread that reads them.
final class SocketHub: @unchecked Sendable {
  private let listener: Descriptor
  private let waker: Descriptor
  private let secret: String
  private let user: uid_t
  private var thread: pthread_t?
  private let state = Guarded(State())

  private struct State {
    /// Made by `connect`, for the thread to take over.
    var newLinks: [SocketLink] = []
    var isClosing = false
    /// How often the thread has begun to look at all connections, and how often it was done.
    var roundsBegun: UInt64 = 0
    var roundsDone: UInt64 = 0
    /// The round that somebody waits for.
    var roundAwaited: UInt64 = 0
  }

  /// Rung after every round that somebody waits for.
  private let roundBell = SharedBell()

  /// The first message of a connection.
  struct Hello: Codable {
    let secret: String
    let member: MemberID
    /// Of the group that the member has found here.
    let generation: Int
  }

  init(card: Card) throws(SystemCallError) {
    listener = try Descriptor("bind of an abstract socket") { swiftep_listen_abstract(card.socketName) }
    waker = try Descriptor("eventfd") { swiftep_make_waker() }
    secret = card.secret
    user = card.user
  }

  /// The thread keeps the hub and the mesh alive until `close`.
  func start(delivering mesh: Mesh) {
    thread = startThread { self.serve(mesh) }
  }

  /// Whether the thread could be started.
  var isRunning: Bool { thread != nil }

  func close() {
    guard let thread else { return }
    state.withLock { $0.isClosing = true }
    wake()
    pthread_join(thread, nil)
    self.thread = nil
  }

  /// Waits until everything is handled that lay in the connections when it was called. Returns false where that did not
  /// happen in time.
  func settle(until deadline: UInt64) -> Bool {
    let round = state.withLock { state in
      state.roundAwaited = state.roundsBegun + 1
      return state.roundAwaited
    }
    wake()
    var isDone = false
    _ = roundBell.wait(until: deadline, spinningFor: 0) {
      let (done, isClosing) = state.withLock { ($0.roundsDone, $0.isClosing) }
      isDone = done >= round
      return isDone || isClosing
    }
    return isDone
  }

  /// - Parameter generation: of the group that the process of `card` is in.
  func connect(to card: Card, as own: MemberID, generation: Int) throws(SystemCallError) -> SocketLink {
    let descriptor = try Descriptor("connect to an abstract socket") { swiftep_connect_abstract(card.socketName) }
    var peerUser: UInt32 = 0
    try systemCall("getsockopt(SO_PEERCRED)") { swiftep_peer_user(descriptor.raw, &peerUser) }
    if peerUser != user { throw SystemCallError(call: "connect to a process of another user", code: EPERM) }
    let hello = encode(Hello(secret: card.secret, member: own, generation: generation))!
    try systemCall("sendmsg") { Int32(truncatingIfNeeded: swiftep_send(descriptor.raw, hello, hello.count, -1)) }
    let link = makeLink(to: card.id, descriptor)
    state.withLock { $0.newLinks.append(link) }
    wake()
    return link
  }

  private func makeLink(to member: MemberID, _ descriptor: Descriptor) -> SocketLink {
    SocketLink(to: member, descriptor: descriptor, wakingHub: { [waker] in Self.wake(waker) })
  }

  private func wake() { Self.wake(waker) }

  private static func wake(_ waker: Descriptor) {
    var one: UInt64 = 1
    _ = write(waker.raw, &one, 8)
  }

  // MARK: The thread

  /// Who has connected and not said hello yet.
  private struct Guest {
    let descriptor: Descriptor
    let deadline: UInt64
  }

  private static let guestCountMax = 256
  private static let guestPatience: UInt64 = 5_000_000_000
  /// How long the thread sleeps at most where something has to be tried again.
  private static let retryMilliseconds: Int32 = 20

  private func serve(_ mesh: Mesh) {
    var links: [SocketLink] = []
    var guests: [Guest] = []
    var canAccept = true
    var buffer = [UInt8](repeating: 0, count: SocketLink.messageByteCountMax)
    while true {
      let (newLinks, isClosing, isAwaited) = state.withLock { state in
        defer { state.newLinks = [] }
        state.roundsBegun += 1
        return (state.newLinks, state.isClosing, state.roundAwaited >= state.roundsBegun)
      }
      if isClosing { return }
      links += newLinks

      let backlogs = links.map(\.hasBacklog)
      var polled = [pollfd(fd: waker.raw, events: Int16(POLLIN), revents: 0)]
      polled.append(pollfd(fd: canAccept ? listener.raw : -1, events: Int16(POLLIN), revents: 0))
      polled += guests.map { pollfd(fd: $0.descriptor.raw, events: Int16(POLLIN), revents: 0) }
      polled += zip(links, backlogs).map { link, hasBacklog in
        pollfd(fd: link.descriptor.raw, events: Int16(hasBacklog ? POLLIN | POLLOUT : POLLIN), revents: 0)
      }
      let isRetrying = !canAccept || !guests.isEmpty || backlogs.contains(true)
      _ = poll(&polled, nfds_t(polled.count), isAwaited ? 0 : isRetrying ? Self.retryMilliseconds : -1)

      if polled[0].revents != 0 {
        var count: UInt64 = 0
        _ = read(waker.raw, &count, 8)
      }
      let isReady = polled.map { $0.revents != 0 }
      let firstLink = 2 + guests.count
      var gone: [Int] = []
      for (index, link) in links.enumerated() where isReady[firstLink + index] {
        _ = link.sendQueue()
        if !receive(from: link, into: &buffer, for: mesh) { gone.append(index) }
      }
      for index in gone.reversed() {
        let link = links.remove(at: index)
        // One that made no sense lives on: it is to learn that it is lost.
        link.close()
        mesh.lose(link.peer)
      }

      let now = monotonicNow()
      var staying: [Guest] = []
      for (index, guest) in guests.enumerated() {
        if isReady[2 + index] {
          if let link = greet(guest, &buffer, for: mesh) { links.append(link) }
        } else if now < guest.deadline {
          staying.append(guest)
        }
      }
      guests = staying
      canAccept = !isReady[1] || acceptGuests(&guests, now: now)
      state.withLock { $0.roundsDone = $0.roundsBegun }
      if isAwaited { roundBell.ring() }
    }
  }

  /// Hands on what has come; returns false when the connection has ended or makes no sense.
  private func receive(from link: SocketLink, into buffer: inout [UInt8], for mesh: Mesh) -> Bool {
    var wasReset = false
    while true {
      var (attachment, isCut): (Int32, Bool) = (-1, false)
      let count = swiftep_receive(link.descriptor.raw, &buffer, buffer.count, &attachment, &isCut)
      if count < 0 && errno == EINTR { continue }
      if count < 0 && errno == EAGAIN { return true }
      // The other end was closed with messages unread. Its own last ones lie here all the same.
      if count < 0 && errno == ECONNRESET && !wasReset {
        wasReset = true
        continue
      }
      let file = attachment >= 0 ? Descriptor(owning: attachment) : nil
      guard count > 0, !isCut, let message = decode(Message.self, from: buffer[..<count]) else { return false }
      mesh.receive(Parcel(message: message, file: file), from: link.peer)
    }
  }

  /// The guest's connection, if it is this user's, knows the secret, and does not come too late.
  private func greet(_ guest: Guest, _ buffer: inout [UInt8], for mesh: Mesh) -> SocketLink? {
    var (attachment, isCut): (Int32, Bool) = (-1, false)
    let count = swiftep_receive(guest.descriptor.raw, &buffer, buffer.count, &attachment, &isCut)
    if attachment >= 0 { Glibc.close(attachment) }
    guard count > 0, !isCut, let hello = decode(Hello.self, from: buffer[..<count]), hello.secret == secret else {
      return nil
    }
    let link = makeLink(to: hello.member, guest.descriptor)
    return mesh.add(link, to: hello.member, of: hello.generation) ? link : nil
  }

  /// Returns false where the system allows no more descriptors now.
  private func acceptGuests(_ guests: inout [Guest], now: UInt64) -> Bool {
    while true {
      let raw = swiftep_accept(listener.raw)
      if raw < 0 { return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED }
      let descriptor = Descriptor(owning: raw)
      var peerUser: UInt32 = 0
      guard swiftep_peer_user(raw, &peerUser) == 0, peerUser == user else { continue }
      if guests.count == Self.guestCountMax { guests.removeFirst() }
      guests.append(Guest(descriptor: descriptor, deadline: now &+ Self.guestPatience))
    }
  }
}
