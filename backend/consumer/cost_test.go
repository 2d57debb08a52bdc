package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// costly is an API server with Deployments of one pod each, that counts what it is
// asked. Pods of a restarted one are new at the next tick, and ready at the one after.
type costly struct {
	t *testing.T
	// lists: Deployments may be listed; otherwise what a Role with names permits.
	lists bool
	// refused, when set, is a Deployment whose restart a policy refuses.
	refused string
	// says, when set, is a Deployment whose pod has a line in its log.
	says string

	mu          sync.Mutex
	now         time.Time
	deployments map[string]*appsv1.Deployment
	pods        map[string]*corev1.Pod
	rolling     map[string]int
	asked       map[string]int
	patched     map[string]int
}

func newCostly(t *testing.T, n int) *costly {
	t.Helper()
	f := &costly{
		t: t, now: noon, deployments: map[string]*appsv1.Deployment{}, pods: map[string]*corev1.Pod{}, rolling: map[string]int{},
		asked: map[string]int{}, patched: map[string]int{},
	}
	for i := range n {
		name, one := fmt.Sprintf("web-%03d", i), int32(1)
		labels := map[string]string{"app": name, "tier": "web"}
		f.deployments[name] = &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "app", Generation: 1, Labels: labels},
			Spec: appsv1.DeploymentSpec{
				Replicas: &one, Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: map[string]string{}}},
			},
			Status: appsv1.DeploymentStatus{ObservedGeneration: 1, Replicas: 1, UpdatedReplicas: 1, ReadyReplicas: 1, AvailableReplicas: 1},
		}
		f.pods[name] = f.pod(name, time.Hour)
	}
	return f
}

func (f *costly) pod(name string, age time.Duration) *corev1.Pod {
	d, is := f.deployments[name], true
	at := metav1.NewTime(f.now.Add(-age))
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("%s-5d4f-%d", name, d.Generation), Namespace: "app", CreationTimestamp: at,
			UID:    types.UID(fmt.Sprintf("%s-%d", name, d.Generation)),
			Labels: d.Spec.Template.Labels, Annotations: maps.Clone(d.Spec.Template.Annotations),
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: name + "-5d4f", Controller: &is}},
		},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main"}}},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: at}},
		},
	}
}

// tick lets time pass, and rollouts go on.
func (f *costly) tick(by time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(by)
	for name, n := range f.rolling {
		d := f.deployments[name]
		switch n {
		case 0:
			f.pods[name] = f.pod(name, 0)
			unready(f.pods[name])
		case 1:
			f.pods[name] = f.pod(name, 0)
			d.Status.ObservedGeneration = d.Generation
			delete(f.rolling, name)
			continue
		}
		f.rolling[name]++
	}
}

func (f *costly) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *costly) status(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.WriteHeader(code)
	f.send(w, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason, Message: message})
}

func (f *costly) send(w http.ResponseWriter, what any) {
	if err := json.NewEncoder(w).Encode(what); err != nil {
		f.t.Error(err)
	}
}

func (f *costly) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	path, name, named := strings.Cut(strings.TrimPrefix(r.URL.Path, "/apis/apps/v1/namespaces/app/"), "/")
	what := path
	switch {
	case strings.HasSuffix(r.URL.Path, "/pods"):
		what = "list pods"
	case path == "deployments" && !named:
		what = "list deployments"
	case path == "deployments" && r.Method == http.MethodPatch && r.URL.Query().Has("dryRun"):
		what = "try"
	case path == "deployments":
		what = strings.ToLower(r.Method)
	case strings.HasSuffix(r.URL.Path, "reviews"):
		what = "review"
	case strings.HasSuffix(r.URL.Path, "/log"):
		what = "log"
	case strings.HasSuffix(r.URL.Path, "/secrets/other"):
		what = "secret"
	}
	f.asked[what]++
	switch what {
	case "list pods":
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}}
		for _, name := range slices.Sorted(maps.Keys(f.pods)) {
			list.Items = append(list.Items, *f.pods[name])
		}
		f.send(w, list)
	case "list deployments":
		f.list(w)
	case "get", "patch", "try":
		f.one(w, r, what, name)
	case "review":
		f.review(w, r)
	case "log":
		w.Header().Set("Content-Type", "text/plain")
		_, _ = fmt.Fprintln(w, "all is well")
		if f.says != "" && strings.Contains(r.URL.Path, f.says) {
			_, _ = fmt.Fprintln(w, "authentication failed")
		}
	case "secret":
		f.status(w, http.StatusForbidden, metav1.StatusReasonForbidden, "")
	default:
		f.t.Errorf("nobody should ask for %s", r.URL.Path)
		f.status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "")
	}
}

func (f *costly) list(w http.ResponseWriter) {
	if !f.lists {
		f.status(w, http.StatusForbidden, metav1.StatusReasonForbidden, "")
		return
	}
	list := appsv1.DeploymentList{TypeMeta: metav1.TypeMeta{Kind: "DeploymentList", APIVersion: "apps/v1"}}
	for _, name := range slices.Sorted(maps.Keys(f.deployments)) {
		list.Items = append(list.Items, *f.deployments[name])
	}
	f.send(w, list)
}

func (f *costly) one(w http.ResponseWriter, r *http.Request, what, name string) {
	d := f.deployments[name]
	if d == nil {
		f.status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "")
		return
	}
	if what == "try" && name == f.refused {
		f.status(w, http.StatusForbidden, metav1.StatusReasonForbidden, "ValidatingAdmissionPolicy 'keep' with binding 'keep' denied request")
		return
	}
	if what == "patch" {
		var patch struct {
			Spec struct{ Template corev1.PodTemplateSpec }
		}
		if err := json.NewDecoder(r.Body).Decode(&patch); err != nil {
			f.t.Error(err)
		}
		maps.Copy(d.Spec.Template.Annotations, patch.Spec.Template.Annotations)
		d.Generation++
		f.rolling[name] = 0
		f.patched[name]++
	}
	out := d.DeepCopy()
	out.TypeMeta = metav1.TypeMeta{Kind: "Deployment", APIVersion: "apps/v1"}
	f.send(w, out)
}

// review answers what a Role with names gives.
func (f *costly) review(w http.ResponseWriter, r *http.Request) {
	if strings.HasSuffix(r.URL.Path, "selfsubjectaccessreviews") {
		var review authorizationv1.SelfSubjectAccessReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			f.t.Error(err)
		}
		review.Status.Allowed = true
		f.send(w, review)
		return
	}
	review := authorizationv1.SelfSubjectRulesReview{TypeMeta: metav1.TypeMeta{Kind: "SelfSubjectRulesReview", APIVersion: "authorization.k8s.io/v1"}}
	review.Status.ResourceRules = []authorizationv1.ResourceRule{
		{Verbs: []string{"get", "patch"}, APIGroups: []string{"apps"}, Resources: []string{"deployments"}, ResourceNames: slices.Sorted(maps.Keys(f.deployments))},
		{Verbs: []string{"list"}, APIGroups: []string{""}, Resources: []string{"pods"}},
	}
	f.send(w, review)
}

func (f *costly) total() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, k := range f.asked {
		n += k
	}
	return n
}

// costs is a consumer of n workloads: one is a canary, and the rest are restarted max
// at once.
func costs(n, most int) *Consumer {
	waves := [][]Workload{nil, nil}
	for i := range n {
		wave := min(i, 1)
		waves[wave] = append(waves[wave], Workload{Kind: deployment, Name: fmt.Sprintf("web-%03d", i)})
	}
	return &Consumer{Name: "app", Connection: "prod", Namespace: "app", Mode: Restart, Workloads: waves, MaxParallel: most, Stabilization: 20 * time.Second}
}

// engine is a process: what it knows is lost with it. Its clock is that of f, and
// nothing keeps it from asking as fast as it can.
func (f *costly) engine() *clusters {
	e := apiServer(f.t, f.ServeHTTP)
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }, Now: f.clock})
	k.dial = func(e *connection.Entry) (*cluster, error) {
		c, err := dial(e, podFolder)
		if err == nil {
			c.clients, err = newClients(&rest.Config{Host: c.host, QPS: -1}, c.http)
		}
		return c, err
	}
	return k
}

// bring does a step until it is done, with a look every two seconds.
func (f *costly) bring(step func(context.Context, *Consumer, Delivery) Progress, c *Consumer, d Delivery, most int) (looks int, told []string) {
	f.t.Helper()
	for looks = 1; looks <= most; looks++ {
		p := step(f.t.Context(), c, d)
		require.NoError(f.t, p.Err)
		told = append(told, p.Told...)
		if p.Done {
			return looks, told
		}
		f.tick(2 * time.Second)
	}
	require.FailNow(f.t, "it does not end", "%v", told)
	return looks, told
}

// TestCost: what a consumer of many workloads asks of an API server is a constant for
// each of them, and one for each look, whatever it may list.
func TestCost(t *testing.T) {
	t.Parallel()
	const n = 60
	for _, lists := range []bool{false, true} {
		for _, most := range []int{6, 0} {
			t.Run(fmt.Sprintf("lists=%v,max_parallel=%d", lists, most), func(t *testing.T) {
				t.Parallel()
				f := newCostly(t, n)
				f.lists = lists
				k := f.engine()
				c := costs(n, most)
				found := k.Preflight(t.Context(), c)
				require.NoError(t, found.Err)
				require.Empty(t, found.Problems)
				before := f.total()
				require.LessOrEqual(t, before, 2*n+3, "preflight reads and tries each once: %v", f.asked)

				d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
				restarts, told := f.bring(k.Restart, c, d, 100)
				perWorkload := 3 // read, restarted, read when its pods were new
				require.LessOrEqual(t, f.total()-before, perWorkload*n+2*restarts+2, "restart in %d looks: %v", restarts, f.asked)
				for name, times := range f.patched {
					require.Equal(t, 1, times, name)
				}
				require.Len(t, f.patched, n)
				require.Less(t, len(told), 3*restarts, "%v", told)

				before = f.total()
				checks, seen := f.bring(k.Check, c, d, 100)
				require.GreaterOrEqual(t, checks, 5, "it waits for the stabilization")
				require.LessOrEqual(t, f.total()-before, n+2*checks, "each is read once more: %v", f.asked)
				require.Contains(t, told, "Deployment app/web-000: restarted")
				require.Contains(t, told, "Deployment app/web-000: all pods (1) run with the change")
				require.Len(t, seen, 1, "%v", seen)
				require.Contains(t, seen[0], "60 workloads (Deployment app/web-000, ")
				require.Contains(t, seen[0], "and 52 more): 60 pods run with the change, and have been well for 20s")
				t.Logf("%d workloads: %d requests in %d looks %v", n, f.total(), restarts+checks, f.asked)
			})
		}
	}
}

// TestCostOfALook: a look at workloads that only wait asks for their pods and nothing
// else, however many there are.
func TestCostOfALook(t *testing.T) {
	t.Parallel()
	look := func(n int) int {
		f := newCostly(t, n)
		k := f.engine()
		c := costs(n, 0)
		c.Workloads = [][]Workload{slices.Concat(c.Workloads...)}
		d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
		for range 10 { // all are restarted, and none is ready
			require.NoError(t, k.Restart(t.Context(), c, d).Err)
			if len(f.patched) == n {
				break
			}
		}
		require.Len(t, f.patched, n)
		f.tick(time.Second)
		before := f.total()
		p := k.Restart(t.Context(), c, d)
		require.NoError(t, p.Err)
		require.NotEmpty(t, p.Waits)
		return f.total() - before
	}
	require.Equal(t, 1, look(10))
	require.Equal(t, look(10), look(80))
}

// TestAnotherProcessGoesOn: a process that knows nothing finds out from the cluster
// what was restarted, and restarts nothing twice.
func TestAnotherProcessGoesOn(t *testing.T) {
	t.Parallel()
	const n = readsPerLook + 20
	f := newCostly(t, n)
	c := costs(n, 10)
	d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
	k := f.engine()
	for len(f.patched) < readsPerLook+5 {
		require.NoError(t, k.Restart(t.Context(), c, d).Err)
		f.tick(2 * time.Second)
	}
	require.Less(t, len(f.patched), n)
	before := f.total()
	k = f.engine()
	looks, _ := f.bring(k.Restart, c, d, 100)
	checks, _ := f.bring(k.Check, c, d, 100)
	require.Len(t, f.patched, n)
	for name, times := range f.patched {
		require.Equal(t, 1, times, name)
	}
	require.LessOrEqual(t, f.total()-before, 2*n+4*20+2*(looks+checks), "each is read once in a step: %v", f.asked)
}

// TestNobodyRemembers: each look may be another process's.
func TestNobodyRemembers(t *testing.T) {
	t.Parallel()
	const n = 12
	f := newCostly(t, n)
	c := costs(n, 3)
	d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
	anew := func(step func(*clusters) func(context.Context, *Consumer, Delivery) Progress) {
		f.bring(func(ctx context.Context, c *Consumer, d Delivery) Progress { return step(f.engine())(ctx, c, d) }, c, d, 100)
	}
	anew(func(k *clusters) func(context.Context, *Consumer, Delivery) Progress { return k.Restart })
	anew(func(k *clusters) func(context.Context, *Consumer, Delivery) Progress { return k.Check })
	require.Len(t, f.patched, n)
	for name, times := range f.patched {
		require.Equal(t, 1, times, name)
	}
}

// TestOneBadOfMany: what was proven is looked at again, and one that turns bad ends
// the delivery before any other is restarted.
func TestOneBadOfMany(t *testing.T) {
	t.Parallel()
	const n = 20
	f := newCostly(t, n)
	k := f.engine()
	c := costs(n, 3)
	d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
	for len(f.patched) < 8 {
		require.NoError(t, k.Restart(t.Context(), c, d).Err)
		f.tick(2 * time.Second)
	}
	canary := f.pods["web-000"]
	unready(canary)
	canary.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "main", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
	}}
	restarted := len(f.patched)
	p := k.Restart(t.Context(), c, d)
	require.ErrorContains(t, p.Err, "CrashLoopBackOff")
	require.Len(t, f.patched, restarted)
	// One that somebody has turned back is restarted before any other.
	f.pods["web-000"] = f.pod("web-000", time.Hour)
	delete(f.pods["web-000"].Annotations, Mark)
	delete(f.deployments["web-000"].Spec.Template.Annotations, Mark)
	f.tick(readAgain)
	p = k.Restart(t.Context(), c, d)
	require.NoError(t, p.Err)
	require.Equal(t, 2, f.patched["web-000"])
	require.Len(t, f.patched, restarted)
}

// TestStalledOfMany: a controller that gives up is noticed, though its pods say
// nothing of it.
func TestStalledOfMany(t *testing.T) {
	t.Parallel()
	const n = 10
	f := newCostly(t, n)
	k := f.engine()
	c := costs(n, 0)
	d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
	require.NoError(t, k.Restart(t.Context(), c, d).Err)
	f.tick(time.Second)
	f.rolling = map[string]int{}
	canary := f.deployments["web-000"]
	canary.Status.ObservedGeneration = canary.Generation
	canary.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Reason: "ProgressDeadlineExceeded"}}
	require.NoError(t, k.Restart(t.Context(), c, d).Err)
	f.tick(readAgain)
	require.ErrorContains(t, k.Restart(t.Context(), c, d).Err, "ProgressDeadlineExceeded")
}

// TestPreflightOfMany: what is not permitted and what a policy refuses is found among
// many.
func TestPreflightOfMany(t *testing.T) {
	t.Parallel()
	const n = 40
	f := newCostly(t, n)
	f.refused = "web-017"
	k := f.engine()
	found := k.Preflight(t.Context(), costs(n, 0))
	require.NoError(t, found.Err)
	require.Len(t, found.Problems, 1)
	require.Contains(t, found.Problems[0], "Deployment app/web-017 cannot be restarted")
	require.Contains(t, found.Problems[0], "policy keep refuses")

	c := costs(n, 0)
	c.Secrets = []string{"other"}
	found = k.Preflight(t.Context(), c)
	require.Contains(t, strings.Join(found.Problems, "\n"), "may not get secrets other")
}

// TestLogsOfMany: more logs than one look may read are read by several, each once.
func TestLogsOfMany(t *testing.T) {
	t.Parallel()
	const n = logsPerLook + 10
	f := newCostly(t, n)
	k := f.engine()
	c := costs(n, 0)
	c.Checks = []Check{{Type: checkLogs, Forbid: "authentication failed"}}
	d := Delivery{ID: "r1", Since: noon.Add(-time.Minute)}
	f.bring(k.Restart, c, d, 100)
	f.bring(k.Check, c, d, 100)
	require.Equal(t, n, f.asked["log"])

	f.says = fmt.Sprintf("web-%03d", n-1)
	d.ID = "r2"
	f.bring(k.Restart, c, d, 100)
	var p Progress
	for range 100 {
		if p = k.Check(t.Context(), c, d); p.Err != nil {
			break
		}
		require.False(t, p.Done)
		f.tick(2 * time.Second)
	}
	require.ErrorContains(t, p.Err, "has written 1 lines with what is forbidden")
	require.False(t, kind.IsDefinite(p.Err))
	f.tick(2 * checkTimeout)
	require.True(t, kind.IsDefinite(k.Check(t.Context(), c, d).Err))
}
