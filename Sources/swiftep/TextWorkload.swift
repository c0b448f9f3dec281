import Foundation
import SwiftEP

/// A text's tokens: pieces of words, runs of digits and single other characters, hashed to a vocabulary.
struct TokenizedText: Equatable {
  static let vocabularySize = 1 << 15
  static let pieceByteCountMax = 6

  let ids: [Int]

  /// - Throws: `UsageError` when the text has no tokens.
  init(_ text: Data, subject: String) throws(UsageError) {
    var ids: [Int] = []
    var piece: [UInt8] = []
    var pieceKind = Kind.space
    func endPiece() {
      if piece.isEmpty { return }
      var hash = FNVHash()
      piece.withUnsafeBytes { hash.add($0) }
      // The high bits: the low ones of this hash know the last byte too well.
      ids.append(Int(hash.value >> 32) % Self.vocabularySize)
      piece.removeAll(keepingCapacity: true)
    }
    for byte in text {
      let kind = Kind(byte)
      if kind != pieceKind || kind == .other || piece.count == Self.pieceByteCountMax { endPiece() }
      pieceKind = kind
      if kind != .space { piece.append(byte) }
    }
    endPiece()
    if ids.isEmpty { throw UsageError(subject, expected: "a text with at least one word", found: "none") }
    self.ids = ids
  }

  private enum Kind {
    case space, letter, digit, other

    init(_ byte: UInt8) {
      switch byte {
      case 0x00...0x20: self = .space
      case UInt8(ascii: "0")...UInt8(ascii: "9"): self = .digit
      case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), 0x80...0xff: self = .letter
      default: self = .other
      }
    }
  }
}

extension Workload {
  /// The tokens of a text, repeated or cut to the job's number. Each distinct token has one seeded embedding, and the
  /// experts that a seeded gate gives it, so that routing has the skew of the text's words.
  static func text(_ job: JobSpec, _ text: TokenizedText, seed: UInt64) throws(EPError) -> Workload {
    let dtype = job.rowType.inputDType
    let tokenCount = job.rankCount * job.tokensPerRank
    let gate = LinearGate(hidden: job.hidden, expertCount: job.expertCount, topK: job.topK, seed: seed)
    let prefix = UnsafeMutableRawBufferPointer.allocate(byteCount: job.hidden * dtype.byteCount, alignment: 16)
    defer { prefix.deallocate() }
    var choices: [Int: GateChoice] = [:]
    for id in Set(text.ids.prefix(tokenCount)) {
      fillRandomRow(prefix, dtype, seed: seed, token: id)
      choices[id] = gate.route(row: UnsafeRawBufferPointer(prefix), dtype: dtype)
    }
    return try Workload(
      job, tokenCount: tokenCount,
      fillRow: { token, row in
        fillRandomRow(row, dtype, seed: seed, token: text.ids[token % text.ids.count])
      },
      route: { choices[text.ids[$0 % text.ids.count]]! })
  }
}
