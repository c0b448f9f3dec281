import Glibc

/// The NVIDIA driver: `libcuda.so.1`, loaded when it is first asked for. Nothing else of CUDA is needed.
package final class Driver: Sendable {
  let table: DriverTable
  /// As 12040 for 12.4.
  package let version: Int32
  package let gpuCount: Int

  /// PTX of the kernels' version is understood from here on.
  private static let versionNeeded: Int32 = 12000

  /// The one driver of this process, or why there is none.
  package static let shared: Result<Driver, DriverAbsence> = {
    do throws(DriverAbsence) { return .success(try Driver()) } catch { return .failure(error) }
  }()

  private init() throws(DriverAbsence) {
    // Before the driver reads them. Each rank of this process has a stream, which must not wait for another's kernel; and
    // code that is loaded late would have to wait for kernels that wait for it.
    // Under MPS, all processes share what one has otherwise; there, ranks are processes.
    if !MultiProcessService.isThere { setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0) }
    setenv("CUDA_MODULE_LOADING", "EAGER", 1)
    table = try DriverTable(try Library("libcuda.so.1"))
    var version: Int32 = 0
    var count: Int32 = 0
    do throws(DriverError) {
      try Self.check("cuInit", table.cuInit(0), table)
      try Self.check("cuDriverGetVersion", table.cuDriverGetVersion(&version), table)
      try Self.check("cuDeviceGetCount", table.cuDeviceGetCount(&count), table)
    } catch {
      throw .failed(error)
    }
    if version < Self.versionNeeded { throw .tooOld(found: version, needed: Self.versionNeeded) }
    if count == 0 { throw .noGPU }
    self.version = version
    gpuCount = Int(count)
  }

  /// Streams of one process that run at the same time on one GPU for certain.
  package static let streamCountMax = 32

  /// Calls a function of the driver.
  func call(_ name: String, _ body: (DriverTable) -> Int32) throws(DriverError) {
    try Self.check(name, body(table), table)
  }

  private static func check(_ call: String, _ code: Int32, _ table: DriverTable) throws(DriverError) {
    if code == 0 { return }
    var name: UnsafePointer<CChar>?
    _ = table.cuGetErrorName(code, &name)
    throw DriverError(call: call, code: code, name: name.map { String(cString: $0) } ?? "an unknown error")
  }
}

/// A shared library, loaded as long as the process lives.
struct Library: @unchecked Sendable {
  private let handle: UnsafeMutableRawPointer

  init(_ name: String) throws(DriverAbsence) {
    guard let handle = dlopen(name, RTLD_NOW | RTLD_LOCAL) else {
      throw .noLibrary(dlerror().map { String(cString: $0) } ?? name)
    }
    self.handle = handle
  }

  /// - Parameter Function: the type that the driver's documentation gives the function, as `@convention(c)`.
  func symbol<Function>(_ name: String) throws(DriverAbsence) -> Function {
    guard let address = dlsym(handle, name) else { throw .missingSymbol(name) }
    // SAFETY: a C function pointer is an address; the table says its type.
    return unsafeBitCast(address, to: Function.self)
  }
}
