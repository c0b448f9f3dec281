/* How the members of a generation agree on the next one. Sets of members are bit masks. What a member does under its
 * lock is one atomic step; what it sends then goes link by link, and it can die in between. It mirrors, by these names:
 *
 *   Sources/SwiftEP/Group/Regrouping.swift: begin, hold, receive, decide, isReady, laggards, report, adopt
 *   Sources/SwiftEP/Group/MeshState.swift: send, note, suspect, regroup
 *   Sources/SwiftEP/Group/Mesh.swift: lose, receive, tell, regroup, leaveBehind
 *
 * A link keeps order and loses nothing but what its sender had not yet sent when it died. That is the system's promise
 * for a socket: what has been sent lies in the receiver's buffer. It may lie there for ever so long: a member may stop
 * at any step (that is how interleavings are explored), while others lose patience with it though it lives. Patience that
 * ends because really nothing else can happen is Promela's `timeout`.
 *
 * Everything a member knows is local to it, so that partial order reduction has something to reduce: who may die, or
 * doubt a living member, is chosen beforehand, when it does is not.
 */

#ifndef N
#define N 3       /* members */
#endif
#ifndef MORTAL
#define MORTAL 0   /* members that may die, at any step (a bit mask): all of them, some or none */
#endif
#ifndef DOUBTER
#define DOUBTER 0  /* ... that may lose patience too early while they regroup, once each */
#endif
#ifndef ACCUSER
#define ACCUSER 0  /* ... that may lose patience in an operation before, and tell, once each */
#endif
#ifndef SILENT
#define SILENT 0   /* ... that live, but do not call `shrink` until nothing else moves */
#endif
#ifndef DEPTH
#define DEPTH 8    /* messages that a link may hold */
#endif

/* What the agreement relies on. The checks take each away in turn, and must then find what goes wrong. */
#ifndef PROMISE
#define PROMISE 1      /* no decision is taken from one that this member has reported absent */
#endif
#ifndef UNANIMITY
#define UNANIMITY 1    /* the leader waits for the reports of all that are present */
#endif
#ifndef PASSING_ON
#define PASSING_ON 1   /* who takes a decision sends it to all others */
#endif
#ifndef SETTLING
#define SETTLING 1     /* what has arrived is read before patience ends, and before a decision */
#endif
#ifndef NAMED_IS_OUT
#define NAMED_IS_OUT 1 /* who is reported absent by anybody goes no further, even with a decision */
#endif

#define bit(x) (1 << (x))
#define ALL ((1 << N) - 1)
#define NOTHING 255
#define has(set, x) (((set) & bit(x)) != 0)

mtype = { REPORT, DECISION, ACCUSATION, END };

chan link[N * N] = [DEPTH] of { mtype, byte };
#define from_to(from, to) link[(from) * N + (to)]

byte silent; /* who does not call `shrink` at once */

/* What is checked, not what anybody knows. Each member writes its own, and all is read when nothing moves any more. */
local byte final[N];    /* the decision with which a member has gone on; NOTHING: it is dead, or out */
local byte went[N];     /* ... even if it is dead now, or out */
local byte doubted[N];  /* whom it has lost patience with; itself: it died */

#define present (ALL & ~absent)
#define isLeader (has(present, me) && (present & (bit(me) - 1)) == 0)
#define agrees(other) ((other) == me || has(absent, other) || reports[other] == absent)
#define allAgree (agrees(0) && agrees(1) && agrees(N / 2) && agrees(N - 1))
#define isReady (begun && decision == 0 && !out && isLeader && (!UNANIMITY || allAgree))
#define EVERYBODY (((1 << N) - 1) & ~bit(me))


/* MeshState.send, to all of `t`: the flush follows. */
#define queue(k, s, t) message = k; content = s; targets = t

inline report() {
  if
  :: begun && decision == 0 && reported != absent -> reported = absent; queue(REPORT, absent, ALL & ~bit(me))
  :: else
  fi
}

inline hold(these) {
  absent = absent | ((these) & ALL);
  if
  :: has(absent, me) && decision == 0 -> out = true
  :: else
  fi;
  report()
}

inline adopt(d, isOwn) {
  if
  :: decision == 0 ->
    decision = d;
    if
    :: PASSING_ON || isOwn -> queue(DECISION, d, EVERYBODY)
    :: else
    fi
  :: else
  fi
}

/* Mesh.receive and Mesh.lose: one message, under the lock. */
inline handle() {
  if
  :: has(ended, from)
  :: else ->
    if
    :: kind == REPORT ->
      if
      :: NAMED_IS_OUT && has(set, me) -> out = true
      :: else
      fi;
      if
      :: has(absent, from)
      :: else ->
        reports[from] = set;
        if
        :: decision == 0 -> hold(set)
        :: else
        fi
      fi
    :: kind == DECISION ->
      if
      :: PROMISE && reported != NOTHING && has(reported, from)
      :: else ->
        if
        :: !has(set, me) -> out = true
        :: else
        fi;
        adopt(set, false)
      fi
    :: kind == ACCUSATION ->
      if
      :: set == me -> out = true; hold(bit(me))
      :: set != me && !has(absent, from) -> hold(bit(set))
      :: else
      fi
    :: kind == END -> hold(bit(from))
    fi
  fi;
  kind = 0; set = 0; from = 0
}

inline take(in, f) { in?kind, set; from = f; handle() }
inline send(out) { assert(nfull(out)); out!message, content }

/* Sends what is queued, link by link. */
inline flush() {
  do
  :: atomic { targets != 0 ->
      to = 0;
      do
      :: !has(targets, to) -> to++
      :: else -> break
      od;
      targets = targets & ~bit(to);
      if
      :: to == 0 -> send(out0)
      :: to == 1 -> send(out1)
#if N > 2
      :: to == 2 -> send(out2)
#endif
#if N > 3
      :: to == 3 -> send(out3)
#endif
      fi;
      to = 0
    }
  :: targets != 0 && isMortal -> goto death
  :: atomic { targets == 0 -> message = 0; content = 0 } -> break
  od
}

/* Mesh.settle: reads what has arrived, link after link. */
inline settleLink(in, f) {
  do
  :: atomic { SETTLING && nempty(in) -> take(in, f) }; flush()
  :: !SETTLING || empty(in) -> break
  od
}

inline settle() {
  settleLink(in0, 0);
  settleLink(in1, 1);
#if N > 2
  settleLink(in2, 2);
#endif
#if N > 3
  settleLink(in3, 3);
#endif
}

inline findLaggards() {
  laggards = 0; to = 0;
  do
  :: to < N ->
    if
    :: to != me && !has(absent, to) && reports[to] != absent -> laggards = laggards | bit(to)
    :: else
    fi;
    to++
  :: else -> break
  od;
  to = 0;
  if
  :: laggards == 0 ->
    do
    :: to < N && has(absent, to) -> to++
    :: to < N && !has(absent, to) -> laggards = bit(to) & ~bit(me); break
    :: to == N -> break
    od
  :: else
  fi;
  to = 0
}

/* Where it is not too early, nobody is hit who moves. */
inline losePatience(isEarly) {
  settle();
  if
  :: atomic { decision == 0 && !out && !isReady ->
      findLaggards();
      assert(isEarly || (laggards & ~silent) == 0);
      doubted[me] = doubted[me] | laggards;
      hold(laggards);
      laggards = 0
    };
    flush()
  :: else
  fi
}

proctype member(byte me; bool isMortal; bool isSilent; byte doubts; byte accusations) {
  byte absent, reported = NOTHING, decision, ended;
  byte reports[N];
  bool begun, out;
  mtype message, kind;
  byte content, targets, set, from, to, laggards;

  chan in0 = from_to(0, me); xr in0;
  chan in1 = from_to(1, me); xr in1;
  chan out0 = from_to(me, 0);
  chan out1 = from_to(me, 1);
#if N > 2
  chan in2 = from_to(2, me); xr in2;
  chan out2 = from_to(me, 2);
#endif
#if N > 3
  chan in3 = from_to(3, me); xr in3;
  chan out3 = from_to(me, 3);
#endif
  atomic {
    do
    :: to < N -> reports[to] = NOTHING; to++
    :: else -> to = 0; break
    od
  };

  do
  :: atomic { nempty(in0) -> take(in0, 0) }; flush()
  :: atomic { nempty(in1) -> take(in1, 1) }; flush()
#if N > 2
  :: atomic { nempty(in2) -> take(in2, 2) }; flush()
#endif
#if N > 3
  :: atomic { nempty(in3) -> take(in3, 3) }; flush()
#endif
  :: atomic { !begun && !out && decision == 0 && !isSilent -> begun = true; report() }; flush()
  /* One that lives, but does not call `shrink` until others have lost patience. */
  :: atomic { isSilent && timeout -> isSilent = false }
  :: isMortal -> goto death

  /* An operation of a buffer loses patience with another rank; Mesh.tell. */
  :: atomic { accusations > 0 && !begun && !out && decision == 0 -> accusations-- };
    settle();
    if
    :: atomic { !out && decision == 0 && absent == 0 ->
        if
        :: me != 0 -> laggards = 0
        :: me != 1 -> laggards = 1
#if N > 2
        :: me != 2 -> laggards = 2
#endif
#if N > 3
        :: me != 3 -> laggards = 3
#endif
        fi;
        doubted[me] = doubted[me] | bit(laggards);
        hold(bit(laggards)); queue(ACCUSATION, laggards, ALL & ~bit(me)); laggards = 0
      };
      flush()
    :: else
    fi

  /* Mesh.regroup: nothing has come for too long. */
  :: atomic { doubts > 0 && begun && decision == 0 && !out && !isReady -> doubts-- }; losePatience(true)
  :: timeout && begun && decision == 0 && !out && !isReady -> losePatience(false)

  /* ... or this member is to decide. */
  :: isReady ->
    settle();
    if
    :: atomic { isReady -> adopt(present, true) }; flush()
    :: else
    fi

  :: out -> goto leave
  :: decision != 0 && !out -> break
  od;

  /* Mesh.leaveBehind: the connections to the others end. */
  atomic { queue(END, 0, EVERYBODY & ~decision) };
  flush();
  atomic { ended = ALL & ~decision; final[me] = decision; went[me] = decision };

end_gathering:
  do
  :: atomic { nempty(in0) -> take(in0, 0) }; flush()
  :: atomic { nempty(in1) -> take(in1, 1) }; flush()
#if N > 2
  :: atomic { nempty(in2) -> take(in2, 2) }; flush()
#endif
#if N > 3
  :: atomic { nempty(in3) -> take(in3, 3) }; flush()
#endif
  :: out -> goto leave
  :: isMortal -> goto death
  od;

leave:
  final[me] = NOTHING;
  atomic { isMortal = false; queue(END, 0, EVERYBODY & ~ended) };
  flush();
  goto over;

death:
  atomic {
    isMortal = false;
    final[me] = NOTHING;
    doubted[me] = doubted[me] | bit(me);
    queue(END, 0, EVERYBODY & ~ended)
  };
  flush();

over:
  skip
}

#define went_(x, d) (!has(d, x) || went[x] == (d))
/* All of a decision's members have gone on with it. */
#define isWhole(d) ((d) != 0 && went_(0, d) && went_(1, d) && went_(N / 2, d) && went_(N - 1, d))

/* Any of `these`. Who may die or doubt is chosen at first: whoever still may would never be seen to wait for ever. */
inline choose(set, these) {
  set = 0;
  for (x : 0 .. N - 1) {
    if
    :: has(these, x) -> set = set | bit(x)
    :: true
    fi
  }
}

init {
  byte mortal, doubters, accusers, x, y;
  atomic {
    choose(mortal, MORTAL);
    choose(doubters, DOUBTER);
    choose(accusers, ACCUSER);
    choose(silent, SILENT);
    for (x : 0 .. N - 1) {
      run member(x, has(mortal, x), has(silent, x), (has(doubters, x) -> 1 : 0), (has(accusers, x) -> 1 : 0))
    }
    x = 0
  };
  /* When nothing moves any more, those that are still there are of one mind. */
  atomic {
    timeout && final[0] != 0 && final[1] != 0 && final[N / 2] != 0 && final[N - 1] != 0 ->
    for (x : 0 .. N - 1) {
      /* Nobody is out whom nobody has doubted. */
      assert(final[x] != NOTHING || has(doubted[0] | doubted[1] | doubted[N / 2] | doubted[N - 1], x));
      for (y : 0 .. N - 1) {
        assert(final[x] == NOTHING || final[y] == NOTHING || final[x] == final[y]);
        /* Nobody has gone on beside others. */
        assert(!isWhole(went[x]) || !isWhole(went[y]) || went[x] == went[y])
      }
    }
  }
}
