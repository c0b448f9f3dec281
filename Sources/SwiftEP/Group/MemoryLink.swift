import Glibc
import HostMachine

/// A connection between two threads' meshes.
final class MemoryLink: Link {
  private let own: MemberID
  private let queue: Guarded<Queue>

  private struct Queue {
    weak var peer: Mesh?
    /// Nil is the end of the connection.
    var parcels: [Parcel?] = []
    /// Somebody is delivering; what is queued meanwhile will be, too.
    var isDelivering = false
  }

  init(from own: MemberID, to peer: Mesh) {
    self.own = own
    queue = Guarded(Queue(peer: peer))
  }

  /// The other direction; nil once its end has been delivered or the peer is gone.
  var opposite: MemoryLink? { queue.withLock { $0.peer }?.memoryLink(to: own) }

  /// Returns false when the deadline passes before what was queued has been handled.
  func waitUntilDelivered(until deadline: UInt64) -> Bool {
    while queue.withLock({ $0.isDelivering || !$0.parcels.isEmpty }) {
      if monotonicNow() >= deadline { return false }
      usleep(50)
    }
    return true
  }

  func enqueue(_ parcel: Parcel) { queue.withLock { $0.parcels.append(parcel) } }

  func flush() {
    let delivers = queue.withLock { queue in
      defer { queue.isDelivering = true }
      return !queue.isDelivering
    }
    if !delivers { return }
    while true {
      let next: (peer: Mesh?, parcel: Parcel?)? = queue.withLock { queue in
        if queue.parcels.isEmpty {
          queue.isDelivering = false
          return nil
        }
        return (queue.peer, queue.parcels.removeFirst())
      }
      guard let next else { return }
      if let parcel = next.parcel { next.peer?.receive(parcel, from: own) } else { next.peer?.lose(own) }
    }
  }

  func close() {
    queue.withLock { $0.parcels.append(nil) }
    flush()
  }
}
