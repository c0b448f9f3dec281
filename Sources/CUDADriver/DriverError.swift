/// A call of the driver that failed.
package struct DriverError: Error, Equatable, CustomStringConvertible {
  package let call: String
  package let code: Int32
  /// The driver's own name for the code.
  package let name: String

  package var description: String { "\(call) failed: \(name) (\(code))" }

  package var isOutOfMemory: Bool { code == 2 }
  /// Of a query: not yet.
  package static let notReady: Int32 = 600
}

/// Why there is no driver to call.
package enum DriverAbsence: Error, Equatable, CustomStringConvertible {
  case noLibrary(String)
  case missingSymbol(String)
  case failed(DriverError)
  case tooOld(found: Int32, needed: Int32)
  case noGPU

  package var description: String {
    switch self {
    case .noLibrary(let why): "no NVIDIA driver: \(why)"
    case .missingSymbol(let name): "the NVIDIA driver is too old: it has no \(name)"
    case .failed(let error): "the NVIDIA driver does not start: \(error)"
    case .tooOld(let found, let needed):
      "the NVIDIA driver is too old: it knows CUDA \(Self.text(found)), needed is \(Self.text(needed))"
    case .noGPU: "no NVIDIA GPU"
    }
  }

  private static func text(_ version: Int32) -> String { "\(version / 1000).\(version % 1000 / 10)" }
}
