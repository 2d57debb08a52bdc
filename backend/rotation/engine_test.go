package rotation

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
)

// silent is a target that never answers. A stubborn one does not even when its
// context has ended, which no driver may do.
type silent struct{ stubborn <-chan struct{} }

func (s silent) hang(ctx context.Context) {
	if s.stubborn != nil {
		<-s.stubborn
	}
	<-ctx.Done()
}

func (s silent) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	s.hang(ctx)
	out := make([]kind.Finding, len(users))
	for i := range out {
		out[i].Err = ctx.Err()
	}
	return out
}

func (s silent) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	s.hang(ctx)
	out := make([]kind.Answer, len(questions))
	for i := range out {
		out[i].Err = ctx.Err()
	}
	return out
}

func (s silent) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	s.hang(ctx)
	out := make([]kind.Outcome, len(changes))
	for i := range out {
		out[i].Err = ctx.Err()
	}
	return out
}

func plainEngine(target kind.Target) *Engine {
	return New(Options{
		Storage:    &logical.InmemStorage{},
		Kind:       func(string) kind.Kind { return fakeKind{w: &world{}, connection: "fake"} },
		Target:     func(string, string) kind.Target { return target },
		Generation: func(context.Context, string) (int, error) { return 0, nil },
		Active:     func() bool { return true },
	})
}

func plainRole(t *testing.T, e *Engine, name string) {
	t.Helper()
	r := &Role{Name: name, Kind: "fake", Connection: "c", Spec: kind.Spec{Username: "u", Strategy: kind.Overlap}}
	r.Add(kind.Material{Username: "u", Secret: "m"}, "", time.Now())
	r.Promote(time.Now())
	require.NoError(t, e.st.PutRole(t.Context(), nil, r))
}

func TestStartAndStopInAnyOrder(t *testing.T) {
	before := goleak.IgnoreCurrent()
	defer func() { require.NoError(t, leaks.Find(before)) }()
	for _, order := range []string{"", "S", "SS", "X", "XS", "XX", "SX", "SSXX", "SXSX", "TXT"} {
		e := plainEngine(silent{})
		for _, c := range order {
			switch c {
			case 'S':
				e.Start()
			case 'T':
				e.Tick()
			case 'X':
				require.NoError(t, e.Stop(t.Context()), order)
			}
		}
		require.NoError(t, e.Stop(t.Context()), order)
	}
}

func TestStopWithAHangingTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := plainEngine(silent{})
		plainRole(t, e, "a")
		e.Start()
		_, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: []string{"a"}})
		require.NoError(t, err)
		<-time.After(3 * time.Second)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		require.NoError(t, e.Stop(ctx))
		require.Less(t, time.Since(began), time.Second)
	})
}

// A driver that ignores its context holds up its own goroutine, not Clean.
func TestStopWithAStubbornDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		e := plainEngine(silent{stubborn: free})
		plainRole(t, e, "a")
		e.Start()
		_, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: []string{"a"}})
		require.NoError(t, err)
		<-time.After(3 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		require.ErrorContains(t, e.Stop(ctx), "still under way")
		require.LessOrEqual(t, time.Since(began), 5*time.Second)
		close(free)
		require.NoError(t, e.Stop(t.Context()))
	})
}

// Forty connections that never answer take neither the workers nor the locks
// from the one that does.
func TestHangingTargetsDelayNoOtherLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, overlap(1), plan{name: t.Name()})
		w.seed("a", nil)
		w.run()
		defer w.close()
		e := w.instance().engine
		good := e.o.Target
		e.o.Target = func(k, connection string) kind.Target {
			if connection == "c" {
				return good(k, connection)
			}
			return silent{}
		}
		w.tampered[""] = true
		var bad []string
		for i := range 40 {
			r := w.newRole(fmt.Sprintf("bad%02d", i))
			r.Connection = fmt.Sprintf("bad%02d", i)
			r.Spec.Username = "" // nobody checks what these serve
			r.Add(kind.Material{Secret: "m"}, "", time.Now())
			r.Promote(time.Now())
			require.NoError(t, e.st.PutRole(t.Context(), nil, r))
			bad = append(bad, r.Name)
		}
		_, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: bad})
		require.NoError(t, err)
		<-time.After(25 * time.Second) // by now they are known to be slow
		_, err = e.Begin(t.Context(), Request{Trigger: Manual, Roles: bad})
		_ = err // some are at it, some have failed
		<-time.After(2 * time.Second)
		began := time.Now()
		_, err = e.Begin(t.Context(), Request{Trigger: Manual, Roles: append(bad, "a")})
		require.NoError(t, err)
		require.Less(t, time.Since(began), 100*time.Millisecond, "the request does not wait for what hangs")
		w.until("promotion", 30*time.Second, func() bool { r := w.roles["a"]; return secret(r, version.Current) != "m0-a" })
		t.Logf("promoted after %s", time.Since(began))
		require.Less(t, time.Since(began), 2*time.Second)
		for _, name := range bad {
			w.idle(name)
		}
		w.idle("a")
	})
}
