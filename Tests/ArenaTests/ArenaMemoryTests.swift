import Arena
import Glibc
import Testing

@Suite struct ArenaMemoryTests {
  private let page = HoleList.granule

  @Test func growsInPlace() throws {
    let memory = try ArenaMemory(reservedByteCount: 10 * page)
    #expect(memory.byteCount == 0)
    let base = memory.base
    try memory.grow(to: 2 * page)
    let words = memory.base.assumingMemoryBound(to: UInt32.self)
    let wordCount = Int(page) / 2
    for index in 0..<wordCount {
      #expect(words[index] == 0)
      words[index] = UInt32(index)
    }
    try memory.grow(to: 10 * page)
    try memory.grow(to: 10 * page)
    #expect(memory.base == base && memory.byteCount == 10 * page)
    for index in 0..<wordCount where words[index] != UInt32(index) {
      Issue.record("word \(index) has changed")
      break
    }
    #expect(words[Int(10 * page) / 4 - 1] == 0)
  }

  @Test func reservesWholePages() throws {
    #expect(try ArenaMemory(reservedByteCount: page + 1).reservedByteCount == 2 * page)
  }

  /// Who has the descriptor reaches the same memory.
  @Test func theDescriptorIsTheMemory() throws {
    let memory = try ArenaMemory(reservedByteCount: 4 * page)
    let mapped = mmap(nil, Int(4 * page), PROT_READ | PROT_WRITE, MAP_SHARED, memory.descriptor!.raw, 0)
    let other = try #require(mapped)
    defer { munmap(other, Int(4 * page)) }
    // Mapped before the file grew.
    try memory.grow(to: 3 * page)
    memory.base.storeBytes(of: 0x1234_5678, toByteOffset: Int(3 * page) - 4, as: UInt32.self)
    #expect(other.load(fromByteOffset: Int(3 * page) - 4, as: UInt32.self) == 0x1234_5678)
    other.storeBytes(of: 99, toByteOffset: 0, as: UInt8.self)
    #expect(memory.base.load(as: UInt8.self) == 99)
  }

  @Test func neverShrinks() throws {
    let memory = try ArenaMemory(reservedByteCount: 4 * page)
    try memory.grow(to: 2 * page)
    #expect(ftruncate(memory.descriptor!.raw, Int(page)) == -1)
    #expect(errno == EPERM)
    #expect(ftruncate(memory.descriptor!.raw, 0) == -1)
    var status = stat()
    #expect(fstat(memory.descriptor!.raw, &status) == 0)
    #expect(status.st_size == Int(2 * page))
  }

  @Test func theDescriptorIsNotInherited() throws {
    let memory = try ArenaMemory(reservedByteCount: page)
    #expect(fcntl(memory.descriptor!.raw, F_GETFD) & FD_CLOEXEC != 0)
  }

  @Test func givesItsDescriptorBack() throws {
    let first = try ArenaMemory(reservedByteCount: page).descriptor!.raw
    // Other tests open files meanwhile, but not a hundred at once.
    let later = try (0..<100).map { _ in try ArenaMemory(reservedByteCount: page).descriptor!.raw }
    #expect(later.max()! < first + 100)
  }

  @Test func moreThanAllAddressesIsAnError() {
    let error = #expect(throws: SystemCallError.self) { _ = try ArenaMemory(reservedByteCount: 1 << 60) }
    #expect(error?.call == "mmap" && error?.code == ENOMEM)
  }
}
