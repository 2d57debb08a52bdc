package rotation

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// Whatever is noted, moved and taken in any order over many hours: each role is
// taken at its time, once, and none is dropped.
func TestDueQueueDropsNoRole(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		st := NewStore(&logical.InmemStorage{})
		q := newDueQueue(st)
		now := time.Date(2026, 1, 1, 0, 30, 0, 0, time.UTC)
		want := map[string]time.Time{}
		if err := q.load(ctx, now); err != nil {
			rt.Fatal(err)
		}
		q.built = true
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			name := fmt.Sprint(rapid.IntRange(0, 5).Draw(rt, "role"))
			if rapid.Bool().Draw(rt, "note") {
				at := now.Add(time.Duration(rapid.IntRange(-30, 300).Draw(rt, "minutes")) * time.Minute)
				if old, ok := want[name]; ok {
					_ = st.DropDue(ctx, old, name)
				}
				if err := st.putDue(ctx, at, name); err != nil {
					rt.Fatal(err)
				}
				q.note(name, at)
				want[name] = at
				continue
			}
			now = now.Add(time.Duration(rapid.IntRange(0, 200).Draw(rt, "pass")) * time.Minute)
			got, err := q.take(ctx, now)
			if err != nil {
				rt.Fatal(err)
			}
			for role, at := range want {
				if due := !at.After(now); due != got[role].Equal(at) && (due || !got[role].IsZero()) {
					rt.Fatalf("role %s due at %s: taken %v at %s", role, at, got[role], now)
				}
				if !at.After(now) {
					_ = st.DropDue(ctx, at, role)
					delete(want, role)
				}
			}
		}
	})
}

// slowList lets a note come between the listing of an hour and its end.
type slowList struct {
	logical.InmemStorage
	during func()
}

func (s *slowList) List(ctx context.Context, prefix string) ([]string, error) {
	keys, err := s.InmemStorage.List(ctx, prefix)
	if s.during != nil {
		s.during()
		s.during = nil
	}
	return keys, err
}

func TestNoteWhileAnHourIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowList{}
		st := NewStore(s)
		q := newDueQueue(st)
		now := time.Now()
		require.NoError(t, st.putDue(t.Context(), now.Add(time.Minute), "a"))
		require.NoError(t, q.rebuild(t.Context()))
		require.NoError(t, st.putDue(t.Context(), now.Add(70*time.Minute), "b"))
		q.note("b", now.Add(70*time.Minute))
		later := now.Add(65 * time.Minute)
		s.during = func() { // while the second hour is being read
			_ = st.putDue(t.Context(), now.Add(80*time.Minute), "c")
			q.note("c", now.Add(80*time.Minute))
		}
		_, err := q.take(t.Context(), later)
		require.NoError(t, err)
		got, err := q.take(t.Context(), now.Add(90*time.Minute))
		require.NoError(t, err)
		require.Contains(t, got, "b")
		require.Contains(t, got, "c")
	})
}

// A role that is due and has to wait, as on a frozen mount, is looked at again
// in whatever hour that is: storage does not name it there.
func TestWaitingOverTheHourIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := NewStore(&logical.InmemStorage{})
		q := newDueQueue(st)
		now := time.Now()
		require.NoError(t, st.putDue(t.Context(), now.Add(59*time.Minute), "a"))
		require.NoError(t, q.rebuild(t.Context()))
		got, err := q.take(t.Context(), now.Add(59*time.Minute))
		require.NoError(t, err)
		require.Contains(t, got, "a")
		again := now.Add(190 * time.Minute)
		q.again("a", again)
		got, err = q.take(t.Context(), again.Add(-1))
		require.NoError(t, err)
		require.Empty(t, got)
		got, err = q.take(t.Context(), again)
		require.NoError(t, err)
		require.Contains(t, got, "a")
	})
}

// A role that rotates is due until it has: it is not read again after each of its steps
// to find that, and is looked at when its run has ended.
func TestWhatRotatesIsNotLookedForAgain(t *testing.T) {
	e := New(Options{Storage: &logical.InmemStorage{}})
	require.NoError(t, e.due.rebuild(t.Context()))
	now := time.Now()
	r := &Role{Name: "app", Next: now.Add(-time.Minute)}
	due := func() map[string]time.Time {
		e.noteDue(r)
		got, err := e.due.take(t.Context(), now)
		require.NoError(t, err)
		return got
	}
	require.Contains(t, due(), "app")
	r.Run = &Run{Phase: Apply}
	require.Empty(t, due())
	e.due.again("app", r.Next) // somebody had it looked at before it began
	require.Empty(t, due())
	r.Run = nil
	require.Contains(t, due(), "app")
}
