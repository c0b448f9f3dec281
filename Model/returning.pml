/* How ranks agree, in calls that can fail, that masked ranks return. It mirrors, by these names:
 *
 *   Sources/SwiftEP/Group/Mesh.swift: gather, Gathered
 *   Sources/SwiftEP/Masks.swift: takeBack
 *
 * All ranks take part; who is masked is left out. A call has a number of its own, and what a call has found is one for each
 * rank, here side by side in one number. What a rank is told lies in its links until it looks; then the last of each kind counts.
 *
 * Whoever gives up may leave others that have already succeeded with it: that cannot be excluded, since nobody knows of
 * the last message that it has come. Then (`isSplit`) the calls that follow may wait for ever. Otherwise, calls that nobody gives
 * up succeed, whatever has failed before.
 */

#ifndef N
#define N 3       /* ranks */
#endif
#ifndef CALLS
#define CALLS 1   /* that are to succeed, one behind the other */
#endif
#ifndef DOUBTER
#define DOUBTER 0 /* ranks that may give up a call, at any step, once each (a bit mask) */
#endif
#ifndef DEPTH
#define DEPTH 10  /* messages that a link may hold */
#endif

/* What the agreement relies on. The checks take each away in turn, and must then find what goes wrong. */
#ifndef RENEWING
#define RENEWING 1 /* who has found something looks again when a rank calls again */
#endif
#ifndef HOLDING
#define HOLDING 1  /* ... but for ranks that have found the same: they may be ahead, in their next call */
#endif
#ifndef FORGETTING
#define FORGETTING 1 /* what a call that has succeeded was told is no other's */
#endif

#define bit(x) (1 << (x))
#define has(set, x) (((set) & bit(x)) != 0)
#define NUMBERS 4
#define numberOf(found, x) (((found) >> (2 * (x))) & (NUMBERS - 1))
#define call(x, number) ((x) * NUMBERS + (number))

mtype = { PLACE, FOUND };
chan link[N * N] = [DEPTH] of { mtype, byte };
#define to(x) link[me * N + (x)]
#define from(x) link[(x) * N + me]

/* What is checked. */
byte successes[N * NUMBERS]; /* what a call has succeeded with */
bool isGivenUp[N * NUMBERS];
bool isSplit;

#define hasConfirmed(x) ((x) >= N || (x) == me || found == confirmed[x])
#define isAgreed (found != 0 && hasConfirmed(0) && hasConfirmed(1) && hasConfirmed(2))

/* What is known of a rank's call; 0: nothing. */
#define known(x) ((x) == me -> number : (HOLDING && found != 0 && confirmed[x] == found -> numberOf(found, x) : places[x]))
#define isThere(x) ((x) >= N || known(x) != 0)
#define areAllThere (isThere(0) && isThere(1) && isThere(2))
#if N == 2
#define all (known(0) | (known(1) << 2))
#else
#define all (known(0) | (known(1) << 2) | (known(2) << 4))
#endif

inline tell(kind, what) {
  x = 0;
  do
  :: x < N && x != me -> to(x)!kind(what); x++
  :: x == me -> x++
  :: x == N -> x = 0; break
  od
}

#define hears(x) (x) < N && (x) != me && nempty(from(x))
inline hear(x) {
  if
  :: from(x)?PLACE(what) -> places[x] = what
  :: from(x)?FOUND(what) -> confirmed[x] = what
  fi;
  what = 0
}

inline succeed() {
  successes[call(me, number)] = found;
  x = 0;
  do
  :: x < N ->
    /* No call succeeds with two different things. */
    assert(successes[call(x, numberOf(found, x))] == 0 || successes[call(x, numberOf(found, x))] == found);
    if
    :: isGivenUp[call(x, numberOf(found, x))] -> isSplit = true
    :: else
    fi;
    if
    :: FORGETTING && x != me && places[x] == numberOf(found, x) -> places[x] = 0
    :: else
    fi;
    if
    :: FORGETTING && x != me -> confirmed[x] = 0
    :: else
    fi;
    x++
  :: else -> break
  od;
  x = 0; found = 0; successCount++
}

inline giveUp() {
  isGivenUp[call(me, number)] = true;
  x = 0;
  do
  :: x < N * NUMBERS ->
    if
    :: successes[x] != 0 && numberOf(successes[x], me) == number -> isSplit = true
    :: else
    fi;
    x++
  :: else -> break
  od;
  x = 0; found = 0
}

proctype rank(byte me; bool doubts) {
  byte number, found, successCount, what, x;
  byte places[3], confirmed[3];

  do
  :: successCount < CALLS ->
    number++;
    tell(PLACE, number);
    do
    :: atomic { hears(0) -> hear(0) }
    :: atomic { hears(1) -> hear(1) }
#if N > 2
    :: atomic { hears(2) -> hear(2) }
#endif
    :: atomic { isAgreed -> succeed() }; break
    :: atomic { !isAgreed && areAllThere && all != found && (RENEWING || found == 0) -> found = all };
      tell(FOUND, found)
    :: atomic { doubts -> doubts = false; giveUp() }; break
    :: isSplit && timeout -> goto over
    od
  :: else -> break
  od;
over:
  skip
}

init {
  byte doubters, x;
  atomic {
    for (x : 0 .. N - 1) {
      if
      :: has(DOUBTER, x) -> doubters = doubters | bit(x)
      :: true
      fi
    }
    for (x : 0 .. N - 1) { run rank(x, has(doubters, x)) }
  }
}
