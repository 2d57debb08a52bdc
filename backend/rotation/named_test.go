package rotation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// inWorld runs f in a bubble with a world of shape s whose role "a" is seeded.
func inWorld(t *testing.T, s shape, seed func(*Role), f func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s, plan{name: t.Name()})
		w.seed("a", seed)
		w.run()
		defer w.close()
		f(t, w)
	})
}

func overlap(nodes int) shape { return shape{name: "overlap", strategy: kind.Overlap, nodes: nodes} }

func swap(nodes int) shape { return shape{name: "swap", strategy: kind.Swap, nodes: nodes} }

func partial(nodes int) shape {
	return shape{name: "partial", strategy: kind.Overlap, nodes: nodes, partial: true}
}

// nextCall has the n-th target call from now fail as what.
func (w *world) nextCall(n int, what fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.plan.points = append(w.plan.points, point{where: atTarget, at: w.ops[atTarget] + n, what: what})
}

// nextWrite has the n-th storage operation from now fail as what.
func (w *world) nextWrite(n int, what fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.plan.points = append(w.plan.points, point{where: atStorage, at: w.ops[atStorage] + n, what: what})
}

func (w *world) reads() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ops[atStorage]
}

func (w *world) accepts(node, user, secret string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range w.nodes[node].accepts[user] {
		if m.Secret == secret {
			return true
		}
	}
	return false
}

func secret(r *Role, s version.Stage) string {
	if v := r.With(s); v != nil {
		return v.Material.Secret
	}
	return ""
}

// hashicorp/vault 1.21.4 stores the new root password as the one to go back to,
// and then reports a successful rollback. Here what is current before the
// promotion is what the way back serves, whatever write fails.
func TestUpstreamRootRotationStoresNewAsOld(t *testing.T) {
	for n := range 40 {
		inWorld(t, swap(1), nil, func(t *testing.T, w *world) {
			w.nextWrite(n+1, storageFails)
			id := w.rotate("a")
			w.cancel(id)
			w.idle("a")
			w.finish()
			r := w.role("a")
			require.True(t, w.accepts("n1", "u-a", secret(r, version.Current)))
			require.Contains(t, []string{"m0-a", "m1"}, secret(r, version.Current))
		})
	}
}

// hashicorp/vault#28989 discards the WAL of a self-managed account when a retry
// fails, though the target took the new password and only the reply was lost.
func TestUpstreamSelfManagedReplyLost(t *testing.T) {
	inWorld(t, swap(1), nil, func(t *testing.T, w *world) {
		w.nextCall(3, replyLost) // preflight, probe, change
		w.rotate("a")
		w.idle("a")
		w.finish()
		require.Equal(t, "m1", secret(w.role("a"), version.Current))
		require.Equal(t, 1, w.generated, "the material that the target may have is kept, not replaced")
	})
}

// Two concurrent rotate-role calls of Vault's database engine both run, and what
// is stored is not what the server has.
func TestUpstreamConcurrentRotate(t *testing.T) {
	inWorld(t, swap(2), nil, func(t *testing.T, w *world) {
		// Nobody works on it before all have been answered: a rotation without a
		// grace that had ended by then would make room for another.
		w.setInactive(true)
		errs := make([]error, 8)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				_, errs[i] = w.instance().engine.Begin(t.Context(), Request{Trigger: Manual, Roles: []string{"a"}, Keys: newKeys()})
			})
		}
		wg.Wait()
		began := 0
		for _, err := range errs {
			var c *Conflict
			if err == nil {
				began++
			} else {
				require.ErrorAs(t, err, &c)
				require.NotEmpty(t, c.Rotation)
			}
		}
		require.Equal(t, 1, began)
		w.setInactive(false)
		w.idle("a")
		w.finish()
		require.Equal(t, 1, w.generated)
	})
}

// A failed write outside the window drops the role from Vault's queue until
// restart. Here every write of a scheduled rotation fails once, and the role goes on.
func TestUpstreamFailedWriteDropsRoleFromQueue(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Cron: "0 3 * * *", Window: time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	for n := range 24 {
		inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
			first := w.role("a").Next
			w.pass(time.Until(first) - time.Second)
			w.nextWrite(n+1, readOnly)
			w.until("a rotation", 48*time.Hour, func() bool {
				r := w.roles["a"]
				return r.Run == nil && r.LastRun != nil && r.LastRun.State == Completed
			})
			require.True(t, w.role("a").Next.After(first))
			second := w.role("a").Next
			w.until("the next one", 48*time.Hour, func() bool { r := w.roles["a"]; return r.Run == nil && r.Next.After(second) })
			w.unschedule("a")
			w.finish()
		})
	}
}

// hashicorp/vault#21935 and #31918: a fail-over across the fire time skips the
// rotation, with a window the next one too.
func TestUpstreamMissedScheduleOverFailOver(t *testing.T) {
	for _, window := range []time.Duration{0, 2 * time.Hour} {
		seed := func(r *Role) {
			r.Schedule = schedule.Spec{Cron: "0 3 * * *", Window: window}
			r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
		}
		inWorld(t, overlap(2), seed, func(t *testing.T, w *world) {
			slot := w.role("a").Next
			w.pass(time.Until(slot) - time.Minute)
			w.mu.Lock()
			w.inactive = true // nobody is active while the slot passes
			w.mu.Unlock()
			w.pass(30 * time.Minute)
			require.Zero(t, w.generated)
			w.mu.Lock()
			w.inactive = false
			w.mu.Unlock()
			w.restart()
			w.until("the rotation", 10*time.Minute, func() bool { return w.roles["a"].Next.After(slot) })
			w.idle("a")
			require.Equal(t, Scheduled, w.role("a").LastRun.Trigger)
			w.unschedule("a")
			w.finish()
		})
	}
}

// A slot whose window has passed is moved to the next one, which is served.
func TestMissedWindowMovesToNextSlot(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Cron: "0 3 * * *", Window: time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		slot := w.role("a").Next
		w.mu.Lock()
		w.inactive = true
		w.mu.Unlock()
		w.pass(time.Until(slot) + 5*time.Hour)
		w.mu.Lock()
		w.inactive = false
		w.mu.Unlock()
		w.pass(time.Minute)
		require.Zero(t, w.generated, "outside its window")
		require.Equal(t, slot.Add(24*time.Hour), w.role("a").Next)
		w.until("the next slot", 24*time.Hour, func() bool { return w.roles["a"].LastRun != nil })
		w.unschedule("a")
		w.finish()
	})
}

// Vault's database engine accepts `0 0 30 2 *` and rotates in a hot loop. A role
// that has such a schedule all the same is left alone, and costs nothing.
func TestUpstreamCronThatNeverFires(t *testing.T) {
	for _, window := range []time.Duration{0, time.Hour} {
		seed := func(r *Role) {
			r.Schedule = schedule.Spec{Cron: "0 0 30 2 *", Window: window}
			r.Next = time.Now().Add(time.Minute)
		}
		inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
			w.pass(12 * time.Hour)
			require.LessOrEqual(t, w.generated, 1)
			require.Less(t, w.reads(), 400)
			w.finish()
		})
	}
}

// Due entries that no role confirms are removed and start nothing; a role whose
// due entry is later than its slot is still found when it is stored next.
func TestUpstreamStaleDueEntries(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Period: 30 * 24 * time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		st := NewStore(&w.inner)
		for h := range 5 {
			require.NoError(t, st.putDue(t.Context(), time.Now().Add(time.Duration(h)*time.Hour), "a"))
			require.NoError(t, st.putDue(t.Context(), time.Now().Add(time.Duration(h)*time.Hour), "gone"))
		}
		w.restart()
		w.pass(6 * time.Hour)
		require.Zero(t, w.generated)
		hours, err := st.DueHours(t.Context())
		require.NoError(t, err)
		require.Len(t, hours, 1, "only the real one is left")
		w.until("the real slot", 31*24*time.Hour, func() bool { return w.roles["a"].LastRun != nil })
		w.unschedule("a")
		w.finish()
	})
}

// hashicorp/vault#29537: roles were rotated by every restart.
func TestUpstreamRestartDoesNotRotate(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Period: 24 * time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		for range 10 {
			w.restart()
			w.pass(time.Hour)
		}
		require.Zero(t, w.generated)
		w.unschedule("a")
		w.finish()
	})
}

// A slot that comes while its role is in grace stays due.
func TestSlotInGraceStaysDue(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Period: 10 * time.Minute}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
		grace := 20 * time.Minute // the API refuses this; storage may hold it
		r.GracePeriod = &grace
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		w.until("two rotations", 2*time.Hour, func() bool { return w.generated == 2 })
		w.unschedule("a")
		w.idle("a")
		w.finish()
		require.Equal(t, 2, w.generated)
	})
}

// Suspended roles wait until a rotation of theirs has succeeded.
func TestSuspendedUntilOneSucceeds(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Period: time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.rollBack("a")
		w.idle("a")
		require.Equal(t, "suspended", w.role("a").State())
		w.pass(12 * time.Hour)
		require.Equal(t, 1, w.generated, "nothing is due")
		w.rotate("a")
		w.idle("a")
		require.Equal(t, "idle", w.role("a").State())
		w.until("the schedule goes on", 2*time.Hour, func() bool { return w.generated == 3 })
		w.unschedule("a")
		w.finish()
	})
}

func TestFreezeHoldsTheSchedule(t *testing.T) {
	seed := func(r *Role) {
		r.Schedule = schedule.Spec{Period: time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	inWorld(t, overlap(1), seed, func(t *testing.T, w *world) {
		c := DefaultConfig()
		c.Freeze = true
		require.NoError(t, w.instance().engine.ChangeConfig(t.Context(), func(stored *Config) error { *stored = c; return nil }))
		w.pass(3 * time.Hour)
		require.Zero(t, w.generated)
		c.Freeze = false
		require.NoError(t, w.instance().engine.ChangeConfig(t.Context(), func(stored *Config) error { *stored = c; return nil }))
		w.until("the slot that stayed due", 5*time.Minute, func() bool { return w.generated == 1 })
		w.unschedule("a")
		w.idle("a")
		w.finish()
	})
}

// A target that makes no change but answers every question is given up at the
// deadline, and not before what was sent can no longer land.
func TestHangingChangesAreGivenUp(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		for n := range 60 {
			w.nextCall(3+2*n, callHangs)
		}
		w.rotate("a")
		w.until("the way back", 5*time.Minute, func() bool {
			r := w.roles["a"]
			return r.Run == nil || r.Run.Back
		})
		w.finish()
		require.Equal(t, RolledBack, w.role("a").LastRun.State)
	})
}

// One node rejects and another gives no answer: the rejection counts, after
// nothing of the call can land any more.
func TestDefiniteRefusalBesideATimeout(t *testing.T) {
	inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
		w.nextCall(3, rejectsOne)
		w.rotate("a")
		w.idle("a")
		require.Equal(t, RolledBack, w.role("a").LastRun.State)
		require.Contains(t, w.role("a").LastRun.Error, "refused by policy")
		w.finish()
	})
}

// A recall that comes while a change may still land waits for it, then turns.
func TestRecallWhileAnAttemptIsOutstanding(t *testing.T) {
	for _, s := range []shape{overlap(2), swap(2)} {
		inWorld(t, s, nil, func(t *testing.T, w *world) {
			w.nextCall(3, landsLate)
			id := w.rotate("a")
			w.until("the attempt", time.Minute, func() bool { r := w.roles["a"]; return r.Run != nil && r.Run.Attempt != nil })
			w.cancel(id)
			w.idle("a")
			w.finish()
			require.Equal(t, "m0-a", secret(w.role("a"), version.Current))
			require.Equal(t, RolledBack, w.role("a").LastRun.State)
		})
	}
}

// The material that a rollback brings back is still accepted somewhere: it must
// not be refused as "failed" while it is served, nor forgotten.
func TestRollbackToMaterialThatIsStillAccepted(t *testing.T) {
	inWorld(t, partial(3), func(r *Role) { r.KeepVersions = 1 }, func(t *testing.T, w *world) {
		w.setDown("n3", true)
		w.rotate("a")
		w.idle("a")
		require.Equal(t, []string{"n3"}, w.role("a").Drift.Missed)
		w.rotate("a") // another over the same gap: m0 is at n3 only
		w.idle("a")
		w.rollBack("a")
		w.idle("a")
		w.finish()
		require.Contains(t, []string{"m1", "m2", "m0-a"}, secret(w.role("a"), version.Current))
	})
}

// A node that is down for many rotations comes back with a password that is
// older than keep_versions: it was never forgotten, and is refused then.
func TestNodeComesBackWithOldPassword(t *testing.T) {
	inWorld(t, partial(2), func(r *Role) { r.KeepVersions = 1 }, func(t *testing.T, w *world) {
		w.setDown("n2", true)
		for range 6 {
			w.rotate("a")
			w.idle("a")
		}
		require.Equal(t, "drifted", w.role("a").State())
		require.True(t, w.accepts("n2", "u-a", "m0-a"))
		w.setDown("n2", false)
		w.until("healing", time.Hour, func() bool { return w.roles["a"].Drift == nil })
		w.finish()
		require.False(t, w.accepts("n2", "u-a", "m0-a"))
		require.Len(t, w.role("a").Versions, 1, "refused versions are pruned again")
	})
}

// Healing that fails for good is spaced, not a hot loop.
func TestHealingThatFailsIsSpaced(t *testing.T) {
	inWorld(t, partial(2), nil, func(t *testing.T, w *world) {
		w.setDown("n2", true)
		w.rotate("a")
		w.idle("a")
		w.setDown("n2", false)
		for n := range 200 {
			w.nextCall(1+n, rejects)
		}
		before := w.reads()
		w.pass(2 * time.Hour)
		require.Less(t, w.reads()-before, 1000)
		require.NotNil(t, w.role("a").Drift)
		w.finish()
	})
}

// A role is drifted, and stays so, when the rotation in its way fails.
func TestFailedPreflightKeepsWhatIsToBeHealed(t *testing.T) {
	inWorld(t, partial(2), nil, func(t *testing.T, w *world) {
		w.setDown("n2", true)
		w.rotate("a")
		w.idle("a")
		w.setDown("n2", false)
		w.rotate("a")
		w.idle("a")
		w.finish() // healed
	})
}

// A worker that decided something before its storage handle was closed must not
// write it.
func TestClosedHandleWritesNothing(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.nextCall(3, callHangs)
		w.rotate("a")
		w.until("the attempt", time.Minute, func() bool { r := w.roles["a"]; return r.Run != nil && r.Run.Attempt != nil })
		old := w.instance()
		old.fence.Close(context.Background()) // the node steps down; its worker is at the target
		before := describe(w.role("a"))
		w.pass(time.Minute)
		require.Equal(t, before, describe(w.role("a")))
		require.ErrorIs(t, old.engine.st.PutConfig(t.Context(), DefaultConfig()), storage.ErrClosed)
		old.kill()
		w.idle("a")
		w.finish()
	})
}

// A driver that always panics is a target without an answer: the rotation ends.
func TestPanickingDriver(t *testing.T) {
	for _, from := range []int{1, 2, 3, 4} {
		inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
			for n := range 40 {
				w.nextCall(from+n, callPanics)
			}
			w.rotate("a")
			w.until("the way back", 10*time.Minute, func() bool {
				r := w.roles["a"]
				return r.Run == nil || r.Run.Back || r.Run.Phase == Grace
			})
			w.finish()
		})
	}
}

// shortDriver answers for fewer users than it is asked about.
type shortDriver struct{ kind.Target }

func (shortDriver) Preflight(context.Context, []kind.User) []kind.Finding { return nil }
func (shortDriver) Probe(_ context.Context, q []kind.Question) []kind.Answer {
	return []kind.Answer{{Nodes: []kind.NodeAnswer{{Node: "n1"}}}}
}

func TestDriverThatAnswersTooLittle(t *testing.T) {
	g := guard{e: New(Options{}), target: func() kind.Target { return shortDriver{} }}
	require.ErrorContains(t, g.Preflight(t.Context(), make([]kind.User, 2))[1].Err, "0 users of 2")
	a := g.Probe(t.Context(), []kind.Question{{Materials: make([]kind.Material, 3)}})
	require.ErrorContains(t, a[0].Nodes[0].Err, "0 credentials of 3")
}

// The second send of a request answers with the rotation of the first: at once,
// at the same time, after a restart and after the end.
func TestRepeatedRequest(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		req := Request{Trigger: Manual, Roles: []string{"a"}, Keys: [][]string{{"id", "1"}, {"idempotency", "x"}}}
		ids := make([]string, 6)
		var wg sync.WaitGroup
		for i := range ids {
			wg.Go(func() {
				r := req
				if i%2 == 1 {
					r.Keys = [][]string{req.Keys[1], req.Keys[0]}
				}
				h, err := w.instance().engine.Begin(t.Context(), r)
				if err == nil {
					ids[i] = h.ID
				}
			})
		}
		wg.Wait()
		for _, id := range ids {
			require.Equal(t, ids[0], id)
		}
		w.restart()
		w.idle("a")
		h, err := w.instance().engine.Begin(t.Context(), req)
		require.NoError(t, err)
		require.Equal(t, ids[0], h.ID)
		w.finish()
		require.Equal(t, 1, w.generated)
	})
}

// A rollback that is sent again after it has ended is not another rollback.
func TestRepeatedRollback(t *testing.T) {
	inWorld(t, overlap(1), func(r *Role) { r.KeepVersions = 5 }, func(t *testing.T, w *world) {
		w.rotate("a")
		w.idle("a") // m1; m0 is retired
		w.rotate("a")
		w.phase("a", Grace)
		req := Request{Keys: newKeys()}
		first, err := w.instance().engine.RollBack(t.Context(), "a", req)
		require.NoError(t, err)
		w.idle("a")
		again, err := w.instance().engine.RollBack(t.Context(), "a", req)
		require.NoError(t, err)
		require.Equal(t, first, again)
		require.Nil(t, w.role("a").Run)
		require.Equal(t, "m1", secret(w.role("a"), version.Current))

		req = Request{Keys: newKeys()} // now a rotation of its own
		first, err = w.instance().engine.RollBack(t.Context(), "a", req)
		require.NoError(t, err)
		again, err = w.instance().engine.RollBack(t.Context(), "a", req)
		require.NoError(t, err)
		require.Equal(t, first, again)
		w.idle("a")
		require.Equal(t, Completed, w.role("a").LastRun.State)
		w.finish()
	})
}

func manyRoles(w *world, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("r%05d", i)
		w.seed(names[i], nil)
	}
	return names
}

// A large request becomes children; one that was cut off between two of them
// is completed when it is sent again, under the same id.
func TestLargeRequestBecomesChildren(t *testing.T) {
	for _, cut := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, shape{name: "targetless", targetless: true, strategy: kind.Swap}, plan{name: t.Name()})
			names := manyRoles(w, 1200)
			w.run()
			defer w.close()
			req := Request{Trigger: Manual, Roles: names, Keys: newKeys()}
			if cut {
				w.nextWrite(2000, crashBefore)
				_, err := w.instance().engine.Begin(t.Context(), req)
				require.Error(t, err)
				w.pass(time.Second)
			}
			h, err := w.instance().engine.Begin(t.Context(), req)
			require.NoError(t, err)
			require.Len(t, h.Children, 3)
			again, err := w.instance().engine.Begin(t.Context(), req)
			require.NoError(t, err)
			require.Equal(t, h.ID, again.ID)
			w.until("all", time.Hour, func() bool {
				for _, n := range names {
					if r := w.roles[n]; r.Run != nil || r.LastRun == nil {
						return false
					}
				}
				return true
			})
			w.finish()
			for _, n := range names {
				require.Equal(t, 2, w.role(n).Last, "each role was rotated once")
			}
		})
	}
}

// Five hundred roles with long names that all fail still fit their header.
func TestLongNamesAndErrorsFitTheHeader(t *testing.T) {
	var names []string
	for i := range 700 {
		names = append(names, fmt.Sprintf("%04d-%s", i, strings.Repeat("n", 120)))
	}
	for _, part := range chunks(names) {
		h := &Header{ID: newID(), Trigger: Scheduled, Started: time.Now()}
		parts := map[string]Part{}
		for _, n := range part {
			h.Roles = append(h.Roles, Part{Role: n, Kind: "postgresql"})
			parts[n] = Part{Role: n, Kind: "postgresql", Version: 1_000_000, State: RollbackFailed, Error: strings.Repeat("\u00e9", 200)}
		}
		inner := &world{}
		require.NoError(t, NewStore(&inner.inner).putHeader(t.Context(), closed(h, parts)))
	}
}

// Finding what is due costs what is due: a hundred thousand entries in later
// hours cost nothing at a look, and a tick with nothing due reads nothing.
func TestDueQueueCostsWhatIsDue(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		e := w.instance().engine
		w.pass(time.Minute)
		for i := range 100_000 {
			e.due.note(fmt.Sprintf("r%06d", i), time.Now().Add(time.Duration(3+i%500)*time.Hour))
		}
		before := w.reads()
		for range 30 {
			e.Tick()
			w.pass(time.Second)
		}
		require.Zero(t, w.reads()-before)
		w.finish()
	})
}

// Standby, secondary, tainted: nothing is read, written or asked.
func TestInactiveDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, overlap(1), plan{name: t.Name()})
		w.inactive = true
		w.seed("a", func(r *Role) {
			r.Schedule = schedule.Spec{Period: time.Minute}
			r.Next = time.Now().Add(time.Minute)
		})
		w.run()
		defer w.close()
		for range 120 {
			w.instance().engine.Tick()
			w.pass(time.Minute)
		}
		require.Zero(t, w.ops[atStorage])
		require.Zero(t, w.ops[atTarget])
	})
}

// Every write of create, and of what leads to it, fails once: the request can be
// repeated, and nothing half-made is in its way.
func TestCreateCanBeRepeated(t *testing.T) {
	for _, what := range storageWriteFaults {
		for n := 1; n < 14; n++ {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, overlap(1), plan{name: t.Name(), points: []point{{atStorage, n, what}}})
				w.run()
				defer w.close()
				w.create("a", nil, false)
				w.idle("a")
				w.finish()
			})
		}
	}
}

// A role of the same name for another user: what the first one left working is
// in storage until its own time has come.
func TestCreateForAnotherUserKeepsTheTombstone(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.remove("a")
		other := w.newRole("a")
		other.Spec.Username = "u-other"
		_, err := w.instance().engine.Create(t.Context(), Creation{Role: other, Target: "target"})
		require.NoError(t, err)
		w.idle("a")
		w.finish()
		require.Equal(t, 2, w.role("a").With(version.Current).Number, "numbers go on")
		w.remove("a")
		w.mu.Lock()
		w.checkLocked()
		w.mu.Unlock()
	})
}

func TestDeleteWhoseTombstoneFails(t *testing.T) {
	for _, what := range storageWriteFaults {
		for n := 1; n < 10; n++ {
			inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
				w.pass(time.Minute)
				w.nextWrite(n, what)
				w.remove("a")
				require.Nil(t, w.role("a"))
				require.NotNil(t, w.tombs["a"])
				w.finish()
			})
		}
	}
}

func TestUpdateDuringGrace(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		until := w.role("a").Run.GraceUntil
		require.NoError(t, w.instance().engine.Update(t.Context(), "a", func(r *Role) error {
			r.Schedule = schedule.Spec{Period: time.Hour}
			r.Description = "new"
			return nil
		}))
		require.Equal(t, until, w.role("a").Run.GraceUntil)
		require.WithinDuration(t, time.Now().Add(time.Hour), w.role("a").Next, time.Second)
		w.until("the scheduled one", 3*time.Hour, func() bool { return w.generated == 2 })
		w.unschedule("a")
		w.idle("a")
		w.finish()
	})
}

// A role that has grown too large for a rotation to be safe fails before its
// target hears anything; it does not get stuck half-way.
func TestRoleTooLargeToRotate(t *testing.T) {
	inWorld(t, shape{name: "targetless", targetless: true, strategy: kind.Overlap}, func(r *Role) {
		r.KeepVersions = 20
		for range 7 {
			r.Versions[0].Refused = time.Time{}
			r.Add(kind.Material{Secret: strings.Repeat("x", 32<<10)}, "", time.Now())
			r.Promote(time.Now())
		}
	}, func(t *testing.T, w *world) {
		w.rotate("a")
		w.idle("a")
		require.Equal(t, Failed, w.role("a").LastRun.State)
		require.Contains(t, w.role("a").LastRun.Error, "keep_versions")
		require.Nil(t, w.role("a").With(version.Pending))
	})
}

// Cancelling a large request cancels its children.
func TestCancelOfAParent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shape{name: "targetless", targetless: true, strategy: kind.Overlap}, plan{name: t.Name()})
		names := manyRoles(w, 510)
		w.run()
		defer w.close()
		h, err := w.instance().engine.Begin(t.Context(), Request{Trigger: Manual, Roles: names})
		require.NoError(t, err)
		w.pass(time.Second)
		_, err = w.instance().engine.Cancel(t.Context(), h.ID, "")
		require.NoError(t, err)
		w.pass(time.Minute)
		for _, n := range names {
			require.Nil(t, w.role(n).Run)
			require.Equal(t, RolledBack, w.role(n).LastRun.State)
		}
	})
}

func TestNotFoundAndBusy(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		e := w.instance().engine
		_, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: []string{"none"}})
		require.ErrorIs(t, err, ErrNotFound)
		_, err = e.Cancel(t.Context(), "none", "")
		require.ErrorIs(t, err, ErrNotFound)
		id := w.rotate("a")
		w.phase("a", Grace)
		var c *Conflict
		require.True(t, errors.As(e.Delete(t.Context(), "a"), &c))
		require.Equal(t, id, c.Rotation)
		require.Contains(t, c.Text, "retire/fake/a")
		w.retire("a")
		w.idle("a")
		w.finish()
	})
}
