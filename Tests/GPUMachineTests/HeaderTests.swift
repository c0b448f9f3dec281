import Testing

@testable import EmulatedGPU

/// What a GPU's block does with headers, on emulated lanes.
@Suite struct HeaderTests {
  /// Every word of every copy, from where the launch has its arguments.
  @Test(arguments: [Int32(1), 8, 33]) func words(copyCount: Int32) {
    let first = Int(ExchangeHeader.offsetInArguments) / 8
    let arguments = Memory((0..<Int64(first) + 40).map { 1000 + $0 })
    let wordCount = ExchangeHeader.wordCount
    let found = Memory([Int64](repeating: -1, count: Int(copyCount * wordCount)))
    let fault = emulate(blockCount: 1, arguments: arguments.base) { machine in
      machine.forEachWord(of: ExchangeHeader(), copyCount: copyCount) { copy, index, word in
        found.address.store(word, at: copy * wordCount + index)
      }
    }
    #expect(fault == nil)
    let words = (0..<Int64(wordCount)).map { 1000 + Int64(first) + $0 }
    #expect(found.elements(Int64.self) == (0..<copyCount).flatMap { _ in words })
  }

  private static let otherCount: Int32 = 5

  /// What is found odd where nothing is but `cell`, of the block of `rank`; and how often it was asked of each other thing.
  private func compare(
    rankCount: Int32, oddAt cell: (rank: Int32, field: Int32)?, oddOther: Int32 = -1
  ) -> (status: OperationStatus, odd: Int32, asked: [Int32], fault: String?) {
    let control = ControlLayout(rankCount: rankCount, expertCount: 8)
    let byteCount = Int(control.exchangeBlockByteCount)
    // What lies behind the blocks is never looked at.
    let blocks = Memory(
      [UInt8](repeating: 0, count: Int(rankCount) * byteCount) + [UInt8](repeating: 9, count: 64 * byteCount))
    if let cell {
      let block = blocks.address.advanced(byBytes: Int64(cell.rank) * control.exchangeBlockByteCount)
      block.store(Int64(7), at: cell.field)
    }
    var view = RankView(
      rank: 0, rankCount: rankCount, expertCount: 8, localExpertCount: 8, arenas: .null, ownArena: .null,
      expertOwner: .null, expertLocal: .null, expertOrder: .null, firstPlaces: .null, failure: .null,
      hostFailure: .null, departures: .null, alarm: .null, arrivals: .null, pause: .null, timeoutNanoseconds: 1)
    view.blocks = blocks.address
    let (asked, found) = (
      Memory([Int32](repeating: 0, count: Int(Self.otherCount))), Memory([Int64](repeating: 0, count: 4))
    )
    let fault = emulate(blockCount: 1) { [view] machine in
      let (status, odd) = compareHeaders(machine, view, with: Self.otherCount) { index in
        asked.address.store(asked.address.load(Int32.self, at: index) + 1, at: index)
        return index == oddOther
      }
      if machine.thread == 0 {
        found.address.store(SIMD4(status.code, status.rank, status.details.0, Int64(odd)), at: 0)
      }
    }
    let words = found.elements(Int64.self)
    return (
      OperationStatus(StatusCode(rawValue: words[0])!, rank: words[1], (words[2], 0, 0, 0)),
      Int32(words[3]), asked.elements(Int32.self), fault
    )
  }

  @Test(arguments: [Int32(1), 3, 31, 32, 33, 64]) func headersThatAgree(rankCount: Int32) {
    for oddOther in [-1, 0, Self.otherCount - 1] {
      let found = compare(rankCount: rankCount, oddAt: nil, oddOther: oddOther)
      #expect(found.fault == nil)
      #expect(found.status.code == StatusCode.ok.rawValue && found.odd == oddOther)
      #expect(oddOther >= 0 || found.asked == [Int32](repeating: 1, count: Int(Self.otherCount)))
    }
  }

  @Test(arguments: [Int32(3), 33]) func everyOddFieldIsFound(rankCount: Int32) {
    for rank in [1, rankCount - 1] {
      for field in 0..<ExchangeHeader.faultIndex {
        let found = compare(rankCount: rankCount, oddAt: (rank, field))
        #expect(found.fault == nil && found.status.code == StatusCode.disagreement.rawValue)
        #expect(found.status.rank == Int64(rank) && found.status.details.0 == Int64(field) && found.odd == -1)
      }
    }
  }

  /// Rather than any field.
  @Test(arguments: [Int32(1), 32, 33]) func everyFaultIsFound(rankCount: Int32) {
    for rank in [0, rankCount - 1] {
      let found = compare(rankCount: rankCount, oddAt: (rank, ExchangeHeader.faultIndex))
      #expect(found.fault == nil && found.status.code == StatusCode.inputFault.rawValue)
      #expect(found.status.rank == Int64(rank) && found.status.details.0 == 7 && found.odd == -1)
    }
  }
}
