import CCUDA

/// The kernels, compiled by the driver for one GPU.
package final class KernelModule: @unchecked Sendable {
  package let gpu: GPU
  package let threadCount: Int
  package let sharedByteCount: Int
  private let module: CUHandle
  private let functions: [Kernel: CUHandle]
  /// Whether kernels wait for the end of the launch before; of graphs, drivers take launches that overlap from 12.3 on.
  private let canOverlap: Bool

  package enum Kernel: String, CaseIterable, Sendable {
    case layout
    case dispatchRows = "dispatch_rows"
    case dispatch
    case dispatchCopying = "dispatch_copying"
    case dispatchQuantizing = "dispatch_quantizing"
    case dispatchGrouped = "dispatch_grouped"
    case combine
    case combineInPlace = "combine_in_place"
    case combineStep = "combine_step"
    case tellTime = "tell_time"
    /// Only of checked kernels.
    case ranks

    /// `swiftep::dispatch()` and so on, as C++ mangles it.
    package var symbol: String { "_ZN7swiftep\(rawValue.utf8.count)\(rawValue)Ev" }
  }

  /// The oldest GPU that the kernels run on.
  package static let architectureMin = 80

  package init(_ gpu: GPU, _ kernels: KernelText) throws(DriverError) {
    self.gpu = gpu
    canOverlap = kernels.awaitPrevious && gpu.driver.version >= 12030
    var loaded: CUHandle?
    try gpu.call("cuModuleLoadData(\(kernels.file ?? "the library's"))") { table in
      kernels.text.withCString { table.cuModuleLoadData(&loaded, $0) }
    }
    let module = loaded!
    self.module = module
    do throws(DriverError) {
      let shape = try Self.blockShape(gpu, module)
      threadCount = Int(shape[0])
      sharedByteCount = Int(shape[1])
      var functions: [Kernel: CUHandle] = [:]
      for kernel in Kernel.allCases where kernel != .ranks || kernels.has(kernel: kernel.symbol) {
        var function: CUHandle?
        try gpu.call("cuModuleGetFunction(\(kernel.rawValue))") {
          $0.cuModuleGetFunction(&function, module, kernel.symbol)
        }
        let maxDynamicSharedByteCount: Int32 = 8
        try gpu.call("cuFuncSetAttribute(shared memory of \(shape[1]) bytes)") {
          $0.cuFuncSetAttribute(function!, maxDynamicSharedByteCount, Int32(shape[1]))
        }
        functions[kernel] = function
      }
      self.functions = functions
    } catch {
      gpu.release { $0.cuModuleUnload(module) }
      throw error
    }
  }

  deinit { gpu.release { $0.cuModuleUnload(module) } }

  private static func blockShape(_ gpu: GPU, _ module: CUHandle) throws(DriverError) -> [UInt32] {
    var (address, byteCount) = (UInt64(0), 0)
    try gpu.call("cuModuleGetGlobal") { $0.cuModuleGetGlobal(&address, &byteCount, module, "swiftep_block_shape") }
    let stream = try Stream(gpu)
    let shape = UnsafeMutableBufferPointer<UInt32>.allocate(capacity: 2)
    defer { shape.deallocate() }
    try stream.copy(from: DeviceAddress(bits: address), to: shape.baseAddress!, byteCount: 8)
    try stream.synchronize()
    return Array(shape)
  }

  /// Blocks of the kernels that one multiprocessor holds at a time.
  package func blocksPerMultiprocessor() throws(DriverError) -> Int {
    var least = Int32.max
    for function in functions.values {
      var count: Int32 = 0
      try gpu.call("cuOccupancyMaxActiveBlocksPerMultiprocessor") {
        $0.cuOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, Int32(threadCount), sharedByteCount)
      }
      least = min(least, count)
    }
    return Int(least)
  }

  /// How a launch tells the host that it is over: its last block stores the ticket into the word, having counted blocks
  /// in a UInt32 of the GPU's memory, zero at first, and keeping the ticket 8 bytes behind it. Where the word's address is 0,
  /// it does not.
  package struct End: Sendable {
    package let counter: UInt64
    package let word: UInt64
    package let ticket: UInt64

    /// The ticket after the one that was told last.
    package static let next: UInt64 = 0
    package static let untold = End(counter: DeviceAddress(bits: 0), word: DeviceAddress(bits: 0), ticket: 0)

    package init(counter: DeviceAddress, word: DeviceAddress, ticket: UInt64) {
      (self.counter, self.word, self.ticket) = (counter.bits, word.bits, ticket)
    }
  }

  /// Starts a kernel on `blockCount` blocks; its arguments are copied.
  ///
  /// - Parameter overlaps: whether it may be started while the kernel before it on the stream ends, where GPU and driver can do
  ///   that.
  package func launch<Arguments>(
    _ kernel: Kernel, _ arguments: Arguments, end: End, blockCount: Int, overlaps: Bool = false, on stream: Stream
  ) throws(DriverError) {
    try withUnsafePointer(to: arguments) { arguments throws(DriverError) in
      try launch(
        kernel, [UnsafeMutableRawPointer(mutating: arguments)], end: end, blockCount: blockCount, overlaps: overlaps,
        on: stream)
    }
  }

  /// Runs a kernel that does nothing but store the time of the GPU's clock, in nanoseconds, into `word`.
  package func tellTime(
    counter: DeviceAddress, word: DeviceAddress, blockCount: Int, on stream: Stream
  ) throws(DriverError) {
    let end = End(counter: counter, word: word, ticket: 0)
    try launch(.tellTime, [], end: end, blockCount: blockCount, on: stream)
  }

  /// Whether the kernels check themselves, and can be launched for several ranks at once.
  package var isChecked: Bool { functions[.ranks] != nil }

  /// Starts checked kernels of several ranks, `blockCount` blocks each.
  ///
  /// - Parameter launches: of each rank its kernel, arguments and end, in the GPU's memory, as that kernel reads them.
  package func launchRanks(
    _ launches: DeviceAddress, rankCount: Int, blockCount: Int, on stream: Stream
  ) throws(DriverError) {
    try withUnsafePointer(to: launches.bits) { launches throws(DriverError) in
      // SAFETY: the driver only reads what the parameters point to.
      try launch(
        .ranks, parameters: [UnsafeMutableRawPointer(mutating: launches)], blockCount: blockCount, rowCount: rankCount,
        on: stream)
    }
  }

  private func launch(
    _ kernel: Kernel, _ arguments: [UnsafeMutableRawPointer?], end: End, blockCount: Int, overlaps: Bool = false,
    on stream: Stream
  ) throws(DriverError) {
    try withUnsafePointer(to: end) { end throws(DriverError) in
      // SAFETY: the driver only reads what the parameters point to, as many as the kernel has.
      let first = UnsafeMutableRawPointer(mutating: end)
      try launch(
        kernel, parameters: arguments + [first, first + 8, first + 16], blockCount: blockCount, rowCount: 1,
        overlaps: overlaps, on: stream)
    }
  }

  private func launch(
    _ kernel: Kernel, parameters: [UnsafeMutableRawPointer?], blockCount: Int, rowCount: Int, overlaps: Bool = false,
    on stream: Stream
  ) throws(DriverError) {
    let function = functions[kernel]!
    var parameters = parameters
    var attribute = swiftep_cu_launch_attribute()
    let programmaticStreamSerialization: Int32 = 6
    (attribute.kind, attribute.value) = (programmaticStreamSerialization, 1)
    var launch = swiftep_cu_launch()
    launch.block_counts = (UInt32(blockCount), UInt32(rowCount), 1)
    launch.thread_counts = (UInt32(threadCount), 1, 1)
    launch.shared_byte_count = UInt32(sharedByteCount)
    launch.stream = stream.handle.map { UnsafeMutableRawPointer($0) }
    launch.attribute_count = overlaps && canOverlap ? 1 : 0
    try withUnsafePointer(to: attribute) { attribute throws(DriverError) in
      launch.attributes = attribute
      try gpu.call("cuLaunchKernelEx(\(kernel.rawValue))") { $0.cuLaunchKernelEx(&launch, function, &parameters, nil) }
    }
  }
}
