package publish

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
)

func TestMain(m *testing.M) {
	// Started by the import of a library of the SDK, and never ended.
	leaks.Main(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

var place = Place{Connection: "other", Mount: "secret", Path: "app/db"}

// kv is one secret of KV version 2 as a Vault serves it, with faults. Each
// version that it ever had is kept.
type kv struct {
	mu       sync.Mutex
	versions []map[string]any // nil: deleted
	gone     bool             // its metadata, too
	mount    map[string]any
	ahead    []func() // writes that are still on their way

	// fault is asked before each request with its step (read, mount, write; read
	// back is the read after a write that was applied), and may act itself.
	fault  func(step, token string) fault
	silent func() // called when a request gets no answer
	wrote  map[string]bool
}

type fault int

const (
	none      fault = iota
	fails           // 500, and nothing happened
	applied         // 500, though it happened
	lost            // it happened, and the connection is cut
	cut             // the connection is cut, and nothing happened
	hangs           // no answer, and nothing happened
	late            // no answer, and it happens when somebody calls land
	forbidden       // 403
)

func newKV(first map[string]any) *kv {
	s := &kv{mount: map[string]any{"path": "secret/", "type": "kv", "options": map[string]any{"version": "2"}}, wrote: map[string]bool{}}
	if first != nil {
		s.versions = append(s.versions, first)
	}
	return s
}

func (s *kv) current() int {
	if s.gone {
		return 0
	}
	return len(s.versions)
}

func (s *kv) body() map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current() == 0 {
		return nil
	}
	return maps.Clone(s.versions[len(s.versions)-1])
}

func (s *kv) version() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current()
}

// foreign is a write of somebody else, who keeps what he does not own.
func (s *kv) foreign(change map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := map[string]any{}
	if s.current() > 0 {
		maps.Copy(next, s.versions[len(s.versions)-1])
	}
	maps.Copy(next, change)
	s.put(next)
}

func (s *kv) put(next map[string]any) {
	if s.gone {
		s.versions, s.gone = nil, false
	}
	s.versions = append(s.versions, next)
}

func (s *kv) delete() { s.mu.Lock(); defer s.mu.Unlock(); s.put(nil) }

// erase takes the secret away with all that is known of it.
func (s *kv) erase() { s.mu.Lock(); defer s.mu.Unlock(); s.gone = true }

// land lets writes happen that were on their way.
func (s *kv) land() {
	s.mu.Lock()
	ahead := s.ahead
	s.ahead = nil
	s.mu.Unlock()
	for _, w := range ahead {
		w()
	}
}

func (s *kv) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	token := req.Header.Get("X-Vault-Token")
	path := strings.TrimPrefix(req.URL.Path, "/v1/")
	answer := func(code int, v any) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v)
	}
	step := "read"
	switch {
	case path == "auth/token/lookup-self":
		answer(200, map[string]any{"data": map[string]any{"ttl": 0}})
		return
	case strings.HasPrefix(path, "sys/internal/ui/mounts/"):
		step = "mount"
	case req.Method == http.MethodPut:
		step = "write"
	default:
		s.mu.Lock()
		if s.wrote[token] {
			step = "read back"
		}
		s.mu.Unlock()
	}
	f := none
	if s.fault != nil {
		f = s.fault(step, token)
	}
	do := func() (int, any) { return s.do(step, token, body) }
	switch f {
	case fails:
		answer(500, map[string]any{"errors": []string{"internal error: " + string(body)}})
		return
	case forbidden:
		answer(403, map[string]any{"errors": []string{"permission denied"}})
		return
	case hangs:
		s.silent()
		<-req.Context().Done()
		return
	case cut:
		panic(http.ErrAbortHandler)
	case late:
		s.mu.Lock()
		s.ahead = append(s.ahead, func() { do() })
		s.mu.Unlock()
		s.silent()
		<-req.Context().Done()
		return
	}
	code, v := do()
	switch f {
	case applied:
		code, v = 500, map[string]any{"errors": []string{"internal error"}}
	case lost:
		panic(http.ErrAbortHandler)
	}
	answer(code, v)
}

func (s *kv) do(step, token string, raw []byte) (int, any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch step {
	case "mount":
		return 200, map[string]any{"data": s.mount}
	case "write":
		var in struct {
			Options struct{ CAS *int }
			Data    map[string]any
		}
		if json.Unmarshal(raw, &in) != nil || in.Options.CAS == nil {
			return 400, map[string]any{"errors": []string{"no cas"}}
		}
		if *in.Options.CAS != s.current() {
			return 400, map[string]any{"errors": []string{vault.Mismatch}}
		}
		s.put(in.Data)
		s.wrote[token] = true
		return 200, map[string]any{"data": map[string]any{"version": s.current()}}
	}
	s.wrote[token] = false
	if s.current() == 0 {
		return 404, map[string]any{"errors": []string{}}
	}
	body := s.versions[len(s.versions)-1]
	code := 200
	if body == nil {
		code = 404
	}
	return code, map[string]any{"data": map[string]any{"data": body, "metadata": map[string]any{"version": s.current()}}}
}

// remoteTo publishes to h, as each of names with a token of that name.
func remoteTo(t *testing.T, h http.Handler, names ...string) *Remote {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = nil
	server.StartTLS()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	entries := map[string]*connection.Entry{}
	for _, name := range append(names, "other") {
		entries[name] = &connection.Entry{
			Name: name, Type: connection.TypeVault, TLS: connection.TLS{CA: ca},
			Vault: &connection.Vault{Address: server.URL, Auth: connection.AuthToken, AllowedPublishPaths: []string{"secret/app/*"}},
			Admin: connection.NewAdmin(kind.Material{Secret: name}),
		}
	}
	clients := vault.New(func(_ context.Context, name string) (*connection.Entry, error) { return entries[name], nil }, hclog.NewNullLogger())
	t.Cleanup(func() { clients.Close(context.Background()); server.Close() })
	r := NewRemote(clients)
	r.againFirst = time.Millisecond
	return r
}

func (r *Remote) publishWithin(t *testing.T, d time.Duration, fields map[string]string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return r.Publish(ctx, place, fields)
}

const soon = 10 * time.Second

func classOf(err error) kind.Class {
	var e *kind.Error
	if err == nil {
		return -1
	}
	if errors.As(err, &e) {
		return e.Class
	}
	return -2
}

// Every fault at every step: what others own stays, and when the fault is over
// one more Publish ends with the fields there, in one version for the change.
func TestPublishFaults(t *testing.T) {
	for _, step := range []string{"read", "mount", "write", "read back"} {
		for f, wants := range map[fault]struct {
			class kind.Class
			name  string
		}{
			fails: {kind.Unavailable, "fails"}, applied: {kind.Unavailable, "fails though applied"}, lost: {kind.Unreachable, "reply lost"},
			cut: {kind.Unreachable, "cut"}, hangs: {kind.Unreachable, "hangs"}, late: {kind.Unreachable, "lands late"}, forbidden: {kind.Unavailable, "forbidden"},
		} {
			for _, meanwhile := range []string{"nothing", "foreign write", "deleted", "erased"} {
				t.Run(step+" "+wants.name+", then "+meanwhile, func(t *testing.T) {
					s := newKV(map[string]any{"theirs": "1", "mine": "old"})
					ctx, giveUp := context.WithTimeout(t.Context(), soon)
					defer giveUp()
					var struck atomic.Bool
					s.fault = func(at, _ string) fault {
						if at != step || !struck.CompareAndSwap(false, true) {
							return none
						}
						return f
					}
					// Who waits for an answer gives up once the fault has struck.
					s.silent = giveUp
					r := remoteTo(t, s)
					err := r.Publish(ctx, place, map[string]string{"mine": "new", "mine-previous": "old"})
					require.True(t, struck.Load())
					// net/http itself repeats a read that met a closed connection.
					if err != nil || step == "write" || f != lost && f != cut {
						require.Equal(t, wants.class, classOf(err), "%v", err)
						require.NotContains(t, err.Error(), "new")
					}
					changes := s.version() // those of this Publish, and the first
					require.LessOrEqual(t, changes, 2)
					want := map[string]any{"theirs": "1", "mine": "new", "mine-previous": "old"}
					landed := changes == 2
					switch meanwhile {
					case "foreign write":
						s.foreign(map[string]any{"theirs": "2"})
						want["theirs"] = "2"
						changes++
					case "deleted":
						s.delete()
						delete(want, "theirs")
						landed = false
						changes++
					case "erased":
						s.erase()
						delete(want, "theirs")
						landed = false
						changes = 0
					}
					if meanwhile == "nothing" && f == late && step == "write" {
						s.land()
						landed, changes = true, changes+1
					}
					require.NoError(t, r.publishWithin(t, soon, map[string]string{"mine": "new", "mine-previous": "old"}))
					if !landed {
						changes++
					}
					require.Equal(t, want, s.body())
					require.Equal(t, changes, s.version(), "one version for the change")
					s.land()
					if meanwhile == "erased" && f == late && step == "write" {
						// Versions begin anew, so a late write may bring back what was erased.
						want["theirs"] = "1"
						changes++
					}
					require.Equal(t, want, s.body(), "what comes late names a version that is past")
					require.Equal(t, changes, s.version())
				})
			}
		}
	}
}

// What somebody else does at each step of one Publish that meets no fault.
func TestPublishBesideOthers(t *testing.T) {
	for _, step := range []string{"read", "mount", "write", "read back"} {
		for name, act := range map[string]func(*kv){
			"foreign write":      func(s *kv) { s.foreign(map[string]any{"theirs": "2"}) },
			"foreign new field":  func(s *kv) { s.foreign(map[string]any{"another": map[string]any{"deep": []any{"x"}}}) },
			"our field replaced": func(s *kv) { s.foreign(map[string]any{"mine": "nonsense"}) },
			"deleted":            (*kv).delete,
			"erased":             (*kv).erase,
		} {
			t.Run(name+" before "+step, func(t *testing.T) {
				s := newKV(map[string]any{"theirs": "1", "mine": "old"})
				acted := false
				s.fault = func(at, _ string) fault {
					if at == step && !acted {
						acted = true
						act(s)
					}
					return none
				}
				require.NoError(t, remoteTo(t, s).publishWithin(t, soon, map[string]string{"mine": "new"}))
				require.True(t, acted)
				after := s.body()
				require.Equal(t, "new", after["mine"])
				if name != "deleted" && name != "erased" {
					require.Contains(t, []any{"1", "2"}, after["theirs"])
					require.Equal(t, name == "foreign write", after["theirs"] == "2")
					require.Equal(t, name == "foreign new field", after["another"] != nil)
				}
			})
		}
	}
}

func TestPublishGivesUp(t *testing.T) {
	s := newKV(map[string]any{"mine": "old"})
	n := 0
	s.fault = func(step, _ string) fault {
		if step == "write" {
			n++
			s.foreign(map[string]any{"n": fmt.Sprint(n)})
		}
		return none
	}
	r := remoteTo(t, s)
	err := r.publishWithin(t, 200*time.Millisecond, map[string]string{"mine": "new"})
	require.Contains(t, []kind.Class{kind.Unavailable, kind.Unreachable}, classOf(err), "%v", err)
	require.Greater(t, n, 1)

	// Somebody who owns the same field as we do: it is told, and not fought.
	s = newKV(map[string]any{"mine": "old"})
	s.fault = func(step, _ string) fault {
		if step == "read back" {
			s.foreign(map[string]any{"mine": "theirs"})
		}
		return none
	}
	err = remoteTo(t, s).publishWithin(t, soon, map[string]string{"mine": "new"})
	require.Equal(t, kind.Unavailable, classOf(err))
	require.ErrorContains(t, err, "somebody else writes fields of secret/app/db")
	require.Equal(t, 1+2*maxWrites, s.version())
}

func TestPublishProvesWhatItWrote(t *testing.T) {
	s := newKV(map[string]any{"mine": "old", "theirs": "1"})
	s.fault = func(step, _ string) fault {
		if step == "read back" {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.versions[len(s.versions)-1], "theirs")
		}
		return none
	}
	err := remoteTo(t, s).publishWithin(t, soon, map[string]string{"mine": "new"})
	require.Equal(t, kind.Definite, classOf(err))
	require.ErrorContains(t, err, "does not hold in version 2 what was written")
}

func TestPublishWritesNothingNew(t *testing.T) {
	s := newKV(map[string]any{"mine": "same", "theirs": "1"})
	s.fault = func(step, _ string) fault {
		require.Equal(t, "read", step)
		return none
	}
	require.NoError(t, remoteTo(t, s).publishWithin(t, soon, map[string]string{"mine": "same"}))
	require.Equal(t, 1, s.version())
}

func TestPublishRefuses(t *testing.T) {
	s := newKV(nil)
	r := remoteTo(t, s)
	ctx := t.Context()
	refused := func(err error, says string) {
		t.Helper()
		require.ErrorContains(t, err, says)
		require.Equal(t, kind.Definite, classOf(err))
		require.Zero(t, s.version())
	}
	elsewhere := place
	elsewhere.Path = "elsewhere"
	refused(r.Publish(ctx, elsewhere, map[string]string{"a": "b"}), `connection "other" does not allow publishing to secret/elsewhere`)
	_, err := r.Held(ctx, elsewhere, []string{"a"})
	refused(err, "allowed_publish_paths")
	elsewhere.Path = "../sys"
	refused(r.Publish(ctx, elsewhere, nil), "publish_path")
	refused(r.Publish(ctx, place, map[string]string{"a": "\xff"}), "no text")
	refused(r.Publish(ctx, place, map[string]string{"a": strings.Repeat("x", maxSecret)}), "may have")
	for _, mount := range []map[string]any{
		{"path": "secret/", "type": "kv", "options": map[string]any{"version": "1"}},
		{"path": "secret/", "type": "kv", "options": nil},
		{"path": "secret/", "type": "vault-plugin-secrets-harmonyflow", "options": map[string]any{"version": "2"}},
		{"path": "secret/app/", "type": "kv", "options": map[string]any{"version": "2"}},
	} {
		s.mount = mount
		refused(r.Publish(ctx, place, map[string]string{"a": "b"}), "no mount of KV version 2")
	}
}

func TestCheckPlace(t *testing.T) {
	for _, ok := range []Place{place, {"c", "kv/team", "a"}, {"c", "secret", "data/x"}, {"c", "secret", "a/b/c/d/e/f/g/h"}} {
		require.NoError(t, CheckPlace(ok))
	}
	for _, bad := range []Place{
		{},
		{"", "secret", "a"},
		{"c", "", "a"},
		{"c", "secret/", "a"},
		{"c", "/secret", "a"},
		{"c", "sec ret", "a"},
		{"c", "a..b", "a"},
		{"c", "secret", ""},
		{"c", "secret", "/a"},
		{"c", "secret", "a/"},
		{"c", "secret", "a//b"},
		{"c", "secret", "a/../b"},
		{"c", "secret", "a?version=1"},
		{"c", "secret", "a#b"},
		{"c", "secret", "a%2fb"},
		{"c", "secret", "ü"},
	} {
		require.Error(t, CheckPlace(bad), "%+v", bad)
	}
}

// gate lets one request through at a time, in an order that the test draws.
type gate struct {
	mu      sync.Mutex
	waiting map[string]chan struct{}
	arrived chan string
}

func (g *gate) pass(ctx context.Context, actor string) {
	c := make(chan struct{})
	g.mu.Lock()
	g.waiting[actor] = c
	g.mu.Unlock()
	select {
	case g.arrived <- actor:
	case <-ctx.Done():
	}
	select {
	case <-c:
	case <-ctx.Done():
	}
}

// Two roles publish different fields of one secret, each until it succeeds, while
// somebody else writes a field of his own, in any order of their requests and
// with any replies lost: no field of anyone ever goes back, and each change is one
// version.
func TestPublishersNeverLoseAField(t *testing.T) {
	var s *kv
	var mu sync.Mutex
	r := remoteTo(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		now := s
		mu.Unlock()
		now.ServeHTTP(w, req)
	}), "a", "b")
	rapid.Check(t, func(rt *rapid.T) {
		now := newKV(map[string]any{"a": "0", "b": "0", "theirs": json.Number("0")})
		g := &gate{waiting: map[string]chan struct{}{}, arrived: make(chan string, 8)}
		verdicts := map[string]fault{}
		// A check may end anywhere, by a draw that fails.
		var publishers sync.WaitGroup
		ctx, end := context.WithCancel(context.Background())
		defer publishers.Wait()
		defer end()
		now.fault = func(_, actor string) fault {
			g.pass(ctx, actor)
			mu.Lock()
			defer mu.Unlock()
			return verdicts[actor]
		}
		mu.Lock()
		s = now
		mu.Unlock()
		done := make(chan string, 2)
		for _, actor := range []string{"a", "b"} {
			publishers.Go(func() {
				at := place
				at.Connection = actor
				for r.Publish(ctx, at, map[string]string{actor: "1"}) != nil {
					if ctx.Err() != nil {
						return
					}
				}
				done <- actor
				g.arrived <- actor
			})
		}
		running, foreigners, faults := 2, rapid.IntRange(0, 5).Draw(rt, "foreign writes"), 6
		wrote := 0
		for running > 0 {
			// Everybody is at the gate, or done.
			g.mu.Lock()
			waiting := len(g.waiting)
			g.mu.Unlock()
			for waiting < running {
				<-g.arrived
				select {
				case <-done:
					running--
				default:
				}
				g.mu.Lock()
				waiting = len(g.waiting)
				g.mu.Unlock()
			}
			if running == 0 {
				break
			}
			if foreigners > 0 && rapid.Bool().Draw(rt, "foreign") {
				foreigners--
				wrote++
				now.foreign(map[string]any{"theirs": json.Number(fmt.Sprint(wrote))})
			}
			g.mu.Lock()
			var actors []string
			for _, actor := range []string{"a", "b"} {
				if g.waiting[actor] != nil {
					actors = append(actors, actor)
				}
			}
			actor := rapid.SampledFrom(actors).Draw(rt, "next")
			c := g.waiting[actor]
			delete(g.waiting, actor)
			g.mu.Unlock()
			verdict := none
			if faults > 0 {
				if verdict = rapid.SampledFrom([]fault{none, none, none, none, fails, applied, lost, cut}).Draw(rt, "fault"); verdict != none {
					faults--
				}
			}
			mu.Lock()
			verdicts[actor] = verdict
			mu.Unlock()
			close(c)
			// Its answer is on its way before anybody else's request passes: wait for its
			// next request, or its end.
			<-g.arrived
			select {
			case <-done:
				running--
			default:
			}
		}
		now.mu.Lock()
		defer now.mu.Unlock()
		number := func(v any) int {
			var n int
			_, err := fmt.Sscan(fmt.Sprint(v), &n)
			require.NoError(rt, err)
			return n
		}
		before := map[string]int{}
		for _, body := range now.versions {
			require.Len(rt, body, 3)
			for _, field := range []string{"a", "b", "theirs"} {
				n := number(body[field])
				require.GreaterOrEqual(rt, n, before[field], "%s goes back", field)
				before[field] = n
			}
		}
		require.Equal(rt, map[string]int{"a": 1, "b": 1, "theirs": wrote}, before)
		require.Len(rt, now.versions, 3+wrote)
	})
}
