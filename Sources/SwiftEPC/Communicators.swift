// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import Glibc
import SwiftEP

/// The caller's all-gather, and what it is to be called with.
private struct CallerGather: @unchecked Sendable {
  private let function: swiftep_all_gather
  private let context: UnsafeMutableRawPointer?

  /// Bytes that each rank passes to it, whatever it has to say: how many, then those.
  private static let byteCount = 4 + 1024

  struct Failure: Error, CustomStringConvertible {
    let description: String
  }

  init?(_ function: swiftep_all_gather?, _ context: UnsafeMutableRawPointer?) {
    guard let function else { return nil }
    (self.function, self.context) = (function, context)
  }

  /// Of those that the function gathers from, this is one.
  func gather(_ bytes: [UInt8], count: Int) throws -> [[UInt8]] {
    let size = Self.byteCount
    if bytes.count > size - 4 {
      throw Failure(description: "all_gather: expected at most \(size - 4) bytes to tell, found \(bytes.count)")
    }
    var mine = [UInt8](repeating: 0, count: size)
    withUnsafeBytes(of: UInt32(bytes.count)) { mine.replaceSubrange(0..<4, with: $0) }
    mine.replaceSubrange(4..<4 + bytes.count, with: bytes)
    var all = [UInt8](repeating: 0, count: size * count)
    let code = all.withUnsafeMutableBytes { function(context, mine, size, $0.baseAddress) }
    if code != 0 { throw Failure(description: "all_gather returned \(code)") }
    return try (0..<count).map { rank in
      let piece = all[rank * size..<(rank + 1) * size]
      let byteCount = Int(piece.withUnsafeBytes { $0.loadUnaligned(as: UInt32.self) })
      if byteCount > size - 4 {
        throw Failure(description: "all_gather: expected what rank \(rank) passed, found something else")
      }
      return Array(piece.dropFirst(4).prefix(byteCount))
    }
  }
}

private func gather(_ function: swiftep_all_gather?, _ context: UnsafeMutableRawPointer?) throws(EPError)
  -> CallerGather
{
  if let gather = CallerGather(function, context) { return gather }
  throw .unusable("all_gather", expected: "a function", found: "NULL")
}

public typealias CommunicatorPlace = UnsafeMutablePointer<OpaquePointer?>

private func make(
  _ communicator: CommunicatorPlace?, _ error: ErrorPlace?, _ body: () throws(EPError) -> Communicator
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(communicator, "communicator")
    place.pointee = give(Box(try body()))
  }
}

private func communicator(_ pointer: OpaquePointer?) throws(EPError) -> Communicator {
  try object(pointer, "communicator", Box<Communicator>.self).value
}

private func point(_ pointer: UnsafePointer<swiftep_meeting_point>?) throws(EPError) -> MeetingPoint {
  let point = try read(pointer, over: swiftep_meeting_point(), "point")
  guard let token = text(point.token) else { throw .unusable("point.token", expected: "a token", found: "NULL") }
  return try MeetingPoint(token: try JobToken(token), address: text(point.address), job: text(point.job) ?? "")
}

@c @implementation
public func swiftep_communicators_of_threads(
  _ rankCount: Int32, _ communicators: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    guard let communicators else {
      throw .unusable("communicators", expected: "a place for each", found: "NULL")
    }
    for (rank, communicator) in try Communicator.threads(rankCount: Int(rankCount)).enumerated() {
      communicators[rank] = give(Box(communicator))
    }
  }
}

@c @implementation
public func swiftep_communicator_of_processes(
  _ rank: Int32, _ rankCount: Int32, _ timeout: swiftep_nanoseconds, _ allGather: swiftep_all_gather?,
  _ context: UnsafeMutableRawPointer?, _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in
    let gather = try gather(allGather, context)
    return try .processes(rank: Int(rank), rankCount: Int(rankCount), timeout: try duration(timeout)) {
      try gather.gather($0, count: Int(rankCount))
    }
  }
}

@c @implementation
public func swiftep_communicator_from_environment(
  _ timeout: swiftep_nanoseconds, _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in try .fromEnvironment(timeout: try duration(timeout)) }
}

@c @implementation
public func swiftep_communicator_at(
  _ meetingPoint: UnsafePointer<swiftep_meeting_point>?, _ rank: Int32, _ rankCount: Int32,
  _ timeout: swiftep_nanoseconds, _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in
    try .processes(
      rank: Int(rank), rankCount: Int(rankCount), at: try point(meetingPoint), timeout: try duration(timeout))
  }
}

@c @implementation
public func swiftep_communicator_shrink(
  _ old: OpaquePointer?, _ timeout: swiftep_nanoseconds, _ next: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(next, error) { () throws(EPError) in try communicator(old).shrink(timeout: try duration(timeout)) }
}

@c @implementation
public func swiftep_communicator_admit(
  _ old: OpaquePointer?, _ timeout: swiftep_nanoseconds, _ function: swiftep_all_gather?,
  _ context: UnsafeMutableRawPointer?, _ next: CommunicatorPlace?, _ refusal: ErrorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  refusal?.pointee = nil
  return make(next, error) { () throws(EPError) in
    var allGather: (@Sendable ([UInt8]) throws -> [[UInt8]])?
    if let caller = CallerGather(function, context) { allGather = { try caller.gather($0, count: 2) } }
    let (next, found) = try communicator(old).admit(timeout: try duration(timeout), allGather: allGather)
    if let found { _ = attempt(refusal) { () throws(EPError) in throw found } }
    return next
  }
}

@c @implementation
public func swiftep_communicator_join(
  _ timeout: swiftep_nanoseconds, _ allGather: swiftep_all_gather?, _ context: UnsafeMutableRawPointer?,
  _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in
    let gather = try gather(allGather, context)
    return try .join(timeout: try duration(timeout)) { try gather.gather($0, count: 2) }
  }
}

@c @implementation
public func swiftep_communicator_join_from_environment(
  _ timeout: swiftep_nanoseconds, _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in try .joinFromEnvironment(timeout: try duration(timeout)) }
}

@c @implementation
public func swiftep_communicator_join_at(
  _ meetingPoint: UnsafePointer<swiftep_meeting_point>?, _ timeout: swiftep_nanoseconds,
  _ communicator: CommunicatorPlace?, _ error: ErrorPlace?
) -> swiftep_code {
  make(communicator, error) { () throws(EPError) in
    try .join(at: try point(meetingPoint), timeout: try duration(timeout))
  }
}

@c @implementation
public func swiftep_communicator_rank(_ communicator: OpaquePointer?) -> Int32 {
  object(communicator, Box<Communicator>.self).map { Int32($0.value.rank) } ?? -1
}

@c @implementation
public func swiftep_communicator_rank_count(_ communicator: OpaquePointer?) -> Int32 {
  object(communicator, Box<Communicator>.self).map { Int32($0.value.rankCount) } ?? 0
}

@c @implementation
public func swiftep_communicator_generation(_ communicator: OpaquePointer?) -> Int32 {
  object(communicator, Box<Communicator>.self).map { Int32($0.value.generation) } ?? 0
}

@c @implementation
public func swiftep_communicator_free(_ communicator: OpaquePointer?) { take(communicator) }
