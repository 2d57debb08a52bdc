package rotation

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// shownKeys are secrets that no server holds, and that are shown with the previous one.
func shownKeys() shape {
	return shape{name: "consumed keys", strategy: kind.Overlap, targetless: true, document: true, consumers: true}
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
		require.LessOrEqual(t, len(w.role("a").Versions), 4)
	})
}

// verdictsOf are those of a rotation as it stands.
func (w *world) verdictsOf(t *testing.T, id string) map[string]Criterion {
	t.Helper()
	st := w.instance().engine.Store()
	h, err := st.Header(t.Context(), id)
	require.NoError(t, err)
	parts, err := st.Parts(t.Context(), h)
	require.NoError(t, err)
	evs, err := st.Evidences(t.Context(), h, parts)
	require.NoError(t, err)
	proofs, _, err := st.Proofs(t.Context(), id, "", 20, true)
	require.NoError(t, err)
	out := map[string]Criterion{}
	for _, c := range Success(evs, proofs) {
		out[c.Name] = c
	}
	return out
}

// Who begins anew has nothing to show of what was taken back.
func TestNothingIsMetAnew(t *testing.T) {
	jointWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		w.spoiling("c")
		ids := w.queueUp("a", "b", "c")
		var anew map[string]Criterion
		w.mu.Lock()
		w.clusters.surveyed = func() {
			if run := w.role("b").Run; run != nil && run.alone() && run.Phase == Preflight {
				got := w.verdictsOf(t, ids[0])
				w.mu.Lock()
				defer w.mu.Unlock()
				anew = got
			}
		}
		w.mu.Unlock()
		w.idle("a", "b", "c")
		w.finish()
		require.NotNil(t, anew)
		for _, name := range []string{inKubernetes, allRestarted, healthy} {
			require.Equal(t, Pending, anew[name].Verdict, anew[name].Line())
		}
		got := w.verdictsOf(t, ids[0])
		for _, name := range []string{inKubernetes, allRestarted, healthy} {
			require.Equal(t, Met, got[name].Verdict, got[name].Line())
		}
	})
}

// A look that was cut off before it saw every workload shows nothing of the others.
func TestPartialLooks(t *testing.T) {
	ev := &Evidence{Part: Part{Role: "a", State: RolledBack}, Account: &Account{Promoted: true, Back: true, Consumers: []string{"web"}}}
	look := &seen.Consumer{
		Mode: "restart", Error: "Deployment app/w150 has still to be read", Workloads: []seen.Workload{{Kind: "Deployment", Name: "w0", Replicas: 1, New: 1, Ready: 1}},
		Checks: []seen.Check{{Number: 1, Type: "http"}},
	}
	look.Count()
	p := &Proof{Consumer: "web", Way: WayForward, Steps: []Phase{Check}, by: map[Phase]*seen.Consumer{Check: look}}
	require.Equal(t, NotMet, Success([]*Evidence{ev}, []*Proof{p})[2].Verdict)
	look.Checks[0].Ran = true // which is after all workloads
	require.Equal(t, Met, Success([]*Evidence{ev}, []*Proof{p})[2].Verdict)

	cleared := &seen.Consumer{Done: true, Values: []seen.Value{{Role: "a", Held: true}}}
	cleared.Count()
	p = &Proof{Consumer: "web", Way: wayAfter, Steps: []Phase{Sync}, by: map[Phase]*seen.Consumer{Sync: cleared}}
	require.Equal(t, NotMet, Success([]*Evidence{ev}, []*Proof{p})[1].Verdict, "what was cleared is not what was to be brought")
}

// Who went back and begins anew is looked at by what came last.
func TestBroughtByTheLast(t *testing.T) {
	st, at := NewStore(&logical.InmemStorage{}), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r := &Role{Name: "a"}
	r.Versions = []version.Version{{Number: 2, Stage: version.Current, Rotation: "id"}}
	for i, way := range []string{wayBack, WayForward, wayBack} {
		when := at.Add(time.Duration(i) * time.Hour)
		require.NoError(t, st.putProof(t.Context(), "id", way, Sync, "web", Progress{Done: true, Seen: &seen.Consumer{At: when, Changed: when}}))
		_, got, err := st.broughtBy(t.Context(), r, "web")
		require.NoError(t, err)
		require.Equal(t, when, got, way)
	}
}
