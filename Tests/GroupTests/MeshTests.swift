import Arena
import CPlatform
import CUDADriver
import Conformance
import EPKernels
import Glibc
import HostMachine
import Testing

@testable import SwiftEP

@Suite struct MeshTests {
  enum Kind: CaseIterable { case threads, sockets }

  /// Two members wait for each other in vain at the same moment. Each could go on alone; both must not.
  @Test(arguments: Kind.allCases) func twoThatHoldEachOtherAbsentDoNotBothGoOn(_ kind: Kind) throws {
    var random = SplitMix64(seed: 1)
    for attempt in 0..<1000 {
      let groups = try makePair(kind)
      let delays = [random.pick(0...60), random.pick(0...60)]
      let goOn = both { rank in
        let start = monotonicNow() + UInt64(delays[rank]) * 1000
        while monotonicNow() < start {}
        let cause = EPError.rankMissing(rank: 1 - rank, step: .exchange, because: .silent(.seconds(1)))
        groups[rank].mesh.tell(.lost(cause), of: BufferKey(generation: 0, index: 0))
        return (try? groups[rank].shrink(timeout: .seconds(20))) != nil
      }
      #expect(goOn != [true, true], "attempt \(attempt)")
    }
  }

  @Test(arguments: Kind.allCases) func oneThatHoldsTheOtherAbsentGoesOn(_ kind: Kind) throws {
    let groups = try makePair(kind)
    let cause = EPError.rankMissing(rank: 1, step: .exchange, because: .silent(.seconds(1)))
    groups[0].mesh.tell(.lost(cause), of: BufferKey(generation: 0, index: 0))
    #expect(try groups[0].shrink(timeout: .seconds(20)).rankCount == 1)
    #expect(throws: EPError.self) { try groups[1].shrink(timeout: .seconds(20)) }
  }

  /// The end of a connection comes behind what was sent before it, even where the sender had not read everything.
  @Test func lastWordsAreHeard() throws {
    for _ in 0..<100 {
      let card = try Card.make(rank: 0)
      let open = OpenMesh(Mesh(card: card, hub: try SocketHub(card: card)))
      let guest = card.id &+ 1
      open.mesh.enter(0, members: [card.id, guest])
      var connection: Descriptor? = try Descriptor("connect") { swiftep_connect_abstract(card.socketName) }
      func send(_ bytes: [UInt8]) {
        #expect(swiftep_send(connection!.raw, bytes, bytes.count, -1) == bytes.count)
      }
      send(encode(SocketHub.Hello(secret: card.secret, member: guest, generation: 0))!)
      try #require(open.mesh.waitForLink(to: guest, until: monotonicNow() + 20_000_000_000))
      // Nobody reads this.
      open.mesh.tell(.closed, of: BufferKey(generation: 0, index: 0))
      send(encode(Message.regrouping(generation: 0, .report(absent: [card.id])))!)
      connection = nil
      #expect(throws: EPError.self) { try open.mesh.regroup(0, timeout: .seconds(20)) }
    }
  }

  // MARK: Arenas that grow

  /// What an arena has grown by is mapped by the peer, with the file that came with it, before `share` returns.
  @Test func growthIsMappedByPeers() throws {
    let (groups, key) = (try makePair(.sockets), BufferKey(generation: 0, index: 0))
    let arenas = [MadeUpArena(), MadeUpArena()]
    groups[1].mesh.register(arenas, for: key)
    let file = try Descriptor("open") { open("/dev/null", O_RDONLY | O_CLOEXEC) }
    for offset: Int64 in [4096, 8192] {
      let piece = ArenaPiece(range: offset..<offset + 4096, file: offset == 4096 ? file : nil)
      try groups[0].mesh.share(piece, of: key, timeout: .seconds(20))
      #expect(arenas[0].mapped.last == .init(range: piece.range, hasFile: piece.file != nil))
    }
    #expect(arenas[0].mapped.count == 2 && arenas[1].mapped.isEmpty)
  }

  @Test func whoCannotMapAGrowthIsTold() throws {
    let (groups, key) = (try makePair(.sockets), BufferKey(generation: 0, index: 0))
    let failure = EPError.systemCall(rank: 1, name: "mmap", code: ENOMEM)
    groups[1].mesh.register([MadeUpArena(failure: failure), MadeUpArena()], for: key)
    #expect(throws: failure) {
      try groups[0].mesh.share(ArenaPiece(range: 0..<4096, file: nil), of: key, timeout: .seconds(20))
    }
  }

  @Test func nobodyWaitsForAMappingByWhoIsGone() throws {
    var groups = try makePair(.sockets)
    let key = BufferKey(generation: 0, index: 0)
    groups[1].mesh.tell(.closed, of: key)
    try groups[0].mesh.share(ArenaPiece(range: 0..<4096, file: nil), of: key, timeout: .seconds(20))
    groups.removeLast()
    try groups[0].mesh.share(ArenaPiece(range: 4096..<8192, file: nil), of: key, timeout: .seconds(20))
  }

  private final class MadeUpArena: SymmetricMemory {
    struct Mapped: Equatable {
      let range: Range<Int64>
      let hasFile: Bool
    }

    private let pieces = Guarded<[Mapped]>([])
    private let failure: EPError?

    init(failure: EPError? = nil) { self.failure = failure }

    var mapped: [Mapped] { pieces.withLock { $0 } }

    func map(_ piece: ArenaPiece) throws(EPError) {
      if let failure { throw failure }
      pieces.withLock { $0.append(Mapped(range: piece.range, hasFile: piece.file != nil)) }
    }

    var address: Address { .null }
    var reservedByteCount: Int64 { 0 }
    var byteCount: Int64 { 0 }
    var descriptor: Descriptor? { nil }
    var copier: (any MemoryCopier)? { nil }
    var clockOffset: UInt64 { 0 }
    var gpu: GPU? { nil }
    func extend(to byteCount: Int64) throws(EPError) -> [ArenaPiece] { [] }
  }

  private func makePair(_ kind: Kind) throws -> [Group] {
    if kind == .threads { return try Group.threads(rankCount: 2) }
    let passed = Guarded<[Int: [UInt8]]>([:])
    let bell = SharedBell()
    let groups = both { rank in
      try? Group.processes(rank: rank, rankCount: 2, timeout: .seconds(20), meeting: nil) { bytes in
        passed.withLock { $0[rank] = bytes }
        bell.ring()
        _ = bell.wait(until: monotonicNow() + 20_000_000_000, spinningFor: 0) { passed.withLock { $0.count == 2 } }
        return passed.withLock { passed in (0..<2).compactMap { passed[$0] } }
      }
    }
    return try groups.map { try #require($0) }
  }

  /// What `body` returns on each of two threads.
  private func both<Value: Sendable>(_ body: @escaping @Sendable (Int) -> Value) -> [Value] {
    let results = Guarded<[Int: Value]>([:])
    let threads = (0..<2).map { rank in
      startThread {
        let result = body(rank)
        results.withLock { $0[rank] = result }
      }!
    }
    for thread in threads { pthread_join(thread, nil) }
    return results.withLock { [$0[0]!, $0[1]!] }
  }
}
