import Arena
import CPlatform
import Glibc

/// What the system was seen to do and to refuse.
struct Probes {
  /// Nil where it works, or what was refused.
  typealias Outcome = SystemCallError?

  /// Memory files that can be sealed, mapped and grown.
  var memoryFiles: Outcome
  /// Taking memory before it is touched.
  var populating: Outcome
  /// Sockets without a name in the file system, between processes of one user, that pass descriptors.
  var sockets: Outcome
  var futexes: Outcome
  /// Opening another process's memory files.
  var inspection: Outcome
  var gpu: GPUAnswer

  enum GPUAnswer: Equatable {
    case noLibrary(String)
    /// The library is there and does not work.
    case refused(String, driverVersion: Int)
    case gpus([GPU], driverVersion: Int)
  }

  struct GPU: Equatable {
    let name: String
    let byteCount: Int64
    /// Indices of those whose memory it does not reach.
    var unreached: [Int] = []
  }

  /// Of this process.
  static func tried() -> Probes {
    Probes(
      memoryFiles: attempt(memoryFile), populating: attempt(populate), sockets: attempt(socket),
      futexes: attempt(futex),
      inspection: attempt(inspect), gpu: askGPUDriver())
  }

  private static func attempt(_ body: () throws(SystemCallError) -> Void) -> Outcome {
    do throws(SystemCallError) {
      try body()
      return nil
    } catch {
      return error
    }
  }

  private static let byteCount: Int64 = 1 << 16

  private static func memoryFile() throws(SystemCallError) {
    let memory = try ArenaMemory(reservedByteCount: byteCount)
    try memory.grow(to: byteCount)
    let copy = try Descriptor("fcntl(F_DUPFD)") { fcntl(memory.descriptor!.raw, F_DUPFD_CLOEXEC, 3) }
    let attached = try ArenaMemory(attaching: copy, reservedByteCount: byteCount)
    memory.base.storeBytes(of: 7, as: UInt8.self)
    if attached.base.load(as: UInt8.self) != 7 { throw SystemCallError(call: "mmap", code: EIO) }
  }

  private static func populate() throws(SystemCallError) {
    let memory = try ArenaMemory(reservedByteCount: byteCount)
    try memory.grow(to: byteCount)
    // The library makes do where the system does not know this.
    let adviceByPopulating: Int32 = 23
    try systemCall("madvise(MADV_POPULATE_WRITE)") { madvise(memory.base, Int(byteCount), adviceByPopulating) }
  }

  private static func socket() throws(SystemCallError) {
    var number: UInt64 = 0
    try systemCall("getrandom") { swiftep_random(&number, 8) }
    let name = "swiftep-doctor-\(number)"
    let listener = try Descriptor("bind of an abstract socket") { swiftep_listen_abstract(name) }
    let near = try Descriptor("connect to an abstract socket") { swiftep_connect_abstract(name) }
    let far = try Descriptor("accept") { swiftep_accept(listener.raw) }
    var user: UInt32 = 0
    try systemCall("getsockopt(SO_PEERCRED)") { swiftep_peer_user(far.raw, &user) }
    if user != geteuid() { throw SystemCallError(call: "getsockopt(SO_PEERCRED)", code: EPERM) }
    var bytes: [UInt8] = [7]
    try systemCall("sendmsg(SCM_RIGHTS)") { Int32(swiftep_send(near.raw, bytes, 1, listener.raw)) }
    var (attachment, isCut): (Int32, Bool) = (-1, false)
    try systemCall("recvmsg(SCM_RIGHTS)") { Int32(swiftep_receive(far.raw, &bytes, 1, &attachment, &isCut)) }
    if attachment < 0 { throw SystemCallError(call: "recvmsg(SCM_RIGHTS)", code: EMFILE) }
    close(attachment)
  }

  private static func futex() throws(SystemCallError) {
    var word: UInt32 = 1
    // Says at once that the word is another.
    let result = swiftep_futex_wait(&word, 0, 1000)
    if result == -1 && errno != EAGAIN { throw SystemCallError(call: "futex", code: errno) }
    try systemCall("futex") { swiftep_futex_wake(&word, 1) }
  }

  private static func inspect() throws(SystemCallError) {
    // Not one that children close.
    let file = try systemCall("memfd_create") { swiftep_memfd_create(ArenaMemory.fileName) }
    defer { close(file) }
    let child = try systemCall("fork") { swiftep_start_sleeper() }
    defer {
      kill(child, SIGKILL)
      waitpid(child, nil, 0)
    }
    let opened = try systemCall("open of another process's memory file") {
      open("/proc/\(child)/fd/\(file)", O_RDONLY | O_CLOEXEC)
    }
    close(opened)
  }

  /// What a healthy driver may take to wake up its GPUs.
  private static let driverMilliseconds: Int32 = 60_000

  private static func askGPUDriver() -> GPUAnswer {
    var driver = swiftep_gpu_driver()
    if swiftep_ask_gpu_driver(&driver, driverMilliseconds) != 0 {
      let what =
        errno == ETIMEDOUT ? "did not answer in \(driverMilliseconds / 1000) s" : "crashed the process that asked it"
      return .refused("the driver " + what, driverVersion: 0)
    }
    let refusal = string(driver.refusal)
    if !driver.is_library_there { return .noLibrary(refusal) }
    let version = Int(driver.version)
    if !refusal.isEmpty { return .refused(refusal, driverVersion: version) }
    let gpus = withUnsafeBytes(of: driver.devices) { bytes in
      bytes.assumingMemoryBound(to: swiftep_gpu.self).prefix(Int(driver.device_count)).map { device in
        GPU(
          name: string(device.name), byteCount: Int64(device.byte_count),
          unreached: (0..<Int(SWIFTEP_GPU_COUNT_MAX)).filter { device.unreached & 1 << $0 != 0 })
      }
    }
    return .gpus(gpus, driverVersion: version)
  }

  /// Of an array of characters in a C structure.
  private static func string<Characters>(_ characters: Characters) -> String {
    withUnsafeBytes(of: characters) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
  }
}
