/* A secret that another server makes and keeps (transit, database-root): it is asked for a new version, once a
 * rotation. The call is lost, answered late or lands late; the worker may die at every step; storage writes have
 * unknown outcomes. With -DNUMBERLESS the server does not show how many versions there are.
 *
 * Mutations:
 * -DASKAGAIN  a call without an answer is made again, without a look at what it did
 * -DNOWAIT    who resumes looks before the call can no longer land
 * -DNOINTENT  asks before the intent is stored
 * -DASSUME    ends as completed what nobody has proven
 * -DLATECANCEL can be cancelled when the server may have heard
 */
#include "transitions.h"
#include "rows.h"
#define IDLE 0
#define R 2                          /* rotations */
typedef Entry { byte phase, before; bool asked };
Entry st;
byte newest = 1, base, begun;        /* versions of the server, in truth; of these, when the rotation began */
bool calling;                        /* a call that may still land, until its deadline */
byte reply;                          /* what the worker that called has heard: 0 nothing, 1 done, 2 refused, 3 no effect */
bool ending; byte outcome;

#define move(t, f, on, to) assert(w.phase == at_##f); ROW(row_##t##_##f##_##on##_##to); w.phase = at_##to
#ifdef NUMBERLESS
#define seen 0
#else
#define seen newest
#endif
#define ends(o) ending = 1; outcome = o
#define COMPLETED 1
#define CANCELLED 2
#define FAILED 3

proctype Worker() {
  Entry w; bool ask, heard;
endless:
  do
#ifdef NOWAIT
  :: atomic { 1 ->
#else
  :: atomic { !calling ->
#endif
    w.phase = st.phase; w.before = st.before; w.asked = st.asked;
    if
    :: w.phase == IDLE && begun < R -> begun++; w.phase = at_preflight
    :: w.phase == at_preflight ->
       if
       :: move(kept, preflight, bad, failed)
       :: move(kept, preflight, recall, cancelled)
       :: base = newest; w.before = seen; w.asked = 1; ask = 1;
          move(kept, preflight, done, generate); move(kept, generate, done, apply)
       fi
    :: w.phase == at_apply && reply == 1 -> move(kept, apply, done, test); heard = 1
    :: w.phase == at_apply && reply == 2 -> move(kept, apply, bad, failed); ends(FAILED); heard = 1
    :: w.phase == at_apply && reply == 3 -> w.asked = 0; heard = 1
#ifdef LATECANCEL
    :: w.phase == at_apply && reply == 0 -> move(kept, apply, recall, cancelled); ends(CANCELLED)
#else
    :: w.phase == at_apply && !w.asked -> move(kept, apply, recall, cancelled); ends(CANCELLED)
#endif
    :: w.phase == at_apply && !w.asked -> w.asked = 1; ask = 1
#ifdef ASSUME
    :: w.phase == at_apply && reply == 0 && w.asked -> move(kept, apply, done, test)
#endif
#ifdef ASKAGAIN
    :: w.phase == at_apply && reply == 0 && w.asked -> ask = 1
#elif defined(NUMBERLESS)
    :: w.phase == at_apply && reply == 0 && w.asked -> move(kept, apply, bad, failed); ends(FAILED)   /* nobody knows */
#else
    :: w.phase == at_apply && reply == 0 && w.asked && newest > w.before -> move(kept, apply, done, test)
    :: w.phase == at_apply && reply == 0 && w.asked && newest == w.before -> ask = 1
    :: w.phase == at_apply && reply == 0 && w.asked && newest == w.before -> move(kept, apply, bad, failed); ends(FAILED)
#endif
#if defined(NUMBERLESS) || defined(ASSUME)
    :: w.phase == at_test -> move(kept, test, done, promote); move(kept, promote, done, completed); ends(COMPLETED)
#else
    :: w.phase == at_test && newest > w.before -> move(kept, test, done, promote); move(kept, promote, done, completed); ends(COMPLETED)
#endif
    :: w.phase == at_test -> move(kept, test, bad, failed); ends(FAILED)                   /* it could not be looked at in time */
    :: else -> goto skipped
    fi;
#ifdef NOINTENT
    if :: ask && !calling -> calling = 1; ask = 0; reply = 0 :: else fi;
#endif
    if
    :: st.phase = w.phase; st.before = w.before; st.asked = w.asked;
       must(13, !ending || outcome == FAILED || outcome == COMPLETED && newest == base + 1 || outcome == CANCELLED && newest == base);
       if :: st.phase == IDLE -> base = newest; reply = 0 :: else fi;
       if :: heard -> reply = 0 :: else fi;
       if
#ifdef NOWAIT
       :: ask && calling -> newest++                                                       /* before the earlier one */
#endif
       :: ask && !calling -> calling = 1; reply = 0
       :: !ask
       fi
    :: reply = 0                                                                           /* the write failed, or the worker died */
    fi;
skipped:
    ask = 0; heard = 0; ending = 0; outcome = 0; w.phase = 0; w.before = 0; w.asked = 0
    }
  od
}
proctype Server() {
endless:
  do
  :: atomic { calling && newest < 6 -> calling = 0;
       if
       :: newest++; reply = 1
       :: newest++                                                                         /* its answer is lost */
       :: skip                                                                             /* lost */
       :: reply = 2
       :: reply = 3
       fi }
  :: atomic { reply -> reply = 0 }                                                         /* who has heard it dies */
  od
}
active proctype Watch() {
  atomic { run Worker(); run Server() }
endless:
  do
  :: atomic { st.phase != IDLE && st.phase != at_preflight && newest > base + 1 -> broken(12) }
  od
}
