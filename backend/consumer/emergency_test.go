package consumer

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// TestNoTwoRestartInTurn: of two deliveries that meet at a workload, one at most begins
// anew while the other's rollout is under way.
func TestNoTwoRestartInTurn(t *testing.T) {
	t.Parallel()
	ids := []string{"a-0", "a-1", "a-2", "b-1", "j~1", "j~2", "c-e1001", "c-e1002", "c-e2001", "d-e1001"}
	sameWays := func(a, b string) bool { return rotationOf(a) == rotationOf(b) && !strings.Contains(a+b, "-e") }
	for _, mine := range ids {
		for _, theirs := range ids {
			if mine == theirs || sameWays(mine, theirs) { // one is over when the other begins
				continue
			}
			require.True(t, awaits(mine, theirs) || awaits(theirs, mine), "%s and %s restart in turn", mine, theirs)
		}
	}
	require.False(t, awaits("c-e1001", "a-1"), "an emergency does not wait for what has time")
	require.True(t, awaits("a-1", "c-e1001"))
	require.False(t, awaits("c-e2001", "c-e1001"), "what comes late has other values to bring")
	require.True(t, awaits("c-e1001", "c-e2001"))
	require.False(t, awaits("a-2", "a-1"), "a way back does not wait for what it takes back")
}

// api is a server that takes one token, and what was sent to it.
type api struct {
	*httptest.Server
	mu    sync.Mutex
	token string
	down  bool
	calls []http.Header
}

func newAPI(t *testing.T, token string) *api {
	t.Helper()
	a := &api{token: token}
	a.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		switch {
		case a.down:
			rw.WriteHeader(http.StatusServiceUnavailable)
		case r.Method != http.MethodPost || r.URL.Path != "/v1/admin/sessions/revoke-all" || r.Header.Get("Authorization") != "Bearer "+a.token:
			rw.WriteHeader(http.StatusUnauthorized)
		default:
			a.calls = append(a.calls, r.Header.Clone())
		}
	}))
	t.Cleanup(a.Close)
	return a
}

func (a *api) set(down bool) { a.mu.Lock(); defer a.mu.Unlock(); a.down = down }

func (a *api) called() []http.Header { a.mu.Lock(); defer a.mu.Unlock(); return a.calls }

// testEmergency: whatever is bad stops nothing else.
func testEmergency(t *testing.T, w *world) {
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"password": "second"}))
	for _, name := range []string{"good", "paused", "crashing", "unnamed", "last"} {
		w.deploy(t, deployment, name, 1, nil)
	}
	w.deploy(t, statefulSet, "store", 1, nil)
	for _, name := range []string{"good", "paused", "crashing", "unnamed", "last"} {
		w.rolledOut(t, deployment, name)
	}
	w.rolledOut(t, statefulSet, "store")
	w.deploy(t, deployment, "paused", 1, nil, "paused: true")
	w.deploy(t, deployment, "crashing", 1, map[string]string{kube.CrashLoop: "true"})
	api := newAPI(t, "new-token")
	api.set(true)
	host := strings.TrimPrefix(api.URL, "http://")
	w.k.Sources = func(context.Context, string) (*Source, error) {
		return &Source{Role: "admin-token", Consumers: []string{"app"}, Hosts: []string{host}, Fields: map[string]string{"value": "new-token"}}, nil
	}
	clock := time.Now
	w.k.Now = func() time.Time { return clock() }
	c := w.consumer(func(c *Consumer) {
		c.ExternalSecrets, c.Secrets, c.MaxParallel = nil, []string{"plain"}, 1
		c.Workloads = [][]Workload{
			{{Kind: deployment, Name: "crashing"}, {Kind: deployment, Name: "gone"}}, {{Kind: deployment, Name: "paused"}}, {{Kind: deployment, Name: "good"}}, {{Kind: deployment, Name: "last"}},
		}
		c.Hooks = []Hook{{Name: "revoke", URL: api.URL + "/v1/admin/sessions/revoke-all", Headers: map[string]string{"Authorization": "Bearer {{admin-token.value}}"}}}
	})
	require.NoError(t, c.Validate())

	e := Emergency{Whole: true}
	f := w.k.Radius(w.ctx, c, e)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	plan, notes := strings.Join(f.Plan, "\n"), strings.Join(f.Notes, "\n")
	for _, says := range []string{"restart at once Deployment " + w.ns + "/crashing", "(6 workloads)", "call hook revoke: POST 127.0.0.1", "annotation security-alert"} {
		require.Contains(t, plan, says)
	}
	require.Contains(t, notes, "is paused")
	require.Contains(t, notes, "has no deployments gone")

	d := delivery("r1-e1001", "second")
	d.Emergency = &e
	w.until(t, w.k.Sync, c, d)
	var last Progress
	require.Eventually(t, func() bool {
		last = w.k.Restart(w.ctx, c, d)
		require.NoError(t, last.Err)
		require.False(t, last.Done)
		for _, name := range []string{"good", "unnamed", "last", "crashing"} {
			o, err := w.Apps.Deployments(w.ns).Get(w.ctx, name, metav1.GetOptions{})
			require.NoError(t, err)
			if o.Spec.Template.Annotations[Mark] != d.ID {
				return false
			}
		}
		return strings.Contains(last.Waits, "3 workloads are not well")
	}, time.Minute, 100*time.Millisecond, "%+v", last)
	o, err := w.Apps.StatefulSets(w.ns).Get(w.ctx, "store", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, d.ID, o.Spec.Template.Annotations[Mark])

	// Hooks are called though not all is well, and again until they succeed.
	require.Eventually(t, func() bool {
		last = w.k.Check(w.ctx, c, d)
		return strings.Contains(last.Waits, "it is called when all pods are well")
	}, time.Minute, 100*time.Millisecond, "%+v", last)
	require.Empty(t, api.called())
	clock = func() time.Time { return time.Now().Add(2 * time.Minute) }
	last = w.k.Check(w.ctx, c, d)
	require.Contains(t, last.Waits, "answered with 503")
	require.NotContains(t, last.Waits, "new-token")
	api.set(false)
	last = w.k.Check(w.ctx, c, d)
	require.Contains(t, last.Waits, "it is called again", "not at once")
	clock = func() time.Time { return time.Now().Add(4 * time.Minute) }
	require.Eventually(t, func() bool {
		last = w.k.Check(w.ctx, c, d)
		return last.Err != nil
	}, time.Minute, 100*time.Millisecond, "%+v", last)
	require.ErrorContains(t, last.Err, "3 workloads are not well", "and nothing else")
	for range 3 {
		w.k.Check(w.ctx, c, d)
	}
	require.Len(t, api.called(), 1, "once")
	require.Equal(t, "r1-e1001/revoke", api.called()[0].Get("Idempotency-Key"))
	require.Len(t, last.Seen.Hooks, 1)
	require.True(t, last.Seen.Hooks[0].OK)
	require.Equal(t, 2, last.Seen.Hooks[0].Called)
	pods, err := w.Core.Pods(w.ns).List(w.ctx, metav1.ListOptions{})
	require.NoError(t, err)
	for _, p := range living(pods.Items) {
		require.Equal(t, "r1", p.Annotations[SecurityAlert], p.Name)
	}
}

// testUrgentPairs: an ordinary rotation and two emergencies meet at one workload, and
// all of them come to their end.
func testUrgentPairs(t *testing.T, w *world) {
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"password": "second"}))
	w.deploy(t, deployment, "web", 2, map[string]string{kube.ReadyAfter: "1s"})
	w.rolledOut(t, deployment, "web")
	c := w.consumer(func(c *Consumer) { c.ExternalSecrets, c.Secrets = nil, []string{"plain"} })
	deliveries := []Delivery{delivery("r1-1", "second"), delivery("r2-e1001", "second"), delivery("r3-e1001", "second"), delivery("r3-e2001", "second")}
	for i := range deliveries[1:] {
		deliveries[i+1].Emergency = &Emergency{}
	}
	w.until(t, w.k.Sync, c, deliveries[0])
	require.False(t, w.k.Restart(w.ctx, c, deliveries[0]).Done)
	over := map[string]bool{}
	require.Eventually(t, func() bool {
		for _, d := range deliveries {
			if !over[d.ID] {
				p := w.k.Restart(w.ctx, c, d)
				require.NoError(t, p.Err)
				over[d.ID] = p.Done
			}
		}
		return over["r1-1"] && over["r2-e1001"] && over["r3-e1001"] && over["r3-e2001"]
	}, 50*time.Second, 100*time.Millisecond, "%v", over)
	o, err := w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	require.LessOrEqual(t, o.Generation, int64(1+len(deliveries)), "nobody restarts in turn")
}
