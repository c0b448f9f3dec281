/// A rank's flight recorder: what its last operations did, and what it is doing. Words of 64 bits, each read whole.
///
///     progress | peers [rank][PeerField] | records [operation modulo placeCount][FlightField]
///
/// Everything hangs on one word, `progress`. A reader that finds operation *n* in it may read the records of the
/// `recordCount` operations up to *n*; when it has, it looks again, and drops those that may have been overwritten
/// meanwhile. The record of *n* itself is complete once its step is `idle` and its end is noted, which may be seen a moment later, as
/// may what was noted last before that, where the operation went well; before that, a word of it is zero or final. Where *n* begins, the record of *n* + 1 is cleared, so
/// that no order is needed: readers of *n* - 1 read none in its place.
@frozen public struct FlightLayout {
  public var rankCount: Int32

  @inlinable public init(rankCount: Int32) { self.rankCount = rankCount }

  /// Of operations that can be read.
  @inlinable public static var recordCount: Int64 { 64 }
  /// A power of two, and at least two more: for the next operation, and for the oldest that is still read.
  @inlinable static var placeCount: Int64 { 128 }

  /// `FlightProgress`.
  @inlinable public static var progressOffset: Int64 { 0 }

  @inlinable static var peersOffset: Int64 { 64 }

  @inlinable public func offset(of field: PeerField, peer: Int32) -> Int64 {
    Self.peersOffset &+ Int64(peer) &* PeerField.byteCount &+ 8 &* Int64(field.rawValue)
  }

  @inlinable var recordsOffset: Int64 { alignUp(Self.peersOffset &+ Int64(rankCount) &* PeerField.byteCount, to: 64) }
  /// In whole cache lines.
  @inlinable static var recordStride: Int64 { alignUp(FlightField.byteCount, to: 64) }

  /// Of operation `index`.
  @inlinable public func offset(ofRecord index: Int64) -> Int64 {
    recordsOffset &+ (index & (Self.placeCount &- 1)) &* Self.recordStride
  }

  @inlinable public var byteCount: Int64 { recordsOffset &+ Self.placeCount &* Self.recordStride }
}

/// The words of one operation's record, in the order in which they lie there.
@frozen public enum FlightField: Int32, Sendable {
  /// `Operation`.
  case operation
  /// 0 until this rank has begun its exchange.
  case epoch
  case tokenCount
  /// Bytes that one row is, its metadata included.
  case bytesPerRow
  case rowsSent, rowsReceived
  /// `StatusCode`, and its rank.
  case statusCode, statusRank
  /// `Machine.now` when each step began, and when the operation ended.
  case inputBegan, prepareBegan, exchangeBegan, placeBegan, deliverBegan, completionBegan, ended
  /// Of the exchange and of the completion: the peer that was waited for longest, and how long; a wait of 0: nobody.
  case exchangePeer, exchangeWait, completionPeer, completionWait

  /// Of the record.
  @inlinable public var offset: Int64 { 8 &* Int64(rawValue) }
  @inlinable public static var byteCount: Int64 { 8 &* Int64(count) }
  @inlinable static var count: Int32 { FlightField.completionWait.rawValue &+ 1 }
}

/// What a rank knows of each of its peers.
@frozen public enum PeerField: Int32, Sendable {
  /// 0: not known.
  case process
  /// Nanoseconds; then the operation's epoch, and the `FlightStep`.
  case longestWait, longestWaitEpoch, longestWaitStep

  @inlinable public static var byteCount: Int64 { 8 &* Int64(PeerField.longestWaitStep.rawValue &+ 1) }
}

/// Where a rank is in its operation. An operation that ends early goes from any step to `idle`.
@frozen public enum FlightStep: Int32, Sendable {
  case idle = 0
  /// The host waits for the events that the call was to wait for, if there are any.
  case input = 1
  /// A dispatch is laid out, a combine's rows are staged; then the peers are told.
  case prepare = 2
  /// Waiting for the peers' headers.
  case exchange = 3
  /// Headers are compared, places are found.
  case place = 4
  /// Rows are written or summed.
  case deliver = 5
  /// Waiting until the peers have delivered, too.
  case completion = 6

  /// Of the steps from `input` on.
  @inlinable public var beganField: FlightField {
    switch self {
    case .idle, .input: .inputBegan
    case .prepare: .prepareBegan
    case .exchange: .exchangeBegan
    case .place: .placeBegan
    case .deliver: .deliverBegan
    case .completion: .completionBegan
    }
  }
}

/// One word: which operation this rank has begun last (they are counted from 1), its step, and the peer waited for.
@frozen public struct FlightProgress: Equatable, Sendable {
  public var word: UInt64

  @inlinable public init(word: UInt64) { self.word = word }

  @inlinable public init(index: Int64, step: FlightStep, peer: Int32 = -1) {
    word =
      UInt64(bitPattern: index) &<< 24 | UInt64(truncatingIfNeeded: step.rawValue) &<< 20
      | UInt64(truncatingIfNeeded: peer &+ 1)
  }

  @inlinable public var index: Int64 { Int64(bitPattern: word &>> 24) }
  @inlinable public var step: FlightStep {
    FlightStep(rawValue: Int32(truncatingIfNeeded: word &>> 20 & 0xf)) ?? .idle
  }
  /// -1: none.
  @inlinable public var peer: Int32 { Int32(truncatingIfNeeded: word & 0xf_ffff) &- 1 }
}
