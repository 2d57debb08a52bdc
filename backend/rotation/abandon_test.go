package rotation

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (w *world) setInactive(inactive bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inactive = inactive
}

// allDown is a server that does not come back.
func (w *world) allDown() {
	for _, n := range w.order {
		w.setDown(n, true)
	}
}

// A server that is gone for good ends no rotation by itself, wherever it stood:
// abandon does, and keeps every version.
func TestAbandonWhereTheServerIsGone(t *testing.T) {
	for name, reach := range map[string]func(*world){
		"grace": func(w *world) { w.phase("a", Grace); w.allDown() },
		"retire": func(w *world) {
			w.phase("a", Grace)
			w.allDown()
			w.retire("a")
			w.pass(time.Minute)
		},
		"back": func(w *world) {
			w.phase("a", Grace)
			w.allDown()
			w.rollBack("a")
			w.pass(time.Minute)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
				id := w.rotate("a")
				reach(w)
				before := w.role("a")
				require.NotNil(t, before.Run)
				var c *Conflict
				require.ErrorAs(t, w.instance().engine.Delete(t.Context(), "a"), &c)
				require.Equal(t, id, c.Rotation)
				w.abandon("a")
				require.Nil(t, w.role("a"))
				w.pass(time.Minute)
				require.Len(t, w.tombs["a"].Role.Versions, len(before.Versions), "every version is kept")
				st := NewStore(&w.inner)
				h, err := st.Header(t.Context(), id)
				require.NoError(t, err)
				require.Equal(t, Cancelled, h.State, "the rotation is closed")
				ev, err := st.Evidence(t.Context(), id, "a")
				require.NoError(t, err)
				require.Equal(t, "abandoned", ev.Error)
				claims, err := w.inner.List(t.Context(), storage.Claim)
				require.NoError(t, err)
				require.Empty(t, claims, "its user is free")
				w.abandon("a") // again
				w.calm()
				w.create("a", nil, false)
				w.idle("a")
				w.finish()
				require.Equal(t, before.With(version.Current).Material, w.role("a").With(version.Current).Material)
			})
		})
	}
}

// What can be cancelled is not abandoned; and while a change may still land, its
// role is not forgotten.
func TestAbandonIsRefused(t *testing.T) {
	inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
		w.setInactive(true)
		id := w.rotate("a")
		var c *Conflict
		require.ErrorAs(t, w.instance().engine.Abandon(t.Context(), "a", ""), &c)
		require.Contains(t, c.Text, "use cancel/"+id)
		w.setInactive(false)
		w.phase("a", Grace)
		w.nextCall(1, landsLate)
		w.retire("a")
		w.until("an attempt", time.Minute, func() bool { return w.roles["a"].Run.Attempt != nil })
		w.pass(11 * time.Second) // the worker has given the role back
		deadline := w.role("a").Run.Attempt.Deadline.Add(Skew)
		require.True(t, time.Now().Before(deadline))
		require.ErrorAs(t, w.instance().engine.Abandon(t.Context(), "a", ""), &c)
		require.Contains(t, c.Text, "try again after "+deadline.UTC().Format(time.RFC3339))
		w.idle("a")
		w.finish()
	})
}

// Whatever a refusal advises works.
func TestBusyAdvisesWhatWorks(t *testing.T) {
	role := func(run Run, s shape) *Role {
		w := &world{shape: s}
		r := w.newRole("a")
		run.Rotation = "id"
		r.Run = &run
		r.Versions = []version.Version{{Number: 1, Stage: version.Previous}, {Number: 2, Stage: version.Current}}
		return r
	}
	for _, s := range []shape{overlap(1), swap(1)} {
		for _, phase := range []Phase{Preflight, Generate, Apply, Test, Publish, Grace, Retire} {
			for _, run := range []Run{{Phase: phase}, {Phase: phase, Back: true}, {Phase: phase, Retired: true}, {Phase: phase, Recall: "r"}} {
				r := role(run, s)
				text := busy(r).Text
				require.Contains(t, text, "rotation id")
				words := map[string]bool{
					"cancel/id":           recallRun(r.clone(), "r") == nil && !run.Back && run.Recall == "",
					"retire/fake/a":       phase == Grace && !run.Back && run.Recall == "",
					"with abandon=true":   false,
					"wait until it has e": false,
				}
				if !words["cancel/id"] {
					words["with abandon=true"], words["wait until it has e"] = true, true
				}
				for word, there := range words {
					if there {
						require.Contains(t, text, word, "%+v", run)
					} else {
						require.NotContains(t, text, word, "%+v", run)
					}
				}
			}
		}
	}
}

// A role whose worker holds it while its target hangs: the refusal comes within
// the time of the request and says which rotation it is.
func TestLockedRoleNamesItsRotation(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.nextCall(1, callHangs)
		id := w.rotate("a")
		w.pass(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err := w.instance().engine.RollBack(ctx, "a", Request{})
		var c *Conflict
		require.ErrorAs(t, err, &c)
		require.Equal(t, id, c.Rotation)
		require.Contains(t, c.Text, "rotations/"+id)
		require.NoError(t, ctx.Err(), "the answer is in time")
		w.idle("a")
		w.finish()
	})
}

// A cancel that comes again, on the way back or after it, is answered like the
// first; one of what has completed is not.
func TestCancelAgain(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		e := w.instance().engine
		id := w.rotate("a")
		w.phase("a", Grace)
		for range 2 {
			_, err := e.Cancel(t.Context(), id, "")
			require.NoError(t, err)
		}
		w.idle("a")
		for range 2 { // before the header is closed, and after that
			h, err := e.Cancel(t.Context(), id, "")
			require.NoError(t, err)
			require.Equal(t, id, h.ID)
			w.pass(time.Minute)
		}
		id = w.rotate("a")
		w.idle("a")
		var c *Conflict
		_, err := e.Cancel(t.Context(), id, "")
		require.ErrorAs(t, err, &c)
		w.finish()
	})
}

// Requests that joined a rotation stand in no header; they go by their age.
func TestRequestsAreForgotten(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.rollBack("a") // joins
		w.idle("a")
		w.days(91)
		keys, err := w.inner.List(t.Context(), storage.Request)
		require.NoError(t, err)
		require.Empty(t, keys)
		w.finish()
	})
}
