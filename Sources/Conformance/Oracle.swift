import SwiftEP

/// One rank's input to a dispatch.
package struct RankTokens: Sendable {
  package var x: Tensor
  package var scales: Tensor?
  /// The same in columns, where a dispatch is given those.
  package var scaleColumns: Tensor?
  package var sidecars: [Tensor]
  /// By top-k or by table.
  package var routing: Routing

  package init(x: Tensor, scales: Tensor? = nil, sidecars: [Tensor] = [], routing: Routing) {
    self.x = x
    self.scales = scales
    self.sidecars = sidecars
    self.routing = routing
  }

  /// The same tokens where the buffer's machine reaches them.
  package func reachable(from buffer: ExpertBuffer) throws(EPError) -> RankTokens {
    var tokens = self
    tokens.x = try buffer.reachable(x)
    if let scales { tokens.scales = try buffer.reachable(scales) }
    if let scaleColumns { tokens.scaleColumns = try buffer.reachable(scaleColumns) }
    tokens.sidecars = try sidecars.map { sidecar throws(EPError) in try buffer.reachable(sidecar) }
    switch routing {
    case .topK(let indices, let weights):
      var reachable: Tensor?
      if let weights { reachable = try buffer.reachable(weights) }
      tokens.routing = .topK(indices: try buffer.reachable(indices), weights: reachable)
    case .table(let table): tokens.routing = .table(try buffer.reachable(table))
    case .cached: break
    }
    return tokens
  }
}

/// What dispatch and combine have to return, worked out from all ranks' inputs in the plainest way. Shares nothing with
/// the protocol but its documentation.
package struct Oracle: Sendable {
  /// Where a received row came from.
  struct Origin: Sendable {
    let source: Int
    let token: Int
    /// By expert: the top-k slot; by source: -1.
    let slot: Int
  }

  /// Where a sent row went.
  struct Destination: Sendable {
    let rank: Int
    let row: Int
  }

  let expertOwners: [Int]
  let tokens: [RankTokens]
  let layout: RowLayout
  let expertAlignment: Int
  let quantization: ScaleFormat?
  let globalScale: Float
  let scaleOrder: ScaleOrder
  /// Rows that each source has room for; 0 where its rows are followed by the next one's.
  let sourceCapacity: Int
  let choices: [Choices]
  /// The index of each expert among those of its rank.
  let localExperts: [Int]
  /// By rank: the rows that it receives, nil where there is padding.
  let origins: [[Origin?]]
  /// By source rank: `[tokens, slots]`; by source the slots are ranks, by expert they are top-k slots.
  let destinations: [[Destination?]]

  /// Of each rank's tensors.
  package var rowCounts: [Int] { origins.map(\.count) }

  /// - Parameter masked: ranks that neither send nor receive anything.
  package init(
    expertOwners: [Int], tokens: [RankTokens], layout: RowLayout, expertAlignment: Int = 1, quantization: ScaleFormat?,
    globalScale: Float = 1, scaleOrder: ScaleOrder = .rowMajor, groupCapacity: Int, sourceCapacity: Int = 0,
    masked: Set<Int> = []
  ) {
    let rankCount = tokens.count
    self.expertOwners = expertOwners
    self.tokens = tokens
    self.layout = layout
    self.expertAlignment = expertAlignment
    self.quantization = quantization
    self.globalScale = globalScale
    self.scaleOrder = scaleOrder
    self.sourceCapacity = sourceCapacity
    let choices = tokens.enumerated().map { rank, tokens in
      var choices = Choices(tokens, rankCount: rankCount)
      choices.leaveOut(masked.contains(rank) ? Set(0..<rankCount) : masked, expertOwners)
      return choices
    }
    self.choices = choices
    localExperts = expertOwners.indices.map { expert in
      expertOwners[..<expert].count { $0 == expertOwners[expert] }
    }
    let origins =
      layout == .bySource
      ? Self.originsBySource(choices, expertOwners, sourceCapacity: sourceCapacity)
      : Self.originsByExpert(
        choices, expertOwners, sourceCapacity: sourceCapacity,
        groupSize: { count in
          layout == .grouped ? groupCapacity : (count + expertAlignment - 1) / expertAlignment * expertAlignment
        })
    self.origins = origins
    destinations = choices.enumerated().map { source, choice in
      let slotCount = layout == .bySource ? tokens.count : choice.topK
      var destinations = [Destination?](repeating: nil, count: choice.tokenCount * slotCount)
      for (rank, rows) in origins.enumerated() {
        for (row, origin) in rows.enumerated() {
          guard let origin, origin.source == source else { continue }
          let slot = layout == .bySource ? rank : origin.slot
          destinations[origin.token * slotCount + slot] = Destination(rank: rank, row: row)
        }
      }
      return destinations
    }
  }

  /// - Parameter tokens: of all ranks; routed by top-k or by table.
  package init(_ job: Job, tokens: [RankTokens]) {
    self.init(
      expertOwners: job.owners, tokens: tokens, layout: job.layout, expertAlignment: job.expertAlignment,
      quantization: job.quantization, globalScale: job.globalScale, scaleOrder: job.scaleOrder,
      groupCapacity: job.shape.groupCapacity, sourceCapacity: job.masking == .none ? 0 : job.tokensPerRankMax,
      masked: job.masked)
  }

  /// Each rank's rows by source rank, then token.
  private static func originsBySource(_ choices: [Choices], _ owners: [Int], sourceCapacity: Int) -> [[Origin?]] {
    choices.indices.map { rank in
      var rows: [Origin?] = []
      for (source, choice) in choices.enumerated() {
        rows.fill(to: source * sourceCapacity)
        for token in 0..<choice.tokenCount where choice.goes(token, to: rank, owners) {
          rows.append(Origin(source: source, token: token, slot: -1))
        }
      }
      rows.fill(to: choices.count * sourceCapacity)
      return rows
    }
  }

  /// Each rank's rows by local expert, then source rank, then token; each expert's rows filled up to the size of a group
  /// of so many rows.
  private static func originsByExpert(
    _ choices: [Choices], _ owners: [Int], sourceCapacity: Int, groupSize: (_ count: Int) -> Int
  ) -> [[Origin?]] {
    var groups = [[Origin?]](repeating: [], count: owners.count)
    for (source, choice) in choices.enumerated() {
      for expert in owners.indices { groups[expert].fill(to: source * sourceCapacity) }
      for token in 0..<choice.tokenCount {
        for slot in 0..<choice.topK {
          let expert = choice.experts[token * choice.topK + slot]
          if expert >= 0 { groups[expert].append(Origin(source: source, token: token, slot: slot)) }
        }
      }
    }
    return choices.indices.map { rank in
      var rows: [Origin?] = []
      for expert in owners.indices where owners[expert] == rank {
        let group = groups[expert]
        rows += group + [Origin?](repeating: nil, count: groupSize(group.count) - group.count)
      }
      return rows
    }
  }
}

extension [Oracle.Origin?] {
  /// Padding up to so many rows.
  fileprivate mutating func fill(to count: Int) {
    self += [Oracle.Origin?](repeating: nil, count: Swift.max(0, count - self.count))
  }
}

extension Oracle {
  /// A rank's routing, read out of its tensors.
  struct Choices: Sendable {
    let tokenCount: Int
    /// 0 when routing is by table.
    let topK: Int
    /// `[tokenCount, topK]`, -1 for none.
    var experts: [Int] = []
    /// fp32 `[tokenCount, topK]`.
    var weights: [Float]?
    /// Bytes of an index.
    var indexByteCount = 0
    /// `[tokenCount, ranks]`.
    private var table: [Bool] = []
    private let rankCount: Int

    init(_ tokens: RankTokens, rankCount: Int) {
      tokenCount = tokens.x.shape[0]
      self.rankCount = rankCount
      switch tokens.routing {
      case .topK(let indices, let weights):
        topK = indices.shape[1]
        experts =
          indices.dtype == .int32 ? try! indices.elements(Int32.self).map { Int($0) } : try! indices.elements(Int.self)
        self.weights = try! weights?.elements(Float.self)
        indexByteCount = indices.dtype.byteCount
      case .table(let table):
        topK = 0
        self.table = try! table.elements(UInt8.self).map { $0 != 0 }
      case .cached:
        preconditionFailure("the oracle wants the routing that the handle was made from")
      }
    }

    /// Nothing goes to these ranks.
    mutating func leaveOut(_ ranks: Set<Int>, _ owners: [Int]) {
      for index in experts.indices where experts[index] >= 0 && ranks.contains(owners[experts[index]]) {
        experts[index] = -1
      }
      for index in table.indices where ranks.contains(index % rankCount) { table[index] = false }
    }

    func goes(_ token: Int, to rank: Int, _ owners: [Int]) -> Bool {
      if topK == 0 { return table[token * rankCount + rank] }
      return experts[token * topK..<(token + 1) * topK].contains { $0 >= 0 && owners[$0] == rank }
    }
  }
}

/// The rank of each expert where nobody says otherwise: equal runs, the first ranks' being one longer where the experts
/// do not divide.
package func contiguousOwners(expertCount: Int, rankCount: Int) -> [Int] {
  var owners: [Int] = []
  for rank in 0..<rankCount {
    for _ in 0..<expertCount / rankCount { owners.append(rank) }
    if rank < expertCount % rankCount { owners.append(rank) }
  }
  return owners
}
