extension Doctor {
  /// One line where there is no GPU; otherwise the driver, and what it knows.
  var gpuChecks: [Check] {
    let module = files.lines("/proc/driver/nvidia/version").first.map { kernelModuleVersion($0.text) }
    let nodes = files.names(in: "/dev").filter { $0.wholeMatch(of: /nvidia[0-9]+/) != nil }.count
    let kernel = module.map { "kernel module \($0)" } ?? "no kernel module"
    switch probes.gpu {
    case .noLibrary where module == nil && nodes == 0:
      return [Check(name: "GPU", state: .missing, found: "none, and no driver for one", needed: "none")]
    case .noLibrary(let why):
      return [
        Check(
          name: "GPU driver", state: .warning, found: "\(kernel), \(nodes) devices; \(why)", needed: "libcuda.so.1",
          remedy: "in a container: start it with --gpus all; else install the driver's libcuda package")
      ]
    case .refused(let why, let version):
      let remedy =
        module == nil
        ? "load the kernel module: modprobe nvidia"
        : nodes == 0
          ? "make the devices visible: nvidia-modprobe, or --gpus all of the container" : "see dmesg and nvidia-smi"
      return [
        Check(
          name: "GPU driver", state: .warning, found: "\(kernel), \(nodes) devices, \(cuda(version)); \(why)",
          needed: "a driver that works", remedy: remedy)
      ]
    case .gpus(let gpus, let version):
      return [
        Check(name: "GPU driver", found: "\(kernel), \(cuda(version))"),
        Check(
          name: "GPUs", state: gpus.isEmpty ? .missing : .ok,
          found: gpus.isEmpty ? "none that this process may use" : summary(gpus),
          remedy: gpus.isEmpty ? "see CUDA_VISIBLE_DEVICES" : ""),
      ] + (gpus.count < 2 ? [] : [peerAccess(of: gpus)])
    }
  }

  var gpuCount: Int {
    if case .gpus(let gpus, _) = probes.gpu { return gpus.count }
    return 0
  }

  /// Which GPUs reach each other's memory, over NVLink or PCIe.
  private func peerAccess(of gpus: [Probes.GPU]) -> Check {
    let apart = gpus.indices.flatMap { first in
      gpus.indices.filter { first < $0 && (gpus[first].unreached.contains($0) || gpus[$0].unreached.contains(first)) }
        .map { "\(first) and \($0)" }
    }
    if apart.isEmpty { return Check(name: "GPU peer access", found: "between all") }
    return Check(
      name: "GPU peer access", state: .warning, found: "none between \(apart.joined(separator: ", "))",
      needed: "between all GPUs of a job; where it lacks, all arenas of the job lie in pinned host memory",
      remedy:
        "see nvidia-smi topo -p2p rw; choose GPUs of one PCIe root or NVLink domain; in a VM, pass ACS settings on")
  }

  /// As in "2 x NVIDIA H100 80GB HBM3, 79.2 GiB".
  private func summary(_ gpus: [Probes.GPU]) -> String {
    var kinds: [(gpu: Probes.GPU, count: Int)] = []
    for gpu in gpus {
      if let index = kinds.firstIndex(where: { ($0.gpu.name, $0.gpu.byteCount) == (gpu.name, gpu.byteCount) }) {
        kinds[index].count += 1
      } else {
        kinds.append((gpu, 1))
      }
    }
    return kinds.map { "\($0.count) x \($0.gpu.name), \(binaryUnits($0.gpu.byteCount))" }.joined(separator: "; ")
  }

  /// Of 12040: "CUDA 12.4".
  private func cuda(_ version: Int) -> String {
    version == 0 ? "no CUDA version" : "CUDA \(version / 1000).\(version % 1000 / 10)"
  }

  /// Of a line such as "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:09:07 UTC 2025".
  private func kernelModuleVersion(_ line: String) -> String {
    let words = line.split(separator: " ")
    return words.first { $0.wholeMatch(of: /[0-9]+(\.[0-9]+)+/) != nil }.map(String.init) ?? "of an unknown version"
  }
}
