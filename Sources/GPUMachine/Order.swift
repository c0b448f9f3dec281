import PTX

extension GPUMachine {
  @inline(__always)
  public func startNext() {
    #if BULK_COPIES
      ptx_start_next()
    #endif
  }

  @inline(__always)
  public func settle() { ptx_block_barrier() }

  @inline(__always)
  public func arriveLocal(_ counter: Address, for audience: Audience) -> Bool {
    // Joins what the block's threads have stored; each has waited for its own bulk copies.
    ptx_block_barrier()
    if workerCount == 1 { return true }
    let isLast = Shared.word(Shared.meetingOffset)
    if thread == 0 { isLast[0] = countIn(counter, for: audience) ? 1 : 0 }
    ptx_block_barrier()
    let result = isLast[0] != 0
    ptx_block_barrier()
    return result
  }

  /// By one thread: whether its block is the last of all that come here. If so, it sees what all have stored.
  @inline(__always)
  private func countIn(_ counter: Address, for audience: Audience) -> Bool {
    // Releases the block's stores to the last, and through its signal to the peers.
    if audience != .rank { ptx_fence_system(audience.isSystem) }
    // Acquires those of all blocks, which are on this GPU; the signal to peers releases them, too.
    let isLast = ptx_add(counter.bits, 1) &+ 1 == UInt32(bitPattern: workerCount)
    if isLast { counter.store(UInt32(0), at: 0) }
    return isLast
  }

  @inline(__always)
  private func loadAcquire(_ word: UInt64, of audience: Audience) -> UInt64 {
    audience == .rank ? ptx_load_acquire_gpu(word) : ptx_load_acquire_peers(word, audience.isSystem)
  }

  /// The end of every kernel: the last block tells the host, in a word that it watches; null where it watches none.
  ///
  /// - Parameters:
  ///   - counter: UInt32, as that of `arriveLocal`; 8 bytes behind it, a UInt64: what the host was told last.
  ///   - ticket: what to tell; 0: one more than last time.
  @inline(__always)
  func leave(_ counter: Address, word: Address, ticket: UInt64) {
    if word.isNull { return }
    ptx_block_barrier()
    if thread != 0 || !countIn(counter, for: .rank) { return }
    let last = counter.advanced(byBytes: 8)
    let told = ticket == 0 ? last.load(UInt64.self, at: 0) &+ 1 : ticket
    last.store(told, at: 0)
    ptx_store_release(word.bits, told)
  }

  @inline(__always)
  public func signal(_ count: Int32, to audience: Audience, word: (Int32) -> SignalWord) {
    // Joins the threads' stores to this lane's release.
    ptx_block_barrier()
    var index = thread
    while index < count {
      let target = word(index)
      // Releases what this block stored, and what it acquired from the others when it was the last to arrive. Pairs with
      // the acquire in `await`.
      let address = target.arena.advanced(byBytes: target.offset)
      let word = address.bits
      if audience == .rank {
        ptx_store_release_gpu(word, target.epoch)
      } else {
        ptx_store_release_peers(word, target.epoch, audience.isSystem)
        ptx_store_relaxed(SignalWord.gate(of: address).bits, 1)
      }
      index = index &+ Self.threadCount
    }
  }

  /// The first warp watches the signals, 32 at a time, each by a lane of its own. Its first lane keeps the record of them in
  /// their order, as a CPU's worker does, which waits for one after the other.
  @inline(__always)
  public func await(
    _ arena: Address, count: Int32, epoch: UInt64, as audience: Audience, deadline: UInt64, alarm: Address,
    heard: UInt64, offset: (Int32) -> Int64, awaited: (Int32) -> Void, seen: (Int32) -> Void
  ) -> Wait {
    let words = Shared.word(Shared.meetingOffset)
    if warp == 0 {
      let end = watch(
        arena, count: count, epoch: epoch, as: audience, deadline: deadline, alarm: alarm, heard: heard, offset: offset,
        awaited: awaited, seen: seen)
      if lane == 0 { (words[0], words[1]) = (end.code, end.missing) }
    }
    // What the lanes have acquired is everybody's now.
    ptx_block_barrier()
    let (code, missing) = (words[0], words[1])
    ptx_block_barrier()
    if code == Watch.timedOut { return Wait(.timedOut, missing: missing) }
    return Wait(code == Watch.there ? .signalled : .alarmed)
  }

  /// By one warp. Returns how that ended, and the first whose signal is missing.
  @inline(__always)
  private func watch(
    _ arena: Address, count: Int32, epoch: UInt64, as audience: Audience, deadline: UInt64, alarm: Address,
    heard: UInt64, offset: (Int32) -> Int64, awaited: (Int32) -> Void, seen: (Int32) -> Void
  ) -> (code: Int32, missing: Int32) {
    var turn: UInt32 = 0
    var first: Int32 = 0
    while first < count {
      let index = first &+ lane
      let word = arena.advanced(byBytes: offset(min(index, count &- 1))).bits
      var isThere = index >= count
      // Of those that are not there, the first.
      var missing: Int32 = -1
      while true {
        // Pairs with the release in `signal`.
        if !isThere && loadAcquire(word, of: audience) >= epoch {
          isThere = true
          if audience != .rank { ptx_store_relaxed(SignalWord.gate(of: Address(bits: word)).bits, 0) }
        }
        let absent = ptx_ballot(isThere ? 0 : 1)
        let next = absent == 0 ? -1 : first &+ Int32(truncatingIfNeeded: absent.trailingZeroBitCount)
        if next != missing {
          if lane == 0 && missing >= 0 { seen(missing) }
          if lane == 0 && next >= 0 { awaited(next) }
          missing = next
        }
        if absent == 0 { break }
        turn = turn &+ 1
        // The clock is one for the whole GPU, and the alarm lies in the host's memory: who asks for them often holds up
        // everybody.
        if turn & 255 != 0 { continue }
        if ptx_ballot(ptx_nanoseconds() >= deadline ? 1 : 0) != 0 { return (Watch.timedOut, missing) }
        if ptx_ballot(ptx_load_acquire(alarm.bits) != heard ? 1 : 0) != 0 { return (Watch.alarmed, missing) }
      }
      first = first &+ 32
    }
    return (Watch.there, -1)
  }

  @inline(__always)
  public func hear(_ alarm: Address) -> UInt64 {
    let value = ptx_load_acquire(alarm.bits)
    // One value for all threads: the host may raise the alarm between two loads.
    let words = Shared.word(Shared.meetingOffset)
    if thread == 0 {
      words[0] = Int32(truncatingIfNeeded: value)
      words[1] = Int32(truncatingIfNeeded: value &>> 32)
    }
    ptx_block_barrier()
    let low = UInt64(UInt32(bitPattern: words[0]))
    let result = UInt64(UInt32(bitPattern: words[1])) &<< 32 | low
    ptx_block_barrier()
    return result
  }

  @inline(__always)
  public func isSignalled(_ arena: Address, offset: Int64, epoch: UInt64) -> Bool {
    // Pairs with the release in `signal`.
    ptx_load_acquire(arena.advanced(byBytes: offset).bits) >= epoch
  }

  @inline(__always)
  public var now: UInt64 { ptx_nanoseconds() }

  @inline(__always)
  public func note(_ word: UInt64, at address: Address) {
    // Not released: so many fences would take longer than what they tell of.
    if thread == 0 { ptx_store_relaxed(address.bits, word) }
  }

  @inline(__always)
  public func noteZeros(_ count: Int32, at address: Address) {
    if warp != 0 { return }
    // What the first lane notes next may be what all find the address by.
    ptx_warp_barrier()
    var index = lane
    while index < count {
      ptx_store_relaxed(address.advanced(byBytes: 8 &* Int64(index)).bits, 0)
      index = index &+ 32
    }
  }

  @inline(__always)
  public func publish(_ word: UInt64, at address: Address) {
    // Read by copies of the host's, which see the GPU's memory as its threads do.
    if thread == 0 { ptx_store_release_gpu(address.bits, word) }
  }

  @inline(__always)
  public func read(_ address: Address) -> UInt64 { ptx_load_acquire(address.bits) }

  @inline(__always)
  public func peek(_ address: Address) -> UInt64 { ptx_load_relaxed(address.bits) }
}

extension Audience {
  /// Not zero: they may be on several devices.
  @inline(__always) fileprivate var isSystem: UInt32 { self == .system ? 1 : 0 }
}

/// How a warp's wait for signals ends.
private enum Watch {
  @inline(__always) static var there: Int32 { 0 }
  @inline(__always) static var timedOut: Int32 { 1 }
  @inline(__always) static var alarmed: Int32 { 2 }
}
