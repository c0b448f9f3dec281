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

  /// Each signal is watched by a lane of its own, of the second warp and further; the first lane of the first warp keeps
  /// the record of them in their order, by what those tell it in shared memory.
  @inline(__always)
  public func await(
    _ arena: Address, count: Int32, epoch: UInt64, as audience: Audience, deadline: UInt64, alarm: Address,
    heard: UInt64, offset: (Int32) -> Int64, awaited: (Int32) -> Void, seen: (Int32) -> Void
  ) -> Wait {
    let missing = Shared.word(Shared.meetingOffset)
    let alarms = Shared.word(Shared.meetingOffset &+ 4)
    if thread == 0 {
      missing[0] = Int32.max
      alarms[0] = 0
    }
    forEach(count) { Shared.word(Shared.destinationsOffset)[Int($0)] = 0 }
    if thread == 0 { keepRecord(of: count, awaited: awaited, seen: seen) }
    var index = warp == 0 ? count : thread &- 32
    while index < count {
      let word = arena.advanced(byBytes: offset(index)).bits
      var turn: UInt32 = 0
      var state = Watch.there
      // Pairs with the release in `signal`.
      while loadAcquire(word, of: audience) < epoch {
        if turn == 0 { _ = ptx_shared_add(Watch.word(index), Watch.awaited) }
        turn = turn &+ 1
        // The clock is one for the whole GPU, and the alarm lies in the host's memory: who asks for them often holds up
        // everybody.
        if turn & 255 != 0 { continue }
        if ptx_nanoseconds() >= deadline {
          _ = ptx_shared_min(UInt32(bitPattern: Shared.meetingOffset), UInt32(bitPattern: index))
          state = Watch.givenUp
          break
        }
        if ptx_load_acquire(alarm.bits) != heard {
          _ = ptx_shared_add(UInt32(bitPattern: Shared.meetingOffset &+ 4), 1)
          state = Watch.givenUp
          break
        }
      }
      _ = ptx_shared_add(Watch.word(index), state)
      if audience != .rank && state == Watch.there {
        ptx_store_relaxed(SignalWord.gate(of: Address(bits: word)).bits, 0)
      }
      index = index &+ Self.threadCount &- 32
    }
    // What the lanes have acquired is everybody's now.
    ptx_block_barrier()
    let (firstMissing, alarmCount) = (missing[0], alarms[0])
    ptx_block_barrier()
    if firstMissing != Int32.max { return Wait(.timedOut, missing: firstMissing) }
    return Wait(alarmCount == 0 ? .signalled : .alarmed)
  }

  @inline(__always)
  private func keepRecord(of count: Int32, awaited: (Int32) -> Void, seen: (Int32) -> Void) {
    var index: Int32 = 0
    while index < count {
      var state: UInt32 = 0
      while state == 0 { state = ptx_shared_add(Watch.word(index), 0) }
      if state == Watch.awaited {
        awaited(index)
        while state == Watch.awaited { state = ptx_shared_add(Watch.word(index), 0) }
        if state & Watch.there != 0 { seen(index) }
      }
      // As a CPU's worker does, which waits for one after the other.
      if state & Watch.givenUp != 0 { return }
      index = index &+ 1
    }
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
  public func publish(_ word: UInt64, at address: Address) {
    // Read by copies of the host's, which see the GPU's memory as its threads do.
    if thread == 0 { ptx_store_release_gpu(address.bits, word) }
  }

  @inline(__always)
  public func read(_ address: Address) -> UInt64 { ptx_load_acquire(address.bits) }
}

extension Audience {
  /// Not zero: they may be on several devices.
  @inline(__always) fileprivate var isSystem: UInt32 { self == .system ? 1 : 0 }
}

/// What is known of a signal while it is waited for: nothing at first, then the sum of what has been found.
private enum Watch {
  /// It was not there when first looked for.
  @inline(__always) static var awaited: UInt32 { 1 }
  @inline(__always) static var there: UInt32 { 2 }
  @inline(__always) static var givenUp: UInt32 { 4 }

  /// Of a signal: room for as many as ranks fit on a GPU.
  @inline(__always) static func word(_ index: Int32) -> UInt32 {
    UInt32(bitPattern: Shared.destinationsOffset &+ 4 &* index)
  }
}
