package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	rbacv1 "k8s.io/api/rbac/v1"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	appsv1client "k8s.io/client-go/kubernetes/typed/apps/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestKube is of the test bed itself. Its parts share one cluster, each in a
// namespace of its own.
func TestKube(t *testing.T) {
	c := ForTest(t)
	ok := t.Run("together", func(t *testing.T) {
		for name, test := range map[string]func(*bed){
			"rotation":     testRotation,
			"annotations":  testAnnotations,
			"logs":         testLogs,
			"proxy":        testProxy,
			"access":       testAccess,
			"eso":          testExternalSecrets,
			"late secret":  testLateSecret,
			"kinds":        testKinds,
			"logins":       testLogins,
			"old pods":     testOldPods,
			"side by side": testSideBySide,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(newBed(t, c, strings.ReplaceAll(name, " ", "-")))
			})
		}
	})
	if ok {
		t.Run("outage", func(t *testing.T) { testOutage(newBed(t, c, "outage")) })
	}
}

type bed struct {
	*Cluster
	t   *testing.T
	sim *Simulator
	ns  string
	ctx context.Context
}

func newBed(t *testing.T, c *Cluster, namespace string, opts ...SimulatorOption) *bed {
	t.Helper()
	b := &bed{Cluster: c, t: t, ns: namespace, ctx: t.Context()}
	require.NoError(t, c.Namespace(b.ctx, b.ns))
	b.sim = c.Simulate(append(opts, InNamespace(b.ns))...)
	t.Cleanup(b.sim.Stop)
	return b
}

// deploy applies a Deployment web with annotations in its template.
func (b *bed) deploy(t *testing.T, replicas int, annotations map[string]string) {
	t.Helper()
	b.deployAs(t, "web", "Deployment", replicas, annotations)
}

func (b *bed) deployAs(t *testing.T, name, kind string, replicas int, annotations map[string]string) {
	t.Helper()
	text, err := json.Marshal(annotations)
	require.NoError(t, err)
	extra := map[string]string{
		"Deployment":  fmt.Sprintf("replicas: %d\n  progressDeadlineSeconds: 4", replicas),
		"StatefulSet": fmt.Sprintf("replicas: %d\n  serviceName: %s", replicas, name),
	}[kind]
	require.NoError(t, b.Apply(b.ctx, fmt.Sprintf(`
apiVersion: apps/v1
kind: %s
metadata: {name: %s, namespace: %s}
spec:
  %s
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s}, annotations: %s}
    spec: {containers: [{name: main, image: example.com/web:1, ports: [{containerPort: 8080}]}]}
`, kind, name, b.ns, extra, name, name, text)))
}

func (b *bed) simulated(addr string) map[string]string {
	return map[string]string{"sim/secret": "db-creds", "sim/target": "redis", "sim/addr": addr, "sim/every": "20ms"}
}

func (b *bed) rolledOut(t *testing.T) {
	t.Helper()
	require.NoError(t, b.WaitRollout(b.ctx, "deployment", b.ns, "web"))
}

// live are the pods that are not gone.
func live(pods []SimulatedPod) (left []SimulatedPod) {
	for _, p := range pods {
		if !p.Gone {
			left = append(left, p)
		}
	}
	return left
}

func testRotation(b *bed) {
	t := b.t
	redis := servers.Redis(t, servers.WithUsers("app on >first +@all"))
	setUser := func(rules ...any) {
		_, err := redis.Do(b.ctx, append([]any{"ACL", "SETUSER", "app"}, rules...)...)
		require.NoError(t, err)
	}
	require.NoError(t, b.PutSecret(b.ctx, b.ns, "db-creds", map[string]string{"username": "app", "password": "first"}))
	b.deploy(t, 3, b.simulated(redis.Addr))
	b.rolledOut(t)

	// Both passwords are good until the last pod has the second.
	setUser(">second")
	require.NoError(t, b.PatchSecret(b.ctx, b.ns, "db-creds", map[string]string{"password": "second"}))
	require.NoError(t, b.Restart(b.ctx, "deployment", b.ns, "web"))
	b.rolledOut(t)
	require.NoError(t, b.sim.Wait(b.ctx, b.ns, "web", func(pods []SimulatedPod) bool { return len(live(pods)) == 3 }))
	for _, p := range live(b.sim.Pods(b.ns, "web")) {
		require.Equal(t, "second", p.Password)
		require.True(t, p.Ready)
	}
	setUser("<first")
	logins := b.sim.Workload(b.ns, "web").Logins
	require.NoError(t, b.sim.Wait(b.ctx, b.ns, "web", func([]SimulatedPod) bool { return b.sim.Workload(b.ns, "web").Logins > logins+20 }))
	require.Zero(t, b.sim.Workload(b.ns, "web").Refused)
	require.Zero(t, b.sim.Workload(b.ns, "web").Failed)

	// A program that cannot do with the next one: the rollout stalls, and what ran goes on.
	b.sim.CrashWhen(func(p SimulatedPod) bool { return p.Namespace == b.ns && p.Password == "third" })
	setUser(">third")
	require.NoError(t, b.PatchSecret(b.ctx, b.ns, "db-creds", map[string]string{"password": "third"}))
	require.NoError(t, b.Restart(b.ctx, "deployment", b.ns, "web"))
	require.ErrorIs(t, b.WaitRollout(b.ctx, "deployment", b.ns, "web"), ErrStalled)
	b.crashing(t)
	require.Zero(t, b.sim.Workload(b.ns, "web").Refused)
	b.sim.CrashWhen(nil)
	b.recovers(t) // the container is started again

	// One that is refused at the start: the Secret is ahead of the server.
	require.NoError(t, b.PatchSecret(b.ctx, b.ns, "db-creds", map[string]string{"password": "fourth"}))
	require.NoError(t, b.Restart(b.ctx, "deployment", b.ns, "web"))
	require.NoError(t, b.sim.Wait(b.ctx, b.ns, "web", func([]SimulatedPod) bool { return b.sim.Workload(b.ns, "web").Refused > 1 }))
	b.crashing(t)
	setUser(">fourth")
	b.recovers(t)
}

// recovers waits for a rollout that may have stalled before.
func (b *bed) recovers(t *testing.T) {
	t.Helper()
	require.NoError(t, Until(b.ctx, func(ctx context.Context) error {
		return b.WaitRollout(ctx, "deployment", b.ns, "web")
	}))
}

// crashing waits until one pod of web is in a crash loop, and three are ready.
func (b *bed) crashing(t *testing.T) {
	t.Helper()
	require.NoError(t, Until(b.ctx, func(ctx context.Context) error {
		pods, err := b.PodsOf(ctx, b.ns, "web")
		if err != nil {
			return err
		}
		crashing, ready := 0, 0
		for _, pod := range pods {
			if Waiting(pod) == "CrashLoopBackOff" && pod.Status.ContainerStatuses[0].RestartCount > 0 {
				crashing++
			}
			if pod.Status.ContainerStatuses[0].Ready {
				ready++
			}
		}
		if crashing != 1 || ready != 3 {
			return fmt.Errorf("%d pods crash, %d are ready", crashing, ready)
		}
		return nil
	}))
}

func testAnnotations(b *bed) {
	t := b.t
	for name, c := range map[string]struct {
		annotation, value, waits string
		phase                    corev1.PodPhase
		restarts                 int32
	}{
		"never":    {NeverReady, "true", "", corev1.PodRunning, 0},
		"crash":    {CrashLoop, "true", "CrashLoopBackOff", corev1.PodRunning, 2},
		"later":    {CrashAfter, "1s", "CrashLoopBackOff", corev1.PodRunning, 2},
		"no-image": {ImagePullBackOff, "true", "ImagePullBackOff", corev1.PodPending, 0},
	} {
		b.deployAs(t, name, "Deployment", 1, map[string]string{c.annotation: c.value})
		require.NoError(t, Until(b.ctx, func(ctx context.Context) error {
			pods, err := b.PodsOf(ctx, b.ns, name)
			if err != nil || len(pods) != 1 || len(pods[0].Status.ContainerStatuses) != 1 {
				return errors.Join(err, errors.New("there is no pod with containers"))
			}
			container := pods[0].Status.ContainerStatuses[0]
			if pods[0].Status.Phase != c.phase || Waiting(pods[0]) != c.waits || container.RestartCount < c.restarts || container.Ready {
				return fmt.Errorf("%s: %s, waits %q, %d restarts", name, pods[0].Status.Phase, Waiting(pods[0]), container.RestartCount)
			}
			return nil
		}))
	}
	require.ErrorIs(t, b.WaitRollout(b.ctx, "deployment", b.ns, "never"), ErrStalled)

	began := time.Now()
	b.deploy(t, 1, map[string]string{ReadyAfter: "2s", TerminateAfter: "2s"})
	b.rolledOut(t)
	require.Greater(t, time.Since(began), 1900*time.Millisecond)
	began = time.Now()
	require.NoError(t, b.Restart(b.ctx, "deployment", b.ns, "web"))
	b.rolledOut(t)
	require.Greater(t, time.Since(began), 3900*time.Millisecond)
}

func testLogs(b *bed) {
	t := b.t
	b.deploy(t, 1, nil)
	b.rolledOut(t)
	pods, err := b.PodsOf(b.ctx, b.ns, "web")
	require.NoError(t, err)
	b.LogAt(time.Now().Add(-time.Hour), b.ns, "web", "an hour ago")
	b.Log(b.ns, "web", "authentication failed", "again")
	read := func(o *corev1.PodLogOptions) string {
		t.Helper()
		text, err := b.Core.Pods(b.ns).GetLogs(pods[0].Name, o).DoRaw(b.ctx)
		require.NoError(t, err)
		return string(text)
	}
	minute, two := int64(60), int64(2)
	require.Equal(t, "an hour ago\nauthentication failed\nagain\n", read(&corev1.PodLogOptions{}))
	require.Equal(t, "authentication failed\nagain\n", read(&corev1.PodLogOptions{SinceSeconds: &minute}))
	require.Equal(t, "authentication failed\nagain\n", read(&corev1.PodLogOptions{TailLines: &two}))
	require.Equal(t, "an", read(&corev1.PodLogOptions{LimitBytes: &two}))
	_, err = b.Core.Pods(b.ns).GetLogs(pods[0].Name, &corev1.PodLogOptions{Previous: true}).DoRaw(b.ctx)
	require.True(t, apierrors.IsBadRequest(err), "%v", err)
	_, err = b.Kubectl(b.ctx, "-n", b.ns, "logs", "deploy/web", "--previous")
	require.ErrorContains(t, err, "previous terminated container")
	out, err := b.Kubectl(b.ctx, "-n", b.ns, "logs", "deploy/web", "--tail=1")
	require.NoError(t, err)
	require.Equal(t, "again\n", out)

	stream, err := b.Core.Pods(b.ns).GetLogs(pods[0].Name, &corev1.PodLogOptions{Follow: true, TailLines: new(int64)}).Stream(b.ctx)
	require.NoError(t, err)
	b.Log(b.ns, pods[0].Name, "of this pod alone")
	buffer := make([]byte, 100)
	n, err := stream.Read(buffer)
	require.NoError(t, err)
	require.Equal(t, "of this pod alone\n", string(buffer[:n]))
	require.NoError(t, stream.Close())
}

func testProxy(b *bed) {
	t := b.t
	b.Serve(b.ns, "web", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s of %s", r.URL.Path, PodOf(r).Name)
	}))
	require.NoError(t, b.Apply(b.ctx, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %s}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
`, b.ns)))
	b.deploy(t, 1, nil)
	b.rolledOut(t)
	pods, err := b.PodsOf(b.ctx, b.ns, "web")
	require.NoError(t, err)
	require.NoError(t, Until(b.ctx, func(ctx context.Context) error {
		answer, err := b.Core.Services(b.ns).ProxyGet("http", "web", "80", "healthz", nil).DoRaw(ctx)
		if err == nil && string(answer) != "/healthz of "+pods[0].Name {
			err = errors.New(string(answer))
		}
		return err // endpoints come after the pod
	}))
}

func testAccess(b *bed) {
	t := b.t
	token, err := b.ServiceAccount(b.ctx, b.ns, "rotator",
		rbacv1.PolicyRule{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, ResourceNames: []string{"web"}, Verbs: []string{"get", "patch"}})
	require.NoError(t, err)
	b.deploy(t, 1, nil)
	apps, err := appsv1client.NewForConfig(b.Config(token))
	require.NoError(t, err)
	_, err = apps.Deployments(b.ns).Get(b.ctx, "web", metav1.GetOptions{})
	require.NoError(t, err)
	_, err = apps.Deployments("default").Get(b.ctx, "web", metav1.GetOptions{})
	require.True(t, apierrors.IsForbidden(err), "%v", err)
	core, err := corev1client.NewForConfig(b.Config(token))
	require.NoError(t, err)
	_, err = core.Secrets(b.ns).List(b.ctx, metav1.ListOptions{})
	require.True(t, apierrors.IsForbidden(err), "%v", err)
}

// testExternalSecrets reads a document of a Vault that is no more than its
// two answers.
func testExternalSecrets(b *bed) {
	t := b.t
	var password atomic.Value
	password.Store("first")
	vault := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data := map[string]any{"data": map[string]any{"data": map[string]any{"user": "app", "pass": password.Load()}, "metadata": map[string]any{"version": 1}}}
		if strings.HasSuffix(r.URL.Path, "/lookup-self") {
			data = map[string]any{"data": map[string]any{"type": "service", "ttl": 3600, "expire_time": nil}}
		}
		_ = json.NewEncoder(w).Encode(data)
	}))
	t.Cleanup(vault.Close)
	require.NoError(t, b.StartESO(b.ctx))
	require.NoError(t, b.ApplyVaultStore(b.ctx, VaultStore{Namespace: b.ns, Name: "vault", Address: vault.URL, Mount: "secret", Token: "root"}))
	require.NoError(t, b.ApplyExternalSecret(b.ctx, ExternalSecret{
		Namespace: b.ns, Name: "db-creds", Store: "vault", Document: "app",
		Fields: map[string]string{"username": "user", "password": "pass"},
	}))
	require.NoError(t, b.WaitExternalSecret(b.ctx, b.ns, "db-creds"))
	data, err := b.Secret(b.ctx, b.ns, "db-creds")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"username": "app", "password": "first"}, data)

	password.Store("second")
	require.NoError(t, b.ForceSync(b.ctx, b.ns, "db-creds"))
	data, err = b.Secret(b.ctx, b.ns, "db-creds")
	require.NoError(t, err)
	require.Equal(t, "second", data["password"])
}

func testLateSecret(b *bed) {
	t := b.t
	b.deploy(t, 1, map[string]string{"sim/secret": "db-creds", "sim/target": "none"})
	require.NoError(t, Until(b.ctx, func(ctx context.Context) error {
		pods, err := b.PodsOf(ctx, b.ns, "web")
		if err != nil || len(pods) != 1 || Waiting(pods[0]) != "CreateContainerConfigError" {
			return fmt.Errorf("the pod does not wait for its secret: %w", err)
		}
		return nil
	}))
	require.NoError(t, b.PutSecret(b.ctx, b.ns, "db-creds", map[string]string{"username": "app", "password": "first"}))
	b.rolledOut(t)
}

func testKinds(b *bed) {
	t := b.t
	require.NoError(t, b.PutSecret(b.ctx, b.ns, "db-creds", map[string]string{"username": "app", "password": "first"}))
	for _, kind := range []string{"StatefulSet", "DaemonSet"} {
		name := strings.ToLower(kind)
		b.deployAs(t, name, kind, 1, map[string]string{"sim/secret": "db-creds", "sim/target": "none"})
		require.NoError(t, b.WaitRollout(b.ctx, name, b.ns, name))
		require.NoError(t, b.Restart(b.ctx, name, b.ns, name))
		require.NoError(t, b.WaitRollout(b.ctx, name, b.ns, name))
		require.NoError(t, b.sim.Wait(b.ctx, b.ns, name, func(pods []SimulatedPod) bool { return len(pods) == 2 && len(live(pods)) == 1 }), name)
	}
}

// testOldPods lets a pod start with what the Secret held before, and run after
// that is refused.
func testOldPods(b *bed) {
	t := b.t
	b.sim.Stop()
	b.sim = b.Simulate(InNamespace(b.ns), WithSecretLag(time.Second), WithCrashAfter(5))
	t.Cleanup(b.sim.Stop)
	redis := servers.Redis(t, servers.WithUsers("app on >first >second +@all"))
	require.NoError(t, b.PutSecret(b.ctx, b.ns, "db-creds", map[string]string{"password": "first"}))
	time.Sleep(1200 * time.Millisecond) // longer than the lag
	require.NoError(t, b.PatchSecret(b.ctx, b.ns, "db-creds", map[string]string{"password": "second"}))
	annotations := b.simulated(redis.Addr)
	annotations["sim/username"] = "app"
	b.deploy(t, 1, annotations)
	b.rolledOut(t)
	require.Equal(t, "first", b.sim.Pods(b.ns, "web")[0].Password)

	_, err := redis.Do(b.ctx, "ACL", "SETUSER", "app", "<first")
	require.NoError(t, err)
	require.NoError(t, b.sim.Wait(b.ctx, b.ns, "web", func(pods []SimulatedPod) bool {
		return pods[0].Restarts > 0 && pods[0].Password == "second" && pods[0].Ready
	}))
	require.GreaterOrEqual(t, b.sim.Total().Refused, 5)
	require.Equal(t, b.sim.Total(), b.sim.Workload(b.ns, "web"))
}

func testLogins(b *bed) {
	t := b.t
	redis := servers.Redis(t, servers.WithUsers("app on >first"))
	postgresql := servers.Postgres(t)
	require.NoError(t, postgresql.Exec(b.ctx, "CREATE ROLE app LOGIN PASSWORD 'first'"))
	rabbitmq := servers.RabbitMQ(t)
	for target, c := range map[string]struct {
		addr, username, password string
		end                      func() error
	}{
		"redis":      {redis.Addr, "app", "first", redis.Kill},
		"postgresql": {postgresql.Addr, "app", "first", postgresql.Stop},
		"rabbitmq":   {rabbitmq.Addr, servers.RabbitMQAdmin, servers.RabbitMQAdminPassword, rabbitmq.End},
	} {
		require.NoError(t, logins[target](b.ctx, c.addr, c.username, c.password), target)
		require.ErrorIs(t, logins[target](b.ctx, c.addr, c.username, "wrong"), ErrRefused, target)
		require.NoError(t, c.end())
		err := logins[target](b.ctx, c.addr, c.username, c.password)
		require.Error(t, err, target)
		require.NotErrorIs(t, err, ErrRefused, target)
	}
}

func testSideBySide(b *bed) {
	t := b.t
	other := ForTest(t)
	require.NotEqual(t, b.Host, other.Host)
	_, err := other.Core.Namespaces().Get(b.ctx, b.ns, metav1.GetOptions{})
	require.True(t, apierrors.IsNotFound(err), "%v", err)
}

func testOutage(b *bed) {
	t := b.t
	require.NoError(t, b.PutSecret(b.ctx, b.ns, "db-creds", map[string]string{"username": "app", "password": "first"}))
	b.deploy(t, 2, map[string]string{"sim/secret": "db-creds", "sim/target": "none"})
	b.rolledOut(t)
	require.NoError(t, b.KillAPIServer())
	_, err := b.Secret(b.ctx, b.ns, "db-creds")
	require.Error(t, err)
	logins := b.sim.Workload(b.ns, "web").Logins
	require.NoError(t, b.sim.Wait(b.ctx, b.ns, "web", func([]SimulatedPod) bool { return b.sim.Workload(b.ns, "web").Logins > logins+10 }))
	require.NoError(t, b.StartAPIServer(b.ctx))
	require.NoError(t, b.Restart(b.ctx, "deployment", b.ns, "web"))
	b.recovers(t)
}
