// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import Glibc
import SwiftEP

/// Where a function's last parameter points.
public typealias ErrorPlace = UnsafeMutablePointer<UnsafeMutablePointer<swiftep_error>?>

/// Runs `body`; what it throws is stored for the caller, and becomes the code.
func attempt(_ place: ErrorPlace?, _ body: () throws(EPError) -> Void) -> swiftep_code {
  place?.pointee = nil
  do throws(EPError) {
    try body()
    return swiftep_code(SWIFTEP_OK)
  } catch {
    place?.pointee = makeError(error)
    return error.code
  }
}

@c @implementation
public func swiftep_error_free(_ error: UnsafeMutablePointer<swiftep_error>?) {
  guard let error else { return }
  let texts = [
    error.pointee.message, error.pointee.argument, error.pointee.expected, error.pointee.found, error.pointee.step,
  ]
  for text in texts { free(UnsafeMutablePointer(mutating: text)) }
  swiftep_error_free(UnsafeMutablePointer(mutating: error.pointee.cause))
  error.deallocate()
}

/// The Python package's, too.
private let version: StaticString = "0.1.0"

@c @implementation
public func swiftep_version() -> UnsafePointer<CChar>! {
  UnsafeRawPointer(version.utf8Start).assumingMemoryBound(to: CChar.self)
}

private func makeError(_ error: EPError) -> UnsafeMutablePointer<swiftep_error> {
  let error = error.namedAsInC
  var made = swiftep_error()
  made.size = MemoryLayout<swiftep_error>.size
  made.code = error.code
  made.rank = Int32(error.rank)
  made.masking_rank = -1
  made.message = copy("\(error)")
  switch error {
  case .invalidArgument(_, let argument, let expected, let found),
    .ranksDisagree(let argument, _, let expected, let found):
    (made.argument, made.expected, made.found) = (copy(argument), copy(expected), copy(found))
  case .checkFailed(_, let step, let check, let expected, let found):
    (made.argument, made.expected, made.found) = (copy(check), copy(expected), copy(found))
    made.step = copy(step.rawValue)
  case .rankMissing(_, let step, _): made.step = copy(step.rawValue)
  case .outOfMemory(_, let needed, let available):
    (made.needed_byte_count, made.available_byte_count) = (needed, available)
  case .bufferLost(let cause): made.cause = UnsafePointer(makeError(cause))
  case .rankMasked(_, let masker): made.masking_rank = Int32(masker)
  case .systemCall(_, _, let code), .driver(_, _, let code, _): made.system_code = code
  case .bufferClosed, .rendezvousFailed, .machineUnavailable: break
  }
  let place = UnsafeMutablePointer<swiftep_error>.allocate(capacity: 1)
  place.initialize(to: made)
  return place
}

/// Freed with `free`.
private func copy(_ text: String) -> UnsafePointer<CChar>? { UnsafePointer(strdup(text)) }

extension EPError {
  fileprivate var code: swiftep_code {
    let code =
      switch self {
      case .invalidArgument: SWIFTEP_INVALID_ARGUMENT
      case .ranksDisagree: SWIFTEP_RANKS_DISAGREE
      case .rankMissing: SWIFTEP_RANK_MISSING
      case .outOfMemory: SWIFTEP_OUT_OF_MEMORY
      case .bufferLost: SWIFTEP_BUFFER_LOST
      case .checkFailed: SWIFTEP_CHECK_FAILED
      case .rankMasked: SWIFTEP_RANK_MASKED
      case .bufferClosed: SWIFTEP_BUFFER_CLOSED
      case .rendezvousFailed: SWIFTEP_RENDEZVOUS_FAILED
      case .systemCall: SWIFTEP_SYSTEM_CALL
      case .driver: SWIFTEP_DRIVER
      case .machineUnavailable: SWIFTEP_MACHINE_UNAVAILABLE
      }
    return swiftep_code(code)
  }

  /// At fault; -1 where none is.
  fileprivate var rank: Int {
    switch self {
    case .invalidArgument(let rank, _, _, _), .ranksDisagree(_, let rank, _, _), .rankMissing(let rank, _, _),
      .outOfMemory(let rank, _, _), .checkFailed(let rank, _, _, _, _), .rankMasked(let rank, _),
      .systemCall(let rank, _, _), .driver(let rank, _, _, _):
      rank
    case .bufferLost(let cause): cause.rank
    case .bufferClosed, .rendezvousFailed, .machineUnavailable: -1
    }
  }

  /// With the argument's name as `swiftep.h` has it.
  fileprivate var namedAsInC: EPError {
    switch self {
    case .invalidArgument(let rank, let argument, let expected, let found):
      .invalidArgument(rank: rank, argument: argument.inSnakeCase, expected: expected, found: found)
    case .ranksDisagree(let about, let rank, let expected, let found):
      .ranksDisagree(about: about.inSnakeCase, rank: rank, expected: expected, found: found)
    default: self
    }
  }

  /// Of an argument that no rank but this one sees.
  static func unusable(_ argument: String, expected: String, found: String) -> EPError {
    .invalidArgument(rank: -1, argument: argument, expected: expected, found: found)
  }
}

extension String {
  /// `topKWeights` as `top_k_weights`.
  fileprivate var inSnakeCase: String {
    var words = ""
    for (character, next) in zip(self, dropFirst() + " ") {
      // The first letter of a word, unless the word is the first, or begins behind the end of another.
      let beginsWord = character.isUppercase && (words.last?.isLowercase == true || next.isLowercase)
      if beginsWord && words.last?.isLetter == true { words += "_" }
      words += character.lowercased()
    }
    return words
  }
}
