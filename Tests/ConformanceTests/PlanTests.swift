import Conformance
import SwiftEP
import Testing

/// A change to a good shape, and what the plan says of it.
struct WrongShape: Sendable, CustomTestStringConvertible {
  let argument: String
  let found: String
  let change: @Sendable (inout JobShape) -> Void

  init(argument: String, found: String, change: @escaping @Sendable (inout JobShape) -> Void) {
    (self.argument, self.found, self.change) = (argument, found, change)
  }

  var testDescription: String { "\(argument) \(found)" }

  static let all: [WrongShape] = [
    WrongShape(argument: "rankCount", found: "0") { $0.rankCount = 0 },
    WrongShape(argument: "rankCount", found: "\(Int.max)") { $0.rankCount = .max },
    WrongShape(argument: "tokensPerRankMax", found: "-1") { $0.tokensPerRankMax = -1 },
    WrongShape(argument: "tokensPerRankMax", found: "\(Int.max)") { $0.tokensPerRankMax = .max },
    WrongShape(argument: "tokensPerRankMax", found: "2147483648") { $0.tokensPerRankMax = 1 << 31 },
    WrongShape(argument: "hidden", found: "0") { $0.hidden = 0 },
    WrongShape(argument: "hidden", found: "\(Int.max)") { $0.hidden = .max },
    WrongShape(argument: "hidden", found: "10 x bf16 = 20 bytes") { $0.hidden = 10 },
    WrongShape(argument: "hidden", found: "96") { ($0.dtype, $0.scales, $0.hidden) = (.fp4E2M1x2, .nvfp4, 96) },
    WrongShape(argument: "scales", found: "nvfp4") { ($0.dtype, $0.scales) = (.fp8E4M3, .nvfp4) },
    WrongShape(argument: "scales", found: "powerOfTwo") { ($0.dtype, $0.scales) = (.fp4E2M1x2, .powerOfTwo) },
    WrongShape(argument: "dtype", found: "int32") { ($0.dtype, $0.hidden) = (.int32, 16) },
    WrongShape(argument: "topK", found: "-1") { $0.topK = -1 },
    WrongShape(argument: "topK", found: "33") { ($0.topK, $0.expertCount) = (33, 64) },
    WrongShape(argument: "topK", found: "7") { $0.topK = 7 },
    WrongShape(argument: "expertCount", found: "-1") { ($0.topK, $0.expertCount) = (0, -1) },
    WrongShape(argument: "expertCount", found: "\(Int.max)") { $0.expertCount = .max },
    WrongShape(argument: "scales", found: "float") { $0.scales = .float },
    WrongShape(argument: "sidecarByteCounts", found: "[4, 4, 4, 4]") { $0.sidecarByteCounts = [4, 4, 4, 4] },
    WrongShape(argument: "sidecarByteCounts", found: "6") { $0.sidecarByteCounts = [6] },
    WrongShape(argument: "sidecarByteCounts", found: "\(1 << 40)") { $0.sidecarByteCounts = [1 << 40] },
    WrongShape(argument: "expertAlignment", found: "0") { $0.expertAlignment = 0 },
    WrongShape(argument: "expertAlignment", found: "\(Int.max)") { $0.expertAlignment = .max },
    WrongShape(argument: "layout", found: "byExpert") { ($0.topK, $0.layout) = (0, .byExpert) },
    WrongShape(argument: "layout", found: "grouped") { ($0.topK, $0.layout) = (0, .grouped) },
    WrongShape(argument: "combineDType", found: "uint8") { $0.combineDType = .uint8 },
    WrongShape(argument: "combineEncoding", found: "logFMT of 64 x bf16") { $0.combineEncoding = .logFMT },
    WrongShape(argument: "combineEncoding", found: "logFMT of 128 x fp16") {
      ($0.hidden, $0.combineDType, $0.combineEncoding) = (128, .fp16, .logFMT)
    },
    WrongShape(argument: "indexByteCount", found: "2") { $0.indexByteCount = 2 },
    WrongShape(argument: "expertOwners", found: "2") { $0.expertOwners = [0, 1] },
    WrongShape(argument: "expertOwners", found: "3") { $0.expertOwners = [0, 1, 2, 3, 0, 1] },
  ]
}

extension ConformanceTests {
  @Suite struct PlanTests {
    @Test(arguments: WrongShape.all)
    func wrongShapes(_ wrong: WrongShape) throws {
      var shape = smallJob().shape
      wrong.change(&shape)
      let error = try error { () throws(EPError) in _ = try ExpertBuffer.Plan(shape) }
      guard case .invalidArgument(-1, let argument, _, let found) = error else {
        Issue.record("\(error)")
        return
      }
      #expect(argument == wrong.argument && found == wrong.found)
    }

    @Test func planOptions() throws {
      let shape = smallJob().shape
      #expect(
        throws: EPError.invalidArgument(rank: -1, argument: "resultCount", expected: "1 to 1048576", found: "0")
      ) { _ = try ExpertBuffer.Plan(shape, resultCount: 0) }
      #expect(
        throws: EPError.invalidArgument(rank: -1, argument: "receivedTokensMax", expected: "at least 0", found: "-1")
      ) { _ = try ExpertBuffer.Plan(shape, receivedTokensMax: -1) }
      #expect(
        throws: EPError.invalidArgument(
          rank: -1, argument: "receivedTokensMax", expected: "nil where groups have a fixed size", found: "7")
      ) { _ = try ExpertBuffer.Plan(smallJob().with { $0.layout = .grouped }.shape, receivedTokensMax: 7) }
    }

    /// Half a byte a channel, and a byte for sixteen.
    @Test func nvfp4() throws {
      let byteCount = { (quantization: ScaleFormat?) in
        let job = Job(rankCount: 1, tokenCount: 4096, hidden: 7168, topK: 2, expertCount: 2)
        let plan = try ExpertBuffer.Plan(job.with { $0.quantization = quantization }.shape)
        return plan.parts.first { $0.name == "dispatch results" }!.byteCount
      }
      let (rows, scales) = (4096 * 7168 / 2, 4096 * 7168 / 16)
      #expect(try byteCount(nil) - byteCount(.nvfp4) == Int64(4096 * 7168 * 2 - rows - scales))
    }

    @Test func hugeLimitsAreLimits() throws {
      let shape = smallJob().with { $0.layout = .byExpert }.shape
      let all = try ExpertBuffer.Plan(shape)
      #expect(try ExpertBuffer.Plan(shape, receivedTokensMax: .max).rowsPerResult == all.rowsPerResult)
    }

    /// A full buffer is given its memory once: whatever it dispatches, the arena does not grow.
    @Test(arguments: RowLayout.allCases, [ScaleFormat?.none, .float, .nvfp4])
    func aFullPlanNeverGrows(_ layout: RowLayout, _ quantization: ScaleFormat?) throws {
      let job = smallJob().with {
        ($0.layout, $0.expertAlignment, $0.sizing, $0.quantization) = (layout, 8, .worstCase, quantization)
      }
      let plan = try ExpertBuffer.Plan(job.shape)
      let sizes = try onEachRank(plan) { buffer in
        try job.checkDispatch(on: buffer)
        return buffer.arenaByteCount
      }
      #expect(sizes == [Int64](repeating: plan.arenaByteCount, count: 3))
    }
  }
}
