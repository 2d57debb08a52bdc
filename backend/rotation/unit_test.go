package rotation

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func swapDocument() shape {
	return shape{name: "swap document", strategy: kind.Swap, nodes: 1, document: true}
}

// rejecting has nodes refuse every change of a user, with a definite answer.
func (w *world) rejecting(user string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rejected = user
}

// Of two roles that swap, one fails when the other is through: the rest of the
// unit is that one alone, and it comes to its end.
func TestUnitOfTwoSwapsOneFails(t *testing.T) {
	inWorld(t, swapDocument(), nil, func(t *testing.T, w *world) {
		w.seed("b", nil)
		w.rejecting("u-b")
		w.rotate("a", "b")
		w.idle("a")
		w.rejecting("")
		w.idle("b")
		w.finish()
		require.Equal(t, Completed, w.role("a").LastRun.State)
		require.Equal(t, RolledBack, w.role("b").LastRun.State)
	})
}

// asRing makes of a role that is being seeded a ring of keys that sign.
func asRing(r *Role) {
	r.Kind, r.Connection, r.Target = "fakering", "", ""
	r.Spec.Strategy, r.Spec.Username, r.Spec.PreviousField, r.UsernameField = kind.KeyRing, "", "", ""
	r.Spec.PropagationDelay, r.Spec.MaxTokenTTL, r.Spec.KeysField = testDelay, 20*time.Minute, "keys-"+r.Name
}

// A server that goes away while its role waits for the rest of the unit does not
// hold up the rest for as long as it stays away.
func TestUnitGivesUpAtPromote(t *testing.T) {
	inWorld(t, shape{name: "document", strategy: kind.Overlap, nodes: 1, document: true, tokens: 20 * time.Minute}, nil, func(t *testing.T, w *world) {
		w.mu.Lock()
		w.tampered["u-a"], w.tampered[""] = true, true // nodes are not asked about b, which has no user
		w.mu.Unlock()
		w.seed("b", asRing)
		w.rotate("a", "b")
		w.phase("b", Check)
		require.Equal(t, Promote, w.role("a").Run.Phase)
		w.setDown("n1", true)
		w.idle("b")
		require.Equal(t, RolledBack, w.role("b").LastRun.State)
		require.True(t, w.role("a").Run.Back)
		w.setDown("n1", false)
		w.idle("a")
		require.Equal(t, RolledBack, w.role("a").LastRun.State)
	})
}

// Roles that wait for their unit look now and then, and no more often the longer
// they wait.
func TestUnitWaitsQuietly(t *testing.T) {
	inWorld(t, shape{name: "document", strategy: kind.Overlap, nodes: 1, document: true, tokens: 20 * time.Minute}, nil, func(t *testing.T, w *world) {
		w.mu.Lock()
		w.tampered[""] = true
		w.mu.Unlock()
		names := []string{"a"}
		for i := range 6 {
			names = append(names, fmt.Sprintf("b%d", i))
			w.seed(names[i+1], nil)
		}
		w.seed("c", func(r *Role) { asRing(r); r.Spec.PropagationDelay = 20 * time.Minute })
		w.rotate(append(names, "c")...)
		w.phase("c", Check)
		w.pass(time.Minute)
		began := w.reads()
		w.pass(10 * time.Minute)
		looks := int(10*time.Minute/unitPause) + 1
		require.LessOrEqual(t, w.reads()-began, looks*2*(1+len(names)), "each looks at itself, and one of them at all")
		for _, name := range names {
			w.idle(name)
		}
	})
}
