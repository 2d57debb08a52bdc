/* Three rotations that want one consumer: those that wait together share a delivery, and go alone when it fails.
 * Each may be bad (pods crash with its new version), drop out before it is promoted, or be cancelled later.
 *
 * Claims checked: no deadlock; none is rolled back but for its own fault or a cancel; a consumer is restarted by one at
 * once; whoever is over, pods run with what it serves. A restart has an id, and is made once for it.
 * -DNOBARRIER      a delivery does not wait for those that are to share it            (must break)
 * -DNOBACKBARRIER  the way back does not wait until all have turned                   (must break)
 * -DALLGUILTY      who went back with others is over                                  (must break)
 * -DHOLDON         a shared reservation lasts until all of it have ended              (must deadlock)
 */
#include "transitions.h"
#include "rows.h"
#define N 3
mtype = { START, WAITS, APPLIES, SHOWN, BACK, GRACE, OVER };
mtype st[N] = START;
bool bad[N], asked[N], alone[N], proven[N];
byte served[N] = 1, pods[N] = 1; /* versions; pods[r] is what pods run with of role r */
byte group[N];                   /* who shares the delivery of r, as it has noted */
byte entry = 0;                  /* the reservation */
bool shared = 0, marked[2];      /* the deliveries, there and back, that restarted the consumer */
bool restarting = 0;

#define BIT(r) (1 << (r))
#define IN(r, set) ((set) & BIT(r))
#ifdef HOLDON
#define LEFT(p) 0
#else
#define LEFT(p) (shared && (alone[p] && st[p] == WAITS || st[p] == GRACE))
#endif
#define HOLDS(p) (IN(p, entry) && st[p] != START && st[p] != OVER && !(st[p] == GRACE && !asked[p]) && !LEFT(p))
#define FREE(r) (((r) == 0 || !HOLDS(0)) && ((r) == 1 || !HOLDS(1)) && ((r) == 2 || !HOLDS(2)))
/* p is to share r's delivery, and has not come to it */
#define LATE(r, p) ((p) != (r) && IN(p, group[r]) && (st[p] == WAITS && !alone[p] || st[p] == APPLIES))
#define NOTBACK(r, p) ((p) != (r) && IN(p, group[r]) && (LATE(r, p) || st[p] == SHOWN && !proven[p]))
#define WITH(r, p, s) ((p) != (r) && IN(p, group[r]) && group[p] == group[r] && st[p] == s)
#define LED(r, s) ((r) > 0 && WITH(r, 0, s) || (r) > 1 && WITH(r, 1, s))
#define FAILED(r) (WITH(r, 0, BACK) || WITH(r, 1, BACK) || WITH(r, 2, BACK))

inline restart(way) {
  if
  :: marked[way] -> skip
  :: else ->
     atomic { must(21, !restarting); restarting = 1 }
     atomic { pods[0] = served[0]; pods[1] = served[1]; pods[2] = served[2]; marked[way] = 1; restarting = 0 }
  fi
}

inline reserve(set) { entry = set; shared = (set != BIT(r)); marked[0] = 0; marked[1] = 0 }

inline take(p) {
  if
  :: p != r && st[p] == WAITS && !alone[p] && !alone[r] -> if :: set = set | BIT(p) :: skip fi
  :: else
  fi
}

proctype Rotation(byte r) {
  byte set;
  bool ok;
  st[r] = WAITS;
wait:
  atomic {
    if
    :: !alone[r] && IN(r, entry) && st[r] == WAITS -> skip /* another one has reserved for it, too */
    :: FREE(r) && (alone[r] || !IN(r, entry)) -> set = BIT(r); take(0); take(1); take(2); reserve(set)
    fi;
    group[r] = entry; proven[r] = 0; st[r] = APPLIES; set = 0
  }
  if
  :: goto over /* its target fails: nothing of it was shown */
  :: skip
  fi;
  atomic { served[r] = 2; st[r] = SHOWN }
#ifndef NOBARRIER
  (!LATE(r, 0) && !LATE(r, 1) && !LATE(r, 2));
#endif
  do
  :: proven[r] -> atomic { st[r] = GRACE; goto grace }
  :: !proven[r] && FAILED(r) -> goto back
  :: !proven[r] && !FAILED(r) && !LED(r, SHOWN) ->
     restart(0);
     atomic {
       ok = !(bad[0] && pods[0] == 2 || bad[1] && pods[1] == 2 || bad[2] && pods[2] == 2);
       if
       :: !ok -> goto back
       :: ok && FAILED(r) -> skip
       :: else ->
          proven[r] = 1;
          if :: WITH(r, 0, SHOWN) -> proven[0] = 1 :: else fi;
          if :: WITH(r, 1, SHOWN) -> proven[1] = 1 :: else fi;
          if :: WITH(r, 2, SHOWN) -> proven[2] = 1 :: else fi
       fi
     }
  od;
back:
  st[r] = BACK;
#ifndef NOBACKBARRIER
  (!NOTBACK(r, 0) && !NOTBACK(r, 1) && !NOTBACK(r, 2));
#endif
  served[r] = 1;
  /* all that go back have published that before the first restart */
  (!(WITH(r, 0, BACK) && served[0] == 2) && !(WITH(r, 1, BACK) && served[1] == 2) && !(WITH(r, 2, BACK) && served[2] == 2));
  (!LED(r, BACK) || marked[1]);
  restart(1);
  atomic {
    must(23, pods[r] == 1);
#ifndef ALLGUILTY
    if
    :: group[r] != BIT(r) && !asked[r] ->
       if                                                  /* the last phase of a way back, with a server and without */
       :: ROW(row_rotate_apply_back_anew_preflight)
       :: ROW(row_clear_sync_back_anew_preflight)
       fi;
       alone[r] = 1; st[r] = WAITS; goto wait
    :: else
    fi;
#endif
    must(22, bad[r] || asked[r]); goto over
  }
grace:
  if
  :: atomic { asked[r] && FREE(r) -> set = BIT(r); reserve(set); group[r] = set; set = 0 }
     st[r] = BACK; served[r] = 1; restart(1)
  :: !asked[r] -> skip
  fi;
over:
  atomic { must(23, pods[r] == served[r]); st[r] = OVER }
}

/* somebody cancels what is served */
proctype Person(byte r) {
  if
  :: atomic { st[r] == SHOWN || st[r] == BACK || st[r] == GRACE -> asked[r] = 1 }
  :: skip
  fi
}

init {
  atomic {
    byte i = 0;
    do
    :: i < N ->
       if :: bad[i] = 1 :: bad[i] = 0 fi;
       run Rotation(i); run Person(i); i++
    :: else -> break
    od
  }
}
