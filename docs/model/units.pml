/* A unit of two roles, which fill one document and share a consumer: each decides for itself, from what it has read of
 * the other, which may have changed when it writes. Each may fail at its target, before or after it was proven there,
 * its new version may not work at the consumer, and somebody may take one back.
 *
 * Claims checked: a unit goes forward or back together (20), one restart (24), and no deadlock: a role that can go no
 * further waits until the other one has changed what it waits for, so that none waits for ever.
 *
 * Mutations:
 * -DPROMOTEALONE  promotes before the other has passed its test
 * -DPUBLISHEACH   publishes before the other is promoted
 * -DBACKEACH      publishes back before the other has turned
 * -DRETIREALONE   retires before the other has come as far as its grace
 * -DBACKALONE     does not go back with the other                  (must deadlock: the other waits for it)
 * -DNOAGREE       what is read of the other is not read again when the step is stored
 * -DRESTARTEACH   each restarts the consumer
 */
#include "transitions.h"
#include "rows.h"
byte ph[2];                          /* phases, as stored */
bool over[2], good[2], promoted[2], asked[2], tested[2], faulty[2];
byte shown[2] = 1;                   /* the document: of each role, the version */
byte pods[2] = 1;                    /* what the consumer's pods run with */
byte restarts, restartsback;
bool proven, provenback;

#define move(f, on, to) assert(ph[r] == at_##f); ROW(row_rotate_##f##_##on##_##to); ph[r] = at_##to
#define ended(x)  (ph[x] == 0)
#define back(x)   (ph[x] == at_apply_back || ph[x] == at_publish_back || ph[x] == at_sync_back || ph[x] == at_restart_back || ph[x] == at_check_back)
#define fixed(x)  (ph[x] == at_retire || ph[x] == at_publish_retired || ph[x] == at_sync_retired || ended(x) && good[x])
#define served(x) (promoted[x] && !failed(x))
#define ready(x)  (ph[x] == at_promote || served(x))
#define failed(x) (back(x) || ended(x) && !good[x])
#define arrived(x) (fixed(x) || ph[x] == at_grace && !asked[x])
#define at(x, a, b, c) (ph[x] == at_##a || ph[x] == at_##b || ph[x] == at_##c)
#define AHEAD  (at(o, sync, restart, check) || at(o, grace, retire, publish_retired) || ph[o] == at_sync_retired || ended(o))
#define o (1 - r)
#define finish(x) good[r] = x; over[r] = 1

/* go on if the other still stands so, or look again */
#ifdef NOAGREE
#define agreed(c) 1
#else
#define agreed(c) (c)
#endif

/* what turns a role back after its promotion */
#ifdef BACKALONE
#define TURNS asked[r]
#else
#define TURNS (failed(o) || asked[r])
#endif

proctype Role(byte r) {
  bool turns, seen, can;
  ph[r] = at_preflight;
  if
  :: atomic { move(preflight, bad, failed); finish(0); goto out }
  :: atomic { move(preflight, recall, cancelled); finish(0); goto out }
  :: move(preflight, done, generate)
  fi;
  if
  :: atomic { move(generate, bad, failed); finish(0); goto out }
  :: move(generate, done, apply)
  fi;
  if
  :: atomic { move(apply, bad, apply_back); goto undo }
  :: atomic { move(apply, done, test); move(test, done, promote); tested[r] = 1 }
  fi;
#ifndef PROMOTEALONE
  (ready(o) || failed(o));
#endif
  if
#ifdef PROMOTEALONE
  :: atomic { move(promote, done, publish); promoted[r] = 1; must(20, tested[o] || failed(o)) }
#else
  :: atomic { ready(o) -> move(promote, done, publish); promoted[r] = 1; must(20, tested[o]) }
  :: atomic { failed(o) -> move(promote, recall, apply_back); goto undo }
#endif
  :: atomic { move(promote, bad, apply_back); goto undo }                        /* it does not work any more */
  fi;
  do
  :: turns = TURNS;                                                              /* what is read of the other */
     can = !fixed(o); seen = arrived(o);
     if
     :: atomic { turns && can && agreed(!fixed(o)) && ph[r] == at_publish -> move(publish, recall, publish_back); goto wayback }
     :: atomic { turns && can && agreed(!fixed(o)) && ph[r] == at_sync -> move(sync, recall, publish_back); goto wayback }
     :: atomic { turns && can && agreed(!fixed(o)) && ph[r] == at_restart -> move(restart, recall, publish_back); goto wayback }
     :: atomic { turns && can && agreed(!fixed(o)) && ph[r] == at_check -> move(check, recall, publish_back); goto wayback }
     :: atomic { turns && can && agreed(!fixed(o)) && ph[r] == at_grace -> move(grace, recall, publish_back); goto wayback }
     :: atomic { asked[r] && !can -> asked[r] = 0 }                              /* it is told that it is too late */
#ifdef PUBLISHEACH
     :: atomic { !turns && ph[r] == at_publish -> shown[r] = 2; move(publish, done, sync) }
#else
     :: atomic { !turns && ph[r] == at_publish && served(o) -> shown[0] = 2; shown[1] = 2; move(publish, done, sync) }
#endif
     :: atomic { !turns && ph[r] == at_sync && AHEAD -> move(sync, done, restart) }
#ifdef RESTARTEACH
     :: atomic { !turns && ph[r] == at_restart && pods[r] != shown[r] || ph[r] == at_restart && !faulty[r] && restarts < 2 ->
          pods[0] = shown[0]; pods[1] = shown[1]; restarts++; faulty[r] = 0; move(restart, done, check) }
#else
     :: atomic { !turns && r == 0 && ph[r] == at_restart -> pods[0] = shown[0]; pods[1] = shown[1]; restarts++; move(restart, done, check) }
     :: atomic { !turns && r == 1 && ph[r] == at_restart && restarts -> move(restart, done, check) }
#endif
     :: atomic { !turns && r == 0 && ph[r] == at_check ->
          if :: proven = 1; move(check, done, grace) :: move(check, recall, publish_back); goto wayback fi }
     :: atomic { !turns && r == 1 && ph[r] == at_check && proven -> move(check, done, grace) }
#ifdef RETIREALONE
     :: atomic { !turns && ph[r] == at_grace -> move(grace, done, retire); break }
#else
     :: atomic { !turns && seen && agreed(arrived(o) && !asked[r]) && ph[r] == at_grace -> move(grace, done, retire); break }
#endif
     :: atomic { else -> (TURNS || ph[r] == at_publish && served(o) || ph[r] == at_sync && AHEAD || ph[r] == at_restart && (r == 0 || restarts) ||
          ph[r] == at_check && (r == 0 || proven) || ph[r] == at_grace && arrived(o)); skip }
     fi
  od;
  move(retire, done, publish_retired);
  move(publish_retired, done, sync_retired);
  atomic { move(sync_retired, done, completed); finish(1); goto out }
wayback:
#ifndef BACKEACH
  (failed(o) || !promoted[o]);
  atomic { shown[0] = 1; shown[1] = 1; move(publish_back, done, sync_back) };
#else
  atomic { shown[r] = 1; move(publish_back, done, sync_back) };
#endif
  move(sync_back, done, restart_back);
  if
  :: atomic { r == 0 -> pods[0] = shown[0]; pods[1] = shown[1]; restartsback++; move(restart_back, done, check_back); provenback = 1 }
  :: atomic { r == 1 && (provenback || !promoted[0]) ->
       if :: !promoted[0] -> pods[0] = shown[0]; pods[1] = shown[1]; restartsback++ :: else fi; move(restart_back, done, check_back) }
  fi;
  move(check_back, done, apply_back);
undo:
  atomic { must(20, pods[r] == 1); move(apply_back, done, rolled_back); finish(0) }
out:
  skip
}
/* somebody takes one back */
proctype Person(byte r) {
  if :: atomic { promoted[r] && !back(r) && !ended(r) && !fixed(r) && !fixed(o) -> asked[r] = 1 } :: skip fi
}
active proctype Watch() {
  atomic { run Role(0); run Role(1); run Person(0); run Person(1) }
end:
  do
  :: atomic { shown[0] != shown[1] -> broken(20) }
  :: atomic { over[0] && over[1] && good[0] != good[1] -> broken(20) }
  :: atomic { (fixed(0) && back(1) && promoted[1]) || (fixed(1) && back(0) && promoted[0]) -> broken(20) }
  :: atomic { restarts > 1 || restartsback > 1 -> broken(24) }
  od
}
