import Arena

/// Who a member of a group is: a random number that it has chosen itself, for its whole life.
typealias MemberID = UInt64

/// Which buffer, the same on all ranks: they are made in the same order.
struct BufferKey: Hashable, Codable, Sendable {
  /// How often the group had changed when the buffer was made.
  let generation: Int
  let index: Int
}

/// What the members of a group tell each other, beside what they write into each other's arenas.
enum Message: Codable, Sendable {
  /// One of the gathers that create a buffer.
  case contribution(BufferKey, step: Int, Contribution)
  /// The sender takes part in this buffer's operations no more.
  case departure(BufferKey, Departure)
  /// What the sender's arena of this buffer has grown by, with its file.
  case growth(BufferKey, offset: Int64, byteCount: Int64)
  /// The sender has mapped all of the receiver's arena up to the end of this growth; or why it could not.
  case mapped(BufferKey, offset: Int64, failure: EPError?)
  case regrouping(generation: Int, Regrouping.Message)
  /// The sender, which is to join, is connected to all members.
  case connected
}

/// What a rank tells the others when a buffer is created.
struct Contribution: Codable, Sendable {
  /// What must be the same on all ranks.
  var terms: [Term] = []
  /// Memory that the buffer will take, and that can be had.
  var memory: [ArenaPlace: MemoryNeed] = [:]
  /// Address space of the arena that comes with this; 0 where none does.
  var arenaReservedByteCount: Int64 = 0
  /// Bytes of it that are there.
  var arenaByteCount: Int64 = 0
  /// Of a GPU's, what this rank's kernels take.
  var blocks: BlockNeed?
  /// Where this rank's arena must be.
  var arenaPlace = ArenaPlace.machine
  /// Of a rank that takes part in a change of the mask.
  var place: Place?
  var failure: EPError?

  struct Term: Equatable, Codable, Sendable {
    let name: String
    let value: String
  }

  /// Where a rank is when masked ranks return.
  struct Place: Codable, Sendable {
    /// Ranks that stay masked, one bit each.
    var masked: UInt64
    /// Exchanges that it has begun.
    var epoch: UInt64
    /// A number for this call, then what those of all that take part amount to: something of a call that has failed may lie
    /// here still.
    var attempt: UInt64
  }
}

/// Why a member takes part in a buffer's operations no more.
enum Departure: Equatable, Codable, Sendable {
  case exited
  case closed
  /// Its buffer is lost, because of another rank or itself.
  case lost(EPError)

  /// What it means to a rank that waits for the departed one.
  func error(rank: Int, step: EPError.Step) -> EPError {
    switch self {
    case .exited: .rankMissing(rank: rank, step: step, because: .exited)
    case .closed: .rankMissing(rank: rank, step: step, because: .closed)
    case .lost(let cause): cause
    }
  }
}

/// A message on its way, with the arena that goes with it: the memory itself between threads, its file between
/// processes. Or with the file of a part of it.
struct Parcel: Sendable {
  let message: Message
  var memory: (any SymmetricMemory)?
  var file: Descriptor?
}

/// A connection to one other member. Messages arrive in the order in which they were queued, then the end of the
/// connection.
protocol Link: AnyObject, Sendable {
  func enqueue(_ parcel: Parcel)
  /// Sends what is queued; never waits. May deliver on this thread: not to be called with a lock held.
  func flush()
  /// Sends what is queued and ends the connection.
  func close()
}
