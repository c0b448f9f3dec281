// swift-tools-version: 6.3
import PackageDescription

let strict: [SwiftSetting] = [.treatAllWarnings(as: .error), .swiftLanguageMode(.v6)]
// Kernels check themselves: `swift build -c release -Xswiftc -DCHECKED` does, too.
let checked: [SwiftSetting] = strict + [.define("CHECKED", .when(configuration: .debug))]

let package = Package(
  name: "SwiftEP",
  products: [
    .library(name: "SwiftEP", targets: ["SwiftEP"]),
    .executable(name: "swiftep", targets: ["swiftep"]),
    // What `scripts/build-c-library` makes libswiftep.so of.
    .library(name: "SwiftEPC", type: .static, targets: ["SwiftEPC"]),
  ],
  targets: [
    .target(name: "CPlatform"),
    .target(name: "EPKernels", swiftSettings: checked),
    .target(name: "HostFacts", dependencies: ["CPlatform"], swiftSettings: strict),
    .target(name: "Arena", dependencies: ["CPlatform", "HostFacts"], swiftSettings: strict),
    .target(name: "HostMachine", dependencies: ["CPlatform", "EPKernels"], swiftSettings: strict),
    .target(name: "CCUDA", exclude: ["PTX"]),
    .target(name: "CUDADriver", dependencies: ["CCUDA"], swiftSettings: strict),
    .target(name: "Rendezvous", dependencies: ["Arena", "CPlatform"], swiftSettings: strict),
    .target(
      name: "SwiftEP",
      dependencies: ["Arena", "CPlatform", "CUDADriver", "EPKernels", "HostFacts", "HostMachine", "Rendezvous"],
      swiftSettings: strict),
    .target(name: "CSwiftEP"),
    .target(name: "SwiftEPC", dependencies: ["CSwiftEP", "SwiftEP"], swiftSettings: strict),
    .target(
      name: "Conformance", dependencies: ["Arena", "CPlatform", "CUDADriver", "HostMachine", "SwiftEP"],
      swiftSettings: strict),
    .executableTarget(
      name: "swiftep",
      dependencies: [
        "Arena", "Conformance", "CPlatform", "CUDADriver", "EPKernels", "HostFacts", "HostMachine", "Rendezvous",
        "SwiftEP",
      ],
      swiftSettings: strict),
    .executableTarget(
      name: "first-dispatch", dependencies: ["SwiftEP"], path: "Examples/FirstDispatch", swiftSettings: strict),
    .executableTarget(
      name: "survivors", dependencies: ["SwiftEP"], path: "Examples/Survivors", swiftSettings: strict),
    .executableTarget(
      name: "environment-ranks", dependencies: ["SwiftEP"], path: "Examples/EnvironmentRanks", swiftSettings: strict),
    .executableTarget(
      name: "micro-batches", dependencies: ["SwiftEP"], path: "Examples/MicroBatches", swiftSettings: strict),
    .target(name: "MadeUpHosts", dependencies: ["HostFacts"], path: "Tests/MadeUpHosts", swiftSettings: strict),
    .testTarget(name: "HostFactsTests", dependencies: ["HostFacts", "MadeUpHosts"], swiftSettings: strict),
    .testTarget(name: "ArenaTests", dependencies: ["Arena", "HostFacts", "MadeUpHosts"], swiftSettings: strict),
    .testTarget(
      name: "HostMachineTests", dependencies: ["CPlatform", "EPKernels", "HostMachine", "SwiftEP"],
      swiftSettings: strict),
    .testTarget(
      name: "GroupTests",
      dependencies: ["Arena", "Conformance", "CPlatform", "CUDADriver", "EPKernels", "HostMachine", "SwiftEP"],
      swiftSettings: strict),
    .testTarget(
      name: "FlightRecordTests", dependencies: ["Conformance", "EPKernels", "HostMachine", "SwiftEP"],
      swiftSettings: strict),
    // The kernels' machine, with the protocol, on emulated lanes.
    .target(name: "PTX", path: "Tests/EmulatedPTX"),
    .target(
      name: "EmulatedGPU", dependencies: ["PTX"], path: "Tests/EmulatedGPU",
      exclude: ["EPKernels/KernelLaunch.swift", "GPUMachine/Kernels.swift", "GPUMachine/PTX"],
      swiftSettings: strict + [.define("BULK_COPIES")]),
    .testTarget(
      name: "GPUMachineTests", dependencies: ["CPlatform", "EmulatedGPU", "EPKernels"], swiftSettings: strict),
    .testTarget(name: "PTXTests", dependencies: ["CCUDA", "CUDADriver"], swiftSettings: strict),
    .testTarget(
      name: "RendezvousTests",
      dependencies: ["Arena", "CPlatform", "Conformance", "HostMachine", "Rendezvous", "SwiftEP"], exclude: ["Corpus"],
      swiftSettings: strict),
    .testTarget(
      name: "ConformanceTests",
      dependencies: ["CPlatform", "CUDADriver", "Conformance", "HostFacts", "HostMachine", "SwiftEP"],
      swiftSettings: strict),
    .testTarget(
      name: "GPUTests", dependencies: ["CPlatform", "Conformance", "CUDADriver", "HostMachine", "SwiftEP"],
      // The conformance suite is in it, but for what has no ranks, or ranks on CPUs.
      exclude: ["Suite/MemoryNeedTests.swift", "Suite/Ranks.swift", "Suite/ReusableRangesTests.swift"],
      swiftSettings: strict),
    .testTarget(
      name: "ToolTests",
      dependencies: [
        "swiftep", "Arena", "CPlatform", "Conformance", "EPKernels", "HostFacts", "HostMachine", "MadeUpHosts",
        "SwiftEP",
      ],
      swiftSettings: strict),
  ]
)
