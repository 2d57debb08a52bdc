package rotation

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// heldUpAtPublish rotates a role whose engine stands still, as under a seal, from
// its promotion on: the n-th write of its document fails, and is not made for long.
func (w *world) heldUpAtPublish(n int, d time.Duration) {
	w.mu.Lock()
	w.writeFault, w.writeFaultIn, w.writeFaultAt = storageFails, n, storage.Document
	w.mu.Unlock()
	w.rotate("a")
	for promoted := false; !promoted && !w.dead(); w.pass(100 * time.Millisecond) {
		run := w.role("a").Run
		promoted = run == nil || run.Promoted
	}
	w.setInactive(true)
	w.pass(d)
	w.setInactive(false)
	w.pass(time.Minute)
}

// Consumers that read a document have the whole grace from when they can read of
// the new version, and what they signed until then counts as long as any.
func TestGraceBeginsWithPublication(t *testing.T) {
	for n, s := range map[int]shape{
		1: {name: "document", strategy: kind.Overlap, nodes: 1, document: true},
		2: {name: "signing ring", strategy: kind.KeyRing, targetless: true, document: true, tokens: 20 * time.Minute},
	} {
		t.Run(s.name, func(t *testing.T) {
			inWorld(t, s, nil, func(t *testing.T, w *world) {
				w.rotate("a")
				w.idle("a")
				w.heldUpAtPublish(n, time.Hour)
				require.NotNil(t, w.role("a").Run)
				require.Equal(t, Grace, w.role("a").Run.Phase)
				w.idle("a")
				w.finish()
			})
		})
	}
}
