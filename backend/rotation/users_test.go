package rotation

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// TestLooksAreApart: roles whose connection cannot be read hold up no other.
func TestLooksAreApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shapeOf(t, []string{"strategy=overlap"}), plan{})
		w.run()
		defer w.close()
		w.seed("a", nil)
		w.seed("b", func(r *Role) { r.Connection = "bad" })
		e := w.instance().engine
		e.o.Generation = func(_ context.Context, c string) (int, error) {
			if c == "bad" {
				return 0, errInjected
			}
			return 0, nil
		}
		for _, name := range []string{"a", "b"} {
			require.NoError(t, e.Update(t.Context(), name, func(r *Role) error {
				r.SetAutoReconcile(true, time.Now())
				r.LookAt = time.Now().Add(10 * time.Second)
				return nil
			}))
		}
		w.tamper("n1", "u-a")
		w.pass(30 * time.Second)
		require.NotNil(t, w.role("a").LastRun)
		require.Equal(t, Reconcile, w.role("a").LastRun.Trigger)
		require.False(t, w.role("b").LookAt.After(time.Now()), "it was not looked at")
	})
}

// TestLooksAreFewerWhereNothingHelps: a role that no reconcile mends is looked at less and
// less often, and as often as others once it is well.
func TestLooksAreFewerWhereNothingHelps(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		require.NoError(t, w.do("auto_reconcile", func(ctx context.Context, e *Engine) error {
			return e.Update(ctx, "a", func(r *Role) error { r.SetAutoReconcile(true, time.Now()); return nil })
		}))
		w.mu.Lock()
		w.rejected = "u-a" // the target changes nothing
		w.mu.Unlock()
		w.tamper("n1", "u-a", *material("a", "stranger"))
		w.pass(7 * 24 * time.Hour)
		headers, err := NewStore(&w.inner).Headers(t.Context())
		require.NoError(t, err)
		require.Greater(t, len(headers), 7, "it was given up")
		require.Less(t, len(headers), 20)
		t.Logf("%d tries in a week", len(headers))

		w.mu.Lock()
		w.rejected = ""
		w.mu.Unlock()
		w.reconcile("a")
		w.idle("a")
		require.Equal(t, Completed, w.role("a").LastRun.State)
		require.Zero(t, w.role("a").Unmended)
		require.Less(t, time.Until(w.role("a").LookAt), 2*lookEvery)
		w.mended("a")
		w.finish()
	})
}

// TestHugeProfile: a user that takes long to describe does not make its role too large
// to be stored.
func TestHugeProfile(t *testing.T) {
	r := &Role{Name: "a", Kind: "fake", Connection: "c", Target: "t", Spec: kind.Spec{Username: "u", Strategy: kind.Overlap}, Run: &Run{Phase: Preflight, Trigger: Manual}}
	r.Add(kind.Material{Username: "u", Secret: "x"}, "", time.Now())
	r.Promote(time.Now())
	var profile []string
	for i := range 9000 {
		profile = append(profile, fmt.Sprintf("&%05d%s", i, strings.Repeat("x", 24)))
	}
	d := &decider{role: r, now: time.Now(), config: DefaultConfig(), pause: pause, facts: &facts{
		finding: &kind.Finding{Profile: profile}, asked: r.All(), answer: &kind.Answer{Nodes: []kind.NodeAnswer{{Node: "n", Accepts: []bool{true}}}},
	}}
	s := d.decide()
	require.Equal(t, store, s.act)
	raw, err := jsonutil.EncodeJSON(s.next)
	require.NoError(t, err)
	require.Less(t, len(raw), maxRoleEntry)
	require.NoError(t, s.next.roomy())

	// Two users have to be the same, and cannot.
	r.Spec = kind.Spec{Usernames: []string{"u", "v"}, Strategy: kind.Alternate}
	s = d.decide()
	require.Equal(t, finish, s.act)
	require.Contains(t, s.ended.Error, "KiB")
}

// TestTombstonesOfManyUsers: what earlier roles of a name were leaves room for what they
// hold.
func TestTombstonesOfManyUsers(t *testing.T) {
	e := New(Options{Storage: &logical.InmemStorage{}, Active: func() bool { return true }})
	var profile []string
	for i := range 480 {
		profile = append(profile, fmt.Sprintf("%05d%s", i, strings.Repeat("x", 95)))
	}
	for i := range 10 {
		r := &Role{Name: "a", Kind: "fake", Connection: "c", Target: "t", Profile: profile, Spec: kind.Spec{Username: fmt.Sprint("u", i), Strategy: kind.Overlap}}
		r.Add(kind.Material{Username: fmt.Sprint("u", i), Secret: "x"}, "", time.Now())
		r.Promote(time.Now())
		require.NoError(t, e.st.PutRole(t.Context(), nil, r))
		require.NoError(t, e.Delete(t.Context(), "a"), i)
	}
}

// TestRollbackToTheUserInUse: a rollback that was decided before another rotation, and
// begins after it, would have one user accept both.
func TestRollbackToTheUserInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shapeOf(t, []string{"strategy=alternate"}), plan{})
		w.run()
		defer w.close()
		w.seed("a", nil)
		for range 2 {
			w.rotate("a")
			w.idle("a")
		}
		// decided before the second rotation, begun after it
		err := w.do("rollback", func(ctx context.Context, e *Engine) error {
			_, err := e.Begin(ctx, Request{Trigger: Rollback, Roles: []string{"a"}, Source: 1})
			return err
		})
		require.NoError(t, err)
		w.idle("a")
		w.finish()
		require.Equal(t, Failed, w.role("a").LastRun.State)
		require.Equal(t, 3, numberOf(w.role("a").With(version.Current)))
	})
}
