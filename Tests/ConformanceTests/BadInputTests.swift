import Conformance
import SwiftEP
import Testing

extension ConformanceTests {
  /// A call that a rank cannot make is the same error on all ranks, and the next call works.
  @Suite struct BadInputTests {
    /// Rank 1 of three makes a wrong call. `wrong` changes its arguments.
    private func expectSameError(
      _ job: Job = smallJob(), _ expected: EPError,
      _ wrong: @escaping @Sendable (inout RankTokens, inout DispatchOptions) -> Void
    ) throws {
      let errors = try onEachRank(try job.makePlan()) { buffer in
        var tokens = job.makeTokens(rank: buffer.rank)
        var options = job.dispatchOptions
        if buffer.rank == 1 { wrong(&tokens, &options) }
        let error = try error { () throws(EPError) in
          _ = try buffer.dispatch(
            tokens.x, scales: tokens.scales, sidecars: tokens.sidecars, to: tokens.routing, options: options)
        }
        try job.checkDispatch(on: buffer)
        return error
      }
      #expect(errors == [EPError](repeating: expected, count: job.rankCount))
    }

    private func invalid(_ argument: String, _ expected: String, _ found: String) -> EPError {
      .invalidArgument(rank: 1, argument: argument, expected: expected, found: found)
    }

    /// Routing of 16 tokens to two of six experts, with `change` made to the cells.
    private static func routing(_ change: (inout [Int64]) -> Void) -> Routing {
      var cells = (0..<32).map { Int64($0 % 6) }
      change(&cells)
      return .topK(
        indices: try! Tensor(copying: cells, shape: [16, 2], .int64), weights: try! Tensor(zeros: [16, 2], .fp32))
    }

    @Test func shapes() throws {
      try expectSameError(smallJob(), invalid("x", "2 dimensions", "1")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [64], .bf16)
      }
      try expectSameError(smallJob(), invalid("x", "rows of a positive multiple of 16 bytes, at most 2^30", "20 bytes"))
      {
        tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 10], .bf16)
      }
      try expectSameError(smallJob(), invalid("x", "rows of a positive multiple of 16 bytes, at most 2^30", "0 bytes"))
      { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 0], .bf16)
      }
      try expectSameError(smallJob(), invalid("x", "rows of a positive multiple of 32 bytes, at most 2^30", "16 bytes"))
      {
        $0.x = try! Tensor(zeros: [16, 8], .bf16)
        $1.quantization = .float
      }
      let rows = invalid("x", "rows of a positive multiple of 128 bytes, at most 2^30", "192 bytes")
      try expectSameError(smallJob(), rows) {
        $0.x = try! Tensor(zeros: [16, 96], .bf16)
        $1.quantization = .nvfp4
      }
      try expectSameError(smallJob(), invalid("indices.shape[0]", "16", "15")) { tokens, _ in
        tokens.routing = .topK(indices: try! Tensor(zeros: [15, 2], .int64))
      }
      try expectSameError(smallJob(), invalid("indices", "at most 32", "33")) { tokens, _ in
        tokens.routing = .topK(indices: try! Tensor(zeros: [16, 33], .int64))
      }
      try expectSameError(smallJob(), invalid("indices", "at least 1", "0")) { tokens, _ in
        tokens.routing = .topK(indices: try! Tensor(zeros: [16, 0], .int64))
      }
      try expectSameError(smallJob(), invalid("weights.shape[1]", "2", "3")) { tokens, _ in
        tokens.routing = .topK(
          indices: try! Tensor(zeros: [16, 2], .int64), weights: try! Tensor(zeros: [16, 3], .fp32))
      }
      try expectSameError(smallJob(), invalid("table.shape[1]", "3", "2")) { tokens, _ in
        tokens.routing = .table(try! Tensor(zeros: [16, 2], .uint8))
      }
      try expectSameError(smallJob(), invalid("sidecars.shape[0]", "16", "17")) { tokens, _ in
        tokens.sidecars = [try! Tensor(zeros: [17, 4], .uint8)]
      }
      try expectSameError(
        smallJob(), invalid("sidecars", "rows of a positive multiple of 4 bytes, at most 2^30", "3 bytes")
      ) {
        tokens, _ in tokens.sidecars = [try! Tensor(zeros: [16, 3], .uint8)]
      }
      try expectSameError(smallJob(), invalid("sidecars", "at most 3", "4")) { tokens, _ in
        tokens.sidecars = (0..<4).map { _ in try! Tensor(zeros: [16, 4], .uint8) }
      }
    }

    @Test func dtypes() throws {
      try expectSameError(smallJob(), invalid("x", "bf16 or fp16 or fp32 or fp8E4M3 or uint8", "int32")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 64], .int32)
      }
      try expectSameError(smallJob(), invalid("x", "bf16", "fp16")) {
        $0.x = try! Tensor(zeros: [16, 64], .fp16)
        $1.quantization = .ue8m0
      }
      try expectSameError(smallJob(), invalid("x", "bf16", "fp32")) {
        $0.x = try! Tensor(zeros: [16, 64], .fp32)
        $1.quantization = .nvfp4
      }
      let dtypes = "bf16 or fp16 or fp32 or fp8E4M3 or uint8"
      try expectSameError(smallJob(), invalid("x", dtypes, "fp4E2M1x2")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 64], .fp4E2M1x2)
      }
      try expectSameError(smallJob(), invalid("indices", "int32 or int64", "fp32")) { tokens, _ in
        tokens.routing = .topK(indices: try! Tensor(zeros: [16, 2], .fp32))
      }
      try expectSameError(smallJob(), invalid("weights", "fp32", "bf16")) { tokens, _ in
        tokens.routing = .topK(
          indices: try! Tensor(zeros: [16, 2], .int64), weights: try! Tensor(zeros: [16, 2], .bf16))
      }
      try expectSameError(smallJob(), invalid("table", "uint8", "int32")) { tokens, _ in
        tokens.routing = .table(try! Tensor(zeros: [16, 3], .int32))
      }
      try expectSameError(smallJob(), invalid("scales", "none", "a tensor")) { tokens, _ in
        tokens.scales = try! Tensor(zeros: [16, 1], .fp32)
      }
      try expectSameError(smallJob(), invalid("scales", "a tensor", "none")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 64], .fp8E4M3)
      }
    }

    @Test func options() throws {
      try expectSameError(smallJob(), invalid("workers", "at least 1", "0")) { $1.workers = 0 }
      try expectSameError(smallJob(), invalid("workers", "at most 1", "2")) { $1.workers = 2 }
      try expectSameError(smallJob(), invalid("expertAlignment", "at least 1", "0")) { $1.expertAlignment = 0 }
      let elsewhere = "none but for new routing of worst-case size, not grouped and without masks"
      try expectSameError(smallJob(), invalid("rowsMax", elsewhere, "one")) { $1.rowsMax = 8 }
      try expectSameError(smallJob(), invalid("rowsMax", "at least 1", "0")) {
        $1.rowsMax = 0
        $1.sizing = .worstCase
      }
      try expectSameError(smallJob(), invalid("layout", "bySource", "byExpert")) {
        $0.routing = .table(try! Tensor(zeros: [16, 3], .uint8))
        $1.layout = .byExpert
      }
      let jobs = [smallJob().with { $0.sizing = .worstCase }, smallJob().with { $0.layout = .grouped }]
      for job in jobs {
        try expectSameError(job, invalid("x", "at most 16", "17")) { tokens, _ in
          tokens.x = try! Tensor(zeros: [17, 64], .bf16)
          tokens.routing = .topK(
            indices: try! Tensor(zeros: [17, 2], .int64), weights: try! Tensor(zeros: [17, 2], .fp32))
        }
      }
    }

    @Test(arguments: [0, -1, .nan, .infinity, -.infinity, 0x1p-119, 0x1p119] as [Float])
    func globalScales(_ scale: Float) throws {
      let job = smallJob().with { $0.quantization = .nvfp4 }
      try expectSameError(job, invalid("globalScale", "2^-118 to 2^118", "\(scale)")) { $1.globalScale = scale }
    }

    @Test func globalScaleOfNothing() throws {
      for quantization in [ScaleFormat?.none] + ScaleFormat.ofRows(.fp8E4M3) {
        let error = invalid("globalScale", "1 but for rows that become NVFP4", "2.0")
        try expectSameError(smallJob().with { $0.quantization = quantization }, error) { $1.globalScale = 2 }
      }
    }

    @Test func scalesInColumns() throws {
      let job = smallJob().with { ($0.dtype, $0.scales) = (.fp8E4M3, .float) }
      let few = invalid("scales", "at least 16", "15")
      try expectSameError(job, few) { tokens, options in
        (tokens.scales, options.givenScaleOrder) = (try! Tensor(zeros: [1, 15], .fp32), .columnMajor)
      }
      let wide = invalid("scales.shape[0]", "1", "16")
      try expectSameError(job, wide) { $1.givenScaleOrder = .columnMajor }
    }

    @Test func scalesThatLieInRowsOnly() throws {
      let error = invalid("scaleOrder", "rowMajor but for grouped rows that are quantized on the way", "columnMajor")
      try expectSameError(smallJob().with { $0.layout = .grouped }, error) { $1.scaleOrder = .columnMajor }
      try expectSameError(smallJob().with { ($0.layout, $0.quantization) = (.byExpert, .float) }, error) {
        $1.scaleOrder = .columnMajor
      }
    }

    /// More grouped rows than an Int32 counts, in a buffer that was planned for another layout.
    @Test func groupsOfTooManyRows() throws {
      let shape = JobShape(
        rankCount: 2, tokensPerRankMax: 1 << 20, hidden: 8, topK: 1, expertCount: 600, combineDType: .bf16)
      let plan = try ExpertBuffer.Plan(shape, receivedTokensMax: 8)
      let job = Job(rankCount: 2, tokenCount: 4, hidden: 8, topK: 1, expertCount: 600)
      let errors = try onEachRank(plan) { buffer in
        var options = job.dispatchOptions
        options.layout = .grouped
        let error = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) }
        try job.checkDispatch(on: buffer)
        return error
      }
      let expected = EPError.invalidArgument(
        rank: 0, argument: "layout", expected: "one of at most 536870911 rows", found: "one of 629145600")
      #expect(errors == [expected, expected])
    }

    /// Groups of fixed size in a buffer that was planned for less, and has no more to give.
    @Test func groupsThatWereNotPlanned() throws {
      let job = smallJob()
      let plan = try ExpertBuffer.Plan(job.shape, arenaByteCountMax: 0)
      let errors = try onEachRank(plan) { buffer in
        var options = job.dispatchOptions
        options.layout = .grouped
        let error = try error { () throws(EPError) in _ = try job.dispatch(on: buffer, options: options) }
        try job.checkDispatch(on: buffer)
        return error
      }
      guard case .outOfMemory(rank: 0, let needed, let available) = errors[0] else {
        Issue.record("\(errors[0])")
        return
      }
      #expect(needed > available && errors == [errors[0], errors[0], errors[0]])
    }

    @Test(arguments: [Int64(-2), 6, .max, .min, 1 << 32])
    func expertsOutOfRange(_ expert: Int64) throws {
      try expectSameError(
        smallJob(), invalid("indices[5, 1]", "-1 or an expert of 0..<6", "\(expert)")
      ) { tokens, _ in
        tokens.routing = Self.routing { $0[11] = expert }
      }
    }

    @Test(arguments: RowLayout.allCases)
    func duplicateExperts(_ layout: RowLayout) throws {
      let job = smallJob().with { $0.layout = layout }
      try expectSameError(job, invalid("indices[15, 1]", "an expert that the token names once", "0 again")) {
        tokens, _ in tokens.routing = Self.routing { ($0[30], $0[31]) = (0, 0) }
      }
    }

    /// Of several faults the first in token order is reported, whichever worker finds it.
    @Test(arguments: RowLayout.allCases, [([7, 20, 31], "3, 1"), ([20, 31], "10, 0"), ([31], "15, 1")])
    func theFirstFaultIsReported(_ layout: RowLayout, _ faults: (cells: [Int], first: String)) throws {
      let job = smallJob().with { $0.layout = layout }
      let errors = try onEachRank(try job.makePlan(), workers: 3) { buffer in
        var tokens = job.makeTokens(rank: buffer.rank)
        if buffer.rank > 0 {
          tokens.routing = Self.routing { indices in for cell in faults.cells { indices[cell] = 70 + Int64(cell) } }
        }
        return try error { () throws(EPError) in
          _ = try buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
        }
      }
      let expected = invalid("indices[\(faults.first)]", "-1 or an expert of 0..<6", "\(70 + faults.cells[0])")
      #expect(errors == [expected, expected, expected])
    }

    @Test func ranksDisagree() throws {
      func disagree(_ about: String, _ expected: String, _ found: String) -> EPError {
        .ranksDisagree(about: about, rank: 1, expected: expected, found: found)
      }
      try expectSameError(smallJob(), disagree("hidden", "64", "32")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 32], .bf16)
      }
      try expectSameError(smallJob(), disagree("the rows' dtype", "bf16", "fp16")) { tokens, _ in
        tokens.x = try! Tensor(zeros: [16, 64], .fp16)
      }
      try expectSameError(smallJob(), disagree("topK", "2", "1")) { tokens, _ in
        tokens.routing = .topK(
          indices: try! Tensor(zeros: [16, 1], .int64), weights: try! Tensor(zeros: [16, 1], .fp32))
      }
      try expectSameError(smallJob(), disagree("bytes of an index", "8", "4")) { tokens, _ in
        tokens.routing = .topK(
          indices: try! Tensor(copying: (0..<32).map { Int32($0 % 6) }, shape: [16, 2], .int32),
          weights: try! Tensor(zeros: [16, 2], .fp32))
      }
      try expectSameError(smallJob(), disagree("whether weights are given", "weights", "none")) { tokens, _ in
        guard case .topK(let indices, _) = tokens.routing else { return }
        tokens.routing = .topK(indices: indices)
      }
      try expectSameError(smallJob(), disagree("quantization", "copy", "quantizeFloatScales")) {
        $1.quantization = .float
      }
      try expectSameError(smallJob(), disagree("the layout", "bySource", "byExpert")) { $1.layout = .byExpert }
      try expectSameError(
        smallJob().with { ($0.layout, $0.sizing) = (.byExpert, .worstCase) },
        disagree("the layout", "byExpert", "grouped")
      ) { $1.layout = .grouped }
      try expectSameError(
        smallJob().with { ($0.layout, $0.quantization) = (.grouped, .float) },
        disagree("quantization", "quantizeFloatScales", "quantizeFloatScales in columns")
      ) { $1.scaleOrder = .columnMajor }
      try expectSameError(
        smallJob().with { ($0.quantization, $0.globalScale) = (.nvfp4, 1344) },
        disagree("quantization", "quantizeNVFP4 with global scale 1344.0", "quantizeNVFP4 with global scale 1343.0")
      ) { $1.globalScale = 1343 }
      try expectSameError(smallJob(), disagree("sizing", "exact", "worstCase")) { $1.sizing = .worstCase }
      try expectSameError(smallJob(), disagree("expertAlignment", "1", "4")) { $1.expertAlignment = 4 }
      try expectSameError(smallJob(), disagree("a row of sidecar 0", "none", "8 bytes of uint8")) { tokens, _ in
        tokens.sidecars = [try! Tensor(zeros: [16, 8], .uint8)]
      }
      try expectSameError(smallJob(), disagree("topK", "2", "0")) { tokens, _ in
        tokens.routing = .table(try! Tensor(zeros: [16, 3], .uint8))
      }
    }

    /// One rank combines, or repeats a dispatch, while the others dispatch; then each with a handle of another call.
    @Test func operationsThatDoNotBelongTogether() throws {
      let job = smallJob()
      let errors = try onEachRank(try job.makePlan()) { buffer in
        let (first, second) = (try job.dispatch(on: buffer), try job.dispatch(on: buffer))
        let isOdd = buffer.rank == 1
        let handle = isOdd ? first.handle : second.handle
        let errors = [
          try error { () throws(EPError) in
            if isOdd {
              _ = try buffer.combine(first.rows, with: first.handle)
            } else {
              _ = try job.dispatch(on: buffer)
            }
          },
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer, handle: isOdd ? first.handle : nil) },
          try error { () throws(EPError) in _ = try buffer.combine(first.rows, with: handle) },
          try error { () throws(EPError) in _ = try job.dispatch(on: buffer, handle: handle) },
        ]
        try job.checkDispatch(on: buffer)
        return errors
      }
      #expect(errors[1] == errors[0] && errors[2] == errors[0])
      #expect(
        errors[0][0] == .ranksDisagree(about: "the operation", rank: 1, expected: "dispatch", found: "combine"))
      #expect(
        errors[0][1]
          == .ranksDisagree(about: "the operation", rank: 1, expected: "dispatch", found: "cachedDispatch"))
      for error in errors[0][2...] {
        #expect(
          error
            == .ranksDisagree(about: "the handle (its dispatch's epoch)", rank: 1, expected: "2", found: "1"))
      }
    }
  }
}
