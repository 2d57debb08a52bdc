package rotation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// restore brings a role back and does not give up before it is there.
func (w *world) restore(role string, overwrite bool) {
	for range 50 {
		err := w.do("restore", func(ctx context.Context, e *Engine) error { return e.restore(ctx, role, overwrite) })
		w.idle(role)
		if r := w.role(role); r != nil {
			return
		}
		w.logf("restore again after %s", answer(err))
		// As for createWith: what is not the role's there has to be ended on request.
		overwrite = overwrite || err != nil && strings.Contains(err.Error(), "overwrite_existing")
		w.pass(10 * time.Second)
	}
	w.violate("role %s could not be restored", role)
}

// restore is what the path does: a role that is there is restored.
func (e *Engine) restore(ctx context.Context, role string, overwrite bool) error {
	if r, err := e.st.Role(ctx, role); r != nil || err != nil {
		return err
	}
	left, err := e.st.Remains(ctx, role)
	if err != nil {
		return err
	}
	if len(left) == 0 {
		return ErrNotFound
	}
	r := left[0].Revive(time.Now())
	_, err = e.Create(ctx, Creation{Role: r, Target: r.Target, PlaceTarget: r.PlaceTarget, Restores: left[0].Deleted, Overwrite: overwrite})
	var c *Conflict
	if errors.As(err, &c) && strings.Contains(c.Text, "another request") {
		return nil // it was this one, and its answer was lost
	}
	return err
}

// moveOn rotates until the role is alone with what it serves: what a rotation that was
// given up has left accepted goes with the next one that comes to its end.
func (w *world) moveOn(role string) {
	for range 20 {
		if r := w.role(role); r.Drift == nil && r.beside() == nil && r.LastRun.State == Completed && r.LastRun.Trigger != Create {
			return
		}
		w.rotate(role)
		w.idle(role)
		w.pass(time.Minute)
	}
	w.violate("role %s does not get rid of what was left beside", role)
}

// accepted is what a node takes for user.
func (w *world) accepted(node, user string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return secrets(w.nodes[node].accepts[user])
}

func (w *world) tomb(role string) *Tombstone {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tombs[role]
}

// What a rotation that was given up had left accepted stays so through the restore, is
// shown beside the current version, and ends with the next rotation, not before.
func TestRestoreTakesNothingAway(t *testing.T) {
	for name, s := range map[string]shape{
		"overlap": overlap(2), "alternate": {name: "alternate", strategy: kind.Alternate, nodes: 2},
		"document": {name: "document", strategy: kind.Overlap, nodes: 2, document: true},
		"key":      {name: "key", strategy: kind.Overlap, targetless: true, document: true},
	} {
		for _, back := range []bool{false, true} {
			if back && s.targetless {
				continue // there is nobody who could hold it up
			}
			t.Run(fmt.Sprintf("%s, back %t", name, back), func(t *testing.T) {
				inWorld(t, s, nil, func(t *testing.T, w *world) {
					w.rotate("a")
					w.phase("a", Grace)
					before := w.role("a")
					beside := before.With(version.Previous)
					if back {
						beside = before.With(version.Current)
						w.refuse(beside.Material.Username) // what failed stays accepted
						w.rollBack("a")
						w.until("the way back", time.Hour, func() bool { return w.roles["a"].Run.Tries > 0 })
						before = w.role("a")
						require.True(t, before.Run.Back)
					}
					w.abandon("a")
					w.refuse("")
					w.restore("a", false)
					r := w.role("a")
					require.True(t, r.Served(before.With(version.Current).Material))
					if s.targetless {
						require.Nil(t, r.Drift)
					} else {
						require.Contains(t, r.Drift.Reason, "beside the current one")
						for _, n := range w.order {
							require.True(t, w.nodes[n].takes(beside.Material), "node %s still accepts what clients may have", n)
						}
					}
					p, until := r.PreviousServed()
					require.True(t, p.Material.Same(beside.Material))
					require.Zero(t, until)
					if s.document {
						require.Equal(t, r.With(version.Current).Material.Secret, w.doc.Body["secret-a"])
						shown := "" // a reconcile could end it at its server, and would not publish that
						if s.targetless {
							shown = beside.Material.Secret
						}
						require.Equal(t, shown, w.doc.Body["previous-a"])
					}
					// It is no less restored when it is deleted once more.
					w.remove("a")
					w.restore("a", false)
					p, _ = w.role("a").PreviousServed()
					require.True(t, p.Material.Same(beside.Material))
					w.moveOn("a")
					require.Nil(t, w.role("a").beside())
					w.finish()
				})
			})
		}
	}
}

// What was left beside can be gone back to, and ended at once.
func TestRestoreThenDecide(t *testing.T) {
	for name, decide := range map[string]func(*world){
		"m0-a": func(w *world) { w.rollBack("a") }, "m1": func(w *world) { w.reconcile("a") },
	} {
		for _, s := range []shape{
			overlap(2),
			{name: "alternate", strategy: kind.Alternate, nodes: 2},
			{name: "document", strategy: kind.Overlap, nodes: 2, document: true},
			{name: "alternate document", strategy: kind.Alternate, nodes: 1, document: true},
		} {
			inWorld(t, s, nil, func(t *testing.T, w *world) {
				w.rotate("a")
				w.phase("a", Grace)
				w.abandon("a")
				w.restore("a", false)
				decide(w)
				w.idle("a")
				r := w.role("a")
				require.Equal(t, Completed, r.LastRun.State, r.LastRun.Error)
				require.Equal(t, name, r.With(version.Current).Material.Secret)
				require.Nil(t, r.Drift)
				require.Nil(t, r.beside())
				require.Nil(t, r.With(version.Previous))
				w.finish()
			})
		}
	}
}

// refuse has no node change anything of a user.
func (w *world) refuse(user string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rejected = user
}

// In an emergency that was given up before it served anything new, what is served is what
// others know.
func TestRestoreAfterAnEmergencyThatWasGivenUp(t *testing.T) {
	inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
		w.remove("a")
		w.mu.Lock()
		dead := w.tombs["a"]
		w.mu.Unlock()
		dead.Role.LastRun = &Ending{Rotation: "e", Trigger: Urgent, State: Cancelled, At: time.Now()}
		require.NoError(t, NewStore(&faultyStorage{w: w}).putTombstone(t.Context(), dead))
		e := w.instance().engine
		err := e.restore(t.Context(), "a", false)
		require.ErrorContains(t, err, "version 1 is known to others")
		require.Nil(t, w.role("a"))
		w.restore("a", true)
		w.idle("a")
		r := w.role("a")
		require.Equal(t, "m1", r.With(version.Current).Material.Secret)
		require.Equal(t, version.Compromised, r.Get(1).Stage)
		require.False(t, r.Get(1).Refused.IsZero())
		require.Equal(t, "m1", w.accepted("n1", "u-a"))
		w.finish()
	})
}

// A version that is known to others stays what it is, and so does a schedule that has
// been stopped.
func TestRestoreKeepsWhatIsKnown(t *testing.T) {
	inWorld(t, overlap(1), func(r *Role) {
		r.Add(kind.Material{Username: "u-a", Secret: "m00"}, "", time.Now())
		r.Promote(time.Now())
		r.Compromise(false, time.Now())
		r.Versions[0].Refused = time.Now()
		r.Schedule = schedule.Spec{Period: 2 * time.Hour}
		r.Next, r.LastRotation = time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
		r.Suspended, r.Failures, r.RetryAt = "it was rolled back", 3, time.Now().Add(30*time.Minute)
	}, func(t *testing.T, w *world) {
		before := w.role("a")
		w.remove("a")
		w.pass(5 * time.Hour)
		w.restore("a", false)
		r := w.role("a")
		require.Equal(t, version.Compromised, r.Get(1).Stage)
		require.Equal(t, 2, r.With(version.Current).CopyOf)
		require.True(t, r.LastRotation.Equal(before.LastRotation), "it is as old as it was")
		require.True(t, r.With(version.Current).Created.Equal(before.With(version.Current).Created))
		require.Equal(t, "it was rolled back", r.Suspended)
		require.Zero(t, r.Failures)
		require.WithinDuration(t, time.Now().Add(2*time.Hour), r.Next, time.Minute, "what has passed is not made up for")
		w.pass(5 * time.Hour)
		require.Equal(t, 3, numberOf(w.role("a").With(version.Current)), "it stays suspended")
		w.unschedule("a")
		w.finish()
	})
}

// What earlier roles of the name left to other users is kept: by a delete that is done
// again, by a restore, and by a create that fails.
func TestRestoreKeepsEarlierRoles(t *testing.T) {
	for _, what := range storageWriteFaults {
		for n := 1; n < 16; n++ {
			inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
				w.pass(time.Minute)
				w.remove("a")
				other := w.newRole("a")
				other.Spec.Username = "u-other"
				_, err := w.instance().engine.Create(t.Context(), Creation{Role: other, Target: "target"})
				require.NoError(t, err)
				w.idle("a")
				w.pass(time.Minute)
				w.nextWrite(n, what)
				w.remove("a")
				w.restore("a", false)
				w.idle("a")
				require.Equal(t, "u-other", w.role("a").Spec.Username)
				w.remove("a")
				dead := w.tomb("a")
				require.NotNil(t, dead.Earlier, "%s of write %d", what, n)
				require.Equal(t, "u-a", dead.Earlier.Role.Spec.Username)
				require.Nil(t, dead.Earlier.Earlier)
				require.GreaterOrEqual(t, dead.last(), 3)
				w.finish()
			})
		}
	}
}

// A crash between the role and the end of its tombstone leaves both: what is left over
// goes when the rotation is taken up.
func TestRestoreCutOffAtItsEnd(t *testing.T) {
	for _, what := range []fault{crashBefore, storageFails, crashAfter} {
		inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
			w.pass(time.Minute)
			w.remove("a")
			w.mu.Lock()
			w.writeFault, w.writeFaultIn, w.writeFaultAt = what, 1, "deleted/"
			w.mu.Unlock()
			w.restore("a", false)
			w.idle("a")
			w.until("the end of the tombstone", time.Hour, func() bool { return w.tombs["a"] == nil })
			w.finish()
		})
	}
}

// Time makes no difference until there is none left.
func TestRestoreInTime(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.remove("a")
		left := func() int {
			out, err := w.instance().engine.st.Remains(t.Context(), "a")
			require.NoError(t, err)
			return len(out)
		}
		r := w.tomb("a").Revive(time.Now())
		deleted := w.tomb("a").Deleted
		w.mu.Lock()
		w.foreign["u-a"] = w.tombs["a"].Role.All() // after thirty days it is nobody's
		w.mu.Unlock()
		w.pass(tombstoneAge - time.Minute)
		require.Equal(t, 1, left())
		w.pass(2 * time.Minute)
		require.Zero(t, left())
		var c *Conflict
		_, err := w.instance().engine.Create(t.Context(), Creation{Role: r, Target: r.Target, Restores: deleted})
		require.True(t, errors.As(err, &c), "%v", err)
		require.Nil(t, w.role("a"))
	})
}

// What the server would end is put off: it lasts as long as what is made now.
func TestRestoreOfWhatEnds(t *testing.T) {
	inWorld(t, shape{name: "swap", strategy: kind.Swap, nodes: 2}, func(r *Role) {
		r.Spec.ValidFor = 20 * 24 * time.Hour
		r.Versions[0].Material.Expires = time.Now().Add(20 * 24 * time.Hour)
	}, func(t *testing.T, w *world) {
		w.remove("a")
		w.pass(15 * 24 * time.Hour)
		w.restore("a", false)
		require.WithinDuration(t, time.Now().Add(20*24*time.Hour), w.role("a").With(version.Current).Material.Expires, time.Minute)
		w.mu.Lock()
		got := w.nodes["n2"].accepts["u-a"][0].Expires
		w.mu.Unlock()
		require.WithinDuration(t, time.Now().Add(20*24*time.Hour), got, time.Minute, "its server was told")
		w.finish()
	})
}
