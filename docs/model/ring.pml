/* A secret that no server holds, and that P consumers read: a key ring that signs (jwt), -DENCRYPT one that encrypts
 * (encryption-key), or -DAPIKEY an api-key with a previous_field. Rotate, cancel, take keys out of the ring, an
 * emergency; the worker may die at every step, and storage writes and publications have unknown outcomes.
 *
 * A consumer has what it has last read: the key that it uses, and those that it accepts. What was made with a key
 * counts for as long as a token lives, or until it was encrypted anew. Time is told by what must have happened when it
 * has passed: what was signed before a date is dead when that is a token's life ago.
 *
 * Mutations:
 * -DNOTAHEAD     promote what was not shown as next
 * -DUNREAD       promote before every consumer was seen to have read the next key
 * -DNOTKEPT      promotion drops the earlier key
 * -DEARLYGRACE   the grace counts from promotion, not from when consumers had moved
 * -DEARLYDATE    on the way back a key that was used is dated when that is published, not when consumers had moved
 * -DBACKDROPS    the way back drops the key that was used
 * -DENDRETIRES   the end of a rotation takes out the key that encrypted      (ENCRYPT)
 * -DUNACKED      a key leaves before what it encrypted was acknowledged      (ENCRYPT)
 * -DFORGETSKEYS  an emergency takes out keys that have to decrypt            (ENCRYPT)
 * -DSIGNSON      an emergency keeps the earlier keys that sign
 * -DCLEARFIRST   what failed is not shown any more before consumers have left it   (APIKEY)
 * -DNOWAIT       who resumes does not wait for a publication that may still land
 */
#include "transitions.h"
#include "rows.h"
#ifndef P
#define P 2
#endif
#ifndef M
#define M 3
#endif
#define IDLE 0
#define RING 1
#define LEAVE 2
#define EMERGENCY 3
#define CLEAR 4
#define BIT(m) ((1 << (m)) & 254)

typedef Entry { byte phase, job, cur, next, prevs, from; bool acked };
Entry st;
byte dsign = 1, dset = 2;            /* published: the key to use, those to accept */
byte psign, pset;                    /* a publication that may still land, or be dropped */
byte vsign[P] = 1, vset[P] = 2;      /* what a consumer has read */
byte live = 2;                       /* keys that something counts of */
byte young;                          /* of these, that was made since the key's date */
byte comp, fresh = 1, urgents;
byte hurried;                        /* the key of an emergency, which nobody was shown before */

#define COPY(a, b) a.phase = b.phase; a.job = b.job; a.cur = b.cur; a.next = b.next; a.prevs = b.prevs; a.from = b.from; a.acked = b.acked
#define ZERO(a) a.phase = 0; a.job = 0; a.cur = 0; a.next = 0; a.prevs = 0; a.from = 0; a.acked = 0
#define move_(t, f, on, to) assert(w.phase == at_##f); ROW(row_##t##_##f##_##on##_##to); w.phase = at_##to
#define move(t, f, on, to)  move_(t, f, on, to)
#ifdef APIKEY
#define T rotate
#else
#define T ring
#endif
#define ALLREAD  (vsign[0] == dsign && vset[0] == dset && vsign[1] == dsign && vset[1] == dset)
#ifdef UNREAD
#define READ 1
#else
#define READ ALLREAD
#endif
#define KEYS     (BIT(w.cur) | BIT(w.next) | w.prevs)
#define SHOWN    (dsign == w.cur && dset == KEYS)
#define show     wsign = w.cur; wset = KEYS
#define over    w.job = 0; w.from = 0; w.next = 0; w.acked = 0
#define takeback w.prevs = (w.prevs | BIT(w.cur)) & ~BIT(w.from); w.next = w.cur; w.cur = w.from; w.from = w.next; w.next = 0
#ifdef BACKDROPS
#define tookback w.cur = w.from; w.prevs = w.prevs & ~BIT(w.from); dated = 0
#else
#define tookback takeback
#endif
/* a key's date is now: what counts of it from here on is young */
#define date(k)  dated = BIT(k)

inline promoted() {
#ifdef NOTKEPT
  w.prevs = 0;
#else
  w.prevs = w.prevs | BIT(w.cur);
#endif
  w.cur = w.next; w.next = 0; move(T, promote, done, publish);
#ifdef EARLYGRACE
  date(w.from)
#endif
}

proctype Worker() {
  Entry w;
  byte wsign, wset, dated, k;
endless:
  do
  :: atomic {
#ifndef NOWAIT
    pset == 0 ->
#endif
    COPY(w, st);
    if
    /* ---- requests ---- */
    :: w.phase == IDLE && fresh < M -> w.job = RING; w.phase = at_preflight
#ifndef APIKEY
    :: w.phase == IDLE && w.prevs -> w.job = LEAVE; w.phase = at_preflight;
       if :: (w.prevs & BIT(1)) -> w.from = 1 :: (w.prevs & BIT(2)) -> w.from = 2 :: (w.prevs & BIT(3)) -> w.from = 3 fi
    :: w.job == LEAVE ->
       if
       :: w.phase == at_preflight -> move(leave, preflight, bad, failed); over
       :: w.phase == at_preflight -> move(leave, preflight, recall, cancelled); over
#ifdef ENCRYPT
#ifdef UNACKED
       :: w.phase == at_preflight -> move(leave, preflight, done, retire)
#else
       :: w.phase == at_preflight && !w.acked && (live & BIT(w.from)) == 0 && vsign[0] != w.from && vsign[1] != w.from -> w.acked = 1   /* who encrypted it anew says so */
       :: w.phase == at_preflight && w.acked -> move(leave, preflight, done, retire)
#endif
#else
       :: w.phase == at_preflight ->                                                         /* its time has come */
          live = live & ~(BIT(w.from) & ~young); move(leave, preflight, done, retire)
#endif
       :: w.phase == at_retire -> w.prevs = w.prevs & ~BIT(w.from); move(leave, retire, done, publish_retired)
       :: w.phase == at_publish_retired && !SHOWN -> show
       :: w.phase == at_publish_retired && SHOWN -> move(leave, publish_retired, done, sync_retired)
       :: w.phase == at_sync_retired -> move(leave, sync_retired, done, completed); over
       :: else -> goto skipped
       fi
    :: w.job < EMERGENCY && !urgents && fresh < M -> urgents = 1; w.job = EMERGENCY; w.next = 0; w.from = 0; w.phase = at_preflight
#endif
    :: w.job == EMERGENCY ->
       if
       :: w.phase == at_preflight -> move(emergency, preflight, done, generate)
       :: w.phase == at_generate && fresh < M -> fresh++; w.next = fresh; move(emergency, generate, done, apply)
       :: w.phase == at_generate && fresh >= M -> goto skipped
       :: w.phase == at_apply ->
          move(emergency, apply, done, test); move(emergency, test, done, promote);
          w.prevs = w.prevs | BIT(w.cur); w.cur = w.next; w.next = 0;
          move(emergency, promote, done, retire)
       :: w.phase == at_retire ->
#if !defined(ENCRYPT) && !defined(SIGNSON) || defined(FORGETSKEYS)
          w.prevs = 0;
#endif
          move(emergency, retire, done, publish_retired)
       :: w.phase == at_publish_retired && !SHOWN -> show
       :: w.phase == at_publish_retired && SHOWN -> move(emergency, publish_retired, done, sync_retired)
       :: w.phase == at_sync_retired -> move(emergency, sync_retired, done, restart_retired)
       :: w.phase == at_restart_retired -> move(emergency, restart_retired, done, check_retired)
       :: w.phase == at_check_retired -> move(emergency, check_retired, done, completed); over
       fi

    /* ---- rotation ---- */
    :: w.job == RING ->
       if
       :: w.phase == at_preflight -> move(T, preflight, done, generate)
       :: w.phase == at_preflight -> move(T, preflight, bad, failed); over
       :: w.phase == at_preflight -> move(T, preflight, recall, cancelled); over
       :: w.phase == at_generate && fresh < M -> fresh++; w.next = fresh; w.from = w.cur; move(T, generate, done, apply)
       :: w.phase == at_generate -> move(T, generate, bad, failed); over
       :: w.phase == at_generate -> move(T, generate, recall, cancelled); over
       :: w.phase == at_apply -> w.next = 0; w.from = 0; move(T, apply, recall, apply_back)
#ifdef APIKEY
       :: w.phase == at_apply -> move(rotate, apply, done, test); move(rotate, test, done, promote); promoted()
#elif defined(NOTAHEAD)
       :: w.phase == at_apply -> w.phase = at_promote; promoted()
#else
       :: w.phase == at_apply -> move(ring, apply, done, test); move(ring, test, done, publish_ahead)
       :: w.phase == at_publish_ahead && !SHOWN -> show
       :: w.phase == at_publish_ahead && SHOWN -> move(ring, publish_ahead, done, sync_ahead)
       :: w.phase == at_sync_ahead && READ -> move(ring, sync_ahead, done, restart_ahead)
       :: w.phase == at_restart_ahead && READ -> move(ring, restart_ahead, done, check_ahead)
       :: w.phase == at_check_ahead && READ -> move(ring, check_ahead, done, promote); promoted()
       :: w.phase == at_publish_ahead -> w.next = 0; w.from = 0; move(ring, publish_ahead, recall, publish_back)
       :: w.phase == at_sync_ahead -> w.next = 0; w.from = 0; move(ring, sync_ahead, recall, publish_back)
       :: w.phase == at_restart_ahead -> w.next = 0; w.from = 0; move(ring, restart_ahead, recall, publish_back)
       :: w.phase == at_check_ahead -> w.next = 0; w.from = 0; move(ring, check_ahead, recall, publish_back)
#endif
       :: w.phase == at_publish && !SHOWN -> show
       :: w.phase == at_publish && SHOWN -> move(T, publish, done, sync)
       :: w.phase == at_sync && ALLREAD -> move(T, sync, done, restart)
       :: w.phase == at_restart && ALLREAD -> move(T, restart, done, check)
       :: w.phase == at_check && ALLREAD ->
          move(T, check, done, grace);
#ifndef EARLYGRACE
          date(w.from)
#endif
       :: w.phase == at_publish -> move(T, publish, recall, publish_back); tookback
       :: w.phase == at_sync -> move(T, sync, recall, publish_back); tookback
       :: w.phase == at_restart -> move(T, restart, recall, publish_back); tookback
       :: w.phase == at_check -> move(T, check, recall, publish_back); tookback
       :: w.phase == at_grace -> move(T, grace, recall, publish_back); tookback
#ifdef ENCRYPT
#ifdef ENDRETIRES
       :: w.phase == at_grace -> move(ring, grace, done, retire)
#else
       :: w.phase == at_grace -> move(ring, grace, kept, completed); over
#endif
#else
       :: w.phase == at_grace ->                                                             /* its time is over */
          live = live & ~(BIT(w.from) & ~young); move(T, grace, done, retire)
#endif
       :: w.phase == at_retire -> w.prevs = w.prevs & ~BIT(w.from); move(T, retire, done, publish_retired)
       :: w.phase == at_publish_retired && !SHOWN -> show
       :: w.phase == at_publish_retired && SHOWN -> move(T, publish_retired, done, sync_retired)
       :: w.phase == at_sync_retired -> move(T, sync_retired, done, completed); over

       :: w.phase == at_publish_back && !SHOWN -> show
       :: w.phase == at_publish_back && SHOWN ->
          move(T, publish_back, done, sync_back);
#ifdef EARLYDATE
          date(w.from)
#endif
       :: w.phase == at_sync_back && ALLREAD -> move(T, sync_back, done, restart_back)
#ifdef CLEARFIRST
       :: w.phase == at_sync_back -> w.job = CLEAR; w.prevs = 0; w.phase = at_publish_back
#endif
       :: w.phase == at_restart_back && ALLREAD -> move(T, restart_back, done, check_back)
       :: w.phase == at_check_back && ALLREAD ->
          move(T, check_back, done, apply_back);
#ifndef EARLYDATE
          date(w.from)
#endif
#ifdef APIKEY
       :: w.phase == at_apply_back && w.prevs -> w.job = CLEAR; w.prevs = 0; move(clear, apply_back, done, publish_back)
       :: w.phase == at_apply_back && !w.prevs -> move(T, apply_back, done, rolled_back); over
#else
       :: w.phase == at_apply_back -> move(T, apply_back, done, rolled_back); over
#endif
       :: else -> goto skipped
       fi
#ifdef APIKEY
    :: w.job == CLEAR ->
       if
       :: w.phase == at_publish_back && !SHOWN -> show
       :: w.phase == at_publish_back && SHOWN -> move(clear, publish_back, done, sync_back)
       :: w.phase == at_sync_back -> move(clear, sync_back, done, rolled_back); over
       fi
#endif
    :: else -> goto skipped
    fi;
    if
    :: COPY(st, w); young = young & ~dated; 
       if :: st.job == EMERGENCY && st.phase == at_retire -> comp = comp | st.prevs; hurried = BIT(st.cur) :: else fi;
       if :: wset -> psign = wsign; pset = wset :: else fi
    :: skip                                                                                  /* the write failed, or the worker died */
    fi;
skipped:
    wsign = 0; wset = 0; dated = 0; k = 0; ZERO(w)
    }
  od
}
inline consumer(i) {
  if
  :: vsign[i] = dsign; vset[i] = dset                                                        /* reads */
  :: live = live | BIT(vsign[i]); young = young | BIT(vsign[i])                              /* signs, or encrypts */
  fi
}
proctype Consumers() {
endless:
  do
  :: atomic { vsign[0] != dsign || vset[0] != dset || (live & young & BIT(vsign[0])) == 0 -> consumer(0) }
  :: atomic { vsign[1] != dsign || vset[1] != dset || (live & young & BIT(vsign[1])) == 0 -> consumer(1) }
  :: atomic { pset -> if :: dsign = psign; dset = pset :: skip fi; psign = 0; pset = 0 }
#ifdef ENCRYPT                                                                               /* encrypted anew, by who has another key */
  :: atomic { (live & BIT(1)) && vsign[0] != 1 && vsign[1] != 1 -> live = (live & ~BIT(1)) | BIT(vsign[0]) }
  :: atomic { (live & BIT(2)) && vsign[0] != 2 && vsign[1] != 2 -> live = (live & ~BIT(2)) | BIT(vsign[0]) }
#else                                                                                        /* the last token of a key ends */
  :: atomic { (live & BIT(1)) -> live = live & ~BIT(1); young = young & ~BIT(1) }
  :: atomic { (live & BIT(2)) -> live = live & ~BIT(2); young = young & ~BIT(2) }
#endif
  od
}
#ifdef APIKEY      /* who is asked reads what is published at once: what consumers use is shown there */
#define unknown(i) ((BIT(vsign[i]) & ~dset) != 0)
#elif defined(ENCRYPT)
#define unknown(i) ((live & ~hurried & ~vset[i]) != 0)
#else
#define unknown(i) ((live & ~comp & ~hurried & ~vset[i]) != 0)
#endif
/* of keys that sign none that was compromised is shown, when an emergency is over */
#ifdef ENCRYPT
#define leaked 0
#else
#define leaked (st.phase == IDLE && (dset & comp))
#endif
active proctype Watch() {
  atomic { st.cur = 1; run Worker(); run Consumers() }
endless:
  do
  :: atomic { unknown(0) -> broken(10) }
  :: atomic { unknown(1) -> broken(10) }
  :: atomic { leaked -> broken(7) }
  od
}
#ifdef LIVE
ltl ending { [] <> (st.phase == IDLE) }
#endif
