package rotation

import (
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// shownKeys are secrets that no server holds, and that are shown with the previous one.
func shownKeys() shape {
	return shape{name: "consumed keys", strategy: kind.Overlap, targetless: true, document: true, consumers: true}
}

// Of secrets that no server holds, too, those that went back because of another one
// begin anew, when what failed of them is cleared.
func TestJoinedKeysWithABadOne(t *testing.T) {
	jointWorld(t, shownKeys(), func(t *testing.T, w *world) {
		w.rotate("a")
		w.hasConsumers("a")
		w.spoiling("c")
		w.rotate("b")
		w.rotate("c")
		w.rotate("d")
		w.idle("a", "b", "c", "d")
		w.finish()
		require.Equal(t, []State{Completed, Completed, RolledBack, Completed}, w.states("a", "b", "c", "d"))
		require.Empty(t, w.role("b").Suspended)
		require.Equal(t, "m0-c", secret(w.role("c"), version.Current))
	})
}

// What failed of a secret that no server holds is as old as any other failure: it makes
// room for later ones.
func TestFailedKeysArePruned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shownKeys(), plan{name: t.Name()})
		w.seedAll("a")
		w.run()
		defer w.close()
		w.spoiling("a")
		for range 8 {
			w.rotate("a")
			w.idle("a")
			require.Equal(t, RolledBack, w.role("a").LastRun.State)
		}
		w.finish()
		fmt.Println(describe(w.role("a")))
		require.LessOrEqual(t, len(w.role("a").Versions), 4)
	})
}
