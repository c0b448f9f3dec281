import PTX

extension GPUMachine {
  @inline(__always)
  public func settle() { ptx_block_barrier() }

  @inline(__always)
  public func arriveLocal(_ counter: Address) -> Bool {
    // Joins what the block's threads have stored; each has waited for its own bulk copies.
    ptx_block_barrier()
    let isLast = Shared.word(Shared.meetingOffset)
    if thread == 0 { isLast[0] = countIn(counter) ? 1 : 0 }
    ptx_block_barrier()
    let result = isLast[0] != 0
    ptx_block_barrier()
    return result
  }

  /// By one thread: whether its block is the last of all that come here. If so, it sees what all have stored.
  @inline(__always)
  private func countIn(_ counter: Address) -> Bool {
    // Releases the block's stores to the last, and through its signal to the peers.
    ptx_fence_system()
    let isLast = ptx_add(counter.bits, 1) &+ 1 == UInt32(bitPattern: workerCount)
    if isLast {
      // Acquires those of all blocks.
      ptx_fence_system()
      counter.store(UInt32(0), at: 0)
    }
    return isLast
  }

  /// The end of every kernel: the last block tells the host, in a word that it watches.
  @inline(__always)
  func leave(_ counter: Address, word: Address, ticket: UInt64) {
    ptx_block_barrier()
    if thread == 0 && countIn(counter) { ptx_store_release(word.bits, ticket) }
  }

  @inline(__always)
  public func signal(_ count: Int32, epoch: UInt64, word: (Int32) -> SignalWord) {
    // Joins the threads' stores to this lane's release.
    ptx_block_barrier()
    var index = thread
    while index < count {
      let target = word(index)
      // Releases what this block stored, and what it acquired from the others when it was the last to arrive. Pairs with
      // the acquire in `await`.
      ptx_store_release(target.arena.advanced(byBytes: target.offset).bits, epoch)
      index = index &+ Self.threadCount
    }
  }

  @inline(__always)
  public func await(
    _ arena: Address, count: Int32, epoch: UInt64, deadline: UInt64, alarm: Address, heard: UInt64,
    offset: (Int32) -> Int64
  ) -> Wait {
    let missing = Shared.word(Shared.meetingOffset)
    let alarms = Shared.word(Shared.meetingOffset &+ 4)
    if thread == 0 {
      missing[0] = Int32.max
      alarms[0] = 0
    }
    ptx_block_barrier()
    var index = thread
    while index < count {
      let word = arena.advanced(byBytes: offset(index)).bits
      var turn: UInt32 = 0
      // Pairs with the release in `signal`.
      while ptx_load_acquire(word) < epoch {
        if ptx_nanoseconds() >= deadline {
          _ = ptx_shared_min(UInt32(bitPattern: Shared.meetingOffset), UInt32(bitPattern: index))
          break
        }
        // The alarm lies in the host's memory, far away.
        turn = turn &+ 1
        if turn & 63 == 0 && ptx_load_acquire(alarm.bits) != heard {
          _ = ptx_shared_add(UInt32(bitPattern: Shared.meetingOffset &+ 4), 1)
          break
        }
      }
      index = index &+ Self.threadCount
    }
    // What the lanes have acquired is everybody's now.
    ptx_block_barrier()
    let (firstMissing, alarmCount) = (missing[0], alarms[0])
    ptx_block_barrier()
    if firstMissing != Int32.max { return Wait(.timedOut, missing: firstMissing) }
    return Wait(alarmCount == 0 ? .signalled : .alarmed)
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
  public var now: UInt64 { ptx_nanoseconds() }
}
