import Arena
import Foundation
import HostFacts
import MadeUpHosts
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

  // MARK: Limits

  private func resident(_ memory: ArenaMemory) throws -> Int64 {
    var status = stat()
    try #require(fstat(memory.descriptor!.raw, &status) == 0)
    return Int64(status.st_blocks) * 512
  }

  /// To ask for it would get the process killed.
  @Test func memoryIsNotTakenThatIsNotThere() throws {
    let host = try MadeUpHost.granting(4 * page)
    let memory = try ArenaMemory(reservedByteCount: 100 * page, facts: host.tree)
    try memory.grow(to: 3 * page)
    let refused = SystemCallError(call: "madvise(MADV_POPULATE_WRITE)", code: ENOMEM)
    #expect(throws: refused) { try memory.grow(to: 100 * page) }
    #expect(try memory.byteCount == 3 * page && resident(memory) == 3 * page)
    try memory.grow(to: 5 * page)
    #expect(try resident(memory) == 5 * page)
  }

  /// What others have taken meanwhile is missed halfway: what was taken until then is given back.
  @Test func memoryThatIsGoneHalfway() throws {
    let host = try MadeUpHost.granting(1 << 30)
    let memory = try ArenaMemory(reservedByteCount: 1 << 30, facts: host.tree)
    try memory.grow(to: page)
    memory.base.storeBytes(of: 7, as: UInt8.self)
    // The file with the facts is a pipe, which says something else every time that it is read.
    let path = host.folder.path + "/proc/meminfo"
    try FileManager.default.removeItem(atPath: path)
    try #require(mkfifo(path, 0o600) == 0)
    let answers = Thread {
      // The reader may be gone by the time that it is answered.
      var broken = sigset_t()
      sigemptyset(&broken)
      sigaddset(&broken, SIGPIPE)
      pthread_sigmask(SIG_BLOCK, &broken, nil)
      var available = [1 << 20, 1 << 17][...]
      while !Thread.current.isCancelled {
        let pipe = open(path, O_WRONLY | O_NONBLOCK)
        if pipe < 0 {
          usleep(500)
          continue
        }
        let text = Array("MemTotal: 9999999 kB\nMemAvailable: \(available.popFirst() ?? 0) kB\n".utf8)
        _ = write(pipe, text, text.count)
        close(pipe)
      }
    }
    answers.start()
    defer { answers.cancel() }
    let refused = SystemCallError(call: "madvise(MADV_POPULATE_WRITE)", code: ENOMEM)
    #expect(throws: refused) { try memory.grow(to: 256 << 20) }
    #expect(try memory.byteCount == page && resident(memory) == page)
    #expect(memory.base.load(as: UInt8.self) == 7)
  }

  /// The system's answer would be a signal.
  @Test func aFileMayNotBeAsLarge() throws {
    let host = try MadeUpHost.granting(1 << 30)
    try host.write("/proc/self/limits", "Max file size  \(4 * page)  unlimited  bytes")
    let memory = try ArenaMemory(reservedByteCount: 100 * page, facts: host.tree)
    try memory.grow(to: 4 * page)
    let refused = SystemCallError(call: "ftruncate", code: EFBIG)
    #expect(throws: refused) { try memory.grow(to: 5 * page) }
    #expect(memory.byteCount == 4 * page)
  }

  /// A peer's arena is mapped page by page from the beginning: no first touch of it is a fault.
  @Test func anAttachedArenaIsMapped() throws {
    let memory = try ArenaMemory(reservedByteCount: 200 * page)
    try memory.grow(to: 100 * page)
    let copy = Descriptor(owning: fcntl(memory.descriptor!.raw, F_DUPFD_CLOEXEC, 0))
    let attached = try ArenaMemory(attaching: copy, reservedByteCount: memory.reservedByteCount)
    let first = String(UInt(bitPattern: attached.base), radix: 16) + "-"
    let mappings = try #require(FileTree.host.text("/proc/self/smaps"))
    let mapping = try #require(mappings.range(of: "\n" + first))
    let line = try #require(
      mappings[mapping.upperBound...].split(separator: "\n").first { $0.hasPrefix("Rss:") })
    #expect(line.split(separator: " ")[1] == "400")
    memory.base.storeBytes(of: 7, toByteOffset: Int(99 * page), as: UInt8.self)
    #expect(attached.base.load(fromByteOffset: Int(99 * page), as: UInt8.self) == 7)
  }
}
