package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// testMinimum is grace_minimum of roles that go by who is logged in.
const testMinimum = time.Minute

// watchWorld is who is logged in, and what looks have shown of it.
type watchWorld struct {
	open  map[string][]kind.Session // by user
	looks map[string][]shownLook    // by user
	asked bool                      // a person has asked to retire
}

type shownLook struct {
	at   time.Time
	none bool // it showed nobody, everywhere
}

// target is what a shape's roles see of it.
func (s shape) target(f *fakeTarget) kind.Target {
	if s.observed {
		return observedTarget{f}
	}
	return f
}

// observedTarget tells who is logged in.
type observedTarget struct{ *fakeTarget }

var _ kind.Observer = observedTarget{}

func (f observedTarget) Sessions(ctx context.Context, questions []kind.SessionsQuestion) []kind.SessionsAnswer {
	began := time.Now()
	what, err := f.enter(ctx, "sessions")
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if what == rejects {
		err = kind.Definitely("injected: the admin may not list sessions")
	}
	out := make([]kind.SessionsAnswer, len(questions))
	for i, q := range questions {
		f.mine(q.User)
		out[i].Err = err
		for j, name := range w.order {
			if e := f.reach(w.nodes[name], what, j); e != nil || err != nil {
				out[i].Err = firstOf(out[i].Err, e)
				continue
			}
			for _, s := range w.watch.open[q.Username] {
				if s.Node == name && s.Opened.Before(q.Before) {
					out[i].Sessions = append(out[i].Sessions, s)
				}
			}
		}
		w.logLocked("target sessions %s: %d%s", q.Username, len(out[i].Sessions), note(out[i].Err))
		if w.watch.looks == nil {
			w.watch.looks = map[string][]shownLook{}
		}
		w.watch.looks[q.Username] = append(w.watch.looks[q.Username], shownLook{began, out[i].Err == nil && len(out[i].Sessions) == 0})
	}
	return out
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// login opens a session of a user at a node, from an address.
func (w *world) login(user, node, client string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watch.open == nil {
		w.watch.open = map[string][]kind.Session{}
	}
	w.watch.open[user] = append(w.watch.open[user], kind.Session{Node: node, Client: client, Opened: time.Now()})
}

func (w *world) logout(user string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.watch.open, user)
}

// checkUnused: grace ends early only when nobody was seen anywhere at two looks in a
// row that are apart, after the minimum; or when a person says so.
func (w *world) checkUnused(before, r *Role) {
	if !w.shape.unused || w.watch.asked || before == nil || before.Run == nil || before.Run.RetireNow || r.Run == nil || !r.Run.RetireNow {
		return
	}
	user := r.usernames()[1]
	looks := w.watch.looks[user]
	if len(looks) < 2 {
		w.violateLocked("the grace of role %s ends early after %d looks", r.Name, len(looks))
		return
	}
	last, first := looks[len(looks)-1], looks[len(looks)-2]
	switch {
	case !last.none || !first.none:
		w.violateLocked("the grace of role %s ends early though user %s may be logged in", r.Name, user)
	case last.at.Sub(first.at) < minLooksApart:
		w.violateLocked("two looks at role %s are %s apart", r.Name, last.at.Sub(first.at))
	case first.at.Before(before.Run.GraceFrom.Add(testMinimum)):
		w.violateLocked("the grace of role %s ends %s after it began", r.Name, last.at.Sub(before.Run.GraceFrom))
	}
}

func (s shape) observedScenarios() []scenario {
	keep := []string{"rotate", "rollback in grace"}
	if s.unused {
		keep = append(keep, "abandon in grace")
	}
	out := slices.DeleteFunc(everyScenario(), func(sc scenario) bool { return !slices.Contains(keep, sc.name) })
	inUse := func(w *world) { w.seed("a", nil); w.login("u-a", "n2", "10.0.0.7") }
	if !s.unused {
		return append(out, scenario{name: "used", seed: inUse, steps: func(w *world) {
			w.rotate("a")
			w.idle("a")
		}, check: named("10.0.0.7")})
	}
	return append(out, scenario{name: "used, then not", seed: inUse, steps: func(w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.pass(2 * time.Minute)
		w.logout("u-a")
		w.idle("a")
	}, check: named("10.0.0.7", "gone")}, scenario{name: "used to the end", seed: inUse, steps: func(w *world) {
		w.rotate("a")
		w.idle("a")
	}, check: named("10.0.0.7")}, scenario{name: "retire early", seed: inUse, steps: func(w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.retire("a")
		w.idle("a")
	}, check: serves("a", "m1")})
}

// usage is what the evidence of the last rotation of a role tells.
func (w *world) usage(role string) *Usage {
	ev := &Evidence{}
	e, err := w.inner.Get(context.Background(), evidenceKey(w.roles[role].LastRun.Rotation, role))
	if err != nil || e == nil || jsonutil.DecodeJSON(e.Value, ev) != nil {
		return nil
	}
	return ev.Usage
}

// named checks what is left in the evidence of who used the previous version.
func named(words ...string) func(*world) error {
	return func(w *world) error {
		u := w.usage("a")
		if u == nil || len(u.Clients) != 1 {
			return fmt.Errorf("the evidence names nobody: %+v", u)
		}
		for _, word := range words {
			if line := u.Clients[0].Line(); !strings.Contains(line, word) {
				return fmt.Errorf("the evidence says %q and not %q", line, word)
			}
		}
		return nil
	}
}

func unused() shape {
	return shape{name: "alternate unused", strategy: kind.Alternate, nodes: 2, observed: true, unused: true}
}

// grace is how long the grace of a lasted.
func (w *world) grace(t *testing.T) time.Duration {
	t.Helper()
	w.phase("a", Grace)
	from := w.role("a").Run.GraceFrom
	w.until("the end of grace", time.Hour, func() bool { return w.roles["a"].Run == nil || w.roles["a"].Run.Phase != Grace })
	return time.Since(from)
}

func TestGraceUntilUnused(t *testing.T) {
	t.Run("nobody", func(t *testing.T) {
		inWorld(t, unused(), nil, func(t *testing.T, w *world) {
			w.rotate("a")
			took := w.grace(t)
			require.Greater(t, took, testMinimum)
			require.Less(t, took, testMinimum+30*time.Second)
			w.finish()
		})
	})
	t.Run("used to the end", func(t *testing.T) {
		inWorld(t, unused(), nil, func(t *testing.T, w *world) {
			w.login("u-a", "n2", "10.0.0.7")
			w.rotate("a")
			took := w.grace(t)
			require.GreaterOrEqual(t, took, testGrace)
			require.Less(t, took, testGrace+15*time.Second)
			w.finish()
			require.LessOrEqual(t, len(w.watch.looks["u-a"]), 8, "looks are few")
		})
	})
	t.Run("used, then not", func(t *testing.T) {
		inWorld(t, unused(), nil, func(t *testing.T, w *world) {
			w.login("u-a", "n2", "10.0.0.7")
			w.rotate("a")
			time.AfterFunc(90*time.Second, func() { w.logout("u-a") })
			took := w.grace(t)
			require.Greater(t, took, 90*time.Second)
			require.Less(t, took, testGrace-time.Minute)
			w.finish()
			require.Contains(t, w.usage("a").Clients[0].Line(), "10.0.0.7, gone at ")
		})
	})
	t.Run("comes back between looks", func(t *testing.T) {
		inWorld(t, unused(), nil, func(t *testing.T, w *world) {
			stop := time.Now().Add(testGrace)
			w.rotate("a")
			w.phase("a", Grace)
			from := w.role("a").Run.GraceFrom
			for seen := 0; time.Now().Before(stop) && w.role("a").Run != nil; w.pass(100 * time.Millisecond) {
				w.mu.Lock()
				n := len(w.watch.looks["u-a"])
				w.mu.Unlock()
				if n > seen { // it is never there at two looks in a row, nor away
					seen = n
					if n%2 == 0 {
						w.logout("u-a")
					} else {
						w.login("u-a", "n1", "10.0.0.8")
					}
				}
			}
			w.idle("a")
			require.GreaterOrEqual(t, w.role("a").LastRun.At.Sub(from), testGrace)
			w.finish()
		})
	})
	for name, bad := range map[string]func(*world){
		"a node is down": func(w *world) { w.setDown("n2", true) },
		"looks fail":     func(w *world) { w.mu.Lock(); w.shape.observed = false; w.mu.Unlock() },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, unused(), nil, func(t *testing.T, w *world) {
				w.rotate("a")
				w.phase("a", Grace)
				bad(w)
				require.GreaterOrEqual(t, w.grace(t), testGrace, "not seen is not unused")
				w.calm()
				w.idle("a")
				w.finish()
				require.NotEmpty(t, w.usage("a").Unknown)
			})
		})
	}
	t.Run("a unit waits for its others", func(t *testing.T) {
		s := unused()
		s.document = true
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, s, plan{name: t.Name()})
			w.seed("a", nil)
			w.seed("b", func(r *Role) { r.UntilUnused, r.GraceMinimum = false, nil })
			w.run()
			defer w.close()
			w.rotate("a", "b")
			took := w.grace(t)
			require.Less(t, took, testGrace-time.Minute, "each by its own grace, when all have arrived")
			w.idle("a", "b")
			w.finish()
		})
	})
}

// A look that did not tell everything says so, beside what it told.
func TestUsageOfHalfALook(t *testing.T) {
	t.Parallel()
	nobodys := func(string) bool { return false }
	half := errors.New("a broker does not run")
	seen := kind.SessionsAnswer{Sessions: []kind.Session{{Client: "10.0.0.7", Name: "billing"}}}
	var u *Usage
	require.Equal(t, `1 session of user "app" from 10.0.0.7 (billing)`, u.saw("app", false, seen, nobodys, time.Now()).Line())
	seen.Err = half
	u = u.saw("app", false, seen, nobodys, time.Now())
	require.Equal(t, `1 session of user "app" from 10.0.0.7 (billing); not all are known: a broker does not run`, u.Line())
	u = u.saw("app", false, kind.SessionsAnswer{Err: half}, nobodys, time.Now())
	require.Equal(t, `0 sessions of user "app" from 10.0.0.7 (billing); not all are known: a broker does not run`, u.Line(), "nobody was seen to go")
	u = u.saw("app", false, kind.SessionsAnswer{}, nobodys, time.Now())
	require.Contains(t, u.Line(), "no session of user \"app\" is open any more")
}

// TestLooksBecomeRarer: while the same clients stay; when one leaves they are soon
// looked at again, and a look that fails makes none rarer.
func TestLooksBecomeRarer(t *testing.T) {
	t.Parallel()
	minimum := time.Minute
	from := time.Now()
	r := &Role{
		UntilUnused: true, GraceMinimum: &minimum,
		Run: &Run{GraceFrom: from, GraceUntil: from.Add(24 * time.Hour), Usage: &Usage{}},
	}
	seen := lookedAt{last: from.Add(minimum)}
	next := func(a kind.SessionsAnswer) time.Duration {
		seen.count(a, r.Run.Usage)
		r.Run.Usage = &Usage{Sessions: len(a.Sessions)}
		at := r.nextLook(seen, Config{}, seen.last)
		defer func() { seen.last = at }()
		return at.Sub(seen.last)
	}
	three := kind.SessionsAnswer{Sessions: make([]kind.Session, 3)}
	apart := r.looksApart(Config{})
	for _, want := range []time.Duration{apart, apart, 2 * apart, 4 * apart, 8 * apart} {
		require.Equal(t, want, next(three))
	}
	for range 3 {
		require.Equal(t, 8*apart, next(kind.SessionsAnswer{Err: kind.CannotReach(context.DeadlineExceeded)}))
	}
	require.Equal(t, maxLooksApart, next(three))
	require.Equal(t, apart, next(kind.SessionsAnswer{Sessions: three.Sessions[:1]}))
	require.Equal(t, apart, next(kind.SessionsAnswer{Sessions: three.Sessions[:1]}))
	require.Equal(t, 2*apart, next(kind.SessionsAnswer{Sessions: three.Sessions[:1]}))

	seen = lookedAt{}
	seen.count(kind.SessionsAnswer{Err: context.DeadlineExceeded}, nil)
	require.NotZero(t, seen.n, "one that could not be stored is not begun again at once")
}

// A crash forgets what looks have shown: two new ones are needed.
func TestLooksAreNotBelievedAfterACrash(t *testing.T) {
	inWorld(t, unused(), nil, func(t *testing.T, w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.until("a look that shows nobody after the minimum", time.Hour, func() bool {
			looks := w.watch.looks["u-a"]
			return len(looks) > 0 && !looks[len(looks)-1].at.Before(w.roles["a"].Run.GraceFrom.Add(testMinimum))
		})
		n := len(w.watch.looks["u-a"])
		w.restart()
		w.idle("a")
		require.GreaterOrEqual(t, len(w.watch.looks["u-a"]), n+2)
		w.finish()
	})
}

// Many roles in grace are looked at once, with few calls, and nothing is written where
// nobody was seen.
func TestAdviceIsCheap(t *testing.T) {
	const many = 300
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shape{name: "overlap observed", strategy: kind.Overlap, nodes: 1, observed: true}, plan{name: t.Name()})
		var names []string
		for i := range many {
			names = append(names, fmt.Sprintf("r%03d", i))
			w.seed(names[i], nil)
		}
		w.run()
		defer w.close()
		w.rotate(names...)
		for _, name := range names {
			w.phase(name, Grace)
		}
		puts := func() int {
			w.mu.Lock()
			defer w.mu.Unlock()
			n := 0
			for _, op := range w.kinds[atStorage] {
				if strings.HasPrefix(op, "put") {
					n++
				}
			}
			return n
		}
		before := puts()
		w.until("looks at all", time.Hour, func() bool {
			n := 0
			for _, looks := range w.watch.looks {
				n += len(looks)
			}
			return n >= many
		})
		w.pass(10 * time.Second)
		require.NotNil(t, w.role(names[0]).Run, "it is in grace still")
		require.Equal(t, before, puts(), "no writes")
		w.mu.Lock()
		calls := 0
		for _, op := range w.kinds[atTarget] {
			if op == "sessions" {
				calls++
			}
		}
		w.mu.Unlock()
		t.Logf("%d roles in grace: %d calls", many, calls)
		require.Less(t, calls, many/10)
		w.idle(names...)
		w.finish()
		for _, looks := range w.watch.looks {
			require.Len(t, looks, 1)
		}
	})
}

// What is told of clients is bounded, and no secret is in it.
func TestUsageIsBounded(t *testing.T) {
	r := &Role{Name: "a", Run: &Run{}, Spec: kind.Spec{Username: "u", Strategy: kind.Overlap}, Connection: "c"}
	r.Add(kind.Material{Username: "u", Secret: "the-secret"}, "", time.Now())
	r.Promote(time.Now())
	var a kind.SessionsAnswer
	for i := range 3000 {
		a.Sessions = append(a.Sessions, kind.Session{Client: fmt.Sprintf("%d<%0300d", i, 0), Name: strings.Repeat("<", 500)})
	}
	a.Sessions[0].Client, a.Sessions[0].Name = "", "pool-the-secret"
	r.Run.Usage = r.sawUsers(a, time.Now())
	raw, err := jsonutil.EncodeJSON(r.Run.Usage)
	require.NoError(t, err)
	require.Less(t, len(raw), usageRoom)
	require.NotContains(t, string(raw), "the-secret")
	require.Len(t, r.Run.Usage.Clients, maxClients)
	require.Equal(t, 3000, r.Run.Usage.Sessions)

	// who has gone makes room for who is there
	r.Run.Usage = r.sawUsers(kind.SessionsAnswer{Sessions: []kind.Session{{Client: "10.0.0.9"}}}, time.Now())
	require.Len(t, r.Run.Usage.Clients, maxClients)
	require.Contains(t, r.Run.Usage.Line(), "1 session of user \"u\" from before the promotion from 10.0.0.9")
	partly := r.sawUsers(kind.SessionsAnswer{Err: errDown}, time.Now())
	require.True(t, partly.Clients[maxClients-1].Gone.IsZero(), "a look that fails shows nobody gone")
}
