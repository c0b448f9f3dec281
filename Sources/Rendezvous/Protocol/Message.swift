/// What goes through the channels: a byte for the kind, then the rest of the frame's text.
enum Message: Equatable {
  /// From the server: the client has its seat, and `missing` is the lowest index that has yet to come.
  case waiting(missing: Int)
  /// From the server, and final.
  case refusal(Refusal)
  /// From the server, and final: the time is over, and `missing` is the lowest index that did not come.
  case abandoned(missing: Int)
  /// A part of a piece. After the last one comes the next participant's piece.
  case part([UInt8], isLast: Bool)

  /// Why somebody who knows the token has no seat.
  enum Refusal: Equatable {
    case taken
    case count(expected: Int)
    case room(expected: String)
  }

  static let partByteCountMax = 4096

  private enum Kind: UInt8 {
    case waiting = 1
    case abandoned, part, lastPart, taken, count, room
  }

  var bytes: [UInt8] {
    switch self {
    case .waiting(let missing): Self.bytes(.waiting, missing)
    case .abandoned(let missing): Self.bytes(.abandoned, missing)
    case .part(let bytes, let isLast): [(isLast ? Kind.lastPart : .part).rawValue] + bytes
    case .refusal(.taken): [Kind.taken.rawValue]
    case .refusal(.count(let expected)): Self.bytes(.count, expected)
    case .refusal(.room(let expected)): [Kind.room.rawValue] + expected.utf8
    }
  }

  init(_ bytes: [UInt8]) throws(Malformed) {
    guard let first = bytes.first, let kind = Kind(rawValue: first) else { throw Malformed() }
    let rest = bytes.dropFirst()
    switch kind {
    case .waiting: self = .waiting(missing: try Self.number(rest))
    case .abandoned: self = .abandoned(missing: try Self.number(rest))
    case .part: self = .part(Array(rest), isLast: false)
    case .lastPart: self = .part(Array(rest), isLast: true)
    case .taken: self = .refusal(.taken)
    case .count: self = .refusal(.count(expected: try Self.number(rest)))
    case .room: self = .refusal(.room(expected: String(decoding: rest, as: UTF8.self)))
    }
  }

  private static func bytes(_ kind: Kind, _ number: Int) -> [UInt8] { [kind.rawValue] + UInt32(number).bigEndianBytes }

  private static func number(_ bytes: ArraySlice<UInt8>) throws(Malformed) -> Int {
    guard bytes.count == 4 else { throw Malformed() }
    return Int(UInt32(bigEndian: bytes))
  }
}
