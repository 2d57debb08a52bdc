package rotation

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// A snapshot that is restored holds a rotation in its grace, and the target has what a
// later one made. When that grace ends nothing is taken from consumers, who alone have
// it; a person says what is right.
func TestASnapshotInGraceTakesNothingAway(t *testing.T) {
	for _, s := range shapes {
		if s.targetless || s.keeper || s.root || s.strategy == kind.KeyRing || s.strategy == kind.Swap || s.consumers { // swap has no grace
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, s, plan{name: t.Name()})
				w.seed("a", nil)
				w.run()
				defer w.close()
				w.rotate("a")
				w.phase("a", Grace)
				r := w.role("a")
				user := r.inUse()
				w.tampered["u-a"] = true // by the document, too, which is not asked for its user
				later := kind.Material{Username: user, Secret: "of a later rotation"}
				for _, name := range w.order {
					w.tamper(name, user, later)
				}
				w.restart()
				w.until("what is wrong", 3*testGrace, func() bool { r := w.roles["a"]; return r.Run == nil || r.Run.Error != "" })
				w.pass(6 * time.Hour)
				r = w.role("a")
				require.NotNil(t, r.Run, "it does not end by itself")
				require.Equal(t, Grace, r.Run.Phase)
				require.Equal(t, Waiting, r.Run.state(), "it is seen to wait")
				require.Contains(t, r.Run.Error, "restored from a snapshot; run reconcile/fake/a to put them back, or keep what is there: delete the role (abandon=true) and create it with that")
				for _, name := range w.order {
					require.True(t, w.accepts(name, user, later.Secret), "%s refuses what consumers run with", name)
				}

				w.reconcile("a")
				w.idle("a")
				require.Equal(t, Completed, w.role("a").LastRun.State)
				for _, name := range w.order {
					require.False(t, w.accepts(name, user, later.Secret), "what is stored was put back, as was asked")
				}
			})
		})
	}
}

// One node that was changed is put right by the rotation, whoever goes on with it, and
// an engine that has seen the grace begin asks nobody.
func TestADriftInGraceIsMended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shapes[0], plan{name: t.Name()})
		w.seed("a", nil)
		w.run()
		defer w.close()
		w.rotate("a")
		w.phase("a", Grace)
		w.tamper("n1", "u-a", kind.Material{Username: "u-a", Secret: "stranger"})
		w.restart()
		w.idle("a")
		require.Equal(t, Completed, w.role("a").LastRun.State)
		require.True(t, w.accepts("n1", "u-a", secret(w.role("a"), version.Current)))
	})
}

// inApply is a world with a rotation whose change is under way.
func inApply(t *testing.T) *world {
	w := newWorld(t, shapes[0], plan{name: t.Name()})
	w.seed("a", nil)
	w.nextCall(3, callHangs) // preflight, probe, change
	w.run()
	w.rotate("a")
	w.until("apply", time.Minute, func() bool { return w.roles["a"].Run.Phase == Apply })
	return w
}

// A snapshot that was taken in apply, restored when its server accepts something that is
// not stored: the run waits, says what can be done, and all of that works.
func TestASnapshotInApplyWaitsForAPerson(t *testing.T) {
	for name, then := range map[string]func(*world){
		"reconcile": func(w *world) {
			w.reconcile("a")
			w.idle("a")
			require.Equal(w.t, Completed, w.role("a").LastRun.State)
			require.False(w.t, w.accepts("n1", "u-a", "of a later rotation"), "as was asked")
		},
		"abandon": func(w *world) {
			w.cancel(w.role("a").Run.Rotation) // which takes nothing away
			w.pass(10 * time.Minute)
			require.NotNil(w.t, w.role("a").Run)
			require.True(w.t, w.accepts("n1", "u-a", "of a later rotation"))
			_ = w.do("abandon", func(ctx context.Context, e *Engine) error { return e.Abandon(ctx, "a", "it is another one now") })
			require.Nil(w.t, w.role("a"))
			require.True(w.t, w.accepts("n1", "u-a", "of a later rotation"), "what is there is kept")
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := inApply(t)
				defer w.close()
				later := kind.Material{Username: "u-a", Secret: "of a later rotation"}
				for _, name := range w.order {
					w.tamper(name, "u-a", later)
				}
				w.restart()
				w.pass(10 * time.Minute)
				r := w.role("a")
				require.NotNil(t, r.Run, "it does not end by itself")
				require.True(t, r.Run.Doubt)
				require.Equal(t, Waiting, r.Run.state())
				require.Contains(t, r.Run.Error, "run reconcile/fake/a to put them back")
				require.Contains(t, busy(r).Text, "go on with reconcile/fake/a, or delete roles/a with abandon=true")
				for _, name := range w.order {
					require.True(t, w.accepts(name, "u-a", later.Secret))
				}
				then(w)
			})
		})
	}
}

// After a crash a target that does not answer holds nothing up for ever: the run gives up
// in its time, can be cancelled, and its role deleted.
func TestACrashWithItsTargetGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := inApply(t)
		defer w.close()
		w.allDown()
		w.restart()
		w.until("a way back", 10*time.Minute, func() bool { return w.roles["a"].Run.Back })
		_ = w.do("abandon", func(ctx context.Context, e *Engine) error { return e.Abandon(ctx, "a", "it is gone") })
		require.Nil(t, w.role("a"))
	})
}

// Neither does a retirement whose target is gone spin, and when that is back it goes on by
// itself, once consumers were seen to run with what is served.
func TestACrashInRetire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := shapes[slices.IndexFunc(shapes, func(s shape) bool { return s.name == "consumed" })]
		w := newWorld(t, s, plan{name: t.Name()})
		w.seed("a", nil)
		w.run()
		defer w.close()
		w.rotate("a")
		w.phase("a", Grace)
		w.setDown("n1", true)
		w.until("retire", time.Hour, func() bool { return w.roles["a"].Run.Phase == Retire })
		w.restart()
		w.pass(time.Hour)
		w.mu.Lock()
		asked := w.ops[atTarget]
		w.mu.Unlock()
		require.Less(t, asked, 500)
		require.Equal(t, Retire, w.role("a").Run.Phase)
		w.setDown("n1", false)
		w.idle("a")
		require.Equal(t, Completed, w.role("a").LastRun.State)
		w.finish()
	})
}

// A reconcile in grace that a crash has cut off is done at once, and does not wait for the
// end of the grace; one whose target is gone by then makes no call before that was asked.
func TestACrashInAReconcileInGrace(t *testing.T) {
	for _, down := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, shapes[0], plan{name: t.Name()})
			w.seed("a", nil)
			w.run()
			defer w.close()
			w.rotate("a")
			w.phase("a", Grace)
			w.nextCall(1, callHangs)
			w.reconcile("a")
			w.pass(time.Second) // whose word is from before the start
			if down {
				w.allDown()
			}
			w.restart()
			if down {
				w.pass(time.Minute)
				require.True(t, w.role("a").Run.Reapply)
				for _, name := range w.order {
					w.setDown(name, false)
				}
			}
			w.until("reconciled", 3*time.Minute, func() bool { return !w.roles["a"].Run.Reapply })
			require.Equal(t, Grace, w.role("a").Run.Phase)
			w.idle("a")
			require.Equal(t, Completed, w.role("a").LastRun.State)
			w.finish()
		})
	}
}
