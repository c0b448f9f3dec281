import Synchronization

/// One GPU, with its primary context. Every thread that calls the driver for it makes the context its own first.
package final class GPU: @unchecked Sendable {
  package let driver: Driver
  package let index: Int
  package let name: String
  /// The same in every process, whatever GPUs the process may see: 32 hexadecimal digits.
  package let uuid: String
  package let multiprocessorCount: Int
  /// As 90 for sm_90.
  package let architecture: Int
  package let sharedByteCountMax: Int
  package let byteCount: Int
  /// Whether kernels reach host memory that is registered at the host's own addresses.
  package let reachesHostAddresses: Bool
  let ordinal: Int32
  private let context: CUHandle
  /// Handles of events without time that nobody has: to make one and to destroy it takes the driver 2 us.
  let spareEvents = Mutex<[UInt]>([])

  package init(_ driver: Driver, index: Int) throws(DriverError) {
    self.driver = driver
    self.index = index
    var ordinal: Int32 = 0
    try driver.call("cuDeviceGet") { $0.cuDeviceGet(&ordinal, Int32(index)) }
    self.ordinal = ordinal
    var text = [CChar](repeating: 0, count: 128)
    try driver.call("cuDeviceGetName") { $0.cuDeviceGetName(&text, 127, ordinal) }
    name = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    uuid = try Self.uuid(driver, ordinal)
    var total = 0
    try driver.call("cuDeviceTotalMem") { $0.cuDeviceTotalMem(&total, ordinal) }
    byteCount = total
    multiprocessorCount = try Self.attribute(.multiprocessorCount, driver, ordinal)
    architecture =
      10 * (try Self.attribute(.architectureMajor, driver, ordinal))
      + (try Self.attribute(.architectureMinor, driver, ordinal))
    sharedByteCountMax = try Self.attribute(.sharedByteCountMax, driver, ordinal)
    reachesHostAddresses = try Self.attribute(.reachesHostAddresses, driver, ordinal) != 0
    var context: CUHandle?
    try driver.call("cuDevicePrimaryCtxRetain") { $0.cuDevicePrimaryCtxRetain(&context, ordinal) }
    self.context = context!
  }

  deinit {
    for event in spareEvents.withLock({ $0 }) { release { $0.cuEventDestroy(CUHandle(bitPattern: event)!) } }
    _ = driver.table.cuDevicePrimaryCtxRelease(ordinal)
  }

  private enum Attribute: Int32 {
    case multiprocessorCount = 16
    case reachesHostAddresses = 91
    case architectureMajor = 75
    case architectureMinor = 76
    case sharedByteCountMax = 97
  }

  private static func uuid(_ driver: Driver, _ ordinal: Int32) throws(DriverError) -> String {
    var bytes = [UInt8](repeating: 0, count: 16)
    try driver.call("cuDeviceGetUuid") { $0.cuDeviceGetUuid(&bytes, ordinal) }
    return bytes.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
  }

  private static func attribute(
    _ attribute: Attribute, _ driver: Driver, _ ordinal: Int32
  ) throws(DriverError) -> Int {
    var value: Int32 = 0
    try driver.call("cuDeviceGetAttribute") { $0.cuDeviceGetAttribute(&value, attribute.rawValue, ordinal) }
    return Int(value)
  }

  /// Calls a function of the driver for this GPU. Whatever graph the caller's threads capture meanwhile, the driver lets it
  /// pass: what is called concerns nothing that is captured, or belongs into it.
  func call(_ name: String, _ body: (DriverTable) -> Int32) throws(DriverError) {
    try driver.call("cuCtxSetCurrent") { $0.cuCtxSetCurrent(context) }
    try driver.call(name) { table in Self.relaxed(table) { body(table) } }
  }

  /// As `call`, for giving back: what fails then can be helped by nobody.
  func release(_ body: (DriverTable) -> Int32) {
    _ = driver.table.cuCtxSetCurrent(context)
    _ = Self.relaxed(driver.table) { body(driver.table) }
  }

  private static func relaxed(_ table: DriverTable, _ body: () -> Int32) -> Int32 {
    var mode: Int32 = 2
    _ = table.cuThreadExchangeStreamCaptureMode(&mode)
    defer { _ = table.cuThreadExchangeStreamCaptureMode(&mode) }
    return body()
  }

  package func freeByteCount() throws(DriverError) -> Int {
    var (free, total) = (0, 0)
    try call("cuMemGetInfo") { $0.cuMemGetInfo(&free, &total) }
    return free
  }

  /// Whether kernels of this GPU reach the memory of the GPU with this UUID: over NVLink or PCIe. Of one that this process
  /// may not see, no.
  package func reaches(uuid other: String) throws(DriverError) -> Bool {
    if other == uuid { return true }
    for index in 0..<driver.gpuCount {
      var peer: Int32 = 0
      try driver.call("cuDeviceGet") { $0.cuDeviceGet(&peer, Int32(index)) }
      if try Self.uuid(driver, peer) != other { continue }
      var can: Int32 = 0
      try driver.call("cuDeviceCanAccessPeer") { $0.cuDeviceCanAccessPeer(&can, ordinal, peer) }
      return can != 0
    }
    return false
  }
}

/// An address in a GPU's memory, or in host memory that the GPU reaches.
package struct DeviceAddress: Equatable, Hashable, Sendable {
  package let bits: UInt64
  package init(bits: UInt64) { self.bits = bits }
  package func advanced(byBytes byteCount: Int64) -> DeviceAddress {
    DeviceAddress(bits: bits &+ UInt64(bitPattern: byteCount))
  }
}
