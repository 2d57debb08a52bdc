package rotation

import (
	"testing"

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
