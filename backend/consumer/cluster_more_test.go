package consumer

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// testSilent is about ExternalSecrets that say that they are ready, and do not
// bring what is served: Preflight finds each, and the real controller shows that
// it is right to.
func testSilent(t *testing.T, w *world) {
	w.store(t)
	for name, c := range map[string]struct {
		e     kube.ExternalSecret
		patch string
		says  string
	}{
		"once":      {kube.ExternalSecret{Policy: "CreatedOnce"}, "", "refreshPolicy CreatedOnce"},
		"zero":      {kube.ExternalSecret{Refresh: "0s"}, "", "refreshInterval 0"},
		"immutable": {kube.ExternalSecret{}, `{"spec":{"target":{"immutable":true}}}`, "spec.target.immutable"},
		"merge":     {kube.ExternalSecret{}, `{"spec":{"target":{"name":"nowhere","creationPolicy":"Merge"}}}`, "no Secret nowhere to merge into"},
		"none":      {kube.ExternalSecret{}, `{"spec":{"target":{"creationPolicy":"None"}}}`, "creationPolicy None"},
		"pinned":    {kube.ExternalSecret{}, `{"spec":{"data":[{"secretKey":"password","remoteRef":{"key":"app","property":"pass","version":"1"}}]}}`, "fixed version"},
	} {
		c.e.Name = name
		w.external(t, c.e)
		if c.patch != "" {
			w.patchExternal(t, name, c.patch)
		}
		consumer := w.consumer(func(cs *Consumer) { cs.ExternalSecrets, cs.Workloads = []string{name}, nil })
		require.Eventually(t, func() bool { // the controller says what it found a moment later
			f := w.k.Preflight(w.ctx, consumer)
			require.NoError(t, f.Err)
			return strings.Contains(strings.Join(f.Problems, "\n"), c.says)
		}, 20*time.Second, 200*time.Millisecond, name)
	}
	w.external(t, kube.ExternalSecret{Name: "change", Policy: "OnChange", Refresh: "0s"})
	require.Empty(t, w.k.Preflight(w.ctx, w.consumer(func(c *Consumer) { c.ExternalSecrets, c.Workloads = []string{"change"}, nil })).Problems)

	// What Preflight says of them is so: forced, they stay as they are.
	w.serve(map[string]string{"pass": "second-value"})
	w.until(t, w.k.Sync, w.consumer(func(c *Consumer) { c.ExternalSecrets, c.Workloads = []string{"change"}, nil }), delivery("r0", "second-value"))
	for _, name := range []string{"once", "zero", "immutable", "merge"} {
		c := w.consumer(func(cs *Consumer) { cs.ExternalSecrets, cs.Workloads = []string{name}, nil })
		require.Never(t, func() bool { return w.k.Sync(w.ctx, c, delivery("r1", "second-value")).Done }, time.Second, 100*time.Millisecond, name)
	}
	require.NoError(t, w.Delete(w.ctx, fmt.Sprintf("apiVersion: external-secrets.io/v1\nkind: SecretStore\nmetadata: {name: vault, namespace: %s}", w.ns)))
	f := w.k.Preflight(w.ctx, w.consumer(func(c *Consumer) { c.ExternalSecrets, c.Workloads = []string{"change"}, nil }))
	require.Contains(t, f.Problems, "SecretStore vault, which ExternalSecret change reads from, does not exist")
}

// testParent forces an ExternalSecret by the ClusterExternalSecret that it was made
// from: it would take any other annotation away.
func testParent(t *testing.T, w *world) {
	w.store(t)
	require.NoError(t, w.Apply(w.ctx, fmt.Sprintf(`
apiVersion: external-secrets.io/v1
kind: ClusterExternalSecret
metadata: {name: %[1]s-shared}
spec:
  externalSecretName: shared
  namespaces: [%[1]s]
  externalSecretSpec:
    refreshInterval: 1h
    secretStoreRef: {kind: SecretStore, name: vault}
    target: {name: shared}
    data: [{secretKey: password, remoteRef: {key: app, property: pass}}]
`, w.ns)))
	require.NoError(t, w.WaitExternalSecret(w.ctx, w.ns, "shared"))
	c := w.consumer(func(c *Consumer) { c.ExternalSecrets, c.Workloads = []string{"shared"}, nil })
	f := w.k.Preflight(w.ctx, c)
	require.Empty(t, f.Problems)
	require.Contains(t, f.Plan, "sync ClusterExternalSecret parent-shared, all of its ExternalSecrets")
	for i := range 3 {
		value := fmt.Sprintf("value-%d", i)
		w.serve(map[string]string{"pass": value})
		told := w.until(t, w.k.Sync, c, delivery(fmt.Sprintf("r%d", i), value))
		require.Contains(t, told, "ClusterExternalSecret parent-shared: forced to sync")
	}
}

// plain is a consumer of a Secret that nobody syncs.
func (w *world) plain(t *testing.T, workloads ...Workload) *Consumer {
	t.Helper()
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"password": "second"}))
	return w.consumer(func(c *Consumer) {
		c.ExternalSecrets, c.Secrets, c.Workloads = nil, []string{"plain"}, [][]Workload{workloads}
	})
}

// laterSecond waits until it is a later second than that of the newest pod, which is
// all that a time of Kubernetes says.
func (w *world) laterSecond(t *testing.T, workload string) {
	t.Helper()
	pods, err := w.PodsOf(w.ctx, w.ns, workload)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		now := time.Now().Truncate(time.Second)
		return !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return !p.CreationTimestamp.Time.Before(now) })
	}, 10*time.Second, 50*time.Millisecond)
}

// testMarkTaken: a GitOps tool takes the annotation away in the middle of the
// rollout, for which kubectl says that all is well.
func testMarkTaken(t *testing.T, w *world) {
	w.deploy(t, deployment, "web", 3, map[string]string{kube.ReadyAfter: "2s"})
	w.rolledOut(t, deployment, "web")
	w.laterSecond(t, "web")
	c := w.plain(t, Workload{Kind: deployment, Name: "web"})
	d := delivery("r1", "second")
	require.NoError(t, w.k.Restart(w.ctx, c, d).Err)
	require.Eventually(t, func() bool {
		pods, err := w.PodsOf(w.ctx, w.ns, "web")
		return err == nil && marked(pods, "r1")
	}, 20*time.Second, 50*time.Millisecond)
	_, err := w.Apps.Deployments(w.ns).Patch(w.ctx, "web", types.JSONPatchType,
		[]byte(`[{"op":"remove","path":"/spec/template/metadata/annotations/harmonyflow.io~1rotation"},{"op":"remove","path":"/spec/template/metadata/annotations/kubectl.kubernetes.io~1restartedAt"}]`), metav1.PatchOptions{})
	require.NoError(t, err)
	// The rollout goes back to the template that there was, whose pods have read the
	// old Secret; none of them is taken for proven.
	var last Progress
	require.Eventually(t, func() bool {
		last = w.k.Restart(w.ctx, c, d)
		return last.Done || last.Err != nil
	}, 40*time.Second, 20*time.Millisecond, "%v", last.Waits)
	if last.Done { // it had been restarted once more
		pods, err := w.PodsOf(w.ctx, w.ns, "web")
		require.NoError(t, err)
		for _, p := range pods {
			require.True(t, p.DeletionTimestamp != nil || p.Annotations[Mark] == "r1" || !p.CreationTimestamp.Time.Before(d.Since.Truncate(time.Second)))
		}
		return
	}
	require.True(t, kind.IsDefinite(last.Err), "%v", last.Err)
	require.ErrorContains(t, last.Err, "taken the annotation harmonyflow.io/rotation away")
}

func testObserve(t *testing.T, w *world) {
	w.deploy(t, deployment, "web", 2, nil)
	w.rolledOut(t, deployment, "web")
	w.laterSecond(t, "web")
	c := w.plain(t, Workload{Kind: deployment, Name: "web"})
	c.Mode = Observe
	require.NoError(t, c.Validate())
	d := delivery("r1", "second")
	w.until(t, w.k.Sync, c, d)
	for range 3 {
		p := w.k.Restart(w.ctx, c, d)
		require.NoError(t, p.Err)
		require.Contains(t, p.Waits, "is from before the change")
	}
	require.NoError(t, w.Restart(w.ctx, "deployment", w.ns, "web")) // Reloader
	w.until(t, w.k.Restart, c, d)
	w.until(t, w.k.Check, c, d)
	o, err := w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	require.Empty(t, o.Spec.Template.Annotations[Mark])
}

// testShared: two consumers name one workload, and two deliveries are under way.
func testShared(t *testing.T, w *world) {
	w.deploy(t, deployment, "web", 2, map[string]string{kube.ReadyAfter: "1s"})
	w.rolledOut(t, deployment, "web")
	c := w.plain(t, Workload{Kind: deployment, Name: "web"})
	a, b := delivery("a", "second"), delivery("b", "second")
	doneA, doneB := false, false
	require.Eventually(t, func() bool {
		one, two := w.k.Restart(w.ctx, c, a), w.k.Restart(w.ctx, c, b)
		require.NoError(t, one.Err)
		require.NoError(t, two.Err)
		doneA, doneB = doneA || one.Done, doneB || two.Done
		return doneA && doneB
	}, time.Minute, 50*time.Millisecond)
	w.until(t, w.k.Check, c, a)
	w.until(t, w.k.Check, c, b)
	o, err := w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	require.LessOrEqual(t, o.Generation, int64(3), "each has restarted it once, at most")

	// What another one restarted before the change does not do.
	require.NoError(t, w.PutSecret(w.ctx, w.ns, "plain", map[string]string{"password": "third"}))
	d := delivery("d", "third")
	w.until(t, w.k.Restart, c, d)
	o, err = w.Apps.Deployments(w.ns).Get(w.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "d", o.Spec.Template.Annotations[Mark])
}

func testWorkloadLint(t *testing.T, w *world) {
	w.deploy(t, deployment, "good", 1, nil)
	w.deploy(t, deployment, "paused", 1, nil, "paused: true")
	w.deploy(t, statefulSet, "partition", 1, nil, "updateStrategy: {type: RollingUpdate, rollingUpdate: {partition: 1}}")
	w.deploy(t, statefulSet, "ondelete", 1, nil, "updateStrategy: {type: OnDelete}")
	w.deploy(t, deployment, "none", 0, nil)
	w.deploy(t, deployment, "reloader", 1, map[string]string{"reloader.stakater.com/auto": "true"})
	w.deploy(t, deployment, "rolling", 1, map[string]string{kube.NeverReady: "true"})
	for _, name := range []string{"good", "reloader", "none"} {
		w.rolledOut(t, deployment, name)
	}
	c := w.plain(t,
		Workload{Kind: deployment, Name: "good"}, Workload{Kind: deployment, Name: "paused"}, Workload{Kind: statefulSet, Name: "partition"},
		Workload{Kind: statefulSet, Name: "ondelete"}, Workload{Kind: deployment, Name: "none"}, Workload{Kind: deployment, Name: "reloader"},
		Workload{Kind: deployment, Name: "rolling"})
	f := w.k.Preflight(w.ctx, c)
	require.NoError(t, f.Err)
	all := strings.Join(f.Problems, "\n")
	for _, says := range []string{
		"Deployment workload-lint/paused is paused", "StatefulSet workload-lint/partition has a partition of 1",
		"StatefulSet workload-lint/ondelete has updateStrategy OnDelete",
		"Deployment workload-lint/reloader is restarted by somebody else as well (reloader.stakater.com/auto)",
		"Deployment workload-lint/rolling is in the middle of a rollout",
	} {
		require.Contains(t, all, says)
	}
	require.NotContains(t, all, "/good")
	require.Contains(t, f.Notes, "Deployment workload-lint/none has no replicas: nothing would be proven of it")
	c.Workloads = [][]Workload{{{Kind: deployment, Name: "gone"}}}
	f = w.k.Preflight(w.ctx, c)
	require.NoError(t, f.Err)
	require.Contains(t, strings.Join(f.Problems, "\n"), `has no deployments gone`)
	require.True(t, kind.IsDefinite(w.k.Restart(w.ctx, c, delivery("r1", "second")).Err))
}

func testChecks(t *testing.T, w *world) {
	w.Serve(w.ns, "web", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/healthz":
			_, _ = io.WriteString(rw, "well")
		case "/status":
			rw.Header().Set("Content-Type", "application/json")
			rw.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(rw, `{"kind":"Teapot"}`)
		default:
			rw.WriteHeader(http.StatusUnauthorized)
		}
	}))
	require.NoError(t, w.Apply(w.ctx, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: %[1]s}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80, targetPort: 8080}]}
`, w.ns)))
	outside := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/v1/query":
			_, _ = io.WriteString(rw, `{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"3"]}]}}`)
		case "/away":
			http.Redirect(rw, r, "http://localhost:1/", http.StatusFound)
		case "/within":
			http.Redirect(rw, r, "/ok", http.StatusFound)
		}
	}))
	t.Cleanup(outside.Close)
	w.deploy(t, deployment, "web", 2, nil)
	w.rolledOut(t, deployment, "web")
	c := w.plain(t, Workload{Kind: deployment, Name: "web"})
	d := delivery("r1", "second")
	w.LogAt(time.Now().Add(-time.Hour), w.ns, "web", "authentication failed long ago")
	w.until(t, w.k.Restart, c, d)
	c.Checks = []Check{
		{Type: checkHTTP, Service: "http:web:80", Path: "/healthz", Times: 3},
		{Type: checkHTTP, Service: "http:web:80", Path: "/status", Expect: "418"},
		{Type: checkHTTP, URL: outside.URL + "/within", Method: "POST", Body: "x"},
		{Type: checkHTTP, URL: outside.URL + "/away", Expect: "302"},
		{Type: checkPrometheus, URL: outside.URL, Query: "up", Expect: "< 5"},
		{Type: checkLogs, Forbid: "authentication failed"},
		{Type: checkPods, Selector: "app=web"},
	}
	require.NoError(t, c.Validate())
	w.until(t, w.k.Check, c, d)

	w.Log(w.ns, "web", "authentication failed for user app with password hunter2")
	for _, bad := range []struct {
		check Check
		says  string
	}{
		{Check{Type: checkHTTP, Service: "http:web:80", Path: "/secret"}, "answered with 401, and 2xx is expected"},
		{Check{Type: checkHTTP, Service: "http:nobody:80"}, "has nothing that answers"},
		{Check{Type: checkHTTP, URL: "http://127.0.0.1:1/"}, "cannot be reached"},
		{Check{Type: checkPrometheus, URL: outside.URL, Query: "up", Expect: "== 0"}, "gives 3, and == 0 is expected"},
		{Check{Type: checkLogs, Forbid: "authentication failed"}, "written 1 lines"},
		{Check{Type: checkPods, Selector: "app=gone"}, "no pod"},
	} {
		c.Checks = []Check{bad.check}
		p := w.k.Check(w.ctx, c, d)
		require.ErrorContains(t, p.Err, bad.says)
		require.False(t, kind.IsDefinite(p.Err), "%v", p.Err)
		require.NotContains(t, p.Err.Error(), "hunter2")
		c.Checks[0].Timeout = time.Millisecond
		w.k.Now = func() time.Time { return time.Now().Add(5 * time.Second) }
		require.True(t, kind.IsDefinite(w.k.Check(w.ctx, c, d).Err), bad.says)
		w.k.Now = time.Now
	}
	c.Checks = []Check{{Type: checkHTTP, URL: "https://stranger.example.com/"}}
	require.ErrorContains(t, w.k.Check(w.ctx, c, d).Err, "none that checks may send requests to")
	require.Contains(t, strings.Join(w.k.Preflight(w.ctx, c).Problems, "\n"), "allowed_hosts")
}

// rules are those of deploy/kubernetes, for what a consumer of the tests names.
func rules(without string) []rbacv1.PolicyRule {
	all := []rbacv1.PolicyRule{
		{APIGroups: []string{externalGroup}, Resources: []string{"externalsecrets"}, ResourceNames: []string{"db-creds"}, Verbs: []string{"get", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"db-creds"}, Verbs: []string{"get"}},
		{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, ResourceNames: []string{"web"}, Verbs: []string{"get", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
		{APIGroups: []string{""}, Resources: []string{"services/proxy"}, ResourceNames: []string{"http:web:80"}, Verbs: []string{"get"}},
		{APIGroups: []string{""}, Resources: []string{"pods/log"}, Verbs: []string{"get"}},
	}
	var out []rbacv1.PolicyRule
	for _, r := range all {
		if r.Resources[0] != without {
			out = append(out, r)
		}
	}
	return out
}

func testRights(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	w.deploy(t, deployment, "web", 1, nil)
	w.rolledOut(t, deployment, "web")
	c := w.consumer(func(c *Consumer) {
		c.Checks = []Check{{Type: checkHTTP, Service: "http:web:80"}, {Type: checkLogs, Forbid: "x"}}
	})
	for without, says := range map[string]string{
		"externalsecrets": `connection "prod" may not patch externalsecrets db-creds; add to a Role of namespace rights: {apiGroups: ["external-secrets.io"], resources: [externalsecrets], resourceNames: ["db-creds"], verbs: [patch]}`,
		"secrets":         "may not get secrets db-creds",
		"deployments":     "may not patch deployments web",
		"pods":            "may not list pods; add",
		"services/proxy":  "may not get services/proxy http:web:80",
		"pods/log":        "may not get pods/log",
	} {
		token, err := w.ServiceAccount(w.ctx, w.ns, "without-"+strings.ReplaceAll(without, "/", "-"), rules(without)...)
		require.NoError(t, err)
		w.token = token
		f := w.k.Preflight(w.ctx, c)
		require.NoError(t, f.Err)
		require.Contains(t, strings.Join(f.Problems, "\n"), says)
	}
	token, err := w.ServiceAccount(w.ctx, w.ns, "all", rules("")...)
	require.NoError(t, err)
	w.token = token
	f := w.k.Preflight(w.ctx, c)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	w.serve(map[string]string{"pass": "second-value"})
	c.Checks = nil
	d := delivery("r1", "second-value")
	w.until(t, w.k.Sync, c, d)
	// Taken away half-way it is waited for.
	_, err = w.ServiceAccount(w.ctx, w.ns, "all", rules("deployments")...)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		p := w.k.Restart(w.ctx, c, d)
		require.False(t, kind.IsDefinite(p.Err), "%v", p.Err)
		return p.Err != nil && strings.Contains(p.Err.Error(), "may not get deployments")
	}, 10*time.Second, 50*time.Millisecond)
	_, err = w.ServiceAccount(w.ctx, w.ns, "all", rules("")...)
	require.NoError(t, err)
	w.until(t, w.k.Restart, c, d)
	w.until(t, w.k.Check, c, d)
}

// testOperator: an operator that does nothing is restarted, once.
func testOperator(t *testing.T, w *world) {
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds", Refresh: "0s"}) // reacts to nothing, as one whose operator hangs
	w.deploy(t, deployment, "external-secrets", 1, nil)
	w.rolledOut(t, deployment, "external-secrets")
	c := w.consumer(func(c *Consumer) { c.Workloads, c.RestartOperator = nil, w.ns+"/external-secrets" })
	require.NoError(t, c.Validate())
	d := delivery("r1", "second-value")
	require.False(t, w.k.Sync(w.ctx, c, d).Done)
	require.Contains(t, w.k.Sync(w.ctx, c, d).Waits, "have not synced yet")
	w.k.Now = func() time.Time { return time.Now().Add(time.Minute) }
	require.Equal(t, []string{"Deployment operator/external-secrets: restarted"}, w.k.Sync(w.ctx, c, d).Told)
	for range 3 {
		require.Empty(t, w.k.Sync(w.ctx, c, d).Told)
	}
}

func testVerify(t *testing.T, w *world) {
	e, err := w.entry(w.ctx, "prod")
	require.NoError(t, err)
	info, err := Verify(w.ctx, e)
	require.NoError(t, err)
	require.Equal(t, "logged in as admin", info.Summary)
	require.Contains(t, info.Nodes[0].Note, "Kubernetes v1.36")
	require.NotEmpty(t, info.Warnings)
	ns, err := w.Core.Namespaces().Get(w.ctx, "kube-system", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "kubernetes:"+string(ns.UID), info.Identity)

	token, err := w.ServiceAccount(w.ctx, w.ns, "small")
	require.NoError(t, err)
	w.token = token
	e, _ = w.entry(w.ctx, "prod")
	info, err = Verify(w.ctx, e)
	require.NoError(t, err)
	require.Equal(t, "logged in as system:serviceaccount:verify:small", info.Summary)
	require.Contains(t, info.Identity, w.Host)
	require.Empty(t, info.Warnings)

	w.token = "a-secret-token"
	e, _ = w.entry(w.ctx, "prod")
	_, err = Verify(w.ctx, e)
	require.ErrorContains(t, err, "refuses the token")
	e.TLS.CA = ""
	_, err = Verify(w.ctx, e)
	require.ErrorContains(t, err, "check ca_cert")
	require.NotContains(t, err.Error(), "a-secret")
}

// testClusterOutage: an API server that hangs, or is gone, is waited for.
func testClusterOutage(t *testing.T, w *world) {
	w.deploy(t, deployment, "web", 1, nil)
	w.rolledOut(t, deployment, "web")
	c := w.plain(t, Workload{Kind: deployment, Name: "web"})
	d := delivery("r1", "second")
	require.NoError(t, w.k.Restart(w.ctx, c, d).Err)
	require.NoError(t, w.KillAPIServer())
	for _, p := range []Progress{w.k.Sync(w.ctx, c, d), w.k.Restart(w.ctx, c, d), w.k.Check(w.ctx, c, d)} {
		require.True(t, kind.IsUnreachable(p.Err), "%v", p.Err)
	}
	require.True(t, kind.IsUnreachable(w.k.Preflight(w.ctx, c).Err))
	require.NoError(t, w.StartAPIServer(w.ctx))
	w.until(t, w.k.Restart, c, d)
	w.until(t, w.k.Check, c, d)
}
