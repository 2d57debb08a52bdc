package consumers_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// wave is one of a consumer: some workloads by name, some by a label.
type wave struct {
	named []string // Kind/name
	label string   // of Deployments
	all   []string // Kind/name, those with the label too
}

// scaleWaves are 200 workloads in four waves.
func scaleWaves() []wave {
	several := func(kind, name string, n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("%s/%s-%02d", kind, name, i))
		}
		return out
	}
	front, back := several("Deployment", "front", 79), several("Deployment", "back", 60)
	stores, agents := several("StatefulSet", "store", 40), several("DaemonSet", "agent", 20)
	return []wave{
		{named: []string{"Deployment/canary"}, all: []string{"Deployment/canary"}},
		{label: "front", all: front},
		{named: stores, all: stores},
		{named: agents, label: "back", all: slices.Concat(agents, back)},
	}
}

const scaleParallel = 20

// twoHundred workloads follow a rotation in waves, though the plugin is killed in the
// middle: each is restarted once, and what that costs the API server is bounded. The
// engine may do what a Role with names permits, and list Deployments.
func twoHundred(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	waves := scaleWaves()
	annotations := toRedis(n)
	annotations["sim/every"] = "3s"
	s.deployMany(waves, annotations)
	s.must("connections/rotator", s.rotator(waves))
	s.consumer(map[string]any{
		"connection": "rotator", "workloads": s.wavesText(waves), "max_parallel": scaleParallel, "rollout_timeout": "5m",
	})
	s.must("roles/app", map[string]any{"consumers": "web"})
	h := s.record()

	began := time.Now()
	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
		if k := h.restarted(); k < 60 {
			return fmt.Errorf("%d workloads were restarted; %v", k, s.rotation(id)["roles"])
		}
		return nil
	}))
	_, err := s.vault.KillPlugin()
	require.NoError(t, err)
	killedAt := h.restarted()
	require.Less(t, killedAt, 150, "the plugin is killed in the middle")
	s.until(id, "grace")
	took := time.Since(began).Round(time.Second)
	h.stop()
	require.NoError(t, h.err)
	restarts, most := s.wavesRespected(h, waves)

	requests, err := s.cluster.Requests(s.ns, "rotator")
	require.NoError(t, err)
	by, verbs := map[string]int{}, map[string]int{}
	for _, r := range requests {
		require.True(t, strings.HasPrefix(r.Agent, "vault-plugin-secrets-harmonyflow/"), r.Agent)
		by[r.String()]++
		verbs[r.Verb]++
	}
	t.Logf("requests: %v", by)
	// A restart of each is tried, and made. One that is named is read before the rotation,
	// before its restart, once or twice when its pods are new, for the checks, and by who
	// goes on after the kill; those that roll out for long, again every ten seconds. Each
	// look reads the ExternalSecret, the Secret, the pods and what two selectors find.
	// Beyond that there are the connection, the rights, the store, the force, and lists
	// that are refused.
	named := 0
	for _, wave := range waves {
		named += len(wave.named)
	}
	looks := int(took/(2*time.Second)) + 3
	bound := 2*restarts + 6*named + 5*looks + scaleParallel*int(took/(10*time.Second)) + 20
	require.LessOrEqual(t, len(requests), bound)

	s.must("retire/redis/app", nil)
	s.until(id, "completed")
	require.False(t, accepts(t, n, "the-first-password"))
	before := s.sim.Total()
	require.NoError(t, s.sim.Wait(s.ctx, s.ns, "canary", func([]kube.SimulatedPod) bool { return s.sim.Total().Logins > before.Logins+400 }))
	total := s.sim.Total()
	figure(t, "200 workloads in 4 waves: %d restarts in %s, at most %d at once, plugin killed after %d; %d API requests (%.1f a workload; bound %d): %s; %d logins, %d refused",
		restarts, took, most, killedAt, len(requests), float64(len(requests))/float64(restarts), bound, counted(verbs), total.Logins, total.Refused)
	require.Zero(t, total.Refused)
}

func counted(of map[string]int) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(of)) {
		out = append(out, fmt.Sprintf("%d %s", of[name], name))
	}
	return strings.Join(out, ", ")
}

// deployMany makes all workloads, of one pod each, and waits for them.
func (s *scene) deployMany(waves []wave, annotations map[string]string) {
	s.t.Helper()
	text, err := json.Marshal(annotations)
	require.NoError(s.t, err)
	var documents strings.Builder
	for _, wave := range waves {
		for _, one := range wave.all {
			kindOf, name, _ := strings.Cut(one, "/")
			extra := map[string]string{
				"Deployment":  "replicas: 1",
				"StatefulSet": "replicas: 1\n  serviceName: " + name,
				"DaemonSet":   "revisionHistoryLimit: 3",
			}[kindOf]
			tier := name
			if kindOf == "Deployment" && wave.label != "" {
				tier = wave.label
			}
			fmt.Fprintf(&documents, `---
apiVersion: apps/v1
kind: %s
metadata: {name: %s, namespace: %s, labels: {tier: %s}}
spec:
  %s
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s}, annotations: %s}
    spec: {containers: [{name: main, image: example.com/web:1}]}
`, kindOf, name, s.ns, tier, extra, name, name, text)
		}
	}
	require.NoError(s.t, s.cluster.Apply(s.ctx, documents.String()))
	for _, wave := range waves {
		for _, one := range wave.all {
			kindOf, name, _ := strings.Cut(one, "/")
			require.NoError(s.t, s.cluster.WaitRollout(s.ctx, strings.ToLower(kindOf), s.ns, name))
		}
	}
}

// wavesText are the workloads of the consumer.
func (s *scene) wavesText(waves []wave) string {
	s.t.Helper()
	var out [][]map[string]string
	for _, wave := range waves {
		var list []map[string]string
		for _, one := range wave.named {
			kindOf, name, _ := strings.Cut(one, "/")
			list = append(list, map[string]string{"kind": kindOf, "name": name})
		}
		if wave.label != "" {
			list = append(list, map[string]string{"kind": "Deployment", "selector": "tier=" + wave.label})
		}
		out = append(out, list)
	}
	text, err := json.Marshal(out)
	require.NoError(s.t, err)
	return string(text)
}

// rotator is a connection that may do what the consumer needs, and no more.
func (s *scene) rotator(waves []wave) map[string]any {
	s.t.Helper()
	names := map[string][]string{}
	for _, wave := range waves {
		for _, one := range wave.named {
			kindOf, name, _ := strings.Cut(one, "/")
			names[kindOf] = append(names[kindOf], name)
		}
	}
	apps := []string{"apps"}
	token, err := s.cluster.ServiceAccount(s.ctx, s.ns, "rotator",
		rbacv1.PolicyRule{APIGroups: []string{"external-secrets.io"}, Resources: []string{"externalsecrets"}, ResourceNames: []string{"app"}, Verbs: []string{"get", "patch"}},
		rbacv1.PolicyRule{APIGroups: []string{"external-secrets.io"}, Resources: []string{"secretstores"}, Verbs: []string{"get"}},
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"app"}, Verbs: []string{"get"}},
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
		rbacv1.PolicyRule{APIGroups: apps, Resources: []string{"deployments"}, Verbs: []string{"get", "list", "patch"}},
		rbacv1.PolicyRule{APIGroups: apps, Resources: []string{"statefulsets"}, ResourceNames: names["StatefulSet"], Verbs: []string{"get", "patch"}},
		rbacv1.PolicyRule{APIGroups: apps, Resources: []string{"daemonsets"}, ResourceNames: names["DaemonSet"], Verbs: []string{"get", "patch"}},
	)
	require.NoError(s.t, err)
	out := s.reaches(s.cluster)
	out["token"] = token
	return out
}

// history is what happened in a namespace, in the order of resource versions, which is
// the order in which the API server has stored it.
type history struct {
	stop func()

	mu    sync.Mutex
	err   error
	marks map[string][]int // when the template of a workload got another mark
	mark  map[string]string
	pods  map[types.UID]*podHistory
}

type podHistory struct {
	app         string
	ready, gone int
}

// restarted is how many workloads were.
func (h *history) restarted() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.marks)
}

// record follows the workloads and the pods of the namespace from now on.
func (s *scene) record() *history {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	h := &history{marks: map[string][]int{}, mark: map[string]string{}, pods: map[types.UID]*podHistory{}}
	var following sync.WaitGroup
	h.stop = func() { cancel(); following.Wait() }
	s.t.Cleanup(h.stop)
	follow := func(version string, objects []metav1.Object, open func(context.Context, metav1.ListOptions) (watch.Interface, error)) {
		for _, o := range objects {
			h.see(watch.Added, o)
		}
		following.Go(func() { h.follow(ctx, version, open) })
	}
	pods, err := s.cluster.Core.Pods(s.ns).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	follow(pods.ResourceVersion, objectsOf(pods.Items), s.cluster.Core.Pods(s.ns).Watch)
	deployments, err := s.cluster.Apps.Deployments(s.ns).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	follow(deployments.ResourceVersion, objectsOf(deployments.Items), s.cluster.Apps.Deployments(s.ns).Watch)
	sets, err := s.cluster.Apps.StatefulSets(s.ns).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	follow(sets.ResourceVersion, objectsOf(sets.Items), s.cluster.Apps.StatefulSets(s.ns).Watch)
	daemons, err := s.cluster.Apps.DaemonSets(s.ns).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	follow(daemons.ResourceVersion, objectsOf(daemons.Items), s.cluster.Apps.DaemonSets(s.ns).Watch)
	return h
}

func objectsOf[T any, P interface {
	*T
	metav1.Object
}](items []T) []metav1.Object {
	out := make([]metav1.Object, len(items))
	for i := range items {
		out[i] = P(&items[i])
	}
	return out
}

// follow goes on where a watch has ended until ctx does. It misses nothing, or fails.
func (h *history) follow(ctx context.Context, version string, open func(context.Context, metav1.ListOptions) (watch.Interface, error)) {
	for ctx.Err() == nil {
		w, err := open(ctx, metav1.ListOptions{ResourceVersion: version})
		if err != nil {
			h.fail(ctx, err)
			return
		}
		for e := range w.ResultChan() {
			o, ok := e.Object.(metav1.Object)
			if !ok {
				h.fail(ctx, fmt.Errorf("a watch ended: %v", e.Object))
				break
			}
			version = o.GetResourceVersion()
			h.see(e.Type, o)
		}
		w.Stop()
	}
}

func (h *history) fail(ctx context.Context, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil && ctx.Err() == nil {
		h.err = err
	}
}

func (h *history) see(of watch.EventType, o metav1.Object) {
	h.mu.Lock()
	defer h.mu.Unlock()
	version, err := strconv.Atoi(o.GetResourceVersion())
	if err != nil {
		h.err = err
	}
	var name string
	var template corev1.PodTemplateSpec
	switch o := o.(type) {
	case *corev1.Pod:
		h.seePod(of, o, version)
		return
	case *appsv1.Deployment:
		name, template = "Deployment/"+o.Name, o.Spec.Template
	case *appsv1.StatefulSet:
		name, template = "StatefulSet/"+o.Name, o.Spec.Template
	case *appsv1.DaemonSet:
		name, template = "DaemonSet/"+o.Name, o.Spec.Template
	}
	mark := template.Annotations["harmonyflow.io/rotation"] + template.Annotations["kubectl.kubernetes.io/restartedAt"]
	if before, known := h.mark[name]; known && before != mark {
		h.marks[name] = append(h.marks[name], version)
	}
	h.mark[name] = mark
}

func (h *history) seePod(of watch.EventType, p *corev1.Pod, version int) {
	one := h.pods[p.UID]
	if one == nil {
		one = &podHistory{app: p.Labels["app"]}
		h.pods[p.UID] = one
	}
	if of == watch.Deleted {
		one.gone = version
		return
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && one.ready == 0 {
			one.ready = version
		}
	}
}

// wavesRespected fails unless every workload was restarted once, its pod was made anew
// once, no workload was restarted before all new pods of the waves before were ready and
// all old ones gone, and no more were under way than may be. most is how many were.
func (s *scene) wavesRespected(h *history, waves []wave) (restarts, most int) {
	t := s.t
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	pods := map[string][]*podHistory{}
	for _, p := range h.pods {
		pods[p.app] = append(pods[p.app], p)
	}
	type moment struct{ at, by int }
	var moments []moment
	before := 0 // when the waves before were done
	for i, wave := range waves {
		done := 0
		for _, one := range wave.all {
			_, name, _ := strings.Cut(one, "/")
			require.Len(t, h.marks[one], 1, "%s is restarted once", one)
			require.Len(t, pods[name], 2, "%s: one pod of before, and one of after", one)
			begin, end := h.marks[one][0], 0
			require.Greater(t, begin, before, "%s of wave %d is restarted after the wave before is done", one, i+1)
			living := 0
			for _, p := range pods[name] {
				end = max(end, p.gone, p.ready)
				if p.gone == 0 {
					living++
				}
			}
			require.Equal(t, 1, living, one)
			moments = append(moments, moment{begin, 1}, moment{end, -1})
			done = max(done, end)
			restarts++
		}
		before = done
	}
	slices.SortFunc(moments, func(a, b moment) int { return a.at - b.at })
	running := 0
	for _, m := range moments {
		running += m.by
		most = max(most, running)
	}
	require.LessOrEqual(t, most, scaleParallel)
	return restarts, most
}
