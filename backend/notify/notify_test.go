package notify

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/sdk/logical"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// rotations are what is stored of rotations.
type rotations struct {
	mu      sync.Mutex
	headers map[string]*rotation.Header
	reads   int
}

func (r *rotations) Header(_ context.Context, id string) (*rotation.Header, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.headers[id]; h != nil {
		copied := *h
		copied.Roles = slices.Clone(h.Roles)
		return &copied, nil
	}
	return nil, nil
}

func (r *rotations) AllParts(_ context.Context, h *rotation.Header) ([]rotation.Part, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reads++
	return slices.Clone(r.headers[h.ID].Roles), nil
}

func (r *rotations) Headers(context.Context) ([]string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for id := range r.headers {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// put stores a rotation of roles that are all in one state.
func (r *rotations) put(id string, state, ended rotation.State, roles ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &rotation.Header{ID: id, Trigger: rotation.Manual, Started: time.Now(), State: ended}
	if before := r.headers[id]; before != nil {
		h.Started = before.Started
	}
	for _, name := range roles {
		p := rotation.Part{Role: name, Kind: "redis", Version: 2, State: state}
		if state == rotation.Failed {
			p.Error = "why it failed"
		}
		h.Roles = append(h.Roles, p)
	}
	r.headers[id] = h
}

// newID is like those of rotations, with the time of the bubble.
func newID() string {
	id := uuid.Must(uuid.NewRandom())
	ms := time.Now().UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (8 * (5 - i)))
	}
	id[6] = 0x70 | id[6]&0x0f
	return id.String()
}

// world is a notifier with everything around it.
type world struct {
	t         *testing.T
	s         logical.Storage
	rotations *rotations
	n         *Notifier
	mu        sync.Mutex
	standings map[string]rotation.Standing
	got       map[string][]Event // by receiver
	down      map[string]bool
	found     []Event
}

// receive stands in for HTTP, which does not go with a clock of one's own; see
// TestSend for that.
func (w *world) receive(_ context.Context, to *Notification, e Event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down[to.Name] {
		return errors.New("nobody answers")
	}
	w.got[to.Name] = append(w.got[to.Name], e)
	return nil
}

func newTestWorld(t *testing.T, s logical.Storage) *world {
	t.Helper()
	w := &world{t: t, s: s, rotations: &rotations{headers: map[string]*rotation.Header{}}, standings: map[string]rotation.Standing{}, got: map[string][]Event{}, down: map[string]bool{}}
	w.start()
	return w
}

func (w *world) start() {
	w.n = New(Options{
		Storage: storage.Fence(w.s), Rotations: w.rotations, MayCall: func(string) bool { return true }, Active: func() bool { return true },
		Standings: func(_ context.Context, f func(string, rotation.Standing)) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			for name, s := range w.standings {
				f(name, s)
			}
			return nil
		},
		Found: func(e Event) { w.mu.Lock(); w.found = append(w.found, e); w.mu.Unlock() },
		Sent:  func(string, error) {},
	})
	w.n.send = w.receive
	w.n.Start()
}

func (w *world) stop() { require.NoError(w.t, w.n.Stop(context.Background())) }

func (w *world) restart() { w.stop(); w.start() }

func (w *world) notification(name string, events ...Kind) {
	n := &Notification{Name: name, URL: "https://hooks.example.com/x", Format: JSON, Events: events, Mount: "harmonyflow/", Created: time.Now()}
	require.NoError(w.t, w.n.store.Put(context.Background(), n))
	w.n.Changed()
	w.pass(time.Second)
}

// pass lets time pass, by the clock of the bubble.
func (w *world) pass(d time.Duration) { <-time.After(d) }

// move stores where a rotation stands, and says so.
func (w *world) move(id string, state, ended rotation.State, roles ...string) {
	w.rotations.put(id, state, ended, roles...)
	w.n.Moved(id)
	w.pass(3 * time.Second)
}

func (w *world) events(to string) []Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got[to])
}

func (w *world) kinds(to string) (out []Kind) {
	for _, e := range w.events(to) {
		out = append(out, e.Kind)
	}
	return out
}

func bubble(t *testing.T, f func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newTestWorld(t, &logical.InmemStorage{})
		defer w.stop()
		f(t, w)
	})
}

// What a rotation comes to is told once, to those who want it, also where the plugin
// starts anew after every step.
func TestEventsOfRotations(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		bubble(t, func(t *testing.T, w *world) {
			t.Helper()
			w.notification("all")
			w.notification("bad", Failing, RolledBack)
			steps := []struct{ state, ended rotation.State }{
				{rotation.Running, ""}, {rotation.InGrace, ""}, {rotation.InGrace, ""}, {rotation.Completed, rotation.Completed},
			}
			good, poor := newID(), newID()
			for _, s := range steps {
				w.move(good, s.state, s.ended, "app", "web")
				if restarts {
					w.restart()
				}
			}
			for _, s := range []struct{ state, ended rotation.State }{{rotation.Running, ""}, {rotation.RollingBack, ""}, {rotation.RolledBack, rotation.RolledBack}} {
				w.move(poor, s.state, s.ended, "app")
				if restarts {
					w.restart()
				}
			}
			w.pass(24 * time.Hour)
			w.restart()
			w.pass(24 * time.Hour)
			require.Equal(t, []Kind{Started, Promoted, Completed, Started, Failing, RolledBack}, w.kinds("all"))
			require.Equal(t, []Kind{Failing, RolledBack}, w.kinds("bad"))
			require.Equal(t, "redis/app, redis/web: rotation completed", w.events("all")[2].Summary)
			left, err := w.n.out.letters(context.Background())
			require.NoError(t, err)
			require.Empty(t, left, "what is told is forgotten after a while")
		})
	}
}

// A rotation that moves while nobody looks is found when somebody looks again.
func TestFoundAfterACrash(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		w.notification("all")
		w.pass(time.Hour)
		open, done := newID(), newID()
		w.rotations.put(open, rotation.InGrace, "", "app")
		w.rotations.put(done, rotation.Completed, rotation.Completed, "web")
		w.stop()
		w.start()
		w.pass(5 * time.Second)
		require.ElementsMatch(t, []Kind{Started, Promoted, Started, Promoted, Completed}, w.kinds("all"))
	})
}

// What was before a notification is not told it.
func TestNothingFromBefore(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		before := newID()
		w.move(before, rotation.InGrace, "", "app")
		w.notification("all")
		w.move(before, rotation.Completed, rotation.Completed, "app")
		require.Empty(t, w.kinds("all"))
		w.move(newID(), rotation.Running, "", "app")
		w.notification("second")
		require.Equal(t, []Kind{Started}, w.kinds("all"))
		require.Empty(t, w.kinds("second"))
	})
}

// A receiver that is down for an hour holds up nobody, and gets every event once it is
// back, in order.
func TestDownForAnHour(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		w.notification("down")
		w.notification("up")
		w.mu.Lock()
		w.down["down"] = true
		w.mu.Unlock()
		var want []Kind
		for range 60 {
			id := newID()
			began := time.Now()
			w.move(id, rotation.Running, "", "app")
			w.move(id, rotation.Completed, rotation.Completed, "app")
			require.Len(t, w.kinds("up"), len(want)+3)
			want = append(want, Started, Promoted, Completed)
			w.pass(time.Minute - time.Since(began))
		}
		require.Empty(t, w.kinds("down"))
		require.Equal(t, len(want), w.n.Health("down").Pending)
		require.Contains(t, w.n.Health("down").LastError, "nobody answers")
		w.restart()
		w.mu.Lock()
		w.down["down"] = false
		w.mu.Unlock()
		w.pass(maxPause + time.Second)
		require.ElementsMatch(t, want, w.kinds("down"))
		require.True(t, slices.IsSortedFunc(w.events("down"), func(a, b Event) int { return a.At.Compare(b.At) }))
		report.Figure(t, "PROOF_FILE", "webhooks: a receiver down for an hour had all %d events, in order, when it was back; the other had each within 3 s", len(want))
	})
}

// Events that nobody takes for days are given up.
func TestGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		w.notification("down")
		w.mu.Lock()
		w.down["down"] = true
		w.mu.Unlock()
		w.move(newID(), rotation.Completed, rotation.Completed, "app")
		w.pass(keepFor - time.Hour)
		require.Equal(t, 3, w.n.Health("down").Pending)
		w.pass(2 * time.Hour)
		require.Zero(t, w.n.Health("down").Pending)
		left, err := w.n.out.letters(context.Background())
		require.NoError(t, err)
		require.Empty(t, left)
	})
}

// Roles that are overdue or have drifted are told once, and again when it happens
// again.
func TestEventsOfRoles(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		w.notification("all")
		set := func(drifted ...string) {
			w.mu.Lock()
			w.standings = map[string]rotation.Standing{}
			for _, name := range drifted {
				w.standings[name] = rotation.Standing{Kind: "redis", Drifted: true}
			}
			w.mu.Unlock()
			w.pass(3 * time.Minute)
		}
		set("a", "b")
		w.restart()
		set("a", "b", "c")
		set("a")
		set("a", "b")
		require.Equal(t, []Kind{Drift, Drift, Drift}, w.kinds("all"))
		require.Equal(t, "redis/a, redis/b: the target differs from what is stored", w.events("all")[0].Summary)
		require.Equal(t, "redis/c: the target differs from what is stored", w.events("all")[1].Summary)
		require.Equal(t, "redis/b: the target differs from what is stored", w.events("all")[2].Summary)
	})
}

// A rotation of many roles is not read at each of their steps.
func TestLargeRotationsAreReadSeldom(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		t.Helper()
		w.notification("all")
		var names []string
		for i := range 500 {
			names = append(names, fmt.Sprint("r", i))
		}
		id := newID()
		w.rotations.put(id, rotation.Running, "", names...)
		for range 1000 {
			w.n.Moved(id)
			w.pass(100 * time.Millisecond)
		}
		w.rotations.put(id, rotation.Completed, rotation.Completed, names...)
		w.n.Moved(id)
		w.pass(time.Minute)
		require.Equal(t, []Kind{Started, Promoted, Completed}, w.kinds("all"))
		require.Less(t, w.rotations.reads, 8)
		e := w.events("all")[2]
		require.Equal(t, 500, e.Total)
		require.Len(t, e.Roles, maxNamed)
		require.Contains(t, e.Summary, "and 480 more")
	})
}

// A storage that fails at step k, or does what it is told and says that it did not:
// every event is told, and with one id.
func TestStorageFails(t *testing.T) {
	for _, applied := range []bool{false, true} {
		for k := 1; k < 40; k++ {
			synctest.Test(t, func(t *testing.T) {
				s := &failing{Storage: &logical.InmemStorage{}, applied: applied}
				w := newTestWorld(t, s)
				defer w.stop()
				w.notification("all")
				s.set(k)
				id := newID()
				w.move(id, rotation.Running, "", "app")
				w.move(id, rotation.Completed, rotation.Completed, "app")
				w.pass(2 * time.Minute)
				ids := map[Kind]map[string]bool{}
				for _, e := range w.events("all") {
					if ids[e.Kind] == nil {
						ids[e.Kind] = map[string]bool{}
					}
					ids[e.Kind][e.ID] = true
				}
				for _, kind := range []Kind{Started, Promoted, Completed} {
					require.Len(t, ids[kind], 1, "step %d: %s", k, kind)
				}
			})
		}
	}
}

// failing fails at its k-th operation, once.
type failing struct {
	logical.Storage
	mu      sync.Mutex
	k       int
	applied bool
}

func (s *failing) set(k int) { s.mu.Lock(); s.k = k; s.mu.Unlock() }

func (s *failing) strike() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.k--
	return s.k == 0
}

func (s *failing) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if s.strike() {
		return nil, errors.New("injected")
	}
	return s.Storage.Get(ctx, key)
}

func (s *failing) List(ctx context.Context, prefix string) ([]string, error) {
	if s.strike() {
		return nil, errors.New("injected")
	}
	return s.Storage.List(ctx, prefix)
}

func (s *failing) Put(ctx context.Context, e *logical.StorageEntry) error {
	if s.strike() {
		if s.applied {
			_ = s.Storage.Put(ctx, e)
		}
		return errors.New("injected")
	}
	return s.Storage.Put(ctx, e)
}

func (s *failing) Delete(ctx context.Context, key string) error {
	if s.strike() {
		if s.applied {
			_ = s.Storage.Delete(ctx, key)
		}
		return errors.New("injected")
	}
	return s.Storage.Delete(ctx, key)
}

var testKey = keyPrefix + base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))

// What is sent over HTTP, its signature verified by the library of those who made the
// standard.
func TestSend(t *testing.T) {
	var mu sync.Mutex
	var header http.Header
	var body []byte
	status := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		header = r.Header.Clone()
		body, _ = io.ReadAll(r.Body)
		if status == http.StatusFound {
			w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
		}
		w.WriteHeader(status)
	}))
	defer server.Close()
	n := &Notification{Name: "ops", URL: server.URL + "/hook?token=in-the-url", Format: JSON, Secret: testKey, Header: map[string]string{"X-Team": "platform"}, Mount: "harmonyflow/"}
	may := func(string) bool { return true }
	require.NoError(t, n.Check(may))
	h := &rotation.Header{ID: "0192-x", Trigger: rotation.Manual, Started: time.Now(), State: rotation.Completed, Reason: "because <b>"}
	events := eventsOf(h, []rotation.Part{{Role: "app", Kind: "redis", Version: 7, State: rotation.Completed}})
	e := events[slices.IndexFunc(events, func(e Event) bool { return e.Kind == Completed })]
	require.NoError(t, n.send(t.Context(), e, may))
	wh, err := standardwebhooks.NewWebhook(testKey)
	require.NoError(t, err)
	require.NoError(t, wh.Verify(body, header))
	require.Equal(t, "platform", header.Get("X-Team"))
	require.Equal(t, e.ID, header.Get("webhook-id"))
	var m map[string]any
	require.NoError(t, json.Unmarshal(body, &m))
	require.Equal(t, "rotation.completed", m["type"])
	require.Equal(t, "vault read harmonyflow/rotations/0192-x", m["data"].(map[string]any)["follow"])

	body = append(body, ' ')
	require.Error(t, wh.Verify(body, header), "what was changed on the way is noticed")

	n.Format = Slack
	require.NoError(t, n.send(t.Context(), e, may))
	var text map[string]string
	require.NoError(t, json.Unmarshal(body, &text))
	require.Contains(t, text["text"], "*completed* redis/app: rotation completed")
	require.Contains(t, text["text"], "because &lt;b&gt;")

	for _, status = range []int{http.StatusInternalServerError, http.StatusFound, http.StatusGone} {
		err := n.send(t.Context(), e, may)
		require.ErrorContains(t, err, fmt.Sprint(status))
		require.NotContains(t, err.Error(), "in-the-url")
	}
	require.ErrorContains(t, n.send(t.Context(), e, func(string) bool { return false }), "allowed_hosts")
	server.Close()
	err = n.send(t.Context(), e, may)
	require.Error(t, err)
	require.NotContains(t, err.Error(), "in-the-url")
}

// A receiver that repeats what it was sent, where others say what they think of it, is
// not repeated in errors, which people read.
func TestReceiverThatEchoes(t *testing.T) {
	for _, answer := range []string{"HTTP/1.1 500 %s\r\nContent-Length: 0\r\n\r\n", "%s\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer func() { _ = conn.Close() }()
			_, _ = fmt.Fprintf(conn, answer, r.Header.Get("X-Key"))
		}))
		n := &Notification{URL: server.URL + "/x", Format: Slack, Header: map[string]string{"X-Key": "in-the-header"}}
		err := n.send(t.Context(), Event{ID: "x"}, func(string) bool { return true })
		require.Error(t, err)
		require.NotContains(t, err.Error(), "in-the-header")
		server.Close()
	}
}

func TestCheck(t *testing.T) {
	may := func(host string) bool { return host != "other.example.com" }
	for says, change := range map[string]func(*Notification){
		"":                        func(*Notification) {},
		"has to begin with https": func(n *Notification) { n.URL = "http://hooks.example.com/" },
		"url is none":             func(n *Notification) { n.URL = "https:hooks" },
		"must not hold a password": func(n *Notification) {
			n.URL = "https://a:b@hooks.example.com/"
		},
		"allowed_hosts":            func(n *Notification) { n.URL = "https://other.example.com/" },
		"it is json or slack":      func(n *Notification) { n.Format = "xml" },
		"is not known":             func(n *Notification) { n.Events = []Kind{"nothing"} },
		"whsec_":                   func(n *Notification) { n.Secret = "password" },
		"is set by the engine":     func(n *Notification) { n.Header = map[string]string{"webhook-signature": "x"} },
		"that HTTP does not know":  func(n *Notification) { n.Header = map[string]string{"X": "a\r\nY: b"} },
		"at most 16":               func(n *Notification) { n.Header = manyHeaders() },
		"24 to 64 bytes in base64": func(n *Notification) { n.Secret = keyPrefix + "c2hvcnQ=" },
	} {
		n := &Notification{URL: "https://hooks.example.com/x", Format: JSON, Secret: testKey}
		change(n)
		if err := n.Check(may); says == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, says)
		}
	}
	// A name that leads to an address of the cloud's own.
	n := &Notification{URL: "https://[fe80::1%25lo]:1/", Format: Slack}
	require.ErrorContains(t, n.send(t.Context(), Event{ID: "x"}, func(string) bool { return true }), "nothing is sent to")
	n.URL = "https://169.254.169.254/"
	require.ErrorContains(t, n.send(t.Context(), Event{ID: "x"}, func(string) bool { return true }), "nothing is sent to")
}

func manyHeaders() map[string]string {
	out := map[string]string{}
	for i := range 17 {
		out[fmt.Sprint("X-", i)] = strings.Repeat("x", i)
	}
	return out
}
