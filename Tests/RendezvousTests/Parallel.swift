import Glibc
import HostMachine

@testable import Rendezvous

typealias Outcome = Result<[[UInt8]], RendezvousError>

/// What `body` returns or throws, for each index, all on threads of their own at the same time.
func outcomes<Value: Sendable, Failure: Error>(
  _ count: Int, _ body: @escaping @Sendable (Int) throws(Failure) -> Value
) -> [Result<Value, Failure>] {
  let results = Guarded<[Result<Value, Failure>?]>(Array(repeating: nil, count: count))
  let threads = (0..<count).map { index in
    startThread {
      let result = Result { () throws(Failure) in try body(index) }
      results.withLock { $0[index] = result }
    }!
  }
  for thread in threads { pthread_join(thread, nil) }
  return results.withLock { $0.map { $0! } }
}

/// A place that no other test has.
func newPlace(address: HostAndPort? = nil) throws -> MeetingPlace {
  MeetingPlace(token: try Token.random(), address: address)
}
