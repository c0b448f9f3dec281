import Arena
import CPlatform
import Glibc

/// The addresses of a host. The system's lookup has no deadline of its own, so it has a thread, which is left behind
/// where it takes too long.
final class NameLookup: @unchecked Sendable {
  enum Answer {
    case addresses([SocketAddress])
    /// A code of `getaddrinfo`.
    case failure(Int32)
  }

  private let address: HostAndPort
  /// Rung when the answer is there.
  private let bell: Descriptor
  // SAFETY: written by the thread before it rings, read by who has heard the bell.
  private var answer: Answer?

  private init(_ address: HostAndPort) throws(SystemCallError) {
    self.address = address
    bell = try Descriptor("eventfd") { swiftep_make_waker() }
  }

  static func addresses(
    of address: HostAndPort, until deadline: ContinuousClock.Instant
  ) throws(RendezvousError) -> [SocketAddress] {
    // Numbers need nobody's answer.
    if case .addresses(let numeric) = resolve(address, flags: AI_NUMERICHOST) { return numeric }
    while true {
      let answer: Answer?
      do throws(SystemCallError) {
        answer = try NameLookup(address).ask(until: deadline)
      } catch {
        throw .systemCall(name: error.call, code: error.code)
      }
      switch answer {
      case .addresses(let addresses): return addresses
      case .failure(let code) where code == EAI_AGAIN && .now < deadline: usleep(100_000)
      case .failure(let code):
        throw .badAddress("\(address)", expected: "a host with an address", found: String(cString: gai_strerror(code)))
      case nil: throw .badAddress("\(address)", expected: "a host with an address", found: "no answer in time")
      }
    }
  }

  private func ask(until deadline: ContinuousClock.Instant) throws(SystemCallError) -> Answer? {
    var thread = pthread_t()
    let lookup = Unmanaged.passRetained(self)
    let code = pthread_create(
      &thread, nil,
      { argument in
        let lookup = Unmanaged<NameLookup>.fromOpaque(argument!).takeRetainedValue()
        lookup.answer = NameLookup.resolve(lookup.address, flags: 0)
        var one: UInt64 = 1
        _ = write(lookup.bell.raw, &one, 8)
        return nil
      }, lookup.toOpaque())
    guard code == 0 else {
      lookup.release()
      throw SystemCallError(call: "pthread_create", code: code)
    }
    pthread_detach(thread)
    var polled = [pollfd(fd: bell.raw, events: Int16(POLLIN), revents: 0)]
    while .now < deadline && polled[0].revents == 0 { wait(for: &polled, until: deadline) }
    var count: UInt64 = 0
    return read(bell.raw, &count, 8) == 8 ? answer : nil
  }

  private static func resolve(_ address: HostAndPort, flags: Int32) -> Answer {
    var hints = addrinfo()
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    hints.ai_flags = flags | AI_NUMERICSERV
    var list: UnsafeMutablePointer<addrinfo>?
    let code = getaddrinfo(address.host, "\(address.port)", &hints, &list)
    guard code == 0 else { return .failure(code) }
    defer { freeaddrinfo(list) }
    let entries = sequence(first: list!) { $0.pointee.ai_next }
    return .addresses(
      entries.map {
        SocketAddress(UnsafeRawBufferPointer(start: $0.pointee.ai_addr, count: Int($0.pointee.ai_addrlen)))
      })
  }
}

/// Sleeps until one of the descriptors is ready, or `end`.
func wait(for descriptors: inout [pollfd], until end: ContinuousClock.Instant?) {
  let rest = end.map { max(.zero, ContinuousClock.now.duration(to: $0)) } ?? .seconds(60)
  let (seconds, attoseconds) = rest.components
  // Rounded up: who wakes a little too early would spin.
  let milliseconds = min(60_000, seconds * 1000 + attoseconds / 1_000_000_000_000_000 + 1)
  _ = poll(&descriptors, nfds_t(descriptors.count), Int32(milliseconds))
}
