package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// TestCluster is what the driver does to a real API server, with its controllers
// and External Secrets. Its parts share a cluster, each in a namespace of its own.
func TestCluster(t *testing.T) {
	cluster := kube.ForTest(t)
	if os.Getenv(kube.ESOProgram) == "" {
		t.Skip(kube.ESOProgram + " is not set; make e2e builds External Secrets and sets it")
	}
	require.NoError(t, cluster.StartESO(t.Context()))
	ok := t.Run("together", func(t *testing.T) {
		for name, test := range map[string]func(*testing.T, *world){
			"delivery":      testDelivery,
			"waves":         testWaves,
			"crash":         testCrash,
			"same-second":   testSameSecond,
			"stale-read":    testStaleRead,
			"template":      testTemplate,
			"silent":        testSilent,
			"parent":        testParent,
			"mark-taken":    testMarkTaken,
			"observe":       testObserve,
			"shared":        testShared,
			"workload-lint": testWorkloadLint,
			"checks":        testChecks,
			"rights":        testRights,
			"policy":        testPolicy,
			"operator":      testOperator,
			"verify":        testVerify,
			"emergency":     testEmergency,
			"urgent-pairs":  testUrgentPairs,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, newWorld(t, cluster, name))
			})
		}
	})
	if ok {
		t.Run("outage", func(t *testing.T) { testClusterOutage(t, newWorld(t, cluster, "outage")) })
	}
}

// world is a namespace, a Vault that is no more than its answers, and the driver.
type world struct {
	*kube.Cluster
	ns    string
	ctx   context.Context
	k     *clusters
	token string

	mu     sync.Mutex
	served map[string]string
	stale  map[string]string // what is answered as long as it is there
}

func newWorld(t *testing.T, cluster *kube.Cluster, ns string) *world {
	t.Helper()
	w := &world{Cluster: cluster, ns: ns, ctx: t.Context(), token: cluster.Token, served: map[string]string{"user": "app", "pass": "first-value"}}
	require.NoError(t, cluster.Namespace(w.ctx, ns))
	w.k = newClusters(Options{Entry: w.entry, MayCall: func(host string) bool { return host == "127.0.0.1" }})
	w.k.settle = 0
	return w
}

func (w *world) entry(_ context.Context, name string) (*connection.Entry, error) {
	return &connection.Entry{
		Name: name, Type: connection.TypeKubernetes, Kubernetes: &connection.Kubernetes{Host: w.Host, FieldManager: "harmonyflow"},
		TLS: connection.TLS{CA: w.CA}, Admin: connection.NewAdmin(kind.Material{Secret: w.token}),
	}, nil
}

func (w *world) serve(values map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.Copy(w.served, values)
}

// store makes a SecretStore of a Vault that serves what the world says.
func (w *world) store(t *testing.T) {
	t.Helper()
	vault := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		body := maps.Clone(w.served)
		if w.stale != nil {
			body = w.stale
		}
		data := map[string]any{"data": map[string]any{"data": body, "metadata": map[string]any{"version": 1}}}
		if strings.HasSuffix(r.URL.Path, "/lookup-self") {
			data = map[string]any{"data": map[string]any{"type": "service", "ttl": 3600, "expire_time": time.Now().Add(time.Hour).Format(time.RFC3339)}}
		}
		_ = json.NewEncoder(rw).Encode(data)
	}))
	t.Cleanup(vault.Close)
	require.NoError(t, w.ApplyVaultStore(w.ctx, kube.VaultStore{Namespace: w.ns, Name: "vault", Address: vault.URL, Mount: "secret", Token: "root"}))
}

func (w *world) external(t *testing.T, e kube.ExternalSecret) {
	t.Helper()
	e.Namespace, e.Store, e.Document = w.ns, "vault", "app"
	if e.Fields == nil {
		e.Fields = map[string]string{"username": "user", "password": "pass"}
	}
	require.NoError(t, w.ApplyExternalSecret(w.ctx, e))
	require.NoError(t, w.WaitExternalSecret(w.ctx, w.ns, e.Name))
}

func (w *world) deploy(t *testing.T, of, name string, replicas int, annotations map[string]string, spec ...string) {
	t.Helper()
	text, err := json.Marshal(annotations)
	require.NoError(t, err)
	extra := fmt.Sprintf("replicas: %d", replicas)
	if of == statefulSet {
		extra += "\n  serviceName: " + name
	}
	if of == daemonSet {
		extra = ""
	}
	require.NoError(t, w.Apply(w.ctx, fmt.Sprintf(`
apiVersion: apps/v1
kind: %s
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  %s
  %s
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s}, annotations: %s}
    spec: {containers: [{name: main, image: example.com/web:1, ports: [{containerPort: 8080}]}]}
`, of, name, w.ns, name, extra, strings.Join(spec, "\n  "), name, name, text)))
}

func (w *world) rolledOut(t *testing.T, of, name string) {
	t.Helper()
	require.NoError(t, w.WaitRollout(w.ctx, strings.ToLower(of), w.ns, name))
}

func (w *world) consumer(change func(*Consumer)) *Consumer {
	c := &Consumer{
		Name: "app", Connection: "prod", Namespace: w.ns, ExternalSecrets: []string{"db-creds"}, Mode: Restart,
		Workloads: [][]Workload{{{Kind: deployment, Name: "web"}}}, Stabilization: time.Second,
	}
	if change != nil {
		change(c)
	}
	c.Normalize()
	return c
}

// deliver is what the engine does: each step until it is done.
func (w *world) until(t *testing.T, step func(context.Context, *Consumer, Delivery) Progress, c *Consumer, d Delivery) (told []string) {
	t.Helper()
	var last Progress
	require.Eventually(t, func() bool {
		last = step(w.ctx, c, d)
		told = append(told, last.Told...)
		require.False(t, kind.IsDefinite(last.Err), "%v", last.Err)
		return last.Done
	}, time.Minute, 100*time.Millisecond, "it waits: %s, %v", last.Waits, last.Err)
	return told
}

// fails is until a step has failed for good.
func (w *world) fails(t *testing.T, step func(context.Context, *Consumer, Delivery) Progress, c *Consumer, d Delivery) error {
	t.Helper()
	var last Progress
	require.Eventually(t, func() bool {
		last = step(w.ctx, c, d)
		require.False(t, last.Done, "%v", last.Told)
		return kind.IsDefinite(last.Err)
	}, time.Minute, 100*time.Millisecond, "it waits: %s, %v", last.Waits, last.Err)
	return last.Err
}

func delivery(id, holds string, lacks ...string) Delivery {
	d := Delivery{ID: id, Since: time.Now(), Holds: []Value{{Role: "db", Secret: holds}}}
	for _, l := range lacks {
		d.Lacks = append(d.Lacks, Value{Role: "db", Secret: l})
	}
	return d
}

func testDelivery(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	w.deploy(t, deployment, "web", 2, nil)
	w.rolledOut(t, deployment, "web")
	c := w.consumer(nil)
	require.NoError(t, c.Validate())
	f := w.k.Preflight(w.ctx, c)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	require.Equal(t, []string{
		"sync ExternalSecret db-creds into Secret db-creds", "compare what is served with Secrets db-creds",
		"wave 1 of 1: restart Deployment delivery/web", "prove that every pod is new, and well for 1s",
	}, f.Plan)

	w.serve(map[string]string{"pass": "second-value"})
	d := delivery("r1", "second-value", "first-value")
	told := w.until(t, w.k.Sync, c, d)
	require.Contains(t, told, "ExternalSecret db-creds: forced to sync")
	require.Contains(t, told, "Secrets db-creds hold what is served of db")
	require.Equal(t, 1, strings.Count(strings.Join(told, "\n"), "forced"))
	data, err := w.Secret(w.ctx, w.ns, "db-creds")
	require.NoError(t, err)
	require.Equal(t, "second-value", data["password"])
	w.until(t, w.k.Restart, c, d)
	w.until(t, w.k.Check, c, d)
	pods, err := w.PodsOf(w.ctx, w.ns, "web")
	require.NoError(t, err)
	require.Len(t, pods, 2)
	before, err := w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)

	// Once done, each step is so whoever asks, and changes nothing.
	for _, step := range []func(context.Context, *Consumer, Delivery) Progress{w.k.Sync, w.k.Restart, w.k.Check} {
		require.True(t, step(w.ctx, c, d).Done)
	}
	after, err := w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, before.Generation, after.Generation)
	require.Equal(t, "r1", after.Spec.Template.Annotations[Mark])
	require.True(t, slices.ContainsFunc(after.ManagedFields, func(f metav1.ManagedFieldsEntry) bool { return f.Manager == "harmonyflow" }))

	// The way back is another delivery.
	w.serve(map[string]string{"pass": "first-value"})
	back := delivery("r1-back", "first-value", "second-value")
	w.until(t, w.k.Sync, c, back)
	w.until(t, w.k.Restart, c, back)
	w.until(t, w.k.Check, c, back)
}

func testWaves(t *testing.T, w *world) {
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"url": "redis://:second%2Bvalue@db"}))
	w.deploy(t, deployment, "canary", 1, map[string]string{kube.ReadyAfter: "1s"})
	w.deploy(t, deployment, "web", 2, nil)
	w.deploy(t, statefulSet, "db", 2, nil)
	w.deploy(t, daemonSet, "agent", 1, nil)
	for of, name := range map[string]string{"deployment": "canary", deployment: "web", statefulSet: "db", daemonSet: "agent"} {
		w.rolledOut(t, of, name)
	}
	c := w.consumer(func(c *Consumer) {
		c.ExternalSecrets, c.Secrets, c.MaxParallel = nil, []string{"plain"}, 1
		c.Workloads = [][]Workload{
			{{Kind: deployment, Name: "canary"}},
			{{Kind: deployment, Selector: "app=web"}, {Kind: statefulSet, Name: "db"}, {Kind: daemonSet, Name: "agent"}},
		}
	})
	require.NoError(t, c.Validate())
	d := delivery("r1", "second+value")
	w.until(t, w.k.Sync, c, d)
	first := w.k.Restart(w.ctx, c, d)
	require.NoError(t, first.Err)
	require.Equal(t, []string{"Deployment waves/canary: restarted"}, first.Told)
	told := w.until(t, w.k.Restart, c, d)
	var order []string
	for _, line := range told {
		if strings.HasSuffix(line, ": restarted") {
			order = append(order, line)
		}
	}
	require.Equal(t, []string{"Deployment waves/web: restarted", "StatefulSet waves/db: restarted", "DaemonSet waves/agent: restarted"}, order)
	w.until(t, w.k.Check, c, d)
}

func testCrash(t *testing.T, w *world) {
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"password": "second"}))
	w.deploy(t, deployment, "a", 1, nil)
	w.deploy(t, deployment, "b", 1, nil)
	w.rolledOut(t, deployment, "a")
	w.rolledOut(t, deployment, "b")
	c := w.consumer(func(c *Consumer) {
		c.ExternalSecrets, c.Secrets = nil, []string{"plain"}
		c.Workloads = [][]Workload{{{Kind: deployment, Name: "a"}}, {{Kind: deployment, Name: "b"}}}
	})
	// It cannot do with what is delivered.
	w.deploy(t, deployment, "a", 1, map[string]string{kube.CrashLoop: "true"})
	d := delivery("r1", "second")
	err := w.fails(t, w.k.Restart, c, d)
	require.ErrorContains(t, err, "CrashLoopBackOff")
	b, err := w.Apps.Deployments(w.ns).Get(w.ctx, "b", metav1.GetOptions{})
	require.NoError(t, err)
	require.Empty(t, b.Spec.Template.Annotations[Mark], "nothing is restarted after the first that is bad")
}

// refreshTime of External Secrets has seconds: two syncs within one look alike.
func testSameSecond(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	c := w.consumer(func(c *Consumer) { c.Workloads = nil })
	for i := range 5 {
		value, before := fmt.Sprintf("value-%d", i+1), fmt.Sprintf("value-%d", i)
		w.serve(map[string]string{"pass": value})
		w.until(t, w.k.Sync, c, delivery(fmt.Sprintf("r%d", i), value, before))
	}
}

// A Vault that is not up to date answers with the old value: the
// ExternalSecret says that it has synced, and would not read again for an hour.
func testStaleRead(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	c := w.consumer(func(c *Consumer) { c.Workloads = nil })
	old := maps.Clone(w.served)
	w.serve(map[string]string{"pass": "second-value"})
	w.mu.Lock()
	w.stale = old
	w.mu.Unlock()
	d := delivery("r1", "second-value")
	require.Eventually(t, func() bool {
		p := w.k.Sync(w.ctx, c, d)
		require.False(t, p.Done)
		return p.Err != nil && strings.Contains(p.Err.Error(), "is what role db serves")
	}, 30*time.Second, 100*time.Millisecond)
	w.mu.Lock()
	w.stale = nil
	w.mu.Unlock()
	w.k.Now = func() time.Time { return time.Now().Add(20 * time.Second) }
	told := w.until(t, w.k.Sync, c, d)
	require.Contains(t, told, "ExternalSecret db-creds: forced to sync")
	o, err := w.Dynamic.Resource(externalSecrets).Namespace(w.ns).Get(w.ctx, "db-creds", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "r1.2", o.GetAnnotations()["force-sync"])
}

func (w *world) patchExternal(t *testing.T, name, patch string) {
	t.Helper()
	_, err := w.Dynamic.Resource(externalSecrets).Namespace(w.ns).Patch(w.ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	require.NoError(t, err)
}

func testTemplate(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	w.patchExternal(t, "db-creds", `{"spec":{"target":{"template":{"engineVersion":"v2","data":{"url":"postgres://{{ .username }}:{{ .password | urlquery }}@db/app"}}}}}`)
	c := w.consumer(func(c *Consumer) { c.Workloads = nil })
	w.serve(map[string]string{"pass": "se/cond+va lue"})
	w.until(t, w.k.Sync, c, delivery("r1", "se/cond+va lue", "first-value"))
	data, err := w.Secret(w.ctx, w.ns, "db-creds")
	require.NoError(t, err)
	require.Equal(t, []string{"url"}, slices.Collect(maps.Keys(data)))
}
