import CCUDA
import Testing

private let sm80 = PTXText(String(cString: swiftep_kernels_sm_80()))
private let sm90 = PTXText(String(cString: swiftep_kernels_sm_90()))
private let kernels = [
  "layout", "dispatch_rows", "dispatch", "dispatch_copying", "dispatch_quantizing", "dispatch_grouped", "combine",
  "combine_in_place", "combine_step", "tell_time",
]

@Suite struct PTXTests {
  @Test func theModulesAreWhole() {
    #expect(sm80.target == "sm_80" && sm90.target == "sm_90")
    #expect(Set(sm80.kernels.keys) == Set(kernels) && Set(sm90.kernels.keys) == Set(kernels))
  }

  /// What peers and the host poll is stored with release order and loaded with acquire order, for the whole system.
  @Test func signalsAreOrderedForTheSystem() {
    for text in [sm80, sm90] {
      for kernel in kernels where kernel != "tell_time" {
        #expect(text.count("st.release.sys.global.u64", in: kernel) >= 2)
        #expect(text.count("ld.acquire.sys.global.u64", in: kernel) >= 2)
      }
      // What rows are told of by: the countdown before it.
      for kernel in kernels where !["layout", "tell_time"].contains(kernel) {
        #expect(text.count("fence.acq_rel.sys", in: kernel) >= 1)
      }
    }
  }

  @Test func rules() {
    #expect(Rules.violations(sm80) == [])
    #expect(Rules.violations(sm90) == [])
  }

  /// Every rule is broken once, and seen.
  @Test(arguments: [
    ("atom.acq_rel.gpu", "atom.relaxed.gpu", "a release store without a countdown"),
    ("atom.acq_rel.gpu", "atom.relaxed.gpu", "a countdown without order"),
    ("fence.acq_rel.sys;", "", "rows without a countdown for the system"),
    ("fence.acq_rel.sys;", "fence.acq_rel.gpu;", "rows without a countdown for the system"),
    ("fence.proxy.async.global;", "", "a bulk load before the fence of global memory"),
    ("fence.proxy.async.shared::cta;", "", "a bulk load before the fence of shared memory"),
    (
      "fence.proxy.async.global;\n\t// end inline asm\n\t// begin inline asm\n\tfence.proxy.async.shared::cta;",
      "fence.proxy.async.global;", "stages whose last use bulk loads may overtake"
    ),
    ("cp.async.bulk.wait_group 0;", "", "bulk stores not waited for before the countdown"),
    ("bar.sync 0;", "", "a countdown without a barrier"),
    ("mbarrier.arrive.expect_tx", "mov", "a bulk load that no barrier expects"),
    ("griddepcontrol.wait;", "", "memory before the launch before is over"),
    (
      "griddepcontrol.wait;", "prefetch.global.L1 [%rd1]; griddepcontrol.wait;",
      "memory before the launch before is over"
    ),
    (
      "griddepcontrol.wait;", "griddepcontrol.launch_dependents; griddepcontrol.wait;",
      "rows behind the start of the next"
    ),
    ("add.rn.f32", "fma.rn.f32", "fma.rn.f32"),
    ("ld.shared.v4", "ld.global.nc.v4", "ld.global.nc"),
    ("bar.sync 0;", "trap;", "trap"),
    (".maxntid 512", "", "no .maxntid"),
    ("mul.rn.f32", "mul.rn.ftz.f32", ".ftz"),
    (".extern .shared", ".local", "directive"),
  ])
  func aBrokenRuleIsSeen(_ found: String, _ replacement: String, _ violation: String) {
    let text = String(cString: swiftep_kernels_sm_90())
    #expect(text.contains(found))
    let broken = Rules.violations(PTXText(text.split(separator: found).joined(separator: replacement)))
    #expect(broken.contains { $0.contains(violation) })
  }

  /// The next launch may begin where this rank has completed, if all peers' kernels run, or else where they have, too.
  @Test func launchesOverlap() {
    for kernel in kernels where kernel != "tell_time" {
      #expect(sm90.count("griddepcontrol.wait", in: kernel) == 1)
      #expect(sm90.count("griddepcontrol.launch_dependents", in: kernel) == (kernel == "layout" ? 0 : 2))
      #expect(sm80.count("griddepcontrol", in: kernel) == 0)
    }
  }

  /// Rows move sixteen bytes a lane, or in bulk.
  @Test func rowsMoveInWideSteps() {
    for kernel in [
      "dispatch_rows", "dispatch", "dispatch_copying", "dispatch_quantizing", "dispatch_grouped", "combine",
    ] {
      #expect(sm90.count("cp.async.bulk.shared", in: kernel) > 0)
      #expect(sm90.count("cp.async.bulk.global", in: kernel) > 0)
      #expect(sm80.count("ld.v4.b32", in: kernel) >= 4)
    }
    for kernel in ["dispatch_rows", "dispatch", "dispatch_copying", "combine"] {
      #expect(sm80.count("st.v4.b32", in: kernel) >= 4)
    }
    for kernel in ["combine", "combine_in_place"] {
      #expect(sm90.count("cp.async.bulk.shared", in: kernel) > 0)
      #expect(sm90.count("ld.shared.v4.b32", in: kernel) >= 4)
      #expect(sm90.count("st.v4.b32", in: kernel) >= 4)
      #expect(sm80.count("ld.v4.b32", in: kernel) >= 4)
    }
  }

  /// What is compiled for plain calls has none of what they do not need.
  @Test func plainKernelsAreSmaller() throws {
    for (plain, general) in [
      ("dispatch_copying", "dispatch"), ("dispatch_quantizing", "dispatch"), ("dispatch_grouped", "dispatch"),
      ("combine_in_place", "combine"),
    ] {
      for text in [sm80, sm90] {
        let (few, all) = (try #require(text.kernels[plain]).count, try #require(text.kernels[general]).count)
        #expect(4 * few < 3 * all, "\(plain): \(few) instructions of \(all)")
      }
    }
    #expect(sm90.count("cvt.rn.satfinite.e4m3x2.f32", in: "dispatch_copying") == 0)
    #expect(sm90.count("cp.async.bulk.global", in: "combine_in_place") == 0)
  }

  @Test func quantizedInHardwareWhereThereIsSome() {
    for kernel in ["dispatch_rows", "dispatch_quantizing", "dispatch_grouped"] {
      #expect(sm90.count("cvt.rn.satfinite.e4m3x2.f32", in: kernel) > 0)
      #expect(sm80.count("cvt.rn.satfinite.e4m3x2.f32", in: kernel) == 0)
    }
  }
}
