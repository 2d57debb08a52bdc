package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// still is a cluster as it stands, and what was asked of it.
type still struct {
	objects map[string]any // by path
	hangs   map[string]bool
	writes  []string
}

func (s *still) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		s.writes = append(s.writes, r.Method+" "+r.URL.Path)
	}
	if s.hangs[r.URL.Path] {
		<-r.Context().Done()
		return
	}
	w.Header().Set("Content-Type", "application/json")
	o, ok := s.objects[r.URL.Path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		o = metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound, Status: metav1.StatusFailure,
			Details: &metav1.StatusDetails{Name: r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], Kind: "thing"},
		}
	}
	_ = json.NewEncoder(w).Encode(o)
}

const (
	pathOfWeb   = "/apis/apps/v1/namespaces/app/deployments/web"
	pathOfPods  = "/api/v1/namespaces/app/pods"
	pathOfDB    = "/api/v1/namespaces/app/secrets/db"
	pathOfES    = "/apis/external-secrets.io/v1/namespaces/app/externalsecrets/db"
	pathOfStore = "/apis/external-secrets.io/v1/namespaces/app/secretstores/vault"
)

// standing is a consumer that runs with what is served, since noon.
func standing() *still {
	labels := map[string]string{"app": "web"}
	one := int32(1)
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: map[string]string{
		restartedAt: noon.Add(time.Second).Format(time.RFC3339Nano), Mark: "r1-1",
	}}}
	isReady := map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}, "refreshTime": noon.Format(time.RFC3339)}
	return &still{hangs: map[string]bool{}, objects: map[string]any{
		pathOfES: map[string]any{
			"apiVersion": "external-secrets.io/v1", "kind": "ExternalSecret", "metadata": map[string]any{"name": "db"},
			"spec":   map[string]any{"refreshInterval": "1h", "secretStoreRef": map[string]any{"kind": "SecretStore", "name": "vault"}},
			"status": isReady,
		},
		pathOfStore: map[string]any{"apiVersion": "external-secrets.io/v1", "kind": "SecretStore", "metadata": map[string]any{"name": "vault"}, "status": isReady},
		pathOfDB: &corev1.Secret{
			TypeMeta: metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "db", CreationTimestamp: metav1.NewTime(noon)},
			Data: map[string][]byte{"password": []byte("what-is-served"), "other": []byte("x")},
		},
		pathOfWeb: &appsv1.Deployment{
			TypeMeta:   metav1.TypeMeta{Kind: "Deployment", APIVersion: "apps/v1"},
			ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "app", Annotations: map[string]string{"deployment.kubernetes.io/revision": "4"}},
			Spec:       appsv1.DeploymentSpec{Replicas: &one, Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: template},
			Status:     appsv1.DeploymentStatus{Replicas: 1, UpdatedReplicas: 1, ReadyReplicas: 1, AvailableReplicas: 1},
		},
		pathOfPods: podList(podOfWeb("web-1-a", noon.Add(2*time.Second), "r1-1")),
	}}
}

func podList(pods ...corev1.Pod) *corev1.PodList {
	return &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: pods}
}

func podOfWeb(name string, created time.Time, mark string) corev1.Pod {
	yes := true
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "app", CreationTimestamp: metav1.NewTime(created), Labels: map[string]string{"app": "web"}, Annotations: map[string]string{Mark: mark},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-1", Controller: &yes, APIVersion: "apps/v1"}},
		},
		Spec: corev1.PodSpec{NodeName: "node-1"},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(created.Add(time.Second))}},
			ContainerStatuses: []corev1.ContainerStatus{{
				Name: "main", ImageID: "example.com/web@sha256:0123456789abcdef0123", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
			}},
		},
	}
}

func lookOf(t *testing.T, s *still, d Delivery, change func(*Consumer)) *seen.Consumer {
	t.Helper()
	e := apiServer(t, s.ServeHTTP)
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }})
	c := &Consumer{
		Connection: "prod", Namespace: "app", Mode: Restart, ExternalSecrets: []string{"db"}, Workloads: [][]Workload{{{Kind: deployment, Name: "web"}}},
	}
	if change != nil {
		change(c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	out := k.Look(ctx, c, d)
	require.Empty(t, s.writes, "a look changes nothing")
	require.NotContains(t, fmt.Sprintf("%+v", out), "what-is-served")
	return out
}

func served(since time.Time) Delivery {
	return Delivery{ID: "r1", Since: since, Holds: []Value{{Role: "db", Field: "password", Secret: "what-is-served"}}}
}

func TestLook(t *testing.T) {
	t.Parallel()
	out := lookOf(t, standing(), served(noon), nil)
	require.True(t, out.Done, out.Error)
	require.Equal(t, seen.Counts{Externals: 1, Values: 1, Workloads: 1, WellWorkloads: 1, Pods: 1, WellPods: 1}, out.Counted)
	require.Equal(t, []seen.Store{{Kind: "SecretStore", Name: "vault", Ready: true}}, out.Stores)
	require.Equal(t, []seen.Value{{Role: "db", Field: "password", Secret: "db", Keys: []string{"password"}, Held: true}}, out.Values)
	require.Equal(t, []seen.Workload{{
		Kind: deployment, Name: "web", Wave: 1, Restarted: noon.Add(time.Second), Revision: "4", Replicas: 1, New: 1, Ready: 1, Complete: noon.Add(3 * time.Second),
	}}, out.Workloads)
	require.Equal(t, []seen.Pod{{
		Workload: "Deployment/web", Name: "web-1-a", Node: "node-1", Created: noon.Add(2 * time.Second), Ready: noon.Add(3 * time.Second), Image: "sha256:0123456789ab", New: true,
	}}, out.Pods)
	require.True(t, noon.Equal(out.Changed))

	for says, c := range map[string]struct {
		with   func(*still)
		d      Delivery
		change func(*Consumer)
	}{
		"key password of Secret db holds something else than what role db serves": {with: func(s *still) {
			s.objects[pathOfDB].(*corev1.Secret).Data["password"] = []byte("by-hand")
		}},
		"no key of Secret db holds what role db serves": {with: func(s *still) { delete(s.objects[pathOfDB].(*corev1.Secret).Data, "password") }},
		"Secret db is not there":                        {with: func(s *still) { delete(s.objects, pathOfDB) }},
		"SecretStore vault is not ready (InvalidProviderConfig): External Secrets cannot read from Vault": {with: func(s *still) {
			s.objects[pathOfStore].(map[string]any)["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "False", "reason": "InvalidProviderConfig"}}}
		}},
		"ExternalSecret db cannot be synced (SecretSyncedError)": {with: func(s *still) {
			s.objects[pathOfES].(map[string]any)["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "False", "reason": "SecretSyncedError"}}}
		}},
		"ExternalSecret db has refreshInterval 0": {with: func(s *still) {
			s.objects[pathOfES].(map[string]any)["spec"].(map[string]any)["refreshInterval"] = "0s"
		}},
		"has no thing web": {with: func(s *still) { delete(s.objects, pathOfWeb) }},
		"Deployment app/web: 0 of 1 new pods are available": {with: func(s *still) {
			s.objects[pathOfWeb].(*appsv1.Deployment).Status.AvailableReplicas = 0
		}},
		"pod web-1-old: is from before the change; restart it (kubectl rollout restart deployment/web -n app)": {with: func(s *still) {
			s.objects[pathOfPods] = podList(podOfWeb("web-1-old", noon.Add(-time.Minute), "r0-1"))
		}},
		"waits: CrashLoopBackOff (exit code 1, 3 restarts)": {with: func(s *still) {
			p := podOfWeb("web-1-a", noon, "r1-1")
			p.Status.Conditions[0].Status = corev1.ConditionFalse
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
			p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1}
			p.Status.ContainerStatuses[0].RestartCount = 3
			other := podOfWeb("web-1-0", noon, "r1-1")
			other.Status.Conditions[0].Status = corev1.ConditionFalse
			s.objects[pathOfWeb].(*appsv1.Deployment).Status.AvailableReplicas = 0
			s.objects[pathOfPods] = podList(other, p)
		}},
		"check 1 (pods): no pod of namespace app has the labels app=gone": {
			with: func(s *still) {},
			change: func(c *Consumer) {
				c.Workloads, c.Checks = nil, []Check{{Type: checkPods, Selector: "app=gone"}}
			},
		},
	} {
		s := standing()
		c.with(s)
		if c.change != nil {
			s.objects[pathOfPods] = podList()
		}
		out := lookOf(t, s, served(noon), c.change)
		require.False(t, out.Done, says)
		require.Contains(t, out.Error, says)
		require.NotContains(t, out.Error, "by-hand")
	}
}

// Pods from before a rotation that nobody has brought there are not called old, nor
// are those that are new by their mark or their age alone.
func TestLookAtAge(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		since time.Time
		mark  string // of the template
		pod   corev1.Pod
		ok    bool
	}{
		"marked, and older than the Secret is now": {noon.Add(time.Hour), "r1-1", podOfWeb("p", noon, "r1-1"), true},
		"of the way back":                          {noon.Add(time.Hour), "r1-2", podOfWeb("p", noon, "r1-2"), true},
		"restarted by another rotation since":      {noon, "r2-1", podOfWeb("p", noon.Add(time.Hour), "r2-1"), true},
		"of the next key alone":                    {noon.Add(time.Hour), "r1-0", podOfWeb("p", noon, "r1-0"), false},
		"from before":                              {noon, "", podOfWeb("p", noon.Add(-time.Second), ""), false},
		"nobody knows":                             {time.Time{}, "", podOfWeb("p", noon, ""), true},
	} {
		s := standing()
		s.objects[pathOfWeb].(*appsv1.Deployment).Spec.Template.Annotations[Mark] = c.mark
		s.objects[pathOfPods] = podList(c.pod)
		out := lookOf(t, s, served(c.since), nil)
		require.Equal(t, c.ok, out.Done, "%s: %s", name, out.Error)
		require.Equal(t, name == "nobody knows", out.Workloads[0].Unknown, name)
	}
}

// Where it counts, a pod runs with what stands in the Secret only if the delivery in
// question has restarted it, or if it began after that last changed; whatever nobody knows
// is not so. Checks are none of it.
func TestLookSurely(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		id   string
		mode Mode
		mark string // of the pod and its template
		born time.Duration
		ok   bool
	}{
		"restarted by it":                               {"r1-1", Restart, "r1-1", -time.Hour, true},
		"restarted by its way back":                     {"r1-1", Restart, "r1-2", -time.Hour, false},
		"restarted by another one, before":              {"r1-1", Restart, "r2-1", -time.Hour, false},
		"restarted by another one, since":               {"r1-1", Restart, "r2-1", time.Hour, true},
		"of a rotation, whichever way":                  {"r1", Restart, "r1-2", -time.Hour, true},
		"began in the second in which it changed":       {"r1-1", Observe, "", 0, false},
		"began after it changed":                        {"r1-1", Observe, "", time.Second, true},
		"nobody knows":                                  {"r1-1", Observe, "", -time.Second, false},
		"reads its files again, whenever they change":   {"r1-1", None, "", -time.Hour, true},
		"restarted by it, and the Secret was gone over": {"r1-1", Restart, "r1-1", time.Hour, true},
	} {
		s := standing()
		s.objects[pathOfWeb].(*appsv1.Deployment).Spec.Template.Annotations[Mark] = c.mark
		s.objects[pathOfPods] = podList(podOfWeb("p", noon.Add(c.born), c.mark))
		d := served(time.Time{})
		d.ID, d.Sure = c.id, true
		fails := func(of *Consumer) {
			of.Mode = c.mode
			of.Checks = []Check{{Type: checkPods, Selector: "app=gone"}}
		}
		out := lookOf(t, s, d, fails)
		require.Equal(t, c.ok, out.Done, "%s: %s", name, out.Error)

		s.objects[pathOfDB].(*corev1.Secret).Data["password"] = []byte("what-was-served-before")
		out = lookOf(t, s, d, fails)
		require.False(t, out.Done, name)
		require.Contains(t, out.Error, "holds something else than what role db serves", name)
	}
}

// What hangs costs the time of the look, and nothing of what the rest has shown; what
// would change something is not asked.
func TestLookIsBounded(t *testing.T) {
	t.Parallel()
	s := standing()
	s.hangs[pathOfES] = true
	began := time.Now()
	out := lookOf(t, s, served(noon), func(c *Consumer) {
		c.Checks = []Check{{Type: checkHTTP, Service: "http:web:80", Method: http.MethodPost}, {Type: checkPods, Selector: "app=web"}}
	})
	require.Less(t, time.Since(began), 3*time.Second)
	require.Contains(t, out.Error, "did not answer in time")
	require.Len(t, out.Pods, 1)
	require.True(t, out.Checks[1].Passed)
	require.False(t, out.Checks[0].Ran)
	require.Contains(t, out.Checks[0].Result, "not made: it sends POST")

	s = standing()
	s.hangs[pathOfPods] = true
	out = lookOf(t, s, served(noon), nil)
	require.Contains(t, out.Error, "did not answer in time")
	require.True(t, out.Values[0].Held)
}

// A step that failed has what it saw, too.
func TestEvidenceOfAFailure(t *testing.T) {
	t.Parallel()
	s := standing()
	p := podOfWeb("web-1-a", noon, "r1-1")
	p.Status.Conditions[0].Status = corev1.ConditionFalse
	p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	s.objects[pathOfPods] = podList(p)
	e := apiServer(t, s.ServeHTTP)
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }})
	c := &Consumer{Connection: "prod", Namespace: "app", Mode: Restart, Secrets: []string{"db"}, Workloads: [][]Workload{{{Kind: deployment, Name: "web"}}}}
	got := k.Restart(t.Context(), c, Delivery{ID: "r1-1", Since: noon})
	require.Error(t, got.Err)
	require.Contains(t, got.Seen.Error, "CrashLoopBackOff")
	require.Equal(t, "container main of pod web-1-a waits: CrashLoopBackOff", got.Seen.Pods[0].Problem)
	require.Contains(t, got.Seen.Workloads[0].Problem, "CrashLoopBackOff")
	require.Equal(t, "prod", got.Seen.Connection)
}

// Many logs are read by each look that can, and not believed from an earlier one.
func TestLookAtManyLogs(t *testing.T) {
	t.Parallel()
	s := standing()
	pod := podOfWeb("web-1-a", noon.Add(2*time.Second), "r1-1")
	for i := range logsPerLook + 1 {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i)})
	}
	const log = "/api/v1/namespaces/app/pods/web-1-a/log"
	s.objects[pathOfPods], s.objects[log] = podList(pod), "all is well"
	e := apiServer(t, s.ServeHTTP)
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }})
	c := &Consumer{
		Connection: "prod", Namespace: "app", Mode: Restart, ExternalSecrets: []string{"db"}, Workloads: [][]Workload{{{Kind: deployment, Name: "web"}}},
		Checks: []Check{{Type: checkLogs, Forbid: "password authentication failed"}},
	}
	out := k.Look(t.Context(), c, served(noon))
	require.True(t, out.Done, out.Error)
	s.objects[log] = "password authentication failed"
	out = k.Look(t.Context(), c, served(noon))
	require.False(t, out.Checks[0].Passed, out.Checks[0].Result)
}
