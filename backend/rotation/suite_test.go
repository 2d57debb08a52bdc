package rotation

import (
	"context"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
)

var (
	faultPoints atomic.Int64
	pairBudget  = flag.Duration("pairs", 2*time.Second, "how long to sample pairs of faults, for each strategy")
	pairSeed    = flag.Int64("pairs.seed", 20261122, "seed of the sampled pairs")
)

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if n := faultPoints.Load(); n > 0 {
		fmt.Printf("%d fault points\n", n)
		// go test shows what a package prints only with -v; make shows this.
		if file := os.Getenv("FAULT_POINTS_FILE"); file != "" {
			_ = os.WriteFile(file, fmt.Appendf(nil, "%d fault points\n", n), 0o600)
		}
	}
	if code == 0 {
		if err := leaks.Find(); err != nil {
			fmt.Println(err)
			code = 1
		}
	}
	os.Exit(code)
}

// scenario is a row of the table of scenarios: what people (or the clock) do
// with a role while something fails.
type scenario struct {
	name  string
	seed  func(*world)
	steps func(*world)
	// version is what must be served at the end when nothing fails, by role;
	// see expected.
	check func(*world) error
	// not says for which strategies the row makes no sense.
	not func(shape) bool
}

func one(w *world) { w.seed("a", nil) }

func nobody(*world) {}

// shared reports whether roles of the shape are shown in one place, and so are a
// unit.
func (s shape) shared() bool { return s.document || s.place || s.consumers }

// several are the roles of a batch. A unit of two has every way to go wrong, and
// costs a third of one of three.
func (w *world) several() []string {
	if w.shape.shared() {
		return []string{"a", "b"}
	}
	return []string{"a", "b", "c"}
}

func several(w *world) {
	for _, n := range w.several() {
		w.seed(n, nil)
	}
}

func allEnded(state State) func(*world) error {
	return func(w *world) error {
		for _, n := range w.several() {
			if got := w.roles[n].LastRun.State; got != state {
				return fmt.Errorf("role %s: %s", n, got)
			}
		}
		return nil
	}
}

// anyOf leaves a row out for shapes that others cover: they would meet the same
// code at the same operations.
func anyOf(names ...string) func(shape) bool {
	return func(s shape) bool { return slices.Contains(names, s.name) }
}

func targetlessOnly(s shape) bool { return s.targetless }

func (s shape) scenarios() []scenario {
	if s.keeper {
		return keeperScenarios()
	}
	if s.root {
		return slices.DeleteFunc(everyScenario(), func(sc scenario) bool {
			return !slices.Contains([]string{"rotate", "cancel before promote", "rollback in grace", "retire early", "rollback after retire", "scheduled"}, sc.name)
		})
	}
	if s.consumers {
		return s.consumerScenarios()
	}
	if s.observed {
		return s.observedScenarios()
	}
	return everyScenario()
}

func everyScenario() []scenario {
	return []scenario{
		{name: "rotate", seed: one, steps: func(w *world) { w.rotate("a"); w.idle("a") }, check: serves("a", "m1")},
		{name: "rollback in grace", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.rollBack("a")
			w.idle("a")
		}, check: serves("a", "m0-a")},
		{name: "cancel before promote", seed: one, steps: func(w *world) {
			id := w.rotate("a")
			w.cancel(id)
			w.idle("a")
		}, check: serves("a", "m0-a", "m1")},
		{name: "retire early", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.retire("a")
			w.idle("a")
		}, check: serves("a", "m1")},
		{name: "rollback after retire", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.idle("a")
			w.rollBack("a")
			w.idle("a")
		}, check: serves("a", "m0-a")},
		{name: "create generated", seed: nobody, steps: func(w *world) { w.create("a", nil, false); w.idle("a") }, check: serves("a", "m1")},
		{name: "create adopted", seed: imported, steps: func(w *world) {
			w.create("a", material("a", "old"), false)
			w.idle("a")
		}, check: serves("a", "old")},
		{name: "create taking over", seed: imported, not: func(s shape) bool { return s.strategy != kind.KeyRing }, steps: func(w *world) {
			w.inUse("a", "older", "old")
			w.createWith("a", material("a", "old"), false, func(_ context.Context, r *Role) error {
				r.TakeOver(*material("a", "older"), time.Now())
				return nil
			})
			w.until("the end of the earlier key", 5*time.Hour, func() bool {
				r := w.roles["a"]
				return r.Run == nil && r.With(version.Previous) == nil
			})
		}, check: serves("a", "old")},
		{name: "create overwriting", seed: imported, steps: func(w *world) {
			w.create("a", nil, true)
			w.idle("a")
		}, check: serves("a", "m1")},
		{name: "delete and create again", seed: one, steps: func(w *world) {
			w.remove("a")
			w.create("a", nil, false)
			w.idle("a")
		}, check: serves("a", "m0-a")},
		{name: "abandon in grace", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.abandon("a")
			w.create("a", nil, false)
			w.idle("a")
		}, check: serves("a", "m1")},
		{name: "abandon on the way back", seed: one, not: anyOf("swap", "partial", "targetless", "encrypting ring", "place", "swap document"), steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.rollBack("a")
			w.abandon("a")
			w.create("a", nil, false)
			w.idle("a")
		}, check: serves("a", "m0-a", "m1")},
		{name: "delete and restore", seed: one, steps: func(w *world) {
			w.remove("a")
			w.restore("a", false)
			w.idle("a")
		}, check: serves("a", "m0-a")},
		{name: "restore overwriting", seed: one, not: targetlessOnly, steps: func(w *world) {
			w.remove("a")
			w.tamper("n1", "u-a", *material("a", "stranger"))
			w.restore("a", true)
			w.idle("a")
			w.mended("a")
		}, check: serves("a", "m0-a")},
		{name: "abandon in grace and restore", seed: one, steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.abandon("a")
			w.restore("a", false)
			w.idle("a")
			w.moveOn("a")
		}, check: serves("a", "m2")},
		{name: "abandon on the way back and restore", seed: one, not: anyOf("swap", "partial", "encrypting ring", "place", "swap document"), steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.rollBack("a")
			w.abandon("a")
			w.restore("a", false)
			w.idle("a")
			w.moveOn("a")
		}, check: serves("a", "m0-a", "m1", "m2")},
		{name: "reconcile", seed: one, not: targetlessOnly, steps: func(w *world) {
			w.tamper("n1", "u-a", *material("a", "stranger"))
			w.reconcile("a")
			w.idle("a")
			w.mended("a")
		}, check: serves("a", "m0-a")},
		{name: "reconcile in grace", seed: one, not: anyOf("targetless", "signing ring", "encrypting ring"), steps: func(w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			if !w.shape.targetless {
				w.tamper("n1", "u-a", *material("a", "stranger"))
			}
			w.reconcile("a")
			w.idle("a")
			w.mended("a")
		}, check: serves("a", "m1")},
		{name: "scheduled", not: anyOf("partial", "encrypting ring"), seed: func(w *world) {
			w.seed("a", func(r *Role) {
				r.Schedule = schedule.Spec{Period: 2 * time.Hour}
				r.Next = schedule.Next(r.Schedule, r.Name, time.Now())
			})
		}, steps: func(w *world) {
			w.until("the scheduled rotation", 5*time.Hour, func() bool { return w.roles["a"].LastRun != nil || w.dead() })
			w.until("its end", 5*time.Hour, func() bool {
				r := w.roles["a"]
				return r.Run == nil && r.LastRun != nil && (r.LastRun.State == Completed || r.Suspended != "")
			})
			if w.role("a").Suspended != "" { // it was taken back; from there people go on
				w.rotate("a")
				w.idle("a")
			}
			w.unschedule("a")
		}, check: serves("a", "m1")},
		{name: "one of a unit goes back", seed: several, not: func(s shape) bool {
			return !s.shared() || s.strategy == kind.Swap || s.strategy == kind.KeyRing && s.tokens == 0
		}, steps: func(w *world) {
			w.rotate(w.several()...)
			w.phase("b", Grace)
			w.rollBack("b")
			w.idle(w.several()...)
		}, check: allEnded(RolledBack)},
		{name: "batch", seed: several, not: anyOf("swap", "targetless", "encrypting ring"), steps: func(w *world) {
			w.rotate(w.several()...)
			w.idle(w.several()...)
		}, check: allEnded(Completed)},
	}
}

func material(role, secret string) *kind.Material {
	return &kind.Material{Username: "u-" + role, Secret: secret, KeyID: "kid-" + secret}
}

// imported is a user that has a password the engine was not told.
func imported(w *world) {
	for _, n := range w.nodes {
		n.set("u-a", []kind.Material{*material("a", "old")})
	}
	w.foreign["u-a"] = []kind.Material{*material("a", "old")}
}

func serves(role string, secrets ...string) func(*world) error {
	return func(w *world) error {
		r := w.roles[role]
		if r == nil || !slices.Contains(secrets, r.With("current").Material.Secret) {
			return fmt.Errorf("role %s does not serve one of %v: %s", role, secrets, describe(r))
		}
		return nil
	}
}

// dead is for conditions that cannot come true: a step waits no longer.
func (w *world) dead() bool { return len(w.broken) > 0 }

// What users do. Each repeats its request until it is answered.

var requests atomic.Int64

func newKeys() [][]string { return [][]string{{"request", fmt.Sprint(requests.Add(1))}} }

func (w *world) rotate(roles ...string) (id string) {
	req := Request{Trigger: Manual, Roles: roles, Keys: newKeys()}
	_ = w.do("rotate", func(ctx context.Context, e *Engine) error {
		h, err := e.Begin(ctx, req)
		if h != nil {
			id = h.ID
		}
		return err
	})
	return id
}

func (w *world) rollBack(role string) {
	req := Request{Keys: newKeys()}
	_ = w.do("rollback", func(ctx context.Context, e *Engine) error {
		_, err := e.RollBack(ctx, role, req)
		return err
	})
}

func (w *world) reconcile(role string) {
	req := Request{Keys: newKeys()}
	_ = w.do("reconcile", func(ctx context.Context, e *Engine) error {
		_, err := e.ReconcileRole(ctx, role, req)
		return err
	})
}

func (w *world) cancel(id string) {
	_ = w.do("cancel", func(ctx context.Context, e *Engine) error {
		_, err := e.Cancel(ctx, id, "")
		return err
	})
}

func (w *world) retire(role string) {
	w.mu.Lock()
	w.watch.asked = true
	w.mu.Unlock()
	req := Request{Keys: newKeys()}
	_ = w.do("retire", func(ctx context.Context, e *Engine) error {
		_, err := e.Retire(ctx, role, 0, req)
		return err
	})
}

// remove deletes a role; one that is busy is deleted when it is free.
func (w *world) remove(role string) {
	_ = w.do("delete", func(ctx context.Context, e *Engine) error { return e.Delete(ctx, role) })
}

func (w *world) abandon(role string) {
	w.mu.Lock()
	w.abandoned = true
	w.mu.Unlock()
	_ = w.do("abandon", func(ctx context.Context, e *Engine) error { return e.Abandon(ctx, role, "") })
}

// create makes a role and does not give up before it is there: nothing that
// failed half-way may stand in the way of trying again.
func (w *world) create(role string, initial *kind.Material, overwrite bool) {
	w.createWith(role, initial, overwrite, nil)
}

func (w *world) createWith(role string, initial *kind.Material, overwrite bool, check func(context.Context, *Role) error) {
	for range 50 {
		err := w.do("create", func(ctx context.Context, e *Engine) error {
			_, err := e.Create(ctx, Creation{
				Role: w.newRole(role), Initial: initial, Overwrite: overwrite, Target: w.newRole(role).Target, Check: check,
			})
			return err
		})
		w.idle(role)
		if r := w.role(role); r != nil {
			return
		}
		w.logf("create again after %s", answer(err))
		// The role before was deleted while a node was passed over: what it left
		// there has to be ended on request.
		overwrite = overwrite || err != nil && strings.Contains(err.Error(), "initial_password")
		w.pass(10 * time.Second)
	}
	w.violate("role %s could not be created", role)
}

// mended reconciles until the role is; a reconcile may fail, and says so.
func (w *world) mended(role string) {
	for range 20 {
		r := w.role(role)
		if r.LastRun != nil && r.LastRun.State == Completed && w.untampered(role) {
			break
		}
		w.reconcile(role)
		w.idle(role)
		w.pass(time.Minute)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	user := "u-" + role
	delete(w.tampered, user)
	delete(w.foreign, user)
	w.checkLocked()
}

func (w *world) untampered(role string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		for _, m := range n.accepts["u-"+role] {
			if m.Secret == "stranger" {
				return false
			}
		}
	}
	return true
}

func (w *world) unschedule(role string) {
	_ = w.do("unschedule", func(ctx context.Context, e *Engine) error {
		return e.Update(ctx, role, func(r *Role) error { r.Schedule = schedule.Spec{}; return nil })
	})
}

// play runs one scenario under one plan in a bubble of its own, and returns
// the world for a look at what was counted.
func play(t *testing.T, s shape, sc scenario, p plan) (w *world) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w = newWorld(t, s, p)
		sc.seed(w)
		w.run()
		sc.steps(w)
		w.finish()
		if len(p.points) == 0 && sc.check != nil {
			w.mu.Lock()
			if err := sc.check(w); err != nil {
				w.violateLocked("%v", err)
			}
			w.mu.Unlock()
		}
		w.close()
	})
	return w
}

// TestFaults puts every fault at every operation of every scenario, for every
// strategy, one at a time; with the race detector, which makes it many times
// slower, at every fifth.
func TestFaults(t *testing.T) {
	for _, s := range shapes {
		for _, sc := range s.scenarios() {
			if sc.not != nil && sc.not(s) {
				continue
			}
			t.Run(s.name+"/"+sc.name, func(t *testing.T) {
				t.Parallel()
				everyPoint(t, s, sc)
			})
		}
	}
}

// stride leaves points of storage out where the operations are those of other shapes
// and one more step.
func (s shape) stride(d domain) int {
	switch {
	case s.urgent: // with the race detector, much less often
		return stride * stride
	case s.queue && d == atCluster:
		return 2 * stride
	case s.consumers && d != atCluster:
		return 4 * stride
	}
	return stride
}

func everyPoint(t *testing.T, s shape, sc scenario) {
	name := s.name + "/" + sc.name
	base := play(t, s, sc, plan{name: name})
	if t.Failed() {
		return
	}
	for _, d := range []domain{atStorage, atTarget, atCluster} {
		faults := map[fault]bool{}
		if d == atCluster {
			for _, f := range clusterFaults {
				faults[f] = s.consumers
			}
		}
		for _, list := range [][]fault{storageWriteFaults, changeFaults, lookFaults} {
			for _, f := range list {
				if d != atCluster && slices.Contains(storageWriteFaults, f) == (d == atStorage) {
					faults[f] = true
				}
			}
		}
		// Faults may make a scenario longer, never shorter for good: each goes
		// on until the scenario ends without reaching it.
		for f, possible := range faults {
			for k := 1; possible; k++ {
				if !applies(base, d, k, f) || (k+len(f))%s.stride(d) != 0 {
					continue
				}
				w := play(t, s, sc, plan{name: name, points: []point{{where: d, at: k, what: f}}})
				if t.Failed() {
					return
				}
				if w.ops[d] < k || k > base.ops[d]+1 {
					break
				}
				faultPoints.Add(1)
			}
		}
	}
}

// applies skips faults that make no difference at an operation: what a read
// shares with another fault.
func applies(base *world, d domain, k int, f fault) bool {
	names := base.kinds[d]
	if k > len(names) {
		return true
	}
	switch name, _, _ := strings.Cut(names[k-1], " "); name {
	case "get", "list":
		return slices.Contains(storageReadFaults, f)
	case "preflight", "probe", "look", "sessions":
		return slices.Contains(lookFaults, f)
	}
	return true
}

// TestPairsOfFaults samples two faults at once.
func TestPairsOfFaults(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewSource(*pairSeed))
			t.Logf("seed %d", *pairSeed)
			end := time.Now().Add(*pairBudget)
			rows := s.scenarios()
			for time.Now().Before(end) && !t.Failed() {
				sc := rows[rng.Intn(len(rows))]
				if sc.not != nil && sc.not(s) {
					continue
				}
				p := plan{name: s.name + "/" + sc.name, points: []point{anyPoint(rng, s), anyPoint(rng, s)}}
				play(t, s, sc, p)
				faultPoints.Add(1)
			}
		})
	}
}

// TestRandomUsers lets people who do not talk to each other work on one role
// while things fail. Whatever they ask for, nothing is lost and it comes to rest.
func TestRandomUsers(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			end := time.Now().Add(*pairBudget)
			for seed := *pairSeed; time.Now().Before(end) && !t.Failed(); seed++ {
				rng := rand.New(rand.NewSource(seed))
				p := plan{name: fmt.Sprintf("%s/random users, seed %d", s.name, seed), points: []point{anyPoint(rng, s), anyPoint(rng, s), anyPoint(rng, s)}}
				play(t, s, scenario{seed: one, steps: func(w *world) { w.crowd(rng) }}, p)
				faultPoints.Add(3)
			}
		})
	}
}

// crowd is three users, each with a few requests.
func (w *world) crowd(rng *rand.Rand) {
	var wg sync.WaitGroup
	for range 3 {
		var steps []func()
		for range 1 + rng.Intn(4) {
			pause := time.Duration(rng.Intn(400)) * time.Second
			what := rng.Intn(w.shape.whims())
			steps = append(steps, func() { w.pass(pause); w.whim(what) })
		}
		wg.Go(func() {
			for _, step := range steps {
				step()
			}
		})
	}
	wg.Wait()
	w.calm()
	if w.role("a") == nil {
		w.create("a", nil, false)
	}
	w.idle("a")
	r := w.role("a")
	if r == nil { // what is wrong has been said
		return
	}
	if d := r.Drift; d != nil && len(d.Missed) == 0 { // a reconcile failed, and said so
		w.reconcile("a")
		w.idle("a")
	}
}

// whims is how many of them there are: nobody deletes what the engine logs in with
// as a role, or makes it again.
func (s shape) whims() int {
	if s.root {
		return 5
	}
	return 10
}

func (w *world) whim(what int) {
	switch what {
	case 0, 1:
		if id := w.rotate("a"); what == 0 && id != "" {
			w.cancel(id)
		}
	case 2:
		w.rollBack("a")
	case 3:
		w.retire("a")
	case 4:
		w.reconcile("a")
	case 5:
		w.remove("a")
	case 6:
		_ = w.do("create", func(ctx context.Context, e *Engine) error {
			_, err := e.Create(ctx, Creation{Role: w.newRole("a"), Target: w.newRole("a").Target})
			return err
		})
	case 7:
		w.abandon("a")
	case 8:
		w.emergency("a")
	case 9:
		_ = w.do("restore", func(ctx context.Context, e *Engine) error { return e.restore(ctx, "a", false) })
	}
}

func anyPoint(rng *rand.Rand, s shape) point {
	if s.targetless || rng.Intn(2) == 0 {
		return point{where: atStorage, at: 1 + rng.Intn(60), what: storageWriteFaults[rng.Intn(len(storageWriteFaults))]}
	}
	return point{where: atTarget, at: 1 + rng.Intn(12), what: changeFaults[rng.Intn(len(changeFaults))]}
}
