/// One GPU, with its primary context. Every thread that calls the driver for it makes the context its own first.
package final class GPU: @unchecked Sendable {
  package let driver: Driver
  package let index: Int
  package let name: String
  package let multiprocessorCount: Int
  /// As 90 for sm_90.
  package let architecture: Int
  package let sharedByteCountMax: Int
  package let byteCount: Int
  let ordinal: Int32
  private let context: CUHandle

  package init(_ driver: Driver, index: Int) throws(DriverError) {
    self.driver = driver
    self.index = index
    var ordinal: Int32 = 0
    try driver.call("cuDeviceGet") { $0.cuDeviceGet(&ordinal, Int32(index)) }
    self.ordinal = ordinal
    var text = [CChar](repeating: 0, count: 128)
    try driver.call("cuDeviceGetName") { $0.cuDeviceGetName(&text, 127, ordinal) }
    name = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    var total = 0
    try driver.call("cuDeviceTotalMem") { $0.cuDeviceTotalMem(&total, ordinal) }
    byteCount = total
    multiprocessorCount = try Self.attribute(.multiprocessorCount, driver, ordinal)
    architecture =
      10 * (try Self.attribute(.architectureMajor, driver, ordinal))
      + (try Self.attribute(.architectureMinor, driver, ordinal))
    sharedByteCountMax = try Self.attribute(.sharedByteCountMax, driver, ordinal)
    var context: CUHandle?
    try driver.call("cuDevicePrimaryCtxRetain") { $0.cuDevicePrimaryCtxRetain(&context, ordinal) }
    self.context = context!
  }

  deinit { _ = driver.table.cuDevicePrimaryCtxRelease(ordinal) }

  private enum Attribute: Int32 {
    case multiprocessorCount = 16
    case architectureMajor = 75
    case architectureMinor = 76
    case sharedByteCountMax = 97
  }

  private static func attribute(
    _ attribute: Attribute, _ driver: Driver, _ ordinal: Int32
  ) throws(DriverError) -> Int {
    var value: Int32 = 0
    try driver.call("cuDeviceGetAttribute") { $0.cuDeviceGetAttribute(&value, attribute.rawValue, ordinal) }
    return Int(value)
  }

  /// Calls a function of the driver for this GPU.
  func call(_ name: String, _ body: (DriverTable) -> Int32) throws(DriverError) {
    try driver.call("cuCtxSetCurrent") { $0.cuCtxSetCurrent(context) }
    try driver.call(name, body)
  }

  /// As `call`, for giving back: what fails then can be helped by nobody.
  func release(_ body: (DriverTable) -> Int32) {
    _ = driver.table.cuCtxSetCurrent(context)
    _ = body(driver.table)
  }

  package func freeByteCount() throws(DriverError) -> Int {
    var (free, total) = (0, 0)
    try call("cuMemGetInfo") { $0.cuMemGetInfo(&free, &total) }
    return free
  }

  package func canAccess(_ peer: GPU) throws(DriverError) -> Bool {
    var can: Int32 = 0
    try call("cuDeviceCanAccessPeer") { $0.cuDeviceCanAccessPeer(&can, ordinal, peer.ordinal) }
    return can != 0
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
