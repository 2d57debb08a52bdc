package rotation

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Whatever becomes of a write of what was seen, the rotation ends as it would have,
// and what is kept is whole and there once.
func TestFaultsAtProofs(t *testing.T) {
	points, strategies := 0, []kind.Strategy{kind.Overlap, kind.Swap}
	if stride > 1 { // the race detector makes it many times slower
		strategies = strategies[:1]
	}
	for _, strategy := range strategies {
		for _, crash := range []bool{false, true} {
			for _, f := range storageWriteFaults {
				for k := 1; ; k++ {
					reached := false
					synctest.Test(t, func(t *testing.T) {
						w := newWorld(t, consumed(strategy), plan{name: fmt.Sprintf("%s %s at proof %d", t.Name(), f, k)})
						several(w)
						w.writeFaultAt, w.writeFault, w.writeFaultIn = storage.Proof, f, k
						w.run()
						defer w.close()
						if crash {
							w.crashing("m1")
						}
						w.rotate(w.several()...)
						w.idle(w.several()...)
						reached = w.writeFaultIn == 0
						w.finish()
						want := map[bool]State{false: Completed, true: RolledBack}[crash]
						for _, name := range w.several() {
							require.Equal(t, want, w.role(name).LastRun.State, "%s at write %d", f, k)
						}
					})
					if t.Failed() || !reached {
						break
					}
					points++
				}
			}
		}
	}
	fmt.Printf("proofs: %d faults at writes of what was seen at consumers\n", points)
	require.Greater(t, points, 50*len(strategies))
}

// A consumer of 200 workloads and 2000 pods is kept in entries that storage takes:
// what is bad first, and how many more there are. A step that is done again leaves the
// same entries.
func TestProofsFit(t *testing.T) {
	st := NewStore(&logical.InmemStorage{})
	all := &seen.Consumer{Connection: "prod", Namespace: "app", Mode: "restart", At: time.Now()}
	for i := range 200 {
		all.Workloads = append(all.Workloads, seen.Workload{
			Kind: "Deployment", Name: fmt.Sprintf("%03d-%s", i, strings.Repeat("w", 200)), Wave: 1, Restarted: time.Now(), Generation: 7,
			Revision: "12", Replicas: 10, New: 10, Ready: 10, Complete: time.Now(),
		})
		for j := range 10 {
			p := seen.Pod{
				Workload: fmt.Sprintf("Deployment/web-%d", i), Name: fmt.Sprintf("web-%d-5b6c7d8e9f-%d", i, j), Node: "node-1", New: true,
				Created: time.Now(), Ready: time.Now(), Image: "sha256:0123456789ab",
			}
			if j == 9 && i >= 180 {
				p.Problem = "container main waits: CrashLoopBackOff (exit code 1, 5 restarts)"
			}
			all.Pods = append(all.Pods, p)
		}
	}
	for i := range 60 {
		all.Values = append(all.Values, seen.Value{Role: strings.Repeat("r", 100) + fmt.Sprint(i), Keys: []string{strings.Repeat("k", 200)}, Held: i != 59})
	}
	all.Count()
	for range 3 {
		require.NoError(t, st.putProof(t.Context(), "id", WayForward, Check, "web", Progress{Done: true, Seen: all}))
	}
	keys, err := st.s.List(t.Context(), storage.Proof+"id/")
	require.NoError(t, err)
	require.Equal(t, []string{"1.check-pods.web", "1.check.web"}, keys)
	largest := 0
	for _, key := range keys {
		e, err := st.s.Get(t.Context(), storage.Proof+"id/"+key)
		require.NoError(t, err)
		largest = max(largest, len(e.Value))
	}
	require.LessOrEqual(t, largest, maxSmallEntry)
	proofs, _, err := st.Proofs(t.Context(), "id", "web", 20, true)
	require.NoError(t, err)
	got := proofs[0].All()
	require.Equal(t, "proven", proofs[0].State())
	require.Equal(t, seen.Counts{Values: 60, Workloads: 200, WellWorkloads: 200, Pods: 2000, WellPods: 1980}, got.Counted)
	require.Equal(t, 2000, len(got.Pods)+got.More.Pods)
	require.Equal(t, 200, len(got.Workloads)+got.More.Workloads)
	require.Greater(t, len(got.Pods), 200)
	require.False(t, got.Values[0].Held, "what is bad comes first")
	for i, p := range got.Pods {
		require.Equal(t, i < 20, p.Problem != "", "pod %d: what is bad comes first", i)
	}
	require.Len(t, all.Pods, 2000, "what was seen is as it was")
	require.Equal(t, "web-0-5b6c7d8e9f-0", all.Pods[0].Name)
	fmt.Printf("proofs: 200 workloads and 2000 pods in entries of at most %d bytes; %d pods are kept and %d more counted\n", largest, len(got.Pods), got.More.Pods)

	// Of a step that failed and is then proven nothing bad is left.
	require.NoError(t, st.putProof(t.Context(), "id", WayForward, Restart, "web", Progress{Err: kind.Definitely("it crashes"), Seen: all}))
	proofs, _, err = st.Proofs(t.Context(), "id", "", 20, true)
	require.NoError(t, err)
	require.Len(t, proofs[0].Seen(Restart).Pods, 20, "of restart those that are not well")
	well := &seen.Consumer{Pods: []seen.Pod{{Name: "a"}}}
	require.NoError(t, st.putProof(t.Context(), "id", WayForward, Restart, "web", Progress{Done: true, Seen: well}))
	proofs, _, err = st.Proofs(t.Context(), "id", "", 20, true)
	require.NoError(t, err)
	require.Empty(t, proofs[0].Seen(Restart).Pods)

	for i := range 30 {
		require.NoError(t, st.putProof(t.Context(), "id", WayForward, Sync, fmt.Sprintf("a.b-%02d", i), Progress{Done: true, Seen: well}))
	}
	proofs, more, err := st.Proofs(t.Context(), "id", "", 20, true)
	require.NoError(t, err)
	require.Len(t, proofs, 20)
	require.Equal(t, 11, more)
	require.Equal(t, "a.b-00", proofs[0].Consumer)

	require.NoError(t, st.forget(t.Context(), &Header{ID: "id"}))
	keys, err = st.s.List(t.Context(), storage.Proof)
	require.NoError(t, err)
	require.Empty(t, keys, "it goes with its rotation")
}

// What is kept while a rotation is under way, and what it tells of success.
func TestSuccess(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		id := w.rotate(w.several()...)
		w.phase("a", Grace)
		verdicts := func() map[string]Criterion {
			st := w.instance().engine.Store()
			h, err := st.Header(t.Context(), id)
			require.NoError(t, err)
			parts, err := st.Parts(t.Context(), h)
			require.NoError(t, err)
			evs, err := st.Evidences(t.Context(), h, parts)
			require.NoError(t, err)
			proofs, _, err := st.Proofs(t.Context(), id, "", 20, false)
			require.NoError(t, err)
			out := map[string]Criterion{}
			list := Success(evs, proofs)
			require.Len(t, list, 9)
			for _, c := range list {
				out[c.Name] = c
			}
			return out
		}
		got := verdicts()
		for name, want := range map[string]Verdict{
			vaultUpdated: Met, inKubernetes: Met, allRestarted: Met, noErrorLogs: Unknown, healthy: Met, authWorks: Met,
			databaseWorks: Met, noUserErrors: Unknown, monitoringOK: Unknown,
		} {
			require.Equal(t, want, got[name].Verdict, "%s: %s", name, got[name].Detail)
			require.Equal(t, want == Met, got[name].Met)
		}
		require.Contains(t, got[authWorks].Detail, "the one before is still accepted")
		require.Contains(t, got[noErrorLogs].Detail, "has no logs check; add one")
		w.idle(w.several()...)
		w.finish()
		require.Contains(t, verdicts()[authWorks].Detail, "every earlier one is refused there")
	})
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		w.crashing("m1")
		id := w.rotate(w.several()...)
		w.idle(w.several()...)
		w.finish()
		st := w.instance().engine.Store()
		h, err := st.Header(t.Context(), id)
		require.NoError(t, err)
		evs, err := st.Evidences(t.Context(), h, h.Roles)
		require.NoError(t, err)
		proofs, _, err := st.Proofs(t.Context(), id, "", 20, true)
		require.NoError(t, err)
		list := Success(evs, proofs)
		require.Equal(t, NotMet, list[0].Verdict)
		require.Equal(t, Met, list[1].Verdict, "the Secret had it: %s", list[1].Detail)
		require.Equal(t, NotMet, list[2].Verdict)
		require.Contains(t, list[2].Detail, "pods crash")
		require.Equal(t, NotMet, list[4].Verdict, "it never came to the checks")
		states := map[string]string{}
		for _, p := range proofs {
			states[p.Consumer+" "+p.Direction()] = p.State()
		}
		require.Contains(t, states, "c1 back")
		require.Equal(t, "proven", states["c1 back"])
	})
}

// A role without consumers, and one that a server keeps, are told as what they are.
func TestSuccessWithoutConsumers(t *testing.T) {
	ev := &Evidence{Part: Part{Role: "a", Kind: "redis", Version: 2, State: RolledBack, Error: "node n1 refuses"}, Account: &Account{Phase: Apply, Back: true, Server: true}, Nodes: []string{"n1"}}
	list := Success([]*Evidence{ev}, nil)
	require.Equal(t, NotMet, list[0].Verdict)
	require.Equal(t, NotMet, list[5].Verdict)
	for _, i := range []int{1, 2, 3, 4, 7, 8} {
		require.Equal(t, NotApplicable, list[i].Verdict, list[i].Name)
		require.Contains(t, list[i].Detail, "name them in its field consumers")
	}
	ev = &Evidence{Part: Part{Role: "k", Kind: "transit", Version: 2, State: Completed}, Account: &Account{Promoted: true, Kept: true, Seen: "version 1 → 2"}}
	list = Success([]*Evidence{ev, nil, {Part: Part{Role: "old"}}}, nil)
	require.Equal(t, "met: "+vaultUpdated+" (k: version 2, version 1 → 2)", list[0].Line())
	require.Empty(t, Success([]*Evidence{{Part: Part{Role: "old"}}}, nil), "of what was kept before nothing is assumed")
	begun := &Evidence{Part: Part{Role: "b", State: Running}, Account: &Account{Server: true, Consumers: []string{"web"}}}
	for _, c := range Success([]*Evidence{ev, begun}, nil) {
		require.Equal(t, Pending, c.Verdict, c.Name)
	}
}

// A look at a role asks everything at once, within its time, and changes nothing.
func TestLookAt(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		w.rotate(w.several()...)
		w.idle(w.several()...)
		w.mu.Lock()
		restarts, writes := w.clusters.total, len(w.kinds[atStorage])
		w.mu.Unlock()
		began := time.Now()
		rep, err := w.instance().engine.LookAt(t.Context(), "a")
		require.NoError(t, err)
		require.NoError(t, rep.Err)
		require.Len(t, rep.Consumers, len(w.role("a").Consumers))
		require.NotEmpty(t, rep.Nodes)
		for _, c := range rep.Consumers {
			require.True(t, c.Seen.Done, c.Seen.Error)
			require.NotEmpty(t, c.Seen.Checks)
		}
		require.Less(t, time.Since(began), time.Second)
		w.mu.Lock()
		require.Equal(t, restarts, w.clusters.total)
		for _, op := range w.kinds[atStorage][writes:] {
			require.True(t, strings.HasPrefix(op, "get") || strings.HasPrefix(op, "list"), op)
		}
		w.plan.points = []point{{where: atCluster, at: w.ops[atCluster] + 1, what: callHangs}, {where: atCluster, at: w.ops[atCluster] + 2, what: callPanics}}
		w.mu.Unlock()
		began = time.Now()
		rep, err = w.instance().engine.LookAt(context.Background(), "a")
		require.NoError(t, err)
		require.LessOrEqual(t, time.Since(began), lookTimeout+time.Second)
		require.NotEmpty(t, rep.Nodes, "what answers is told")
		bad := 0
		for _, c := range rep.Consumers {
			if c.Seen.Error != "" {
				bad++
			}
		}
		require.Equal(t, 2, bad)
		w.finish()
	})
}
