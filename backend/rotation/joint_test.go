package rotation

import (
	"fmt"
	"math/rand"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// queueUp rotates first, and the others while it has the consumers, each by itself.
func (w *world) queueUp(first string, others ...string) (ids []string) {
	w.rotate(first)
	w.hasConsumers(first)
	for _, name := range others {
		ids = append(ids, w.rotate(name))
	}
	return ids
}

// hasConsumers waits until those of a role are reserved for it.
func (w *world) hasConsumers(name string) {
	w.until("reservations", time.Hour, func() bool {
		run := w.roles[name].Run
		return run == nil || run.Surveyed || run.Phase != Preflight
	})
}

// shortly is until for what does not last: the run of a role is so, or has ended.
func (w *world) shortly(name string, is func(*Run) bool) {
	for !w.dead() {
		if run := w.role(name).Run; run == nil || is(run) {
			return
		}
		w.pass(100 * time.Millisecond)
	}
}

// inDelivery waits until a role is in a joint delivery.
func (w *world) inDelivery(name string) {
	w.shortly(name, func(run *Run) bool {
		return run.Back || run.Joint != nil && (run.Phase == Restart || run.Phase == Check) || run.Phase == Grace
	})
}

func (w *world) seedAll(names ...string) {
	for _, name := range names {
		w.seed(name, nil)
	}
}

func jointWorld(t *testing.T, s shape, f func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s, plan{name: t.Name()})
		w.seedAll("a", "b", "c", "d")
		w.run()
		defer w.close()
		f(t, w)
	})
}

func (w *world) states(names ...string) (out []State) {
	for _, name := range names {
		out = append(out, w.role(name).LastRun.State)
	}
	return out
}

// Rotations that waited together for the same consumers cost those one restart.
func TestJoinedRestart(t *testing.T) {
	for _, strategy := range []kind.Strategy{kind.Overlap, kind.Alternate} {
		for _, others := range [][]string{{"b", "c"}, {"b", "c", "d"}} {
			t.Run(fmt.Sprint(strategy, len(others)), func(t *testing.T) {
				jointWorld(t, consumed(strategy), func(t *testing.T, w *world) {
					w.queueUp("a", others...)
					w.idle(append(others, "a")...)
					w.finish()
					require.Equal(t, 2+2, w.clusters.total, "two consumers: one restart for the first, and one for all that waited")
					for _, state := range w.states(append(others, "a")...) {
						require.Equal(t, Completed, state)
					}
				})
			})
		}
	}
}

// One of a joint delivery is bad: all go back together, the good ones complete alone,
// and the bad one is rolled back for its own fault.
func TestJoinedWithABadOne(t *testing.T) {
	for _, s := range jointShapes() {
		t.Run(s.name, func(t *testing.T) {
			jointWorld(t, s, func(t *testing.T, w *world) {
				w.spoiling("c")
				w.queueUp("a", "b", "c", "d")
				w.idle("a", "b", "c", "d")
				w.finish()
				require.Equal(t, []State{Completed, Completed, RolledBack, Completed}, w.states("a", "b", "c", "d"))
				require.Contains(t, w.role("c").LastRun.Error, "pods crash")
				require.NotContains(t, w.role("c").LastRun.Error, "shared")
				require.Empty(t, w.role("b").Suspended)
				require.Equal(t, "m0-c", secret(w.role("c"), version.Current))
				// of each consumer: a, all back, b, d, c back
				require.Equal(t, 2*5, w.clusters.total)
			})
		})
	}
}

// spoiling has pods crash that are given a new secret of a role.
func (w *world) spoiling(role string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clusters.rejects = role
}

// Who is cancelled in a joint delivery goes back by himself, when it is over.
func TestJoinedAndCancelled(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		ids := w.queueUp("a", "b", "c")
		w.inDelivery("b")
		w.cancel(ids[0])
		w.idle("a", "b", "c")
		w.finish()
		require.Equal(t, []State{Completed, RolledBack, Completed}, w.states("a", "b", "c"))
		require.Equal(t, "m0-b", secret(w.role("b"), version.Current))
		require.Equal(t, 2+2+2, w.clusters.total)
	})
}

// All of a joint delivery are cancelled in it: one after another goes back.
func TestJoinedAndAllCancelled(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		ids := w.queueUp("a", "b", "c")
		w.inDelivery("b")
		for _, id := range ids {
			w.cancel(id)
		}
		w.idle("a", "b", "c")
		w.finish()
		require.Equal(t, []State{Completed, RolledBack, RolledBack}, w.states("a", "b", "c"))
	})
}

// Who is cancelled on the way back from a joint delivery does not begin anew.
func TestJoinedAndCancelledOnTheWayBack(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		w.spoiling("c")
		ids := w.queueUp("a", "b", "c")
		w.shortly("b", func(run *Run) bool { return run.Back })
		w.cancel(ids[0])
		w.idle("a", "b", "c")
		w.finish()
		require.Equal(t, []State{Completed, RolledBack, RolledBack}, w.states("a", "b", "c"))
	})
}

// Who drops out before anything of him was shown takes nobody along.
func TestJoinedOneDropsOut(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		w.mu.Lock()
		w.rejected = "u-c"
		w.mu.Unlock()
		w.queueUp("a", "b", "c", "d")
		w.shortly("c", func(run *Run) bool { return run.Back })
		w.mu.Lock()
		w.rejected = ""
		w.mu.Unlock()
		w.idle("a", "b", "c", "d")
		w.finish()
		require.Equal(t, []State{Completed, Completed, RolledBack, Completed}, w.states("a", "b", "c", "d"))
		require.Equal(t, 2+2, w.clusters.total)
		require.False(t, w.role("b").With(version.Current).Material.Same(w.role("c").With(version.Current).Material))
	})
}

// Others than those that want exactly the same are not joined, and nobody waits for
// ever.
func TestJoinedIsForTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, consumed(kind.Overlap), plan{name: t.Name()})
		w.seedAll("a", "b", "d")
		w.seed("c", func(r *Role) { r.Consumers = []string{"c2", "c3"} })
		w.seed("e", func(r *Role) { r.HoldOnFailure = true })
		w.run()
		defer w.close()
		w.queueUp("a", "b", "c", "d", "e")
		w.idle("a", "b", "c", "d", "e")
		w.finish()
		for _, state := range w.states("a", "b", "c", "d", "e") {
			require.Equal(t, Completed, state)
		}
		require.Equal(t, 4*2, w.clusters.total, "b and d share")
	})
}

// Rotations of several roles are joined as well, and each stays a unit.
func TestJoinedUnits(t *testing.T) {
	for _, bad := range []bool{false, true} {
		jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
			w.rotate("a")
			w.hasConsumers("a")
			if bad {
				w.spoiling("b")
			}
			w.rotate("b", "c")
			w.rotate("d")
			w.idle("a", "b", "c", "d")
			w.finish()
			if bad {
				require.Equal(t, []State{Completed, RolledBack, RolledBack, Completed}, w.states("a", "b", "c", "d"))
				return
			}
			require.Equal(t, []State{Completed, Completed, Completed, Completed}, w.states("a", "b", "c", "d"))
			require.Equal(t, 2+2, w.clusters.total)
		})
	}
}

// A role of a unit that is recalled in its grace waits for its consumers, too.
func TestUnitsGoBackFromGraceWithTheirConsumers(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		id := w.rotate("a", "b")
		w.phase("a", Grace)
		w.phase("b", Grace)
		w.rotate("c")
		w.hasConsumers("c")
		w.cancel(id)
		w.idle("a", "b", "c")
		w.finish()
		require.Equal(t, []State{RolledBack, RolledBack, Completed}, w.states("a", "b", "c"))
	})
}

// jointScenarios go through every fault.
func jointScenarios() []scenario {
	seed := func(w *world) { w.seedAll("a", "b", "c") }
	idle := func(w *world) { w.idle("a", "b", "c") }
	return []scenario{
		{name: "joined", seed: seed, steps: func(w *world) { w.queueUp("a", "b", "c"); idle(w) }, check: func(w *world) error {
			if w.clusters.total != 4 {
				return fmt.Errorf("%d restarts", w.clusters.total)
			}
			return nil
		}},
		{name: "joined, one is bad", seed: seed, steps: func(w *world) {
			w.spoiling("c")
			w.queueUp("a", "b", "c")
			idle(w)
		}, check: serves("c", "m0-c")},
		{name: "joined, one is cancelled", seed: seed, steps: func(w *world) {
			ids := w.queueUp("a", "b", "c")
			w.inDelivery("b")
			w.cancel(ids[0])
			idle(w)
		}, check: serves("c", "m3", "m2")},
	}
}

// jointShapes are those whose deliveries may be shared.
func jointShapes() []shape {
	return []shape{consumed(kind.Overlap), consumed(kind.Alternate), shownKeys()}
}

func TestJointFaults(t *testing.T) {
	for n, s := range jointShapes() {
		for i, sc := range jointScenarios() {
			if n > 0 && i != 1 {
				continue // nothing new is asked of anybody
			}
			s.queue = true
			t.Run(s.name+"/"+sc.name, func(t *testing.T) {
				t.Parallel()
				everyPoint(t, s, sc)
			})
		}
	}
}

// TestRandomJoint has people work on roles that share consumers, close together, while
// things fail and one of the roles is bad for a while.
func TestRandomJoint(t *testing.T) {
	for _, s := range jointShapes() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			end := time.Now().Add(*pairBudget)
			joined := 0
			for seed := *pairSeed; time.Now().Before(end) && !t.Failed(); seed++ {
				rng := rand.New(rand.NewSource(seed))
				p := plan{name: fmt.Sprintf("%s/random joint, seed %d", s.name, seed), points: []point{anyPoint(rng, s), {where: atCluster, at: 1 + rng.Intn(40), what: clusterFaults[rng.Intn(len(clusterFaults))]}}}
				w := play(t, s, scenario{seed: func(w *world) { w.seedAll("a", "b", "c", "d") }, steps: func(w *world) { w.crowdOn(rng, true, "a", "b", "c", "d") }}, p)
				for _, line := range w.trace {
					if strings.Contains(line, "by ~") {
						joined++
						break
					}
				}
				faultPoints.Add(2)
			}
			require.Positive(t, joined, "none was joined")
		})
	}
}

// crowdOn is people who rotate roles; where it spoils, pods of one of them start with
// nothing but what was there at first.
func (w *world) crowdOn(rng *rand.Rand, spoils bool, names ...string) {
	var wg sync.WaitGroup
	for i, name := range names {
		var steps []func()
		for range 1 + rng.Intn(3) {
			pause, what, later := time.Duration(rng.Intn(3000))*time.Millisecond, rng.Intn(6), time.Duration(rng.Intn(9000))*time.Millisecond
			steps = append(steps, func() {
				w.pass(pause)
				switch what {
				case 0:
					if id := w.rotate(name); id != "" {
						w.pass(later)
						w.cancel(id)
					}
				case 1:
					w.rotate(name)
					w.pass(later)
					w.rollBack(name)
				case 2:
					w.rotate(name)
					w.pass(later)
					w.retire(name)
				case 3:
					if i+1 < len(names) {
						w.rotate(names[i], names[i+1])
					}
				default:
					w.rotate(name)
				}
			})
		}
		wg.Go(func() {
			for _, step := range steps {
				step()
			}
		})
	}
	if spoils && rng.Intn(2) == 0 {
		w.spoiling(names[rng.Intn(len(names))])
	}
	wg.Wait()
	w.idle(names...)
	w.spoiling("")
	w.calm()
}
