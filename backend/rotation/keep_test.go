package rotation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// keeperWorld is a server that keeps secrets, and what it was asked for by
// rotation. For one rotation it makes at most one new version, whatever fails.
type keeperWorld struct {
	holds  map[string]*held
	asked  map[string]int  // Turns that may have had an effect
	made   map[string]int  // versions made
	lied   map[string]bool // answered that it was done, and did nothing
	flying map[string]int  // calls that may still land
	away   bool
}

// held is a secret at its keeper.
type held struct{ newest, oldest int }

func (k *keeperWorld) of(key string) *held {
	if k.holds == nil {
		k.holds, k.asked, k.made = map[string]*held{}, map[string]int{}, map[string]int{}
		k.lied, k.flying = map[string]bool{}, map[string]int{}
	}
	if k.holds[key] == nil {
		k.holds[key] = &held{newest: 3, oldest: 1}
	}
	return k.holds[key]
}

// fakeKeeper is what one instance sees of it.
type fakeKeeper struct {
	w *world
	i *instance
}

var _ kind.Keeper = (*fakeKeeper)(nil)

func (f *fakeKeeper) enter(ctx context.Context, name string) (fault, error) {
	w := f.w
	w.cool()
	w.mu.Lock()
	var what fault
	dead := f.i.isDead()
	if !dead {
		what = w.strikeLocked(atTarget, name)
	}
	if what == nodeDown {
		w.keeper.away = true
		time.AfterFunc(4*time.Minute, func() { w.mu.Lock(); w.keeper.away = false; w.mu.Unlock() })
	}
	away := w.keeper.away && !w.plan.off
	w.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		w.violate("%s was called without a deadline", name)
	}
	switch {
	case dead, what == callFails, away, what == crashInCall:
		if what == crashInCall {
			f.i.kill()
		}
		return callFails, errDown
	case what == callPanics:
		panic("injected")
	case what == callHangs:
		<-ctx.Done()
		return callHangs, errInjected
	}
	select {
	case <-time.After(callTime):
	case <-ctx.Done():
		return callHangs, ctx.Err()
	case <-f.i.dead:
		return callHangs, errInjected
	}
	return what, nil
}

func (f *fakeKeeper) Look(ctx context.Context, subjects []kind.Subject) []kind.Sight {
	out := make([]kind.Sight, len(subjects))
	what, err := f.enter(ctx, "look")
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	for i, s := range subjects {
		switch h := f.w.keeper.of(s.Spec.Key); {
		case err != nil:
			out[i].Err = err
		case what == rejects:
			out[i].Problems = []string{"injected: there is no such key"}
		case what == oneNodeOnly && i > 0:
			out[i].Err = errInjected
		case f.w.shape.shows:
			out[i].Version, out[i].MinDecryptionVersion = h.newest, h.oldest
		}
		f.w.logLocked("keeper look %s: version %d%s", s.Spec.Key, out[i].Version, note(err))
	}
	return out
}

func (f *fakeKeeper) Turn(ctx context.Context, subjects []kind.Subject) []kind.Turned {
	out := make([]kind.Turned, len(subjects))
	rotations := f.begin(ctx, string(Apply), subjects)
	what, err := f.enterCounted(ctx, "turn", subjects)
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, s := range subjects {
		key, id := s.Spec.Key, rotations[i]
		land := func() {
			w.keeper.of(key).newest++
			if w.keeper.made[id]++; w.keeper.made[id] > 1 {
				w.violateLocked("rotation %s made %d versions of %s", id, w.keeper.made[id], key)
			}
		}
		out[i] = f.turn(ctx, key, id, what, err, land, i)
		w.logLocked("keeper turn %s%s", key, note(out[i].Err))
	}
	f.after(what)
	return out
}

// turn does what the fault leaves of one Turn.
func (f *fakeKeeper) turn(ctx context.Context, key, id string, what fault, err error, land func(), index int) kind.Turned {
	k := &f.w.keeper
	landed := func() { k.flying[key]-- }
	switch {
	case what == callFails: // nobody was reached
		landed()
		return kind.Turned{Err: err, NoEffect: true}
	case what == rejects, what == rejectsOne && index == 0:
		landed()
		return kind.Turned{Err: kind.Definitely("injected: permission denied"), NoEffect: true}
	}
	if k.asked[id]++; k.asked[id] > 1 && !f.w.shape.shows {
		f.w.violateLocked("%s, which shows no version, was turned %d times for rotation %s", key, k.asked[id], id)
	}
	switch {
	case err != nil:
		landed()
		return kind.Turned{Err: err}
	case what == landsLate, what == landsAfter:
		deadline, _ := ctx.Deadline()
		f.w.later(deadline.Add(Skew-time.Millisecond), func() { land(); landed() })
		return kind.Turned{Err: errInjected}
	case what == lies:
		k.lied[id] = true
	default:
		land()
	}
	landed()
	if what == replyLost || what == unsavedLost || what == oneNodeOnly {
		return kind.Turned{Err: errInjected}
	}
	return kind.Turned{Evidence: "request 1"}
}

func (f *fakeKeeper) Limit(ctx context.Context, subjects []kind.Subject) []error {
	out := make([]error, len(subjects))
	f.begin(ctx, limitCall, subjects)
	what, err := f.enterCounted(ctx, "limit", subjects)
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, s := range subjects {
		key, want := s.Spec.Key, s.Spec.MinDecryptionVersion
		h := w.keeper.of(key)
		land := func() {
			if w.keeper.flying[key]--; want < h.oldest {
				w.violateLocked("version %d of %s is to decrypt again", want, key)
			}
			if want > h.newest {
				w.violateLocked("%s would decrypt from version %d on, and %d is the newest", key, want, h.newest)
			}
			h.oldest = max(h.oldest, want)
		}
		switch {
		case err != nil, what == rejects, what == lies:
			w.keeper.flying[key]--
			if out[i] = err; what == rejects {
				out[i] = kind.Definitely("injected: permission denied")
			}
		case what == landsLate, what == landsAfter:
			deadline, _ := ctx.Deadline()
			w.later(deadline.Add(Skew-time.Millisecond), land)
			out[i] = errInjected
		default:
			if land(); what == replyLost || what == unsavedLost {
				out[i] = errInjected
			}
		}
		w.logLocked("keeper limit %s to %d%s", key, want, note(out[i]))
	}
	f.after(what)
	return out
}

// begin checks that the intent of a call is stored, and that nothing sent before
// it can still land. It returns the rotations that the calls are for.
func (f *fakeKeeper) begin(ctx context.Context, call string, subjects []kind.Subject) []string {
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]string, len(subjects))
	deadline, _ := ctx.Deadline()
	for i, s := range subjects {
		if w.keeper.of(s.Spec.Key); w.keeper.flying[s.Spec.Key] > 0 {
			w.violateLocked("%s is asked while an earlier call may still land", s.Spec.Key)
		}
		w.keeper.flying[s.Spec.Key]++
		r := w.roles[s.Role]
		if f.i.isDead() {
			continue // nothing of it arrives
		}
		if r == nil || r.Run == nil || r.Run.Attempt == nil || r.Run.Attempt.Call != call || r.Run.Attempt.Deadline.Before(deadline) {
			w.violateLocked("%s of %s was not stored before it was sent: %s", call, s.Role, describe(r))
			continue
		}
		out[i] = r.Run.Rotation + "/" + r.Name
	}
	return out
}

// enterCounted is enter for calls that begin has counted.
func (f *fakeKeeper) enterCounted(ctx context.Context, name string, subjects []kind.Subject) (fault, error) {
	entered := false
	defer func() {
		if !entered { // a panic
			f.w.mu.Lock()
			defer f.w.mu.Unlock()
			for _, s := range subjects {
				f.w.keeper.flying[s.Spec.Key]--
			}
		}
	}()
	what, err := f.enter(ctx, name)
	entered = true
	return what, err
}

func (f *fakeKeeper) after(what fault) {
	switch what {
	case landsAfter, diesBetween, crashOnReturn:
		f.i.kill()
	}
}

// later does something at a time, with w.mu held.
func (w *world) later(at time.Time, do func()) {
	w.over.Add(1)
	go func() {
		defer w.over.Done()
		w.pass(time.Until(at))
		w.mu.Lock()
		defer w.mu.Unlock()
		w.logLocked("keeper: what was sent lands")
		do()
	}()
}

// checkKept holds the end of a run of a role whose secret is kept elsewhere to
// what its keeper did.
func (w *world) checkKept(before, r *Role) {
	if !w.shape.keeper || before == nil || before.Run == nil || r.Run != nil || r.LastRun == nil {
		return
	}
	k, run, end := &w.keeper, before.Run, r.LastRun
	id := run.Rotation + "/" + r.Name
	asked, made := k.asked[id], k.made[id]
	key := k.of(r.Spec.Key)
	switch end.State {
	case Completed:
		if run.Trigger != Create && made != 1 && !k.lied[id] {
			w.violateLocked("rotation %s of %s completed, and made %d versions", run.Rotation, r.Name, made)
		}
		if run.Trigger == Create && asked > 0 {
			w.violateLocked("creating %s rotated it", r.Name)
		}
		if r.With(version.Current).Evidence == "" {
			w.violateLocked("%s completed without evidence", r.Name)
		}
		if w.shape.shows && key.oldest < r.Spec.MinDecryptionVersion && run.Trigger != Create {
			w.violateLocked("%s completed, and decrypts from version %d on", r.Name, key.oldest)
		}
	case Cancelled:
		if asked > 0 {
			w.violateLocked("%s was asked for a version, and its rotation cancelled", r.Name)
		}
	default:
		if end.Error == "" {
			w.violateLocked("%s ended as %s without a sentence", r.Name, end.State)
		}
		if !w.shape.shows && made > 0 && r.Suspended == "" {
			w.violateLocked("%s was rotated, nobody knows, and its schedule goes on", r.Name)
		}
	}
}

// insist rotates until it succeeds, as an operator does who reads why it did not.
func (w *world) insist(role string) {
	for range 20 {
		w.rotate(role)
		w.idle(role)
		if r := w.role(role); r == nil || r.LastRun != nil && r.LastRun.State == Completed && r.LastRun.Trigger == Manual {
			return
		}
		w.pass(time.Minute)
	}
	w.violate("role %s could not be rotated", role)
}

func keeperScenarios() []scenario {
	return []scenario{
		{name: "rotate", seed: one, steps: func(w *world) { w.rotate("a"); w.idle("a") }, check: keeps("a", 2)},
		{name: "rotate until it is done", seed: one, steps: func(w *world) { w.insist("a") }, check: keeps("a", 2)},
		{name: "cancel", seed: one, steps: func(w *world) { w.cancel(w.rotate("a")); w.idle("a") }, check: keeps("a", 1, 2)},
		{name: "create", seed: nobody, steps: func(w *world) { w.create("a", nil, false); w.idle("a") }, check: keeps("a", 3)},
		{name: "delete and create again", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.idle("a")
			w.remove("a")
			w.create("a", nil, false)
			w.idle("a")
		}, check: keeps("a", 2)},
		{name: "delete and restore", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.idle("a")
			w.remove("a")
			w.restore("a", false)
			w.idle("a")
		}, check: keeps("a", 2)},
		{name: "limit", seed: func(w *world) {
			w.seed("a", func(r *Role) { r.Spec.MinDecryptionVersion = 2 })
		}, steps: func(w *world) { w.rotate("a"); w.idle("a") }, check: keeps("a", 2), not: func(s shape) bool { return !s.shows }},
		{name: "scheduled", seed: func(w *world) {
			w.seed("a", func(r *Role) {
				r.Schedule = schedule.Spec{Period: 2 * time.Hour}
				r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
			})
		}, steps: func(w *world) {
			w.until("the scheduled rotation", 5*time.Hour, func() bool {
				r := w.roles["a"]
				return w.dead() || r.Run == nil && (r.LastRun != nil && r.LastRun.State == Completed || r.Suspended != "")
			})
			if w.role("a").Suspended != "" {
				asked := w.turns()
				w.pass(12 * time.Hour)
				if n := w.turns(); n != asked {
					w.violate("a suspended role was rotated %d times", n-asked)
				}
				w.insist("a")
			}
			w.unschedule("a")
		}, check: keeps("a", 2)},
		{name: "batch of three", seed: func(w *world) {
			for _, n := range []string{"a", "b", "c"} {
				w.seed(n, nil)
			}
		}, steps: func(w *world) {
			w.rotate("a", "b", "c")
			for _, n := range []string{"a", "b", "c"} {
				w.idle(n)
			}
		}, check: func(w *world) error {
			for _, n := range []string{"a", "b", "c"} {
				if err := keeps(n, 2)(w); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

func (w *world) turns() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, made := range w.keeper.made {
		n += made
	}
	return n
}

func keeps(role string, newest ...int) func(*world) error {
	return func(w *world) error {
		if h := w.keeper.of(role); !slices.Contains(newest, h.newest) {
			return fmt.Errorf("version %d of %s is the newest, not one of %v", h.newest, role, newest)
		}
		return nil
	}
}

var (
	keptShown  = shape{name: "kept", strategy: kind.Kept, keeper: true, shows: true}
	keptUnseen = shape{name: "kept unseen", strategy: kind.Kept, keeper: true}
)

// What no number shows is asked for once. Not the clock, not a restart, only who
// asks again.
func TestAnUnknownOutcomeIsNeverRepeated(t *testing.T) {
	for _, what := range []fault{replyLost, callHangs, callPanics, landsLate, landsAfter, crashOnReturn} {
		t.Run(string(what), func(t *testing.T) {
			seed := func(r *Role) {
				r.Schedule = schedule.Spec{Period: time.Hour}
				r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
			}
			inWorld(t, keptUnseen, seed, func(t *testing.T, w *world) {
				w.nextCall(2, what) // the first is a look
				w.rotate("a")
				w.idle("a")
				r := w.role("a")
				require.Equal(t, Failed, r.LastRun.State)
				require.Contains(t, r.LastRun.Error, "whether mount/a was rotated is unknown")
				require.Contains(t, r.LastRun.Error, "rotate/fake/a")
				require.Equal(t, "suspended", r.State())
				w.restart()
				w.pass(48 * time.Hour)
				require.LessOrEqual(t, w.turns(), 1)
				require.Equal(t, 1, w.role("a").With(version.Current).Number)
				w.insist("a")
				r = w.role("a")
				require.Empty(t, r.Suspended)
				require.Equal(t, "idle", r.State())
				require.False(t, r.Next.Before(time.Now()), "and the schedule goes on")
			})
		})
	}
}

// A refusal had no effect, and everybody knows.
func TestARefusedTurnSuspendsNothing(t *testing.T) {
	for _, s := range []shape{keptShown, keptUnseen} {
		inWorld(t, s, nil, func(t *testing.T, w *world) {
			w.nextCall(2, rejects)
			w.rotate("a")
			w.idle("a")
			r := w.role("a")
			require.Equal(t, Failed, r.LastRun.State)
			require.Contains(t, r.LastRun.Error, "permission denied")
			require.Empty(t, r.Suspended)
			require.Zero(t, w.turns())
			require.Equal(t, version.Failed, r.Get(2).Stage)
		})
	}
}

// What was lost on the way is sent again, with the number as proof that it was.
func TestALostTurnIsSentAgainWhereTheNumberShowsIt(t *testing.T) {
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		w.nextCall(2, callHangs)
		w.rotate("a")
		w.idle("a")
		r := w.role("a")
		require.Equal(t, Completed, r.LastRun.State)
		require.Equal(t, "fake key version 1 → 2, request 1", r.With(version.Current).Evidence)
		require.Equal(t, 1, w.turns())
	})
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		w.nextCall(2, replyLost)
		w.rotate("a")
		w.idle("a")
		r := w.role("a")
		require.Equal(t, Completed, r.LastRun.State)
		require.Equal(t, "fake key version 1 → 2, its answer was lost", r.With(version.Current).Evidence)
		require.Equal(t, 1, w.turns())
	})
}

func TestSomebodyElseRotatesAtTheSameTime(t *testing.T) {
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		w.nextCall(2, replyLost)
		w.rotate("a")
		w.until("the call", time.Minute, func() bool { return w.ops[atTarget] >= 2 && w.keeper.flying["a"] == 0 })
		w.mu.Lock()
		w.keeper.of("a").newest++
		w.mu.Unlock()
		w.idle("a")
		require.Equal(t, "fake key version 1 → 3, its answer was lost; by more than one: somebody else rotated it, too", w.role("a").With(version.Current).Evidence)
	})
}

func TestAKeyThatWasReplacedMeanwhile(t *testing.T) {
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		w.mu.Lock()
		w.keeper.of("a").newest = 7
		w.mu.Unlock()
		w.nextCall(2, callHangs)
		w.rotate("a")
		w.until("the call", time.Minute, func() bool { return w.ops[atTarget] >= 2 })
		w.mu.Lock()
		w.keeper.of("a").newest = 1
		w.mu.Unlock()
		w.idle("a")
		require.Contains(t, w.role("a").LastRun.Error, "version 1 is the newest, and it was 7 before")
	})
}

// What has been asked for cannot be taken back, and says so.
func TestATurnCannotBeTakenBack(t *testing.T) {
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		w.nextCall(2, callHangs)
		id := w.rotate("a")
		w.until("the attempt", time.Minute, func() bool { r := w.roles["a"]; return r.Run != nil && r.Run.Error != "" })
		e, ctx := w.instance().engine, t.Context()
		_, err := e.Cancel(ctx, id, "")
		require.ErrorContains(t, err, "a new version has been asked for, which nobody can take back")
		_, err = e.RollBack(ctx, "a", Request{Keys: newKeys()})
		require.ErrorContains(t, err, "no earlier version of it can be put back")
		_, err = e.ReconcileRole(ctx, "a", Request{Keys: newKeys()})
		require.ErrorContains(t, err, "nothing to apply again")
		require.ErrorContains(t, e.Abandon(ctx, "a", ""), "nobody can take back")
		w.idle("a")
		require.Equal(t, Completed, w.role("a").LastRun.State)
		_, err = e.RollBack(ctx, "a", Request{Keys: newKeys()})
		require.ErrorContains(t, err, "no earlier version of it can be put back")
	})
}

// Before anything was asked for a rotation is cancelled like every other.
func TestATurnThatNobodyHeardOfIsCancelled(t *testing.T) {
	inWorld(t, keptShown, nil, func(t *testing.T, w *world) {
		for n := 2; n < 7; n++ {
			w.nextCall(n, callFails)
		}
		id := w.rotate("a")
		w.until("the pause", time.Minute, func() bool { r := w.roles["a"]; return r.Run != nil && r.Run.Phase == Apply && r.Run.Tries > 1 })
		w.cancel(id)
		w.idle("a")
		require.Equal(t, Cancelled, w.role("a").LastRun.State)
		require.Zero(t, w.turns())
	})
}

// A new version is not undone, and not made again, because old ones could not be
// ended.
func TestOldVersionsThatCannotBeEnded(t *testing.T) {
	limited := func(r *Role) {
		r.Spec.MinDecryptionVersion = 2
		r.Schedule = schedule.Spec{Period: 4 * time.Hour}
		r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
	}
	for _, what := range []fault{rejects, lies} {
		inWorld(t, keptShown, limited, func(t *testing.T, w *world) {
			for n := 4; n < 60; n++ {
				w.nextCall(n, what)
			}
			if what == lies { // also to a look, where it means nothing
				w.plan.name = "lies"
			}
			w.rotate("a")
			w.idle("a")
			r := w.role("a")
			require.Equal(t, Failed, r.LastRun.State)
			require.True(t, strings.HasPrefix(r.LastRun.Error, "version 2 was made, and min_decryption_version could not be set to 2"), r.LastRun.Error)
			require.Equal(t, 2, r.With(version.Current).Number)
			require.Empty(t, r.Suspended)
			require.Zero(t, r.RetryAt)
			w.pass(2 * time.Hour)
			require.Equal(t, 1, w.turns())
			w.calm()
			w.until("the next slot", 5*time.Hour, func() bool { return w.roles["a"].LastRun.State == Completed })
			w.mu.Lock()
			require.Equal(t, held{newest: 3, oldest: 2}, *w.keeper.of("a"))
			w.mu.Unlock()
		})
	}
}

func TestKeptSecretsCannotBeExaminedWithoutPermission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, keptShown, plan{})
		w.seed("a", nil)
		w.run()
		defer w.close()
		e := w.instance().engine
		e.o.Permit = func(_ context.Context, roles []*Role) []error {
			return slices.Repeat([]error{kind.Definitely("connection %q does not allow role %q", "c", roles[0].Name)}, len(roles))
		}
		reports, err := e.Examine(t.Context(), []string{"a"})
		require.NoError(t, err)
		require.ErrorContains(t, reports[0].Err, "does not allow")
		w.rotate("a")
		w.idle("a")
		require.Contains(t, w.role("a").LastRun.Error, "does not allow")
		require.Zero(t, w.turns())
	})
}
