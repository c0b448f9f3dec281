/* A buffer's operations, as ranks see each other in them, and what becomes of memory. It mirrors, by these names:
 *
 *   Sources/EPKernels/Exchange.swift: exchange, announce, awaitAll, missedRank, fail, compareHeaders, complete, endInVain
 *   Sources/EPKernels/Control.swift: gateOffset
 *   Sources/EPKernels/Placement.swift: place, countBefore
 *   Sources/EPKernels/Dispatch.swift: prepareDispatch, agree, moveRows, endDispatch
 *   Sources/EPKernels/Combine.swift: prepareCombine, findRows, deliverCombine
 *   Sources/SwiftEP/ExpertBuffer+Dispatch.swift: run, offerBlock, launch
 *   Sources/SwiftEP/ExpertBuffer+Combine.swift: run
 *   Sources/SwiftEP/RankArena.swift: take, takeLargest, trim, give, quarantine
 *   Sources/SwiftEP/Event.swift: OperationResources, deinit, retained
 *   Sources/SwiftEP/Membership.swift: lose, close
 *
 * An arena is an array of cells of one row each. A cell holds a tag: which exchange's row, from which source. A rank has
 * one worker, whose every access to memory that others touch is a step of its own: so a rank may stop anywhere, while
 * others lose patience with it, and go on later. Writing a row takes two steps, for a rank may die between them. Memory
 * is sequentially consistent here; that orders suffice on real machines is for scripts/weaken-orders to show.
 *
 * PROGRAM is what all ranks call: 1 dispatch, combine, dispatch, combine; 2 the same in the worst-case size, two
 * dispatches queued at once; 3 a dispatch and another with its handle, both results held; 4 a call that one rank makes
 * differently, then a dispatch.
 */

#ifndef N
#define N 2
#endif
#ifndef PROGRAM
#define PROGRAM 1
#endif
#ifndef MORTAL
#define MORTAL 0   /* ranks that may die, at any step (a bit mask): all of them, some or none */
#endif
#ifndef DOUBTER
#define DOUBTER 0  /* ... that may lose patience too early, once each */
#endif
#ifndef CLOSER
#define CLOSER 0   /* ... that close their buffer after the program's first call */
#endif
#ifndef GATED
#define GATED 0    /* ... whose streams wait for gates before kernels look for signals; one bit: all ranks have gates */
#endif
#ifndef FIRST_SIZE
#define FIRST_SIZE 1  /* cells of an arena at first: too few for most of what may come */
#endif

/* What the protocol relies on. The checks take each away in turn, and must then find what goes wrong. */
#ifndef ROWS_BEFORE_SIGNAL
#define ROWS_BEFORE_SIGNAL 1  /* a rank signals completion when its rows are written, or read */
#endif
#ifndef BLOCK_BEFORE_SIGNAL
#define BLOCK_BEFORE_SIGNAL 1 /* ... and an exchange when its block is written */
#endif
#ifndef COMPLETION
#define COMPLETION 1          /* an operation is over when all have signalled completion */
#endif
#ifndef RETAINING
#define RETAINING 1           /* an operation's memory is kept until then */
#endif
#ifndef QUARANTINE
#define QUARANTINE 1          /* what an operation that missed a rank had offered is never given back */
#endif
#ifndef ALARM
#define ALARM 1               /* a wait ends when a rank that it misses has departed */
#endif
#ifndef FAILED_BEFORE
#define FAILED_BEFORE 1       /* no operation begins after one that has missed a rank */
#endif
#ifndef SUMS
#define SUMS 1                /* a rank's rows lie behind those of earlier ranks */
#endif
#ifndef TELLING
#define TELLING 1             /* who misses a rank departs, and says so */
#endif

#ifndef WATCH
#define WATCH 1               /* a wait for gates ends as a wait for signals does */
#endif
#ifndef FAULTS_COMPLETE
#define FAULTS_COMPLETE 1     /* a completion follows every exchange, also where all ranks have found a fault in it */
#endif
#ifndef FIRST_CAUSE
#define FIRST_CAUSE 1         /* who departs for another's sake names that one */
#endif

#define bit(x) (1 << (x))
#define has(set, x) (((set) & bit(x)) != 0)
#define ALL ((1 << N) - 1)
#define NOBODY 255

#define CELLS (2 * N)
#define at(rank, index) ((rank) * CELLS + (index))
#define pair(to, from) ((to) * N + (from))
#define EXCHANGE 0
#define COMPLETE 1
#define signal(slot, to, from) signals[(slot) * N * N + pair(to, from)]
#define gate(slot, to, from) gates[(slot) * N * N + pair(to, from)]

/* Tags. */
#define row(epoch, source) ((epoch) * N + (source) + 3)
#define TORN 1
#define MINE 2

/* What lies in the arenas. */
byte cells[N * CELLS];
byte signals[2 * N * N];
#if GATED
bool gates[2 * N * N];
#endif
byte blockEpoch[N * N], blockOperation[N * N], blockOffset[N * N];
byte blockCapacity[N * N], blockCounts[N * N];

/* How a rank takes part no more. */
mtype = { CLOSED, LOST, EXITED };
mtype departures[N];
byte blame[N];  /* whom a rank names: 1 more than its number */

/* What is checked: what each exchange has amounted to, on the first rank that knew. */
mtype = { UNKNOWN, FITS, OVERFLOW, DISAGREEMENT };
#define EPOCHS 8
mtype verdicts[EPOCHS];
bool over[N];
byte doubters;

#define signalled(slot, from) (signal(slot, me, from) >= epoch)
#define isMissed(slot, from) ((from) != me && departures[from] != 0 && !signalled(slot, from))
#define missesAny(slot) (isMissed(slot, 0) || isMissed(slot, 1) || isMissed(slot, N - 1))

inline die() { departures[me] = EXITED; over[me] = true; goto dead }

/* A signal opens its gate, which is closed when the signal is seen. */
#if GATED
#define open(slot, to) gate(slot, to, me) = true
#define close(slot, from) gate(slot, me, from) = false
#else
#define open(slot, to) skip
#define close(slot, from) skip
#endif

/* A stream waits; PauseWatch ends it. */
inline awaitGates(slot) {
#if GATED
  peer = 0;
  do
  :: has(GATED, me) && peer < N && (peer == me || gate(slot, me, peer)) -> peer++
  :: WATCH && has(GATED, me) && (missesAny(slot) || doubts > 0) -> break
  :: !has(GATED, me) || peer == N -> break
  :: isMortal -> die()
  od;
#endif
  peer = 0
}

/* awaitAll */
inline awaitAll(slot) {
  awaitGates(slot);
  do
  :: peer < N && peer == me -> peer++
  :: peer < N && peer != me && signalled(slot, peer) -> close(slot, peer); peer++
  :: ALARM && peer < N && missesAny(slot) ->
    atomic {
      peer = 0;
      do
      :: isMissed(slot, peer) -> break
      :: else -> peer++
      od;
      blame[me] = (departures[peer] == LOST && FIRST_CAUSE -> blame[peer] : peer + 1);
      peer = 0;
      hasFailed = true
    };
    break
  :: peer < N && peer != me && doubts > 0 && !signalled(slot, peer) -> doubts--; missSilent(); break
  :: peer == N -> peer = 0; break
  :: isMortal -> die()
  od
}

inline missSilent() { atomic { blame[me] = peer + 1; peer = 0; hasFailed = true } }

/* exchange: then the blocks' contents are in `offsets`, `counts` and `verdict`. */
inline exchange(kind, place, room, sending) {
  if
  :: FAILED_BEFORE && hasFailed -> verdict = UNKNOWN
  :: !FAILED_BEFORE || !hasFailed ->
    hasFailed = false;
    epoch++;
    peer = 0;
    do
    :: peer < N ->
      if
      :: BLOCK_BEFORE_SIGNAL || peer == me -> writeBlock(kind, place, room, sending)
      :: else
      fi;
      if
      :: peer != me -> signal(EXCHANGE, peer, me) = epoch; open(EXCHANGE, peer)
      :: else
      fi;
      if
      :: !BLOCK_BEFORE_SIGNAL && peer != me -> writeBlock(kind, place, room, sending)
      :: else
      fi;
      peer++
    :: isMortal -> die()
    :: peer == N -> peer = 0; break
    od;
    awaitAll(EXCHANGE);
    if
    :: hasFailed -> verdict = UNKNOWN
    :: !hasFailed ->
      readBlocks();
      if
      :: FAULTS_COMPLETE && verdict != FITS ->
        complete();
        if
        :: hasFailed -> verdict = UNKNOWN
        :: else
        fi
      :: else
      fi
    fi
  fi
}

inline writeBlock(kind, place, room, sending) {
  atomic {
    x = pair(peer, me);
    blockEpoch[x] = epoch; blockOperation[x] = kind; blockOffset[x] = place;
    blockCapacity[x] = room; blockCounts[x] = sending;
    x = 0
  }
}

/* compareHeaders, place */
inline readBlocks() {
  verdict = FITS;
  sent = 0;
  do
  :: peer < N ->
    atomic {
      x = pair(me, peer);
      /* Neither before it was written nor after it was overwritten. */
      assert(blockEpoch[x] == epoch);
      offsets[peer] = blockOffset[x];
      capacities[peer] = blockCapacity[x];
      sent = sent | (blockCounts[x] << (peer * N));
      if
      :: blockOperation[x] != blockOperation[pair(me, 0)] -> verdict = DISAGREEMENT
      :: else
      fi;
      x = 0;
      peer++
    }
  :: isMortal -> die()
  :: peer == N -> break
  od;
  atomic {
    peer = 0;
    do
    :: peer < N && verdict == FITS ->
      total(sent, peer);
      if
      :: x > capacities[peer] -> verdict = OVERFLOW
      :: else
      fi;
      x = 0;
      peer++
    :: else -> break
    od;
    peer = 0;
    x = 0;
    /* Alike on all ranks. */
    assert(verdicts[epoch] == 0 || verdicts[epoch] == verdict);
    verdicts[epoch] = verdict
  }
}

/* Whether `from` sends a row to `to`: what all ranks send is one bit mask. */
#define sends(counts, from, to) has(counts, (from) * N + (to))
#define sentBy(counts, from) (((counts) >> ((from) * N)) & ALL)

/* Rows at `rank`, in x. */
inline total(counts, rank) {
  x = 0; y = 0;
  do
  :: y < N && sends(counts, y, rank) -> x++; y++
  :: y < N && !sends(counts, y, rank) -> y++
  :: y == N -> break
  od;
  y = 0
}

/* Rows of ranks before this one at `rank`, in x. */
inline base(counts, rank) {
  x = 0; y = 0;
  do
  :: y < me && sends(counts, y, rank) && SUMS -> x++; y++
  :: y < me && !(sends(counts, y, rank) && SUMS) -> y++
  :: y == me -> break
  od;
  y = 0
}

/* complete */
inline complete() {
  do
  :: peer < N ->
    if
    :: peer != me -> signal(COMPLETE, peer, me) = epoch; open(COMPLETE, peer)
    :: else
    fi;
    peer++
  :: isMortal -> die()
  :: peer == N -> peer = 0; break
  od;
  if
  :: COMPLETION -> awaitAll(COMPLETE)
  :: else
  fi
}

/* moveRows */
inline writeRows(counts) {
  do
  :: peer < N && sends(counts, me, peer) ->
    atomic { base(counts, peer); target = at(peer, offsets[peer] + x); x = 0 };
    write(TORN);
    if
    :: isMortal -> die()
    :: true
    fi;
    write(row(epoch, me));
    target = 0;
    peer++
  :: peer < N && !sends(counts, me, peer) -> peer++
  :: isMortal -> die()
  :: peer == N -> peer = 0; break
  od
}

/* Nobody else's. */
inline write(what) { atomic { assert(cells[target] != MINE); cells[target] = what } }

/* deliverCombine */
inline readRows(counts, ofEpoch) {
  do
  :: peer < N && sends(counts, me, peer) ->
    atomic {
      base(counts, peer);
      /* Neither before they were written nor after they were overwritten. */
      assert(cells[at(peer, offsets[peer] + x)] == row(ofEpoch, me));
      x = 0;
      peer++
    }
  :: peer < N && !sends(counts, me, peer) -> peer++
  :: isMortal -> die()
  :: peer == N -> peer = 0; break
  od
}

/* What a result's holder reads. */
inline check(result, counts) {
  atomic {
    x = 0; y = 0;
    do
    :: y < N && sends(counts, y, me) -> assert(cells[at(me, result.offset + x)] == row(result.epoch, y)); x++; y++
    :: y < N && !sends(counts, y, me) -> y++
    :: y == N -> break
    od;
    x = 0; y = 0
  }
}

typedef Block { byte offset; byte capacity; byte epoch };

#define mask(block) (((1 << block.capacity) - 1) << block.offset)

/* RankArena: free cells are bits. A hole of `size` cells is found at the lowest offset, the arena grows if it must. */
inline take(block, size) {
  atomic {
    x = 0;
    do
    :: x + size <= arenaSize && ((free >> x) & ((1 << size) - 1)) == (1 << size) - 1 -> break
    :: x + size <= arenaSize && ((free >> x) & ((1 << size) - 1)) != (1 << size) - 1 -> x++
    :: x + size > arenaSize -> assert(arenaSize < CELLS); free = free | bit(arenaSize); arenaSize++; x = 0
    od;
    block.offset = x;
    block.capacity = size;
    free = free & ~(((1 << size) - 1) << x);
    x = 0
  }
}

inline takeLargest(block) {
  atomic {
    block.offset = 0; block.capacity = 0; x = 0; y = 0;
    do
    :: x < arenaSize && has(free, x) ->
      y++;
      if
      :: y > block.capacity -> block.capacity = y; block.offset = x + 1 - y
      :: else
      fi;
      x++
    :: x < arenaSize && !has(free, x) -> y = 0; x++
    :: x == arenaSize -> break
    od;
    x = 0; y = 0;
    free = free & ~mask(block)
  }
}

inline give(block) { atomic { free = free | mask(block); block.offset = 0; block.capacity = 0; block.epoch = 0 } }

inline trim(block, size) {
  atomic { free = free | (mask(block) & ~(((1 << (size)) - 1) << block.offset)); block.capacity = size }
}

#define COMBINE 3

/* DispatchCall.run with exact sizing. */
inline dispatch(operation, result, counts, isCached) {
  takeLargest(result);
  do
  :: true ->
    exchange(operation, result.offset, result.capacity, sentBy(counts, me));
    if
    :: !isCached -> copyCounts(counts)
    :: else
    fi;
    if
    :: verdict == OVERFLOW ->
      give(result);
      atomic { total(counts, me); y = x; x = 0; size = y; y = 0 };
      take(result, size);
      size = 0
    :: else -> break
    fi
  od;
  if
  :: verdict == FITS ->
    atomic { total(counts, me); size = x; x = 0 };
    trim(result, size);
    size = 0;
    deliver(result, counts)
  :: else -> missed(result)
  fi
}

inline copyCounts(counts) {
  atomic {
    if
    :: !hasFailed -> counts = sent
    :: else
    fi
  }
}

inline deliver(result, counts) {
  result.epoch = epoch;
  if
  :: ROWS_BEFORE_SIGNAL -> writeRows(counts); complete()
  :: else -> complete(); writeRows(counts)
  fi;
  if
  :: hasFailed -> missed(result)
  :: else -> check(result, counts)
  fi
}

/* OperationResources.deinit of an operation that has missed a rank. */
inline missed(block) {
  if
  :: hasFailed && QUARANTINE -> atomic { block.offset = 0; block.capacity = 0; block.epoch = 0 }
  :: else -> give(block)
  fi
}

/* The caller may write to all memory that is free. */
inline scribble() {
  atomic {
    x = 0;
    do
    :: x < arenaSize && has(free, x) -> cells[at(me, x)] = 0; x++
    :: x < arenaSize && !has(free, x) -> x++
    :: x == arenaSize -> break
    od;
    x = 0
  }
}

/* CombineCall.run: of rows in the arena. */
inline combine(result, counts) {
  exchange(COMBINE, result.offset, CELLS, 0);
  if
  :: verdict == FITS ->
    if
    :: !RETAINING -> give(result); scribble()
    :: else
    fi;
    if
    :: ROWS_BEFORE_SIGNAL -> readRows(counts, ofEpoch); complete()
    :: else -> complete(); readRows(counts, ofEpoch)
    fi
  :: else
  fi;
  if
  :: RETAINING -> missed(result); scribble()
  :: else
  fi
}

proctype rank(byte me; bool isMortal; byte doubts; bool isCloser) {
  Block first, second;
  byte offsets[N], capacities[N];
  short sent, firstCounts, secondCounts;
  byte epoch, peer, x, y, size, target, ofEpoch, free, arenaSize;
  mtype verdict = UNKNOWN;
  bool hasFailed;

  atomic {
    arenaSize = FIRST_SIZE;
    free = (1 << arenaSize) - 1;
    /* Where its tokens go. */
    if
    :: firstCounts = ALL << (me * N)
    :: firstCounts = (ALL & ~bit(0)) << (me * N)
#if N == 2
    :: firstCounts = (ALL & ~bit(1)) << (me * N)
#endif
    fi;
    secondCounts = ALL << (me * N)
  };

#if PROGRAM == 1
  dispatch(1, first, firstCounts, false);
  if
  :: !hasFailed && isCloser -> goto close
  :: !hasFailed && !isCloser ->
    ofEpoch = first.epoch;
    combine(first, firstCounts)
  :: else
  fi;
  if
  :: !hasFailed -> dispatch(1, second, secondCounts, false)
  :: else
  fi;
  if
  :: !hasFailed -> ofEpoch = second.epoch; combine(second, secondCounts)
  :: else
  fi;
#endif

#if PROGRAM == 2
  /* Both are taken before anything runs. */
  take(first, N);
  take(second, N);
  exchange(1, first.offset, first.capacity, sentBy(firstCounts, me));
  copyCounts(firstCounts);
  if
  :: verdict == FITS -> deliver(first, firstCounts)
  :: else -> missed(first)
  fi;
  exchange(1, second.offset, second.capacity, sentBy(secondCounts, me));
  copyCounts(secondCounts);
  if
  :: verdict == FITS -> deliver(second, secondCounts)
  :: else -> missed(second)
  fi;
  if
  :: first.epoch != 0 -> check(first, firstCounts)
  :: else
  fi;
  if
  :: !hasFailed -> ofEpoch = first.epoch; combine(first, firstCounts)
  :: else
  fi;
#endif

#if PROGRAM == 3
  dispatch(1, first, firstCounts, false);
  if
  :: !hasFailed && isCloser -> goto close
  :: !hasFailed && !isCloser -> dispatch(2, second, firstCounts, true)
  :: else
  fi;
  if
  :: first.epoch != 0 -> check(first, firstCounts)
  :: else
  fi;
  if
  :: !hasFailed -> ofEpoch = second.epoch; combine(second, firstCounts)
  :: else
  fi;
#endif

#if PROGRAM == 4
  exchange((me == N - 1 -> 2 : 1), 0, 0, 0);
  if
  :: !hasFailed -> assert(verdict == DISAGREEMENT); dispatch(1, second, secondCounts, false)
  :: else
  fi;
#endif

  if
  :: hasFailed ->
    atomic {
      /* Nobody is blamed for what another did. */
      assert(doubters != 0 || departures[blame[me] - 1] == EXITED || departures[blame[me] - 1] == CLOSED);
      if
      :: TELLING -> departures[me] = LOST
      :: else
      fi
    }
  :: else
  fi;

  /* Memory that another thread of this rank takes while it does not know yet. */
  if
  :: hasFailed && free != 0 ->
    atomic {
      x = 0;
      do
      :: !has(free, x) -> x++
      :: else -> break
      od;
      target = at(me, x);
      free = free & ~bit(x);
      cells[target] = MINE;
      x = 0
    };
    goto close
  :: else
  fi;

close:
  atomic {
    if
    :: departures[me] == 0 && (TELLING || !hasFailed) -> departures[me] = CLOSED
    :: else
    fi
  };
  /* What is still held is what it was, whoever writes late. */
  atomic {
    if
    :: first.epoch != 0 -> check(first, firstCounts)
    :: else
    fi;
#if PROGRAM != 3
    if
    :: second.epoch != 0 -> check(second, secondCounts)
    :: else
    fi;
#endif
    over[me] = true
  };
end_held:
  atomic {
    over[0] && over[1] && over[N - 1] ->
    if
    :: first.epoch != 0 -> check(first, firstCounts)
    :: else
    fi
  };
dead:
  skip
}

/* Any of `these`. Who may die or doubt is chosen at first: whoever still may would never be seen to wait for ever. */
inline choose(set, these) {
  for (x : 0 .. N - 1) {
    if
    :: has(these, x) -> set = set | bit(x)
    :: true
    fi
  }
}

init {
  byte mortal, closer, x;
  atomic {
    choose(mortal, MORTAL);
    choose(doubters, DOUBTER);
    choose(closer, CLOSER);
    for (x : 0 .. N - 1) {
      run rank(x, has(mortal, x), (has(doubters, x) -> 1 : 0), has(closer, x))
    }
  }
}
