/// What must hold of every kernel, as a list of what does not. The rules are about text: a processor's caches would hide
/// most of what they find.
enum Rules {
  /// All of `PTXText`'s kernels.
  static func violations(_ text: PTXText) -> [String] {
    var found: [String] = []
    for directive in text.directives {
      if directive.hasPrefix(".local") || directive.contains(".func") { found.append("directive: \(directive)") }
    }
    if !text.directives.contains(".maxntid 512") { found.append("no .maxntid") }
    for (kernel, instructions) in text.kernels {
      found += forbidden(instructions).map { "\(kernel): \($0)" }
      found += order(text, of: kernel).map { "\(kernel): \($0)" }
      // These are launched alone.
      if text.target == "sm_90" && !["ranks", "tell_time"].contains(kernel) {
        found += overlap(text, of: kernel).map { "\(kernel): \($0)" }
      }
    }
    return found.sorted()
  }

  /// No call into a runtime, no trap, no memory of a lane's own, no load through the cache that is not coherent, nothing
  /// contracted, flushed or approximated; but for the two quotients that quantizing makes exact, of a reciprocal and four fused
  /// products.
  private static func forbidden(_ instructions: [String]) -> [String] {
    let (reciprocal, product) = ("rcp.approx.ftz.f32 ", "fma.rn.f32 ")
    let count = { (prefix: String) in instructions.count { $0.hasPrefix(prefix) } }
    let allowed = count(product) == 4 * count(reciprocal) ? [reciprocal, product] : []
    let prefixes = [
      "call", "trap", "brkpt", "ld.local", "st.local", "ld.global.nc", "fma.", "mad.rn.f", "ex2", "lg2", "rcp.approx",
      "div.approx", "div.full",
    ]
    return instructions.filter { instruction in
      if allowed.contains(where: { instruction.hasPrefix($0) }) { return false }
      return prefixes.contains { instruction.hasPrefix($0) } || instruction.prefix { $0 != " " }.contains(".ftz")
    }
  }

  /// A launch may begin before the one before it is over, and lets the next one begin.
  private static func overlap(_ text: PTXText, of kernel: String) -> [String] {
    var found: [String] = []
    let isAccess = { (instruction: String) in
      ["ld.", "st.", "atom.", "red.", "cp.", "prefetch"].contains { instruction.hasPrefix($0) }
        && !["ld.param", "ld.shared", "st.shared"].contains { instruction.hasPrefix($0) }
    }
    if text.canCome(from: 0, in: kernel, to: isAccess, past: { $0 == "griddepcontrol.wait" }) {
      found.append("memory before the launch before is over")
    }
    let instructions = text.kernels[kernel]!
    for (index, instruction) in instructions.enumerated() where instruction == "griddepcontrol.launch_dependents" {
      // What is still waited for is others' completions.
      if text.canCome(from: index, in: kernel, to: { $0.hasPrefix("cp.async.bulk") }, past: { _ in false }) {
        found.append("rows behind the start of the next launch")
      }
    }
    return found
  }

  private static func order(_ text: PTXText, of kernel: String) -> [String] {
    let instructions = text.kernels[kernel]!
    var found: [String] = []
    func require(_ holds: Bool, _ text: String) { if !holds { found.append(text) } }
    // Who counts in releases what its block has stored, and, as the last, acquires what all have.
    let countdowns = instructions.indices.filter { instructions[$0].hasPrefix("atom.acq_rel.gpu") }
    require(
      !instructions[..<(countdowns.first ?? instructions.count)].contains { $0.hasPrefix("st.release.sys") },
      "a release store without a countdown before")
    for (index, instruction) in instructions.enumerated() {
      require(!instruction.hasPrefix("atom.relaxed.gpu"), "a countdown without order")
      if instruction.hasPrefix("cp.async.bulk.shared") {
        let earlier = instructions[..<index]
        // One barrier may expect several.
        let barrier = instruction.split(separator: " ").last
        let sinceLastLoad = earlier.reversed().prefix {
          !$0.hasPrefix("cp.async.bulk.shared") || $0.split(separator: " ").last == barrier
        }
        require(
          sinceLastLoad.contains { $0.hasPrefix("mbarrier.arrive.expect_tx") }, "a bulk load that no barrier expects")
        require(
          earlier.contains { $0 == "fence.proxy.async.global" }, "a bulk load before the fence of global memory")
        require(
          earlier.contains { $0 == "fence.proxy.async.shared::cta" }, "a bulk load before the fence of shared memory")
      }
      if instruction == "fence.proxy.async.global" {
        let next = instructions[index...].dropFirst().first
        require(next == "fence.proxy.async.shared::cta", "stages whose last use bulk loads may overtake")
      }
    }
    for (index, instruction) in instructions.enumerated() where instruction.hasPrefix("cp.async.bulk.global") {
      let isWait = { (instruction: String) in instruction == "cp.async.bulk.wait_group 0" }
      let wait = instructions[index...].firstIndex(where: isWait) ?? instructions.count
      // A part of the kernel that stands behind the countdown jumps back before it. In one kernel of all operations, others'
      // countdowns may stand between.
      let isInOrder = kernel == "ranks" || wait < countdowns.first { $0 > index } ?? instructions.count
      let isReached = text.canCome(
        from: index, in: kernel, to: isWait, past: { $0.hasPrefix("atom.acq_rel.gpu") })
      require(isInOrder && isReached, "bulk stores not waited for before the countdown")
    }
    // Rows are for peers, so the countdown that ends them is ordered for the system.
    require(
      !instructions.contains { $0.hasPrefix("cp.async.bulk.global") }
        || countdowns.contains { end in
          instructions[max(0, end - 4)..<end].contains { $0.hasPrefix("fence.acq_rel.sys") }
        }, "rows without a countdown for the system")
    // Stores of a warp's lanes are joined before one lane speaks for them. Parts of the kernel that stand between jump away.
    for index in countdowns {
      require(
        instructions[max(0, index - 80)..<index].contains { $0.hasPrefix("bar.sync") }, "a countdown without a barrier")
    }
    return found
  }
}
