package rotation

import (
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
				require.Contains(t, r.Run.Error, "restored from a snapshot; run reconcile/fake/a to put them back, or keep what is there: delete the role")
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
