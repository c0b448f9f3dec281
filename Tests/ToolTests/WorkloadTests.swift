import Conformance
import Foundation
import SwiftEP
import Testing

@testable import swiftep

func makeJob(_ words: String...) throws -> JobSpec {
  try JobSpec(try Arguments(parsing: words, flags: JobSpec.flags))
}

func indices(_ tokens: RankTokens) -> [Int] {
  guard case .topK(let indices, _) = tokens.routing else { return [] }
  return try! indices.elements(Int.self)
}

/// The most popular expert's tokens over the mean.
func imbalance(_ workload: Workload, expertCount: Int) -> Double {
  let all = workload.tokens.flatMap { indices($0) }
  var counts = [Int](repeating: 0, count: expertCount)
  for expert in all { counts[expert] += 1 }
  return Double(counts.max()! * expertCount) / Double(all.count)
}

@Suite struct WorkloadTests {
  @Test func gateTakesTheBest() {
    let choice = GateChoice(scores: [0, 3, 1, 3, -1], topK: 3)
    #expect(choice.experts == [1, 3, 2])
    #expect(abs(choice.weights.reduce(0, +) - 1) < 1e-6)
    #expect(choice.weights[0] == choice.weights[1] && choice.weights[1] > choice.weights[2])
    #expect(GateChoice(experts: [4, -1, 2, -1]).weights == [0.5, 0, 0.5, 0])
  }

  @Test(arguments: RowType.allCases)
  func randomRowsAreFiniteAndSeeded(_ rowType: RowType) throws {
    var job = try makeJob("--tokens", "16", "--hidden", "64", "--experts", "32")
    job.rowType = rowType
    let workload = try Workload.random(job, skew: 0, seed: 5)
    for tokens in workload.tokens {
      #expect(tokens.x.shape == [16, 64])
      #expect(tokens.x.dtype == rowType.inputDType)
      let channels = tokens.x.withUnsafeBytes { bytes in (0..<1024).map { tokens.x.dtype.channel($0, ofRow: bytes) } }
      #expect(channels.allSatisfy { $0.isFinite && abs($0) < 2 })
      #expect(Set(channels).count > 100)
      let chosen = indices(tokens)
      #expect((0..<16).allSatisfy { Set(chosen[8 * $0..<8 * $0 + 8]).count == 8 })
    }
    let again = try Workload.random(job, skew: 0, seed: 5)
    let other = try Workload.random(job, skew: 0, seed: 6)
    func bytes(_ workload: Workload) -> [UInt8] { workload.tokens[1].x.withUnsafeBytes { Array($0) } }
    #expect(bytes(workload) == bytes(again))
    #expect(bytes(workload) != bytes(other))
    #expect(indices(workload.tokens[0]) == indices(again.tokens[0]))
    #expect(indices(workload.tokens[0]) != indices(other.tokens[0]))
  }

  @Test func skewSkews() throws {
    let job = try makeJob("--tokens", "200", "--hidden", "16", "--experts", "64", "--top-k", "2")
    let uniform = try imbalance(.random(job, skew: 0, seed: 1), expertCount: 64)
    let skewed = try imbalance(.random(job, skew: 1, seed: 1), expertCount: 64)
    #expect(uniform < 2.5)
    #expect(skewed > 6)
  }

  @Test func tokensAreCounted() throws {
    var job = try makeJob("--ranks", "2", "--tokens", "2", "--hidden", "16", "--experts", "4", "--top-k", "2")
    let choices: [[Int64]] = [[0, 1], [0, 2], [3, 2]]
    func make() throws -> Workload {
      try Workload(job, tokenCount: 3, fillRow: { _, _ in }, route: { GateChoice(experts: choices[$0]) })
    }
    #expect(try make().tokens.map { $0.x.shape[0] } == [1, 2])
    #expect(try make().sentRowCounts == [[1, 0], [1, 2]])
    #expect(try make().receivedRowCounts == [2, 2])
    job.layout = .byExpert
    #expect(try make().sentRowCounts == [[2, 0], [1, 3]])
    let sizes = CopyFloor.dispatchSizes(job, try make())
    #expect(sizes.map(\.readByteCount) == [32, 64])
    #expect(sizes.map(\.writtenByteCount) == [96, 96])
    #expect(CopyFloor.combineSizes(job, try make()).map(\.readByteCount) == [64, 128])
  }
}

@Suite struct TextWorkloadTests {
  static let sentence = "The quick brown fox, the lazy dog: 42 times the the the extraordinarily long words. "

  func tokenize(_ text: String) throws -> TokenizedText { try TokenizedText(Data(text.utf8), subject: "--text f") }

  @Test func pieces() throws {
    #expect(try tokenize("a  b\na").ids.count == 3)
    let ids = try tokenize("the, the").ids
    #expect(ids.count == 3 && ids[0] == ids[2] && ids[0] != ids[1])
    #expect(try tokenize("extraordinarily").ids.count == 3)
    #expect(try tokenize("ab12").ids.count == 2)
    #expect(try tokenize(Self.sentence).ids.allSatisfy { (0..<TokenizedText.vocabularySize).contains($0) })
  }

  @Test(arguments: ["", " \n\t "])
  func emptyTexts(_ text: String) {
    let error = #expect(throws: UsageError.self) { try tokenize(text) }
    #expect(error?.description == "--text f: expected a text with at least one word, found none")
  }

  @Test func equalWordsAreEqualTokens() throws {
    let job = try makeJob("--tokens", "100", "--hidden", "64", "--experts", "64", "--top-k", "4")
    let text = try tokenize(Self.sentence)
    let workload = try Workload.text(job, text, seed: 1)
    let again = try Workload.text(job, text, seed: 1)
    let rows = workload.tokens.flatMap { try! $0.x.elements(UInt16.self) }
    let experts = workload.tokens.flatMap { indices($0) }
    #expect(rows == again.tokens.flatMap { try! $0.x.elements(UInt16.self) })
    #expect(experts == again.tokens.flatMap { indices($0) })
    let other = try Workload.text(job, text, seed: 2)
    #expect(experts != other.tokens.flatMap { indices($0) })
    // The text repeats itself: so do rows and experts, also from rank to rank.
    let period = text.ids.count
    for token in 0..<200 - period {
      #expect(rows[64 * token..<64 * (token + 1)] == rows[64 * (token + period)..<64 * (token + period + 1)])
      #expect(experts[4 * token..<4 * (token + 1)] == experts[4 * (token + period)..<4 * (token + period + 1)])
    }
  }

  @Test func wordsMakeSkew() throws {
    let job = try makeJob("--tokens", "200", "--hidden", "64", "--experts", "64", "--top-k", "2")
    let skewed = try Workload.text(job, try tokenize(Self.sentence), seed: 1)
    let uniform = try Workload.random(job, skew: 0, seed: 1)
    #expect(imbalance(skewed, expertCount: 64) > 1.5 * imbalance(uniform, expertCount: 64))
  }
}
