import PTX

extension Shared {
  @inline(__always) static func vector(_ offset: Int32) -> Vector {
    // SAFETY: offsets are multiples of 16 inside the shared memory that a launch asks for.
    (ptx_shared().unsafelyUnwrapped + Int(offset)).assumingMemoryBound(to: Vector.self).pointee
  }
}

#if BULK_COPIES
  /// The stages of one warp: a ring of equal parts of shared memory, each filled at a time by one bulk copy or by several
  /// that are waited for together. A lane waits for the stores that it has begun, since groups of them belong to a lane.
  ///
  /// A warp's barriers last as long as its kernel, so that whoever uses a stage next is known to come behind who used it last.
  struct Stages {
    @inline(__always) static var countMax: Int32 { 3 }

    let count: Int32
    private let machine: GPUMachine
    /// Bit `s`: of the phase that stage `s` is in when this ring begins.
    private let parities: UInt32

    /// - Parameter count: at most `countMax`.
    @inline(__always) init(_ machine: GPUMachine, count: Int32) {
      self.count = count
      self.machine = machine
      ptx_warp_barrier()
      parities = UInt32(bitPattern: Self.parities(machine)[0])
      // Bulk copies come after what ordinary accesses did to rows, here and, since they were acquired, at peers; and
      // they see the barriers. Not by one fence for all memory, which waits for the whole GPU, as none for one kind does.
      ptx_fence_proxy()
      ptx_fence_proxy_shared()
    }

    /// Makes the warp's barriers. Every kernel begins with it.
    @inline(__always) static func prepare(_ machine: GPUMachine) {
      if machine.lane != 0 { return }
      var stage: Int32 = 0
      while stage < countMax {
        ptx_phase_init(phase(machine, stage))
        stage = stage &+ 1
      }
      parities(machine)[0] = 0
      ptx_fence_proxy_shared()
    }

    /// The ring ends, after so many uses, which have all been waited for.
    @inline(__always) func close(after uses: Int32) {
      ptx_warp_barrier()
      if machine.lane != 0 { return }
      var changed: UInt32 = 0
      var stage: Int32 = 0
      while stage < count {
        let usesOfStage = (uses &+ count &- 1 &- stage) / count
        changed |= UInt32(bitPattern: usesOfStage & 1) &<< UInt32(bitPattern: stage)
        stage = stage &+ 1
      }
      Self.parities(machine)[0] = Int32(bitPattern: parities ^ changed)
    }

    @inline(__always) private static func parities(_ machine: GPUMachine) -> UnsafeMutablePointer<Int32> {
      Shared.word(Shared.paritiesOffset &+ 4 &* machine.warp)
    }

    @inline(__always) private static func phase(_ machine: GPUMachine, _ stage: Int32) -> UInt32 {
      UInt32(bitPattern: Shared.phasesOffset &+ (machine.warp &* 8 &+ stage) &* 8)
    }

    @inline(__always) func offset(of use: Int32) -> Int32 {
      let byteCount = Shared.stageByteCountOfWarp / count
      return Shared.stagesOffset &+ machine.warp &* Shared.stageByteCountOfWarp &+ use % count &* byteCount
    }

    @inline(__always) func endOffset(of use: Int32) -> Int32 { offset(of: use) &+ Shared.stageByteCountOfWarp / count }

    @inline(__always) private func phase(of use: Int32) -> UInt32 { Self.phase(machine, use % count) }

    /// Starts to fill the stage of the ring's use number `use`, and its end from another source, unless that is null.
    @inline(__always)
    func load(_ use: Int32, from source: Address, _ byteCount: Int32, _ other: Address, _ otherByteCount: Int32) {
      if machine.lane == 0 {
        let (stage, phase) = (offset(of: use), phase(of: use))
        ptx_phase_expect(phase, UInt32(bitPattern: byteCount &+ (other.isNull ? 0 : otherByteCount)))
        ptx_bulk_load(UInt32(bitPattern: stage), source.bits, UInt32(bitPattern: byteCount), phase)
        if !other.isNull {
          let place = UInt32(bitPattern: endOffset(of: use) &- otherByteCount)
          ptx_bulk_load(place, other.bits, UInt32(bitPattern: otherByteCount), phase)
        }
      }
    }

    /// Starts to fill it from a source of each of `lanes`, one behind the other in the stage, `distance` bytes apart.
    @inline(__always)
    func load(_ use: Int32, from source: Address, _ byteCount: Int32, of lanes: UInt32, distance: Int32) {
      if machine.lane == 0 {
        let all = byteCount &* Int32(truncatingIfNeeded: lanes.nonzeroBitCount)
        ptx_phase_expect(phase(of: use), UInt32(bitPattern: all))
      }
      if lanes &>> UInt32(truncatingIfNeeded: machine.lane) & 1 != 0 {
        let place = Int32(truncatingIfNeeded: (lanes & machine.lowerLanes).nonzeroBitCount)
        ptx_bulk_load(
          UInt32(bitPattern: offset(of: use) &+ place &* distance), source.bits, UInt32(bitPattern: byteCount),
          phase(of: use))
      }
    }

    @inline(__always) func wait(for use: Int32) {
      let parity = parities &>> UInt32(bitPattern: use % count) ^ UInt32(bitPattern: use / count)
      ptx_phase_wait(phase(of: use), parity & 1)
    }
  }
#endif
