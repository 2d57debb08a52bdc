/* One role of the rotation engine on N nodes of a target: rotate, retire, cancel, reconcile, delete and
 * re-create, an emergency; strategy overlap, or swap with -DSWAP.
 *
 * Two engine workers take turns (fail-over, restart). Target calls are lost, answered late or land late. Storage
 * writes fail, fail though applied, or apply late. Nodes change behind the engine's back.
 *
 * check.sh runs every configuration and every mutation; README.md says what they mean.
 *
 * Bounds: N nodes, M materials (1 is installed at the start), FAILOVERS, EMERGENCIES, DRIFTS, DELETES.
 * -DSEEN    also check that what readers of storage see never turns round (see README.md)
 * -DREPEAT  a write of unknown outcome is repeated until it is answered, not just read again
 * -DBARRIER after a write of unknown outcome another key is written, until that is answered, and only then read again
 *
 * Mutations, each of which must give a counterexample:
 * -DNOWAIT         resume without waiting for the attempt's deadline
 * -DNOINTENT       call the target before the intent is stored
 * -DEAGERUNDO      roll back at the target before promoting back
 * -DTRUSTPUT       treat a storage error as "not applied" and call on
 * -DSTALE          a worker of an earlier term may still write            (needs FAILOVERS=2)
 * -DREORDER        a write given up on may apply after a later write
 * -DBAREREFUSE     refuse without accepting current in the same change (needs DRIFTS)
 * -DDISCARD        discard pending before it was proven refused
 * -DPRUNE          forget previous before it was proven refused
 * -DPASTRETURN     cancel after the retirement began
 * -DRECONCILEBLIND accept only current where something else is accepted, whatever the phase
 * -DDELETEBUSY     delete while a rotation runs
 * -DDROPTOMB       delete leaves no tombstone
 * -DTOMBOLD        delete takes a tombstone that is already there for its own
 * -DADOPTLAST      re-creation removes the tombstone before the role is stored
 * -DSWAPLATE       swap: promote before the target accepts pending
 * -DSWAPBACK       swap: promote back before the target accepts previous (the order that overlap needs)
 */
#ifndef N
#define N 2
#endif
#ifndef M
#define M 3
#endif
#ifndef FAILOVERS
#define FAILOVERS 1
#endif
#ifndef EMERGENCIES
#define EMERGENCIES 0
#endif
#ifndef DRIFTS
#define DRIFTS 0
#endif
#ifndef DELETES
#define DELETES 0
#endif

#define IDLE      0
#define STAGED    1   /* pending stored; applied and tested here */
#define ABORTING  2   /* not promoted: pending to be refused, then discarded */
#define GRACE     3   /* promoted; previous still accepted */
#define RETIRING  4   /* point of no return: previous to be refused */
#define UNDOING   5   /* promoted back; the failed one to be refused */
#define RECONCILE 6   /* drifted: current to be accepted again, and nothing else */
#define UNSWAP    7   /* swap only: on the way back, previous to be accepted again before it is promoted back */
#define EMERGENCY 8   /* compromised: pending to be accepted and promoted at once */
#define PURGING   9   /* only current stays accepted */
#define ABSENT   10   /* deleted: no role entry */

/* What storage holds. All but the last two fields are the role's entry: one entry, one atomic write. keep is the set
 * of materials that are neither current, previous nor pending and were not proven refused (stage failed). tomb and
 * tkeep are the tombstone, another entry: no write may change both. */
typedef Entry { byte phase, cur, prev, pend, keep, tomb, tkeep };
Entry st;
Entry late; bool lateset;     /* a write that answered with an error and may still apply, before any later write */

byte acc[N];                  /* bit m: the node accepts material m */
byte cset[N], cclr[N];        /* a call that may still land, or be dropped, until its deadline: accept, refuse */
byte alien[N];                /* accepted because the node changed behind our back */
byte gone[N];                 /* refused because the node changed behind our back; ends with the next call about it */
byte leader, term;            /* a worker's storage handle lives for one term */
byte failovers, emergencies, drifts, deletes;
byte fresh = 1;               /* highest material ever generated */

#define FOREIGN 128           /* a credential the engine never knew */
#define ALL 255
#define BIT(m) ((1 << (m)) & 254)                       /* of material 0, none: nothing */
#define idle(n) ((cset[n] | cclr[n]) == 0)
#if N > 1
#define calm (idle(0) && idle(1))
#define EVERY (acc[0] & acc[1])
#define SOME  (acc[0] | acc[1])
#else
#define calm idle(0)
#define EVERY acc[0]
#define SOME  acc[0]
#endif

#define STORED (BIT(st.cur) | BIT(st.prev) | BIT(st.pend) | st.keep | BIT(st.tomb) | st.tkeep)
#define COPY(a,b) a.phase = b.phase; a.cur = b.cur; a.prev = b.prev; a.pend = b.pend; a.keep = b.keep; a.tomb = b.tomb; a.tkeep = b.tkeep
#define ZERO(a) a.phase = 0; a.cur = 0; a.prev = 0; a.pend = 0; a.keep = 0; a.tomb = 0; a.tkeep = 0

/* A write becomes visible. Whoever reads must never see served material vanish without an undo, nor a direction that
 * was stored turn round. */
#ifdef SEEN
#define turns(x) ( \
  (st.phase == GRACE && x.phase != GRACE && x.phase != RETIRING && x.phase != UNDOING && x.phase != UNSWAP && x.phase != EMERGENCY) || \
  (st.phase == ABORTING && (x.phase == GRACE || (x.phase == STAGED && x.pend == st.pend))) || \
  ((st.phase == UNDOING || st.phase == UNSWAP) && (x.phase == GRACE || x.phase == RETIRING)) || \
  (st.phase == RETIRING && (x.phase == GRACE || x.phase == UNDOING || x.phase == UNSWAP)) )
#define APPLY(x) assert(!turns(x)); COPY(st, x)
#else
#define APPLY(x) COPY(st, x)
#endif
inline flush() { if :: lateset -> if :: APPLY(late) :: skip fi; lateset = 0; ZERO(late) :: else fi }

/* Write w; ok tells the worker, which is not always the truth. If it says so, the call that w is the intent of goes
 * out: from here it may land any time until its deadline. */
inline put() {
  fenced = 0;
  if
#ifdef STALE
  :: leader != me -> ok = 0; fenced = 1
#else
  :: leader != me || term != born -> ok = 0; fenced = 1
#endif
  :: else ->
#ifndef REORDER
     flush();
#endif
     if
     :: APPLY(w); ok = 1
     :: ok = 0                                              /* failed */
     :: APPLY(w); ok = 0                                    /* failed, though applied */
#ifdef REORDER
     :: !lateset ->
#else
     ::
#endif
        COPY(late, w); lateset = 1; ok = 0                  /* failed, applies later or never */
     fi
  fi;
  if :: ok && (sett | clr) -> launch() :: else fi
}
inline launch() {
  cset[0] = sett; cclr[0] = clr;
#if N > 1
  cset[1] = sett; cclr[1] = clr
#endif
}
#define accept(m)       sett = (m); clr = 0
#define acceptonly(m)   sett = (m); clr = ALL
#ifdef BAREREFUSE
#define refuse(m)       sett = 0;   clr = (m)
#else
#define refuse(m)       sett = BIT(w.cur); clr = (m)     /* not exclusive, and never without what is served */
#endif
#define every(m)        ((every & (m)) == (m))

proctype Worker(byte me) {
  Entry w;                                    /* what was read, and then what is to be written */
  byte every, some;                           /* what the probe found accepted at every node, at some node */
  byte sett, clr;                             /* the call to make once w is stored */
  bool ok, asked, fenced;
  byte born;
end_loop:
  /* Read, and forget everything else. Once the last attempt's deadline has passed, probe; before it, only a request
   * (cancel, retire, emergency) may be stored. */
  if
#ifdef NOWAIT
  :: atomic { leader == me -> born = term; COPY(w, st); every = EVERY; some = SOME }
#else
  :: atomic { leader == me && calm -> born = term; COPY(w, st); every = EVERY; some = SOME }
  :: atomic { leader == me && !calm && (st.phase == STAGED || st.phase == GRACE) -> born = term; COPY(w, st); asked = 1 }
#endif
  fi;
  atomic {
    if
    /* ---- requests, at any time ---- */
    :: w.phase < EMERGENCY && emergencies < EMERGENCIES && fresh < M ->    /* supersedes whatever runs */
       emergencies++; fresh++; w.keep = w.keep | BIT(w.pend); w.pend = fresh; w.phase = EMERGENCY
    :: w.phase == STAGED ->                                                /* cancelled, or a check failed */
       w.phase = ABORTING
    :: w.phase == GRACE ->                                                 /* the grace ended, or retire on request */
       w.phase = RETIRING
    :: w.phase == GRACE ->                                                 /* cancelled, or a consumer failed */
#ifdef SWAP
#ifdef SWAPBACK
       w.keep = w.keep | BIT(w.cur); w.cur = w.prev; w.prev = 0; w.phase = UNDOING
#else
       w.phase = UNSWAP
#endif
#else
#ifdef EAGERUNDO
       acceptonly(BIT(w.prev)); launch(); sett = 0; clr = 0;
#endif
       w.keep = w.keep | BIT(w.cur); w.cur = w.prev; w.prev = 0; w.phase = UNDOING   /* a new version, old material */
#endif
#ifdef PASTRETURN
    :: w.phase == RETIRING -> w.keep = w.keep | BIT(w.cur); w.cur = w.prev; w.prev = 0; w.phase = UNDOING
#endif
#ifdef RECONCILEBLIND
    :: (w.phase == STAGED || w.phase == GRACE) && !asked && (some & ~BIT(w.cur)) != 0 -> acceptonly(BIT(w.cur))
#endif

    /* ---- rotation ---- */
    :: w.phase == IDLE && fresh < M && every(BIT(w.cur)) ->                /* preflight, generate */
       fresh++; w.pend = fresh; w.phase = STAGED;
#ifdef NOINTENT
       accept(BIT(w.pend)); launch(); sett = 0; clr = 0
#endif
    :: w.phase == STAGED && !asked ->
#ifdef SWAP
       if
#ifdef SWAPLATE
       :: 1
#else
       :: every(BIT(w.pend))
#endif
          -> w.prev = w.cur; w.cur = w.pend; w.pend = 0; w.phase = GRACE
       :: !every(BIT(w.pend)) -> acceptonly(BIT(w.pend))
       fi
#else
       if
       :: every(BIT(w.pend) | BIT(w.cur)) -> w.prev = w.cur; w.cur = w.pend; w.pend = 0; w.phase = GRACE
       :: else -> accept(BIT(w.pend) | BIT(w.cur))
       fi
#endif
    :: w.phase == ABORTING ->
       if
#ifdef DISCARD
       :: w.pend = 0; w.phase = IDLE
#endif
#ifdef SWAP
       :: (some & BIT(w.pend)) == 0 && every(BIT(w.cur)) -> w.pend = 0; w.phase = IDLE
       :: else -> acceptonly(BIT(w.cur))
#else
       :: (some & BIT(w.pend)) == 0 -> w.pend = 0; w.phase = IDLE
       :: else -> refuse(BIT(w.pend))
#endif
       fi
#ifdef SWAP                                                                /* drifted meanwhile: this rotation mends it */
    :: w.phase == GRACE && !asked && !every(BIT(w.cur)) -> acceptonly(BIT(w.cur))
#else
    :: w.phase == GRACE && !asked && !every(BIT(w.cur) | BIT(w.prev)) -> accept(BIT(w.cur) | BIT(w.prev))
#endif
    :: w.phase == RETIRING ->
       if
#ifdef PRUNE
       :: w.prev = 0; w.phase = IDLE
#endif
       :: (some & BIT(w.prev)) == 0 -> w.prev = 0; w.phase = IDLE
       :: (some & BIT(w.prev)) != 0 -> acceptonly(BIT(w.cur))
       :: (some & BIT(w.prev)) != 0 -> refuse(BIT(w.prev))
       fi
    :: w.phase == UNSWAP ->
       if
       :: every(BIT(w.prev)) -> w.keep = w.keep | BIT(w.cur); w.cur = w.prev; w.prev = 0; w.phase = UNDOING
       :: else -> acceptonly(BIT(w.prev))
       fi
    :: w.phase == UNDOING ->
       if
       :: (some & w.keep) == 0 -> w.keep = 0; w.phase = IDLE
#ifdef SWAP
       :: else -> acceptonly(BIT(w.cur))
#else
       :: else -> refuse(w.keep)
#endif
       fi

    /* ---- emergency ---- */
    :: w.phase == EMERGENCY ->
       if
       :: every(BIT(w.pend)) ->
          w.keep = w.keep | BIT(w.cur) | BIT(w.prev); w.prev = 0; w.cur = w.pend; w.pend = 0; w.phase = PURGING
#ifdef SWAP
       :: else -> acceptonly(BIT(w.pend))
#else
       :: else -> accept(BIT(w.pend))
#endif
       fi
    :: w.phase == PURGING ->
       if
       :: (some & w.keep) == 0 -> w.keep = 0; w.phase = IDLE
       :: else -> acceptonly(BIT(w.cur))
       fi

    /* ---- reconcile ---- */
#if DRIFTS > 0
    :: w.phase == IDLE && (!every(BIT(w.cur)) || (some & ~BIT(w.cur)) != 0) -> w.phase = RECONCILE
    :: w.phase == RECONCILE ->
       if
       :: every(BIT(w.cur)) && (some & ~BIT(w.cur)) == 0 -> w.phase = IDLE
       :: (some & ~BIT(w.cur)) != 0 -> acceptonly(BIT(w.cur))
       :: !every(BIT(w.cur)) && (some & ~BIT(w.cur)) == 0 -> accept(BIT(w.cur))
       :: w.phase = IDLE                                                   /* cancelled: drifted still */
       fi
#endif

    /* ---- delete and re-create ---- */
#if DELETES > 0
#ifdef DELETEBUSY
    :: w.phase < EMERGENCY && deletes < DELETES && !asked ->
#else
    :: w.phase == IDLE && deletes < DELETES ->
#endif
       if
#ifdef DROPTOMB
       :: 1
#else
#ifdef TOMBOLD
       :: w.tomb != 0
#else
       :: w.tomb == w.cur
#endif
#endif
          -> deletes++;                                                    /* second the role goes */
          w.phase = ABSENT; w.cur = 0; w.prev = 0; w.pend = 0; w.keep = 0
#ifndef DROPTOMB
       :: w.tomb != w.cur ->                                               /* first the tombstone */
          w.tomb = w.cur; w.tkeep = BIT(w.prev) | BIT(w.pend) | w.keep
#endif
       fi
    :: w.phase == IDLE && w.tomb -> w.tomb = 0; w.tkeep = 0                /* left over by a re-creation */
    :: w.phase == ABSENT && w.tomb ->
#ifdef ADOPTLAST
       w.tomb = 0; w.tkeep = 0
#else
       w.cur = w.tomb; w.phase = IDLE
#endif
#endif
    :: else -> asked = 0; goto wait
    fi;
#ifdef REPEAT
    asked = 0
  }
again:
  atomic {
#endif
    put();
#ifdef TRUSTPUT
    if :: !ok && w.phase == UNDOING && sett == 0 && clr == 0 -> acceptonly(w.keep); launch() :: else fi;   /* "not applied, so retire" */
#endif
#ifdef REPEAT
    if :: !ok && !fenced -> goto again :: else fi;
#endif
#ifdef BARRIER
    if :: ok || fenced -> goto wait :: else fi
  }
again:
  atomic {
    if
    :: leader != me || term != born -> skip
    :: else -> if :: flush() :: goto again fi                              /* what came before has applied, or never will */
    fi;
#endif
wait:
    ok = 0; asked = 0; fenced = 0; sett = 0; clr = 0; every = 0; some = 0; ZERO(w);
#ifndef STALE
    born = 0
#endif
  }
  goto end_loop
}

inline land(n) {
  was = acc[n];
  if
  :: acc[n] = (acc[n] & ~cclr[n]) | cset[n];
     gone[n] = gone[n] & ~(cclr[n] | cset[n]); alien[n] = alien[n] & acc[n] & ~cset[n]
  :: skip
  fi;
  cset[n] = 0; cclr[n] = 0;
  /* 4 no call of the engine shuts a user out: what is left holds something that is in storage */
  assert((was & STORED) == 0 || (acc[n] & STORED) != 0);
  was = 0
}
/* a node changes behind the engine's back */
inline drift(n) {
  drifts++; was = acc[n];
  if
  :: acc[n] = acc[n] & ~BIT(st.cur)          /* drops what is served */
  :: acc[n] = BIT(1)                         /* comes back with the list of the first day */
  :: acc[n] = acc[n] | FOREIGN               /* accepts what nobody here knows */
  fi;
  gone[n] = (gone[n] | (was & ~acc[n])) & ~acc[n];
  alien[n] = (alien[n] | (acc[n] & ~was)) & acc[n];
  was = 0
}
proctype Environment() {
  byte was;
end:
  do
  :: atomic { !idle(0) -> land(0) }
#if N > 1
  :: atomic { !idle(1) -> land(1) }
#endif
  :: atomic { lateset -> APPLY(late); lateset = 0; ZERO(late) }
  :: atomic { failovers < FAILOVERS ->
#ifndef REORDER
       flush();
#endif
       failovers++; term++; leader = 1 - leader }
#if DRIFTS > 0
  :: atomic { drifts < DRIFTS -> drift(0) }
#if N > 1
  :: atomic { drifts < DRIFTS -> drift(1) }
#endif
#endif
  od
}

#ifdef SWAP
#define window (st.phase == STAGED || st.phase == ABORTING || st.phase == UNSWAP || st.phase == EMERGENCY)
#define overlap 0
#else
#define window 0
#define overlap (st.phase == GRACE)
#endif
/* 1 nothing is lost: whatever a node accepts is in storage, unless the node was changed behind our back */
#define lost(n)    ((acc[n] & ~STORED & ~alien[n]) != 0)
/* 2 what is served works, at every node, unless the node dropped it and was not told about it again since */
#define refused(n) (!window && (BIT(st.cur) & ~acc[n] & ~gone[n]) != 0)
/* 3 overlap is real */
#define torn(n)   (overlap && (BIT(st.prev) & ~acc[n] & ~gone[n]) != 0)
/* swap: no node is ever without a credential that is in storage */
#define shut(n)    (st.phase != ABSENT && !gone[n] && (acc[n] & STORED) == 0)

active proctype Watch() {
  atomic { st.cur = 1; acc[0] = BIT(1);
#if N > 1
    acc[1] = BIT(1);
#endif
    run Worker(0); run Worker(1); run Environment() }
end:
  do
  :: atomic { lost(0) -> assert(false) }
  :: atomic { refused(0) -> assert(false) }
  :: atomic { torn(0) -> assert(false) }
  :: atomic { shut(0) -> assert(false) }
#if N > 1
  :: atomic { lost(1) -> assert(false) }
  :: atomic { refused(1) -> assert(false) }
  :: atomic { torn(1) -> assert(false) }
  :: atomic { shut(1) -> assert(false) }
#endif
  od
}
