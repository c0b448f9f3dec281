// swift-tools-version: 6.3
import PackageDescription

let strict: [SwiftSetting] = [.treatAllWarnings(as: .error), .swiftLanguageMode(.v6)]

let package = Package(
  name: "SwiftEP",
  products: [
    .library(name: "SwiftEP", targets: ["SwiftEP"]),
    .executable(name: "swiftep", targets: ["swiftep"]),
  ],
  targets: [
    .target(name: "CPlatform"),
    .target(name: "EPKernels", swiftSettings: strict),
    .target(name: "Arena", dependencies: ["CPlatform"], swiftSettings: strict),
    .target(name: "HostMachine", dependencies: ["CPlatform", "EPKernels"], swiftSettings: strict),
    .target(name: "Rendezvous", dependencies: ["Arena", "CPlatform"], swiftSettings: strict),
    .target(
      name: "SwiftEP", dependencies: ["Arena", "CPlatform", "EPKernels", "HostMachine", "Rendezvous"],
      swiftSettings: strict),
    .target(name: "Conformance", dependencies: ["HostMachine", "SwiftEP"], swiftSettings: strict),
    .executableTarget(
      name: "swiftep", dependencies: ["Conformance", "CPlatform", "HostMachine", "SwiftEP"], swiftSettings: strict),
    .executableTarget(
      name: "first-dispatch", dependencies: ["SwiftEP"], path: "Examples/FirstDispatch", swiftSettings: strict),
    .executableTarget(
      name: "environment-ranks", dependencies: ["SwiftEP"], path: "Examples/EnvironmentRanks", swiftSettings: strict),
    .testTarget(name: "ArenaTests", dependencies: ["Arena"], swiftSettings: strict),
    .testTarget(
      name: "HostMachineTests", dependencies: ["CPlatform", "EPKernels", "HostMachine"], swiftSettings: strict),
    .testTarget(
      name: "RendezvousTests",
      dependencies: ["Arena", "CPlatform", "Conformance", "HostMachine", "Rendezvous", "SwiftEP"], exclude: ["Corpus"],
      swiftSettings: strict),
    .testTarget(
      name: "ConformanceTests", dependencies: ["Conformance", "SwiftEP"], swiftSettings: strict),
    .testTarget(
      name: "ToolTests", dependencies: ["swiftep", "Conformance", "HostMachine", "SwiftEP"], swiftSettings: strict),
  ]
)
