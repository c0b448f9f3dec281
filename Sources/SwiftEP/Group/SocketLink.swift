import Arena
import CPlatform
import FoundationEssentials
import Glibc
import HostMachine

/// A connection to another process.
final class SocketLink: Link {
  let peer: MemberID
  let descriptor: Descriptor
  /// Wakes the thread that waits for the socket to take more.
  private let wakeHub: @Sendable () -> Void
  private let queue = Guarded(Queue())

  private struct Queue {
    var parcels: [(bytes: [UInt8], file: Descriptor?)] = []
    var isClosed = false
  }

  /// More fits into no socket buffer.
  static let messageByteCountMax = 1 << 17

  init(to peer: MemberID, descriptor: Descriptor, wakingHub wakeHub: @escaping @Sendable () -> Void) {
    self.peer = peer
    self.descriptor = descriptor
    self.wakeHub = wakeHub
  }

  func enqueue(_ parcel: Parcel) {
    guard let bytes = encode(parcel.message) else { preconditionFailure("a message that is not JSON") }
    queue.withLock { $0.parcels.append((bytes, parcel.file ?? parcel.memory?.descriptor)) }
  }

  var hasBacklog: Bool { queue.withLock { !$0.parcels.isEmpty } }

  func flush() {
    if sendQueue() { wakeHub() }
  }

  /// Sends what the socket takes; returns whether something is left.
  func sendQueue() -> Bool {
    queue.withLock { queue in
      while let (bytes, file) = queue.parcels.first, !queue.isClosed {
        if swiftep_send(descriptor.raw, bytes, bytes.count, file?.raw ?? -1) < 0 {
          if errno == EINTR { continue }
          // The last: more descriptors on their way than the system allows.
          if errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS { return true }
          // The other end is gone; the hub learns it by itself.
          queue.isClosed = true
        } else {
          queue.parcels.removeFirst()
        }
      }
      if queue.isClosed { queue.parcels = [] }
      return false
    }
  }

  func close() {
    _ = sendQueue()
    queue.withLock { $0.isClosed = true }
    shutdown(descriptor.raw, Int32(SHUT_RDWR))
  }
}

func encode(_ value: some Encodable) -> [UInt8]? {
  (try? JSONEncoder().encode(value)).map { Array($0) }
}

func decode<Value: Decodable>(_ type: Value.Type, from bytes: some Sequence<UInt8>) -> Value? {
  try? JSONDecoder().decode(type, from: Data(bytes))
}
