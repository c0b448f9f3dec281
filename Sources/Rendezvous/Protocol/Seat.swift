/// Whose piece of which gather.
package struct Seat: Equatable, Sendable {
  /// What is gathered for: participants of different rooms do not belong together.
  package let room: String
  /// In `0..<count`; 0 is the one that listens.
  package let index: Int
  package let count: Int

  package static let countMax = 4096
  static let roomByteCountMax = 64

  /// - Precondition: the room's name has 1 to 64 bytes; `count` is at most `countMax`; `index` is in `0..<count`.
  package init(room: String, index: Int, of count: Int) {
    precondition((1...Self.roomByteCountMax).contains(room.utf8.count))
    precondition((1...Self.countMax).contains(count) && (0..<count).contains(index))
    self.init(unchecked: room, index, count)
  }

  private init(unchecked room: String, _ index: Int, _ count: Int) {
    self.room = room
    self.index = index
    self.count = count
  }

  /// What a peer says its seat is: any numbers, which only count once it has proven to know the token.
  static func claimed(room: String, index: UInt32, count: UInt32) -> Seat {
    Seat(unchecked: room, Int(index), Int(count))
  }

  /// Index, count, and the room behind its length.
  var bytes: [UInt8] {
    let name = Array(room.utf8)
    return UInt32(index).bigEndianBytes + UInt32(count).bigEndianBytes + [UInt8(name.count)] + name
  }

  /// The longest piece of each participant: one part, but for the listener's, which may describe a whole group.
  package static func pieceByteCountMax(ofIndex index: Int) -> Int { index == 0 ? 1 << 22 : Message.partByteCountMax }
}
