/* One role of the rotation engine on N nodes of a target, with what is published and what its consumers run with:
 * rotate, cancel, retire, reconcile, delete and re-create, an emergency, a restored snapshot; strategy overlap, or
 * -DALTERNATE, or -DSWAP.
 *
 * Two engine workers take turns (fail-over, restart). Target calls and publications are lost, answered late or land
 * late. Storage writes fail, fail though applied, or apply late. Nodes change behind the engine's back.
 *
 * Phases are the code's, and each change of one is a row of its transition tables (transitions.h, made from them).
 * check.sh runs every configuration and every mutation; README.md says what they mean.
 *
 * Bounds: N nodes, M materials (1 is installed at the start), FAILOVERS, EMERGENCIES, DRIFTS, DELETES, RESTORES.
 * -DFINE    every row is a write of its own, as in a unit; else rows that a role alone takes in one write are one
 * -DLIVE    faults end some day, and consumers may refuse a version for ever: for the liveness properties
 *
 * Mutations, each of which takes a rule away and must be caught:
 *   before a call
 * -DNOWAIT         resume without waiting for the attempt's deadline
 * -DNOINTENT       call the target before the intent is stored
 *   storage
 * -DTRUSTPUT       treat a storage error as "not applied" and call on
 * -DREADAGAIN      after a storage error only read again, without settling the write
 * -DSTALE          a worker of an earlier term may still write            (needs FAILOVERS=2)
 * -DREORDER        a write given up on may apply after a later write
 *   probes decide
 * -DBLINDPROMOTE   promote without a fresh login that proves pending
 * -DDISCARD        discard pending before it was proven refused
 * -DPRUNE          forget previous before it was proven refused
 * -DBAREREFUSE     refuse without accepting current in the same change (needs DRIFTS)
 * -DRECONCILEBLIND accept only current where something else is accepted, whatever the phase
 *   rollback order, forward or back
 * -DEAGERUNDO      roll back at the target before promoting back
 * -DEAGERREFUSE    refuse what failed before consumers have left it
 * -DTURNAGAIN      a way back turns forward again
 * -DPASTRETURN     cancel after the retirement began
 * -DNOCHECK        retire what consumers were not proven to have left
 * -DEAGERPUBLISH   publish before it is proven
 *   strategies
 * -DSAMEUSER       alternate: the user in use gets the new password
 * -DSWAPLATE       swap: promote before the target accepts pending
 * -DSWAPBACK       swap: promote back before the target accepts previous (the order that overlap needs)
 *   emergency
 * -DSEIZENOW       does not wait for what the superseded rotation has sent
 * -DSEIZEFORGETS   forgets the pending material of the superseded rotation
 * -DEMERGENCYBACK  rolls back
 * -DTAKEOVERCANCEL one that has taken a rotation over can be cancelled
 * -DLATECANCEL     can be cancelled when the target may have heard
 * -DSPARES         does not refuse every earlier version
 *   delete, snapshots
 * -DDELETEBUSY     delete while a rotation runs
 * -DDROPTOMB       delete leaves no tombstone
 * -DTOMBOLD        delete takes a tombstone that is already there for its own
 * -DADOPTLAST      re-creation removes the tombstone before the role is stored
 * -DBLINDRESTORE   a run of before the engine was started goes on, whatever nodes accept
 * -DTAKESBACK      such a run serves the previous material again without having seen it accepted
 * -DSUREBACK       such a run goes back although consumers may run with what it takes away
 * -DSUREGRACE      such a run retires what it did not see consumers leave
 *   liveness
 * -DNORESUME       who takes over leaves what was begun
 * -DNORETRY        a call is made once
 * -DNODEADLINE     a phase at consumers has no deadline
 * -DSTUBBORN       an emergency waits for every consumer
 * -DNOSURVEY       a rotation begins although its consumers do not come up with what they have (needs EMERGENCIES)
 */
#include "transitions.h"
#include "rows.h"
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
#ifndef RESTORES
#define RESTORES 0
#endif

#define IDLE   0
#define ABSENT 99            /* deleted: no role entry */

/* What a run is: which transition table is its, and what it has noted. */
#define ROTATE    1
#define BACK      2          /* swap, on its way back after promotion */
#define RECONCILE 3
#define EMERGENCY 4
#define TAKEOVER  5          /* an emergency that took over from another rotation */
#define RESCUED   6          /* an emergency whose consumers have been served before all nodes refused the earlier ones */
#define urgent(e) (e.job >= EMERGENCY)

/* What storage holds. All but the last two fields are the role's entry: one entry, one atomic write. keep is the set
 * of materials that are neither current, previous nor pending and were not proven refused (stages failed and
 * compromised). tomb and tkeep are the tombstone, another entry: no write may change both. */
typedef Entry { byte phase, job, cur, prev, pend, keep, tomb, tkeep };
Entry st;
Entry late; bool lateset;     /* a write that answered with an error and may still apply, before any later write */

byte acc[N];                  /* bit m: the node accepts material m */
byte cset[N], cclr[N];        /* a call that may still land, or be dropped, until its deadline: accept, refuse */
byte doc = 1;                 /* the material that is published */
byte dcall;                   /* a publication that may still land, or be dropped */
byte use = 2;                 /* the materials that consumers run with */
byte alien[N];                /* accepted because the node changed behind our back */
byte gone[N];                 /* refused because the node changed behind our back; ends with the next call about it */
byte comp;                    /* what an emergency has declared compromised */
byte leader, term;            /* a worker's storage handle lives for one term */
byte failovers, emergencies, drifts, deletes;
byte fresh = 1;               /* highest material that was ever stored: one that no write has kept is nobody's */
#ifdef ALTERNATE
byte second;                  /* the materials that are passwords of the second user */
#define UM(m) (((BIT(m) & second) != 0) -> second : ALL & ~second)
#endif
#if RESTORES > 0
Entry snap; byte snapdoc; byte restores; bool taken;
bool admin;                   /* somebody has asked for a reconcile since the restore */
bool own = 1;                 /* the run began, or somebody vouched for it, since the worker did; else it may be a snapshot's */
#else
#define admin 0
#define own 1
#endif
#ifdef LIVE
bool quiet;                   /* no faults any more */
byte unfit;                   /* what consumers do not come up with */
#define fault !quiet
#else
#define unfit 0
#define fault 1
#endif

#define FOREIGN 128           /* a credential the engine never knew */
#define ALL 255
#define BIT(m) ((1 << (m)) & 254)                       /* of material 0, none: nothing */
#define idle(n) ((cset[n] | cclr[n]) == 0)
#if N > 1
#define calm (idle(0) && idle(1) && !dcall)
#define EVERY (acc[0] & acc[1])
#define SOME  (acc[0] | acc[1])
#else
#define calm (idle(0) && !dcall)
#define EVERY acc[0]
#define SOME  acc[0]
#endif

#define HELD(e) (BIT(e.cur) | BIT(e.prev) | BIT(e.pend) | e.keep | BIT(e.tomb) | e.tkeep)
#define STORED HELD(st)
#define COPY(a,b) a.phase = b.phase; a.job = b.job; a.cur = b.cur; a.prev = b.prev; a.pend = b.pend; a.keep = b.keep; a.tomb = b.tomb; a.tkeep = b.tkeep
#define ZERO(a) a.phase = 0; a.job = 0; a.cur = 0; a.prev = 0; a.pend = 0; a.keep = 0; a.tomb = 0; a.tkeep = 0

/* A write becomes visible. Whoever reads must never see served material vanish without an undo, nor a direction that
 * was stored turn round. */
#define promoted(e) (e.job == ROTATE && (e.phase == at_publish || e.phase == at_sync || e.phase == at_restart || e.phase == at_check || e.phase == at_grace))
#define back(e)     (e.phase == at_apply_back || e.phase == at_publish_back || e.phase == at_sync_back || e.phase == at_restart_back || e.phase == at_check_back)
#define past(e)     (e.phase == at_retire || e.phase == at_publish_retired || e.phase == at_sync_retired || e.phase == at_restart_retired || e.phase == at_check_retired)
#define turns(x) ( \
  (promoted(st) && !promoted(x) && !past(x) && !back(x) && !urgent(x)) || \
  (back(st) && !back(x) && x.phase != IDLE && !urgent(x)) || \
  (past(st) && !past(x) && x.phase != IDLE && !urgent(x)) )
#if RESTORES > 0
#if N > 1
#define ANEW(x) gone[0] = (x.cur != st.cur && !admin -> gone[0] & ~BIT(x.cur) : gone[0]); gone[1] = (x.cur != st.cur && !admin -> gone[1] & ~BIT(x.cur) : gone[1]);
#else
#define ANEW(x) gone[0] = (x.cur != st.cur && !admin -> gone[0] & ~BIT(x.cur) : gone[0]);
#endif
/* what is promoted, or served again, is to be accepted, whatever the target did before */
#define BEGINS(x) own = (x.phase == at_preflight -> 1 : own); ANEW(x)
#else
#define BEGINS(x)
#endif
#define APPLY(x) must(8, !turns(x)); BEGINS(x) COPY(st, x); comp = comp | (urgent(st) && st.phase == at_retire -> st.keep : 0); \
  fresh = (st.pend > fresh -> st.pend : fresh)
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
     :: fault -> ok = 0                                     /* failed */
     :: fault -> APPLY(w); ok = 0                           /* failed, though applied */
#ifdef REORDER
     :: !lateset && fault ->
#else
     :: fault ->
#endif
        COPY(late, w); lateset = 1; ok = 0                  /* failed, applies later or never */
     fi
  fi;
  if :: ok && (sett | clr) -> launch() :: else fi;
  if :: ok && dset -> dcall = dset :: else fi
}
inline launch() {
#if defined(NOWAIT) || defined(SEIZENOW)
  if                                                        /* before an earlier one that may still land */
  :: !idle(0) -> acc[0] = (acc[0] & ~clr) | sett
  :: cset[0] = sett; cclr[0] = clr
  fi;
#else
  cset[0] = sett; cclr[0] = clr;
#endif
#if N > 1
  cset[1] = sett; cclr[1] = clr
#endif
}
#define move(t, from, on, to)  assert(w.phase == at_##from); ROW(row_##t##_##from##_##on##_##to); w.phase = at_##to
#define ends                   w.job = 0
#define every(m)        ((every & (m)) == (m))
#define only(m)         (every(BIT(m)) && (some & ~BIT(m)) == 0)
#define acceptonly(m)   sett = (m); clr = ALL
#ifdef BAREREFUSE
#define KEEPCUR 0
#else
#define KEEPCUR BIT(w.cur)               /* never refuse without what is served */
#endif

/* What each strategy asks of the target, and how it is known to be so. */
#if defined(SWAP)
#define PENDOK       only(w.pend)
#define askpend      acceptonly(BIT(w.pend))
#define BACKOK       only(w.cur)
#define askback      acceptonly(BIT(w.cur))
#define askretire    acceptonly(BIT(w.cur))
#define RETIREOK     only(w.cur)
#elif defined(ALTERNATE)
#ifdef SAMEUSER
#define PENDOK       every(BIT(w.pend))
#define askpend      sett = BIT(w.pend); clr = UM(w.pend)
#else
#define PENDOK       (every(BIT(w.pend) | BIT(w.cur)) && (some & UM(w.pend) & ~BIT(w.pend)) == 0)
#define askpend      sett = BIT(w.pend) | BIT(w.cur); clr = UM(w.pend)
#endif
#define BACKOK       (every(BIT(w.cur)) && (some & w.keep) == 0)
#define askback      sett = BIT(w.cur); clr = ALL & ~UM(w.cur)
#define askretire    sett = KEEPCUR; clr = ALL & ~UM(w.cur)
#define RETIREOK     (every(BIT(w.cur)) && (some & ~UM(w.cur)) == 0)
#else
#define PENDOK       every(BIT(w.pend) | BIT(w.cur))
#define askpend      sett = BIT(w.pend) | BIT(w.cur); clr = 0
#define BACKOK       (every(BIT(w.cur)) && (some & w.keep) == 0)
#define askback      sett = KEEPCUR; clr = w.keep
#define askretire    sett = KEEPCUR; clr = ALL
#define RETIREOK     only(w.cur)
#endif
#if defined(SWAP)
#define askurgent    acceptonly(BIT(w.pend))
#elif defined(ALTERNATE)
#define askurgent    sett = BIT(w.pend); clr = UM(w.pend)
#else
#define askurgent    sett = BIT(w.pend); clr = 0
#endif

#define promote      w.prev = w.cur; w.cur = w.pend; w.pend = 0
#define promoteback  w.keep = w.keep | BIT(w.cur); w.cur = w.prev; w.prev = 0
#define giveup       w.keep = w.keep | BIT(w.pend); w.pend = 0
#define forget       w.prev = 0; w.keep = 0           /* proven refused */
#ifdef NOCHECK
#define MOVED 1
#else
#define MOVED (used == BIT(w.cur))
#endif
#ifdef NORETRY
#define again_ok tried == 0
#else
#define again_ok 1
#endif
#ifdef FINE
#define whole 0
#else
#define whole 1
#endif

inline generate() {
  w.pend = fresh + 1;
#ifdef ALTERNATE
#ifdef SAMEUSER
  if :: (BIT(w.cur) & second) -> second = second | BIT(w.pend) :: else -> second = second & ~BIT(w.pend) fi;
#else
  if :: !(BIT(w.cur) & second) -> second = second | BIT(w.pend) :: else -> second = second & ~BIT(w.pend) fi;
#endif
#endif
#ifdef LIVE
  if :: unfit = unfit | BIT(w.pend) :: unfit = unfit & ~BIT(w.pend) fi;
#endif
}
/* publish: what is served is shown; -> next when it is */
#define SHOWN (shown == w.cur)

/* Consumers that do not come up with what is published are in the middle of a rollout: an emergency leaves them so. */
#ifdef NOSURVEY
#define WELL 1
#else
#define WELL ((unfit & BIT(shown)) == 0)
#endif

#ifdef NODEADLINE
#define MAYTURN 0
#else
#define MAYTURN 1
#endif
/* a node accepts what is served, and nothing that nobody here knows; where a server knows one, one of those */
#if defined(SWAP)
#define KNOWNAT(n) ((acc[n] & STORED) != 0 && (acc[n] & ~STORED) == 0)
#else
#define KNOWNAT(n) ((acc[n] & BIT(st.cur)) != 0 && (acc[n] & ~STORED) == 0)
#endif
#if N > 1
#define KNOWN (KNOWNAT(0) || KNOWNAT(1))
#else
#define KNOWN KNOWNAT(0)
#endif
#if RESTORES > 0
#define NOEXTRA ((some & ~STORED) == 0)
#else
#define NOEXTRA 1
#endif
/* Where every node accepts pending, it may have been promoted: only consumers that run with current show that it was not. */
#ifdef SUREBACK
#define MAYUNDO 1
#else
#define MAYUNDO (own || !every(BIT(w.pend)) || used == BIT(w.cur))
#endif
#if defined(TAKESBACK)
#define MAYTAKE 1
#elif defined(SWAP)
#define MAYTAKE (own || fit)
#else
#define MAYTAKE (own || (fit && every(BIT(w.prev))))
#endif
#ifdef SUREGRACE
#define MAYRETIRE 1
#else
#define MAYRETIRE (own || MOVED)
#endif
inline look() {
  born = term; COPY(w, st); every = EVERY; some = SOME; shown = doc; used = use;
#if RESTORES > 0
  fit = KNOWN
#endif
}
inline serve() { promote; move(rotate, promote, done, publish) }
inline urgentpromote() {
  move(emergency, test, done, promote);
  if :: whole -> urgentserve() :: !whole -> skip fi
}
inline urgentserve() {
  w.keep = w.keep | BIT(w.cur) | BIT(w.prev); w.prev = 0; w.cur = w.pend; w.pend = 0;
  move(emergency, promote, done, retire); askretire
}
inline urgentretired() {
  move(emergency, retire, done, publish_retired);
  if
  :: w.job == RESCUED ->
     move(emergency, publish_retired, done, sync_retired); move(emergency, sync_retired, done, restart_retired);
     move(emergency, restart_retired, done, check_retired);
     if :: used == BIT(w.cur) -> move(emergency, check_retired, done, completed) :: else -> move(emergency, check_retired, missed, partial) fi;
     ends
  :: else
  fi
}
inline retired() {
  move(rotate, retire, done, publish_retired);
  if :: whole && SHOWN -> move(rotate, publish_retired, done, sync_retired); move(rotate, sync_retired, done, completed); ends
  :: !(whole && SHOWN) -> skip fi
}
/* Cancelled, a consumer failed, or its deadline has passed. */
#ifdef EAGERUNDO
#define turn(p)    acceptonly(BIT(w.prev)); launch(); sett = 0; clr = 0; promoteback; move(rotate, p, recall, publish_back)
#else
#define turn(p)    promoteback; move(rotate, p, recall, publish_back)   /* a new version, old material */
#endif
#ifdef SWAPBACK
#define unswap(p)  promoteback; w.job = ROTATE; w.phase = at_publish_back
#else
#define unswap(p)  w.job = BACK; move(swapback, p, recall, apply_back); acceptonly(BIT(w.prev))
#endif

proctype Worker(byte me) {
  Entry w;                                    /* what was read, and then what is to be written */
  byte every, some, shown, used;              /* what was found: accepted at every node, at some node; published; used */
  byte sett, clr, dset;                       /* the call to make once w is stored */
  bool ok, hasty, fenced, fit;
  byte born;
#if defined(NORESUME) || defined(NORETRY)
  byte mine = 99, tried;
#endif
end_loop:
  /* Read, and forget everything else. Once the last attempt's deadline has passed, probe; before it, only an
   * emergency may be stored. */
  if
#ifdef NORESUME
  :: atomic { leader == me && calm && (mine == term || st.phase == IDLE) -> look() }
#elif defined(NOWAIT)
  :: atomic { leader == me -> look() }
#else
  :: atomic { leader == me && calm -> look() }
#if EMERGENCIES > 0
#ifdef SEIZENOW
  :: atomic { leader == me && !calm && st.job >= EMERGENCY -> look() }
#endif
  :: atomic { leader == me && !calm && emergencies < EMERGENCIES && fresh < M && st.phase != ABSENT && st.job < EMERGENCY ->
       born = term; COPY(w, st); hasty = 1 }
#endif
#endif
  fi;
  atomic {
    if
#if EMERGENCIES > 0
    /* ---- an emergency supersedes whatever runs, at any time ---- */
    :: w.phase != ABSENT && w.job < EMERGENCY && emergencies < EMERGENCIES && fresh < M ->
       emergencies++;
       if :: w.phase == IDLE -> w.job = EMERGENCY :: else -> w.job = TAKEOVER fi;
#ifdef SEIZEFORGETS
       w.pend = 0;
#else
       giveup;
#endif
       w.phase = at_preflight
    :: !hasty && urgent(w) ->
       if
       :: w.phase == at_preflight -> move(emergency, preflight, done, generate)
#ifdef TAKEOVERCANCEL
       :: w.phase == at_preflight -> move(emergency, preflight, recall, cancelled); ends
#else
       :: w.phase == at_preflight && w.job == EMERGENCY -> move(emergency, preflight, recall, cancelled); ends
       :: w.phase == at_preflight && w.job == EMERGENCY -> move(emergency, preflight, bad, failed); ends
#endif
       :: w.phase == at_generate && w.job == EMERGENCY -> move(emergency, generate, recall, cancelled); ends
       :: w.phase == at_generate && w.job == EMERGENCY -> move(emergency, generate, bad, failed); ends
       :: w.phase == at_generate && fresh < M -> generate(); move(emergency, generate, done, apply); askurgent
       :: w.phase == at_apply && every(BIT(w.pend)) ->
          move(emergency, apply, done, test);
          if :: whole -> urgentpromote() :: !whole -> skip fi
       :: w.phase == at_apply && !every(BIT(w.pend)) -> askurgent
#ifdef LATECANCEL
       :: w.phase == at_apply -> w.pend = 0; w.phase = IDLE; ends
#endif
       :: w.phase == at_test -> urgentpromote()
       :: w.phase == at_promote && every(BIT(w.pend)) ->  /* it is long since it was tested */
          urgentserve()
       :: w.phase == at_promote && !every(BIT(w.pend)) -> askurgent
#ifdef EMERGENCYBACK
       :: past(w) && (w.keep & BIT(1)) -> w.pend = w.cur; w.cur = 1; w.job = ROTATE; w.phase = at_publish_back; giveup
#endif
#ifdef SPARES
       :: w.phase == at_retire && every(BIT(w.cur)) -> w.keep = 0; urgentretired()
#else
       :: w.phase == at_retire && RETIREOK -> forget; urgentretired()
#endif
       :: w.phase == at_retire && !RETIREOK && again_ok -> askretire
       :: w.phase == at_retire && !RETIREOK && w.job != RESCUED && fault -> move(emergency, retire, bad, publish)
       :: w.phase == at_publish && !SHOWN -> dset = w.cur
       :: w.phase == at_publish && SHOWN -> move(emergency, publish, done, sync)
       :: w.phase == at_sync -> move(emergency, sync, done, restart)       /* done, or not proven in time */
       :: w.phase == at_restart -> move(emergency, restart, done, check)
       :: w.phase == at_check -> w.job = RESCUED; move(emergency, check, done, retire)
       :: w.phase == at_publish_retired && !SHOWN -> dset = w.cur
       :: w.phase == at_publish_retired && SHOWN ->
          move(emergency, publish_retired, done, sync_retired);
          if :: whole -> move(emergency, sync_retired, done, restart_retired); move(emergency, restart_retired, done, check_retired)
          :: !whole -> skip fi
       :: w.phase == at_sync_retired -> move(emergency, sync_retired, done, restart_retired)
       :: w.phase == at_restart_retired -> move(emergency, restart_retired, done, check_retired)
       :: w.phase == at_check_retired && used == BIT(w.cur) -> move(emergency, check_retired, done, completed); ends
#ifndef STUBBORN
       :: w.phase == at_check_retired && used != BIT(w.cur) -> move(emergency, check_retired, missed, partial); ends
#endif
       :: else -> goto wait
       fi
#endif
#if RESTORES > 0 && !defined(BLINDRESTORE)
    /* A run that began before this worker did, and no node that accepts what it should, and nothing else: storage may
     * have been rewound. Nothing there is changed, before somebody asks for it. */
    :: !hasty && !own && !fit && w.job == ROTATE -> 
       if
       :: own = 1; admin = 1;
          if :: w.phase == at_grace -> acceptonly(BIT(w.cur) | BIT(w.prev)) :: else -> goto wait fi
       :: goto wait
       fi
#define sighted (own || fit) &&
#else
#define sighted
#endif
    /* ---- rotation ---- */
    :: !hasty && w.phase == IDLE && fresh < M -> w.phase = at_preflight; w.job = ROTATE
    :: !hasty && w.job == ROTATE && w.phase == at_preflight ->
       if
       :: every(BIT(w.cur)) && NOEXTRA && WELL -> move(rotate, preflight, done, generate)
       :: move(rotate, preflight, bad, failed); ends
       :: move(rotate, preflight, recall, cancelled); ends
       fi
    :: !hasty && w.job == ROTATE && w.phase == at_generate ->
       if
       :: sighted fresh < M ->
          generate(); move(rotate, generate, done, apply);
#ifdef NOINTENT
          askpend; launch(); sett = 0; clr = 0
#else
          askpend
#endif
       :: move(rotate, generate, bad, failed); ends
       :: move(rotate, generate, recall, cancelled); ends
       fi
    :: !hasty && sighted w.job == ROTATE && (w.phase == at_apply || w.phase == at_test || w.phase == at_promote) ->
       if
#if defined(SWAPLATE) || defined(BLINDPROMOTE)
       :: 1 ->
#else
       :: PENDOK ->
#endif
          if
          :: w.phase == at_apply -> move(rotate, apply, done, test);
             if :: whole -> move(rotate, test, done, promote); serve() :: !whole -> skip fi
          :: w.phase == at_test -> move(rotate, test, done, promote)
          :: w.phase == at_promote -> serve()
          fi
       :: !PENDOK && again_ok -> askpend
#ifdef EAGERPUBLISH
       :: shown != w.pend -> dset = w.pend
#endif
       :: MAYUNDO && w.phase == at_apply -> giveup; move(rotate, apply, bad, apply_back); askback
       :: MAYUNDO && w.phase == at_apply -> giveup; move(rotate, apply, recall, apply_back); askback
       :: MAYUNDO && w.phase == at_test -> giveup; move(rotate, test, bad, apply_back); askback
       :: MAYUNDO && w.phase == at_test -> giveup; move(rotate, test, recall, apply_back); askback
       :: MAYUNDO && w.phase == at_promote -> giveup; move(rotate, promote, bad, apply_back); askback
       :: MAYUNDO && w.phase == at_promote -> giveup; move(rotate, promote, recall, apply_back); askback
       fi
    :: !hasty && sighted promoted(w) ->
       if
       :: w.phase == at_publish && !SHOWN -> dset = w.cur
       :: w.phase == at_publish && SHOWN -> move(rotate, publish, done, sync)
       :: w.phase == at_sync && MOVED -> move(rotate, sync, done, restart);
          if :: whole -> move(rotate, restart, done, check); move(rotate, check, done, grace) :: !whole -> skip fi
       :: w.phase == at_restart && MOVED -> move(rotate, restart, done, check)
       :: w.phase == at_check && MOVED -> move(rotate, check, done, grace)
#ifdef SWAP                                                                /* drifted meanwhile: this rotation mends it */
       :: w.phase == at_grace && !every(BIT(w.cur)) -> acceptonly(BIT(w.cur))
#else
       :: w.phase == at_grace && !every(BIT(w.cur) | BIT(w.prev)) -> sett = BIT(w.cur) | BIT(w.prev); clr = 0
#endif
#if RESTORES > 0 && !defined(BLINDRESTORE)
       :: w.phase == at_grace && MAYRETIRE -> move(rotate, grace, done, retire)
#else
       :: w.phase == at_grace -> move(rotate, grace, done, retire); askretire
#endif
#ifdef SWAP
       :: MAYTURN && MAYTAKE && w.phase == at_sync -> unswap(sync)
       :: MAYTURN && MAYTAKE && w.phase == at_restart -> unswap(restart)
       :: MAYTURN && MAYTAKE && w.phase == at_check -> unswap(check)
       :: MAYTAKE && w.phase == at_grace -> unswap(grace)
#else
       :: MAYTURN && MAYTAKE && w.phase == at_publish -> turn(publish)
       :: MAYTURN && MAYTAKE && w.phase == at_sync -> turn(sync)
       :: MAYTURN && MAYTAKE && w.phase == at_restart -> turn(restart)
       :: MAYTURN && MAYTAKE && w.phase == at_check -> turn(check)
       :: MAYTAKE && w.phase == at_grace -> turn(grace)
#endif
       :: else -> goto wait
       fi
    :: !hasty && sighted w.job == ROTATE && w.phase == at_retire ->
       if
#ifdef PRUNE
       :: forget; retired()
#endif
#ifdef PASTRETURN
       :: w.prev -> promoteback; w.phase = at_publish_back
#endif
       :: RETIREOK -> forget; retired()
       :: !RETIREOK && again_ok -> askretire
       :: else -> goto wait
       fi
    :: !hasty && sighted w.job == ROTATE && w.phase == at_publish_retired && SHOWN ->
       move(rotate, publish_retired, done, sync_retired);
       if :: whole -> move(rotate, sync_retired, done, completed); ends :: !whole -> skip fi
    :: !hasty && sighted w.job == ROTATE && w.phase == at_publish_retired && !SHOWN -> dset = w.cur
    :: !hasty && sighted w.job == ROTATE && w.phase == at_sync_retired -> move(rotate, sync_retired, done, completed); ends

    /* ---- the way back ---- */
    :: !hasty && sighted w.phase == at_publish_back && !SHOWN -> dset = w.cur
    :: !hasty && sighted w.phase == at_publish_back && SHOWN ->
       if :: w.job == BACK -> move(swapback, publish_back, done, sync_back) :: else -> move(rotate, publish_back, done, sync_back) fi
#ifdef EAGERREFUSE
    :: !hasty && w.job == ROTATE && w.phase == at_sync_back -> w.phase = at_apply_back; askback
#endif
    :: !hasty && sighted w.phase == at_sync_back && used == BIT(w.cur) ->
       if
       :: w.job == BACK -> move(swapback, sync_back, done, restart_back)
       :: else -> move(rotate, sync_back, done, restart_back);
          if :: whole -> move(rotate, restart_back, done, check_back); move(rotate, check_back, done, apply_back); askback :: !whole -> skip fi
       fi
    :: !hasty && sighted w.phase == at_restart_back && used == BIT(w.cur) ->
       if :: w.job == BACK -> move(swapback, restart_back, done, check_back) :: else -> move(rotate, restart_back, done, check_back) fi
    :: !hasty && sighted w.phase == at_check_back && used == BIT(w.cur) ->
       if
       :: w.job == BACK -> move(swapback, check_back, done, rolled_back); ends
       :: else -> move(rotate, check_back, done, apply_back); askback
       fi
    :: !hasty && sighted w.phase == at_apply_back && w.job == ROTATE ->
       if
#ifdef DISCARD
       :: w.keep = 0; move(rotate, apply_back, done, rolled_back); ends
#endif
#ifdef TURNAGAIN
       :: shown == w.cur && PENDOK -> w.phase = at_publish
#endif
       :: BACKOK -> w.keep = 0; move(rotate, apply_back, done, rolled_back); ends
       :: !BACKOK && again_ok -> askback
       :: else -> goto wait
       fi
    :: !hasty && sighted w.phase == at_apply_back && w.job == BACK ->       /* swap: what the target knows again is served again */
       if
       :: only(w.prev) -> promoteback; w.keep = 0; move(swapback, apply_back, done, publish_back)
       :: !only(w.prev) && again_ok -> acceptonly(BIT(w.prev))
       :: else -> goto wait
       fi
#ifdef RECONCILEBLIND
    :: !hasty && w.job == ROTATE && (w.phase == at_apply || w.phase == at_grace) && (some & ~BIT(w.cur)) != 0 -> acceptonly(BIT(w.cur))
#endif

    /* ---- reconcile ---- */
#if DRIFTS > 0 || RESTORES > 0
    :: !hasty && w.phase == IDLE && !only(w.cur) -> w.job = RECONCILE; w.phase = at_preflight;
#if RESTORES > 0
       admin = 1
#endif
    :: !hasty && w.job == RECONCILE ->
       if
       :: w.phase == at_preflight -> move(reconcile, preflight, done, apply); acceptonly(BIT(w.cur))
       :: w.phase == at_preflight -> move(reconcile, preflight, bad, failed); ends
       :: w.phase == at_preflight -> move(reconcile, preflight, recall, cancelled); ends
       :: w.phase == at_apply && only(w.cur) -> move(reconcile, apply, done, test);
          if :: whole -> move(reconcile, test, done, completed); ends :: !whole -> skip fi
       :: w.phase == at_apply && !only(w.cur) -> acceptonly(BIT(w.cur))
       :: w.phase == at_apply -> move(reconcile, apply, bad, failed); ends
       :: w.phase == at_apply -> move(reconcile, apply, recall, cancelled); ends
       :: w.phase == at_test && only(w.cur) -> move(reconcile, test, done, completed); ends
       :: w.phase == at_test -> move(reconcile, test, bad, failed); ends
       :: w.phase == at_test -> move(reconcile, test, recall, cancelled); ends
       fi
#endif

    /* ---- delete and re-create ---- */
#if DELETES > 0
#ifdef DELETEBUSY
    :: !hasty && w.job < EMERGENCY && w.phase != ABSENT && deletes < DELETES ->
#else
    :: !hasty && w.phase == IDLE && deletes < DELETES ->
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
          w.phase = ABSENT; w.job = 0; w.cur = 0; w.prev = 0; w.pend = 0; w.keep = 0
#ifndef DROPTOMB
       :: w.tomb != w.cur ->                                               /* first the tombstone */
          w.tomb = w.cur; w.tkeep = BIT(w.prev) | BIT(w.pend) | w.keep
#endif
       fi
    :: !hasty && w.phase == IDLE && w.tomb -> w.tomb = 0; w.tkeep = 0      /* left over by a re-creation */
    :: !hasty && w.phase == ABSENT && w.tomb ->
#ifdef ADOPTLAST
       w.tomb = 0; w.tkeep = 0
#else
       w.cur = w.tomb; w.phase = IDLE
#endif
#endif
    :: else -> goto wait
    fi;
    put();
#ifdef NORETRY
    if :: ok && (sett | clr) -> tried = 1 :: ok -> tried = 0 :: else fi;
#endif
#ifdef NORESUME
    if :: ok -> mine = term :: else fi;
#endif
#ifdef TRUSTPUT
    if :: !ok && w.phase == at_publish_back && sett == 0 && clr == 0 -> acceptonly(w.keep); launch() :: else fi;   /* "not applied, so retire" */
#endif
#ifndef READAGAIN
    if :: ok || fenced -> goto wait :: else fi
  }
again:
  atomic {
    if                                                                     /* another key is written until that is answered: */
    :: leader != me || term != born -> skip
    :: else -> if :: flush() :: fault -> goto again fi                     /* what came before has applied, or never will */
    fi;
#endif
wait:
    ok = 0; hasty = 0; fenced = 0; fit = 0; sett = 0; clr = 0; dset = 0; every = 0; some = 0; shown = 0; used = 0; ZERO(w);
#ifndef STALE
    born = 0
#endif
  }
  goto end_loop
}
/* Neither an emergency nor a person has said that what consumers have may be taken away. */
#ifdef SWAP      /* of what is stored it may: there is room for one */
#define excused(set) (urgent(st) || admin || ((set) & ~(STORED | comp)) == 0)
#else
#define excused(set) (urgent(st) || admin || ((set) & ~comp) == 0)
#endif
/* what is published works where it is published, but for a node that dropped it behind our back */
#ifdef SWAP
#define unserved(n) 0
#else
#define unserved(n) ((BIT(doc) & ~acc[n] & ~gone[n]) != 0 && !admin)
#endif

inline land(n) {
  was = acc[n];
  if
  :: acc[n] = (acc[n] & ~cclr[n]) | cset[n];
     gone[n] = gone[n] & ~(cclr[n] | cset[n]); alien[n] = alien[n] & acc[n] & ~(cset[n] & STORED)
  :: fault
  fi;
  cset[n] = 0; cclr[n] = 0;
  /* 4 no call of the engine shuts a user out: what is left holds something that is in storage */
  must(4, (was & STORED) == 0 || (acc[n] & STORED) != 0);
  /* 5 nor takes away what is published, or what consumers run with */
  must(5, (was & ~acc[n] & (use | BIT(doc))) == 0 || excused(was & ~acc[n] & (use | BIT(doc))));
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
inline rewound(n) {
  alien[n] = acc[n] & ~STORED; gone[n] = STORED & ~acc[n]
}
#if RESTORES > 0
#define doubt() own = 0
#else
#define doubt() skip
#endif
proctype Environment() {
  byte was;
end:
  do
  :: atomic { !idle(0) -> land(0) }
#if N > 1
  :: atomic { !idle(1) -> land(1) }
#endif
  :: atomic { dcall ->
       if :: doc = dcall; must(5, !unserved(0));
#if N > 1
          must(5, !unserved(1))
#endif
       :: fault
       fi; dcall = 0 }
  :: atomic { (use | BIT(doc)) != use && (unfit & BIT(doc)) == 0 -> use = use | BIT(doc) }     /* a pod starts */
  :: atomic { use != BIT(doc) && (use & BIT(doc)) -> use = BIT(doc) }                           /* the last of the others is gone */
  :: atomic { lateset && fault -> APPLY(late); lateset = 0; ZERO(late) }
  :: atomic { failovers < FAILOVERS && fault ->
#ifndef REORDER
       flush();
#endif
       failovers++; term++; leader = 1 - leader; doubt() }
#if DRIFTS > 0
  :: atomic { drifts < DRIFTS && fault -> drift(0) }
#if N > 1
  :: atomic { drifts < DRIFTS && fault -> drift(1) }
#endif
#endif
#if RESTORES > 0
  :: atomic { !taken && !lateset && fault -> taken = 1; COPY(snap, st); snapdoc = doc }
  /* the engine that was stopped for it has had its last call answered, or cut off */
  :: atomic { taken && calm && restores < RESTORES && fault -> restores++; term++; leader = 1 - leader; doubt();
       lateset = 0; ZERO(late); COPY(st, snap); doc = snapdoc; ZERO(snap); snapdoc = 0; admin = 0;
       rewound(0);
#if N > 1
       rewound(1)
#endif
     }
#endif
#ifdef LIVE
  :: atomic { !quiet -> quiet = 1 }
#endif
  od
}
#ifdef SWAP
/* an emergency that took over between apply and promote begins in it: ttl is 0 until it has promoted */
#define window (st.phase == at_apply || st.phase == at_test || st.phase == at_promote || st.phase == at_apply_back || \
                (st.job == TAKEOVER && (st.phase == at_preflight || st.phase == at_generate)))
#define overlap 0
#else
#define window 0
#define overlap promoted(st)
#endif
/* 1 nothing is lost: whatever a node accepts is in storage, unless the node was changed behind our back */
#define lost(n)    ((acc[n] & ~STORED & ~alien[n]) != 0)
/* 2 what is served works, at every node, unless the node dropped it and was not told about it again since */
#define refused(n) (!window && (BIT(st.cur) & ~acc[n] & ~gone[n]) != 0)
/* 3 overlap is real */
#define torn(n)    (overlap && (BIT(st.prev) & ~acc[n] & ~gone[n]) != 0)
/* swap: no node is ever without a credential that is in storage */
#define shut(n)    (st.phase != ABSENT && !gone[n] && (acc[n] & STORED) == 0)
/* 6 who has ended has left nothing half done */
#define left(n)    (st.phase == IDLE && ((acc[n] & ~BIT(st.cur) & ~alien[n]) != 0 || doc != st.cur))
/* 7 what was compromised is never served again */
#define leaked     ((BIT(st.cur) & comp) != 0)

active proctype Watch() {
  atomic { st.cur = 1; acc[0] = BIT(1);
#if N > 1
    acc[1] = BIT(1);
#endif
    run Worker(0); run Worker(1); run Environment() }
end:
  do
  :: atomic { lost(0) -> broken(1) }
  :: atomic { refused(0) -> broken(2) }
  :: atomic { torn(0) -> broken(3) }
  :: atomic { shut(0) -> broken(4) }
  :: atomic { left(0) -> broken(6) }
  :: atomic { leaked -> broken(7) }
#if N > 1
  :: atomic { lost(1) -> broken(1) }
  :: atomic { refused(1) -> broken(2) }
  :: atomic { torn(1) -> broken(3) }
  :: atomic { shut(1) -> broken(4) }
  :: atomic { left(1) -> broken(6) }
#endif
  od
}

#ifdef LIVE
/* 9 when faults stop, every rotation ends */
ltl ending { [] (quiet -> <> (st.phase == IDLE || st.phase == ABSENT)) }
#endif
