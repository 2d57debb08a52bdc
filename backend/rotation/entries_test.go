package rotation

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

func TestClip(t *testing.T) {
	require.Equal(t, "short", clip("short"))
	require.Equal(t, "aüz", clip("aü\xffz"))
	for _, s := range []string{
		strings.Repeat("<", 11_000), strings.Repeat("\x00\n\"\\", 5000), strings.Repeat("\xff\xfe", 20_000),
		strings.Repeat("ü", 11_000), strings.Repeat("🔑", 11_000), strings.Repeat("\u2028", 1000), strings.Repeat("a", 11_000),
	} {
		got := clip(s)
		raw, err := jsonutil.EncodeJSON(got)
		require.NoError(t, err)
		require.LessOrEqual(t, len(raw), maxText+1)
		require.LessOrEqual(t, utf8.RuneCountInString(got), maxRunes+1)
		require.True(t, utf8.ValidString(got))
	}
	require.Equal(t, maxRunes+1, utf8.RuneCountInString(clip(strings.Repeat("a", 300))))
}

// Entries that were stored without bounds, and what is said today, end in
// evidence and a header that fit.
func TestLongTextsFit(t *testing.T) {
	for name, text := range map[string]string{"escapes": strings.Repeat("<", 11_000), "not UTF-8": strings.Repeat("\xff<", 11_000)} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
				var h *Header
				_ = w.do("rotate", func(ctx context.Context, e *Engine) (err error) {
					h, err = e.Begin(ctx, Request{Trigger: Manual, Roles: []string{"a"}, Reason: text})
					return err
				})
				require.LessOrEqual(t, len(h.Reason), maxText)
				w.phase("a", Grace)
				_ = w.do("rollback", func(ctx context.Context, e *Engine) error {
					_, err := e.RollBack(ctx, "a", Request{Reason: text})
					return err
				})
				w.idle("a")
				require.Equal(t, RolledBack, w.role("a").LastRun.State)
				w.finish()
			})
		})
	}
}

func TestEvidenceFits(t *testing.T) {
	long := strings.Repeat("<", 11_000)
	run := &Run{Rotation: "r", Error: long, Trigger: Manual}
	r := &Role{Name: "a", LastRun: &Ending{}}
	for i := range 3000 {
		run.Timeline = append(run.Timeline, Moment{What: fmt.Sprint(i, long)})
		r.Nodes = append(r.Nodes, fmt.Sprintf("%0250d:6379", i))
	}
	run.Missed = r.Nodes
	ev := evidence(r, step{next: r, ended: run, state: RolledBack})
	raw, err := jsonutil.EncodeJSON(ev)
	require.NoError(t, err)
	require.LessOrEqual(t, len(raw), maxSmallEntry)
	require.NotEmpty(t, ev.Timeline)
	require.NotEmpty(t, ev.Nodes)

	h := &Header{ID: "r", Reason: long, Roles: []Part{{Role: "a"}}}
	raw, err = jsonutil.EncodeJSON(closed(h, map[string]Part{"a": {Role: "a", Error: long, State: RolledBack}}))
	require.NoError(t, err)
	require.LessOrEqual(t, len(raw), 2048)
}

// corrupt replaces an entry by something that is not one.
func (w *world) corrupt(t *testing.T, key string) {
	t.Helper()
	require.NoError(t, w.inner.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte("{broken")}))
}

func (w *world) ends(t *testing.T, role string) {
	t.Helper()
	w.until("the end of the run of "+role, 30*time.Minute, func() bool { return w.roles[role].Run == nil })
}

// One entry that cannot be decoded costs its own role, and nobody else.
func TestOneBadEntry(t *testing.T) {
	for name, bad := range map[string]func(w *world, id string) string{
		"role":   func(*world, string) string { return storage.Role + "a" },
		"header": func(_ *world, id string) string { return storage.Rotation + id },
		"marker": func(*world, string) string { return storage.Open + "0-not-an-id" },
		"due":    func(*world, string) string { return storage.Due + "1999123100/x" },
		"config": func(*world, string) string { return storage.Config },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, shape{name: "targetless", strategy: kind.Overlap, targetless: true}, plan{name: t.Name()})
				for _, role := range []string{"a", "b", "c"} {
					w.seed(role, nil)
				}
				w.run()
				defer w.close()
				first := w.rotate("a")
				w.rotate("b", "c")
				w.phase("b", Grace)
				w.corrupt(t, bad(w, first))
				w.restart()
				w.ends(t, "b")
				w.ends(t, "c")
			})
		})
	}
}

func TestBadRoleOfABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, overlap(1), plan{name: t.Name()})
		for _, role := range []string{"a", "b"} {
			w.seed(role, nil)
		}
		w.run()
		defer w.close()
		w.rotate("a", "b") // one rotation, one lane
		w.phase("b", Grace)
		whole, err := w.inner.Get(t.Context(), storage.Role+"a")
		require.NoError(t, err)
		w.corrupt(t, storage.Role+"a")
		w.restart()
		w.ends(t, "b")

		st := w.instance().engine.Store()
		var seen []string
		unreadable, err := st.ScanRoles(t.Context(), func(r *Role) bool { seen = append(seen, r.Name); return true })
		require.NoError(t, err)
		require.Equal(t, []string{"a"}, unreadable)
		require.Equal(t, []string{"b"}, seen)
		_, err = st.FirstRole(t.Context(), func(*Role) bool { return false })
		require.True(t, storage.IsUndecodable(err), "that nobody matches is not known: %v", err)
		w.rotate("a", "b")
		w.ends(t, "b")

		require.NoError(t, w.inner.Put(t.Context(), whole))
		w.ends(t, "a")
		w.finish()
	})
}

// A due entry that cannot be decoded is checked against its role, like any other.
func TestBadDueEntry(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		past := w.start.Add(-3 * time.Hour)
		w.corrupt(t, dueKey(past, "a"))
		w.corrupt(t, dueKey(past, "gone"))
		w.restart()
		w.pass(time.Minute)
		for _, name := range []string{"a", "gone"} {
			e, err := w.inner.Get(t.Context(), dueKey(past, name))
			require.NoError(t, err)
			require.Nil(t, e, "it was dropped")
		}
	})
}

// A role whose lock is held costs recovery a moment, not its whole time.
func TestRecoveryDoesNotWaitForLocks(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		e := w.instance().engine
		now := time.Now().UTC()
		for i := range 40 { // rotations that began nothing yet
			h := &Header{ID: newID(), Trigger: Manual, Started: now.Add(time.Duration(i)), Roles: []Part{{Role: "a", Kind: "fake"}}}
			require.NoError(t, e.st.putHeader(t.Context(), h))
		}
		require.NoError(t, e.locks.lock(t.Context(), "a"))
		began := time.Now()
		require.NoError(t, e.recoverAll())
		require.Less(t, time.Since(began), 10*time.Second)
		e.locks.unlock("a")
		w.finish()
	})
}
