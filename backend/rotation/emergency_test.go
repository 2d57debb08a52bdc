package rotation

import (
	"context"
	"fmt"
	"maps"
	"math/rand"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// emergency asks for one until it is answered. What is being created, or is in an
// emergency already, is asked for again later.
func (w *world) emergency(roles ...string) (id string) {
	req := Request{Trigger: Urgent, Roles: roles, Reason: "a laptop was stolen", Keys: newKeys(), Emergency: &Emergency{}}
	_ = w.do("emergency", func(ctx context.Context, e *Engine) error {
		h, err := e.Begin(ctx, req)
		if h != nil {
			id = h.ID
		}
		return err
	})
	return id
}

// compromised reports whether m is known to somebody who must not know it, or is about
// to count so; what was is forgotten when enough has come after it.
func (r *Role) compromised(m kind.Material) bool {
	if r.Run.urgent() && !r.Served(m) {
		return true
	}
	known := slices.ContainsFunc(r.Versions, func(v version.Version) bool { return v.Material.Same(m) && v.Compromised.IsZero() })
	return !known
}

// rescued: the last rotation of all roles is the emergency, which ended so whose last rotation is the emergency, completed.
func rescued(states ...State) func(*world) error {
	return func(w *world) error {
		for _, n := range slices.Sorted(maps.Keys(w.roles)) {
			r := w.roles[n]
			if r.LastRun == nil || r.LastRun.Trigger != Urgent || !slices.Contains(states, r.LastRun.State) {
				return fmt.Errorf("role %s: %+v", n, r.LastRun)
			}
			for _, v := range r.Versions {
				if v.Stage != version.Current && v.Compromised.IsZero() && !r.kept() {
					return fmt.Errorf("role %s: version %d is %s", n, v.Number, v.Stage)
				}
			}
		}
		return nil
	}
}

func emergencyScenarios() []scenario {
	at := func(p Phase) scenario {
		return scenario{name: "emergency in " + string(p), seed: one, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", p)
			w.emergency("a")
			w.idle("a")
		}, check: rescued(Completed)}
	}
	inApply := at(Apply)
	inApply.not = func(s shape) bool { return s.targetless || s.keeper }
	inGrace := at(Grace)
	inGrace.not = func(s shape) bool { return s.strategy == kind.KeyRing && s.tokens == 0 || s.keeper }
	return []scenario{
		{name: "emergency", seed: one, steps: func(w *world) { w.emergency("a"); w.idle("a") }, check: rescued(Completed)},
		inApply, inGrace,
		{name: "emergency on the way back", seed: one, not: func(s shape) bool {
			return s.strategy == kind.Swap || s.strategy == kind.KeyRing && s.tokens == 0 || s.keeper
		}, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.rollBack("a")
			w.emergency("a")
			w.idle("a")
		}, check: rescued(Completed)},
		{name: "emergency in a batch", seed: several, not: func(s shape) bool { return s.keeper }, steps: func(w *world) {
			w.rotate(w.several()...)
			w.emergency("b")
			w.idle(w.several()...)
		}},
		{name: "emergency of all", seed: several, steps: func(w *world) {
			w.emergency(w.several()...)
			w.idle(w.several()...)
		}, check: rescued(Completed)},
	}
}

// emergencyShapes are those that differ in what an emergency does.
func emergencyShapes() []shape {
	return slices.DeleteFunc(slices.Clone(shapes), func(s shape) bool { return s.root || s.observed })
}

// TestEmergencyFaults puts every fault at every operation of emergencies.
func TestEmergencyFaults(t *testing.T) {
	for _, s := range emergencyShapes() {
		s.urgent = true
		for _, sc := range emergencyScenarios() {
			if sc.not != nil && sc.not(s) {
				continue
			}
			t.Run(s.name+"/"+sc.name, func(t *testing.T) {
				t.Parallel()
				everyPoint(t, s, sc)
			})
		}
	}
}

// TestEmergencyGoesOnWithoutANode: a node that nobody reaches holds up nothing, and is
// healed when it is back.
func TestEmergencyGoesOnWithoutANode(t *testing.T) {
	sc := scenario{seed: one, steps: func(w *world) {
		w.setDown("n2", true)
		w.emergency("a")
		w.until("the end at the other node", time.Minute, func() bool { r := w.roles["a"]; return r.Run == nil && r.LastRun != nil })
		require.Equal(w.t, Completed, w.role("a").LastRun.State)
		require.NotNil(w.t, w.role("a").Drift)
		w.setDown("n2", false)
		w.until("the other node", time.Hour, func() bool { return w.roles["a"].Drift == nil })
	}, check: serves("a", "m1")}
	play(t, shapes[0], sc, plan{name: "without a node"})
}

// TestEmergencyWaitsForItsTarget: it is not given up, however long that takes, and can be
// cancelled as long as the target has not heard of it.
func TestEmergencyWaitsForItsTarget(t *testing.T) {
	down := func(w *world, is bool) {
		for _, n := range w.order {
			w.setDown(n, is)
		}
	}
	play(t, shapes[0], scenario{seed: one, steps: func(w *world) {
		down(w, true)
		w.emergency("a")
		w.pass(3 * time.Hour)
		require.NotNil(w.t, w.role("a").Run)
		down(w, false)
		w.idle("a")
	}, check: rescued(Completed)}, plan{name: "waits"})
	play(t, shapes[0], scenario{seed: one, steps: func(w *world) {
		down(w, true)
		id := w.emergency("a")
		w.pass(time.Hour)
		w.cancel(id)
		w.idle("a")
		require.Equal(w.t, Cancelled, w.role("a").LastRun.State)
		down(w, false)
	}, check: serves("a", "m0-a")}, plan{name: "is cancelled"})
}

// TestEmergencyIsNotTakenBack: once the target may have heard of it.
func TestEmergencyIsNotTakenBack(t *testing.T) {
	play(t, shapes[0], scenario{seed: one, steps: func(w *world) {
		w.rejected = "u-a"
		id := w.emergency("a")
		w.phase("a", Apply)
		var refused *Conflict
		require.ErrorAs(w.t, w.do("cancel", func(ctx context.Context, e *Engine) error { _, err := e.Cancel(ctx, id, ""); return err }), &refused)
		require.Contains(w.t, refused.Text, "nothing takes back")
		require.ErrorAs(w.t, w.do("rollback", func(ctx context.Context, e *Engine) error {
			_, err := e.RollBack(ctx, "a", Request{Keys: newKeys()})
			return err
		}), &refused)
		w.pass(time.Hour)
		require.NotNil(w.t, w.role("a").Run)
		w.rejected = ""
		w.idle("a")
		require.ErrorAs(w.t, w.do("rollback", func(ctx context.Context, e *Engine) error {
			_, err := e.RollBack(ctx, "a", Request{Keys: newKeys()})
			return err
		}), &refused)
		require.Contains(w.t, refused.Text, "no earlier material")
	}, check: rescued(Completed)}, plan{name: "not taken back"})
}

// TestEmergencyRestartsOnce: those that share consumers are brought there together, and
// who comes late by itself.
func TestEmergencyRestartsOnce(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		several(w)
		w.running(w.several()...)
		w.emergency(w.several()...)
		w.idle(w.several()...)
		require.Equal(t, 2, w.clusters.total, "of two consumers")
		require.Equal(t, Completed, w.role("a").LastRun.State)
	})
}

// TestEmergencyIsNotStopped by a consumer that does not come up: it is told, and what it
// ran with is refused all the same.
func TestEmergencyIsNotStopped(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		several(w)
		w.running(w.several()...)
		w.crashing("m1")
		w.emergency(w.several()...)
		w.idle(w.several()...)
		for _, name := range w.several() {
			r := w.role(name)
			require.Equal(t, Partial, r.LastRun.State, name)
			require.Contains(t, r.LastRun.Error, "pods crash")
			require.Empty(t, r.Suspended)
		}
	})
}

// TestEmergencyDoesNotWaitForOthers: a role whose server hangs holds up none of its unit,
// and brings its own when it comes.
func TestEmergencyDoesNotWaitForOthers(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		several(w)
		w.running(w.several()...)
		w.rejected = "u-b"
		w.emergency(w.several()...)
		w.until("the end of one", time.Minute, func() bool { return w.roles["a"].Run == nil && w.roles["a"].LastRun != nil })
		require.NotNil(t, w.role("b").Run)
		w.rejected = ""
		w.idle("b")
		require.Equal(t, 4, w.clusters.total, "each of two consumers twice")
		for _, name := range w.several() {
			require.Equal(t, Completed, w.role(name).LastRun.State, name)
		}
	})
}

// TestEmergencyBringsMeanwhile: a node that does not refuse what it has to keeps nobody
// from the new version that the others demand, and is gone on with.
func TestEmergencyBringsMeanwhile(t *testing.T) {
	for _, s := range []shape{{name: "document", strategy: kind.Overlap, nodes: 2, document: true}, consumed(kind.Overlap)} {
		play(t, s, scenario{seed: one, steps: func(w *world) {
			w.running("a")
			w.clinging = "u-a"
			w.emergency("a")
			w.until("what is brought meanwhile", 10*time.Minute, func() bool { return w.roles["a"].Run.Over })
			r := w.role("a")
			require.Equal(w.t, Retire, r.Run.Phase)
			require.Zero(w.t, r.Run.Refused)
			if s.document {
				require.Equal(w.t, "m1", w.doc.Body[r.Field])
				require.Nil(w.t, w.doc.Previous)
			} else {
				require.Equal(w.t, "m1", w.clusters.pods["c1"]["a"].Secret)
			}
			w.mu.Lock()
			w.clinging = ""
			w.mu.Unlock()
			w.idle("a")
		}, check: rescued(Completed)}, plan{name: "meanwhile"})
	}
}

// TestRandomEmergencies has people rotate roles that share consumers, and others who have
// emergencies of some of them meanwhile.
func TestRandomEmergencies(t *testing.T) {
	for _, s := range jointShapes() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			end := time.Now().Add(*pairBudget)
			for seed := *pairSeed; time.Now().Before(end) && !t.Failed(); seed++ {
				rng := rand.New(rand.NewSource(seed))
				p := plan{name: fmt.Sprintf("%s/random emergencies, seed %d", s.name, seed), points: []point{
					anyPoint(rng, s), {where: atCluster, at: 1 + rng.Intn(40), what: clusterFaults[rng.Intn(len(clusterFaults))]},
				}}
				names := []string{"a", "b", "c", "d"}
				play(t, s, scenario{seed: func(w *world) { w.seedAll(names...) }, steps: func(w *world) {
					var wg sync.WaitGroup
					for range 1 + rng.Intn(2) {
						some := slices.DeleteFunc(slices.Clone(names), func(string) bool { return rng.Intn(2) == 0 })
						after := time.Duration(rng.Intn(12000)) * time.Millisecond
						wg.Go(func() {
							w.pass(after)
							if len(some) > 0 {
								w.emergency(some...)
							}
						})
					}
					w.crowdOn(rng, false, names...)
					wg.Wait()
					w.idle(names...)
				}}, p)
				faultPoints.Add(2)
			}
		})
	}
}

// TestEmergencyConsumersGoOnAlone: one whose Secret does not come keeps no other from its
// restart.
func TestEmergencyConsumersGoOnAlone(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		several(w)
		w.running(w.several()...)
		w.clusters.unsynced = "c1"
		w.emergency(w.several()...)
		w.until("the other consumer", time.Minute, func() bool {
			return w.clusters.pods["c2"]["a"].Secret == "m1" || w.clusters.pods["c2"]["a"].Secret == "m2"
		})
		w.idle(w.several()...)
		for _, name := range w.several() {
			require.Equal(t, Partial, w.role(name).LastRun.State)
			require.Contains(t, w.role(name).LastRun.Error, `consumer "c1" (sync)`)
			require.NotContains(t, w.role(name).LastRun.Error, "c2")
		}
	})
}
