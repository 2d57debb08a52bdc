package consumer

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// pod is one of the Deployment web, made age ago, ready since then.
func pod(name, mark string, age time.Duration, change ...func(*corev1.Pod)) corev1.Pod {
	at, is := metav1.NewTime(noon.Add(-age)), true
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "app", CreationTimestamp: at, Annotations: map[string]string{},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-5d4f", Controller: &is}},
		},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: at}},
			ContainerStatuses: []corev1.ContainerStatus{{
				Name: "main", Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: at}},
			}},
		},
	}
	if mark != "" {
		p.Annotations[Mark] = mark
	}
	for _, c := range change {
		c(&p)
	}
	return p
}

func going(p *corev1.Pod) { at := metav1.NewTime(noon); p.DeletionTimestamp = &at }

func evicted(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }

func unready(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }

func waitsFor(reason string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		unready(p)
		p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason}}
	}
}

func web(want int32, change ...func(*appsv1.Deployment)) *workload {
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "app", Generation: 3},
		Spec:       appsv1.DeploymentSpec{Replicas: &want, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
		Status: appsv1.DeploymentStatus{
			ObservedGeneration: 3, Replicas: want, UpdatedReplicas: want, ReadyReplicas: want, AvailableReplicas: want,
		},
	}
	for _, c := range change {
		c(d)
	}
	return ofDeployment(d)
}

func TestProof(t *testing.T) {
	t.Parallel()
	restart := proof{mark: "r2", now: noon}
	observe := proof{since: noon.Add(-time.Minute), now: noon}
	for name, c := range map[string]struct {
		w    *workload
		pods []corev1.Pod
		p    proof
		left string // "" for proven
		bad  string
	}{
		"all are new":           {web(2), []corev1.Pod{pod("a", "r2", 0), pod("b", "r2", 0)}, restart, "", ""},
		"one of before":         {web(2), []corev1.Pod{pod("a", "r2", 0), pod("b", "r1", 0)}, restart, "pod b is from before", ""},
		"one without a mark":    {web(1), []corev1.Pod{pod("a", "", 0)}, restart, "pod a is from before", ""},
		"an old one terminates": {web(1), []corev1.Pod{pod("a", "r2", 0), pod("b", "r1", 0, going)}, restart, "old pod b still terminates", ""},
		"a new one terminates":  {web(1), []corev1.Pod{pod("a", "r2", 0), pod("b", "r2", 0, going)}, restart, "", ""},
		"an evicted one":        {web(1), []corev1.Pod{pod("a", "r2", 0), pod("b", "r1", 0, evicted)}, restart, "", ""},
		"too few":               {web(2), []corev1.Pod{pod("a", "r2", 0)}, restart, "1 of 2 pods are there", ""},
		"not ready":             {web(1), []corev1.Pod{pod("a", "r2", 0, unready)}, restart, "pod a is not ready", ""},
		"no replicas":           {web(0), nil, restart, "", ""},
		"crashes":               {web(1), []corev1.Pod{pod("a", "r2", 0, waitsFor("CrashLoopBackOff"))}, restart, "", "CrashLoopBackOff"},
		"an old one crashes":    {web(1), []corev1.Pod{pod("a", "r1", 0, waitsFor("CrashLoopBackOff"))}, restart, "from before", ""},
		"lacks a key, young":    {web(1), []corev1.Pod{pod("a", "r2", time.Second, waitsFor("CreateContainerConfigError"))}, restart, "not ready", ""},
		"lacks a key":           {web(1), []corev1.Pod{pod("a", "r2", 10*time.Second, waitsFor("CreateContainerConfigError"))}, restart, "", "CreateContainerConfigError"},
		"image pull, young":     {web(1), []corev1.Pod{pod("a", "r2", 50*time.Second, waitsFor("ErrImagePull"))}, restart, "not ready", ""},
		"image pull":            {web(1), []corev1.Pod{pod("a", "r2", time.Minute, waitsFor("ErrImagePull"))}, restart, "", "ErrImagePull"},
		"starts":                {web(1), []corev1.Pod{pod("a", "r2", time.Hour, waitsFor("ContainerCreating"))}, restart, "not ready", ""},
		"stalled": {web(1, func(d *appsv1.Deployment) {
			d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Reason: "ProgressDeadlineExceeded"}}
		}), []corev1.Pod{pod("a", "r2", 0)}, restart, "", "ProgressDeadlineExceeded"},
		"stalled before": {web(1, func(d *appsv1.Deployment) { // of the generation before
			d.Generation = 4
			d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Reason: "ProgressDeadlineExceeded"}}
		}), []corev1.Pod{pod("a", "r2", 0)}, restart, "has not seen", ""},
		"rolls":     {web(2, func(d *appsv1.Deployment) { d.Status.UpdatedReplicas = 1 }), nil, restart, "1 of 2 pods are new", ""},
		"surges":    {web(2, func(d *appsv1.Deployment) { d.Status.Replicas = 3 }), nil, restart, "1 old pods have not gone", ""},
		"available": {web(2, func(d *appsv1.Deployment) { d.Status.AvailableReplicas = 1 }), nil, restart, "1 of 2 new pods are available", ""},

		"observed, later":           {web(1), []corev1.Pod{pod("a", "", 30*time.Second)}, observe, "", ""},
		"observed, the same second": {web(1), []corev1.Pod{pod("a", "", time.Minute)}, observe, "", ""},
		"observed, earlier":         {web(1), []corev1.Pod{pod("a", "", time.Minute+time.Second)}, observe, "from before", ""},
	} {
		left, err := prove(c.w, c.pods, c.p)
		if c.bad != "" {
			require.ErrorContains(t, err, c.bad, name)
			require.True(t, kind.IsDefinite(err), name)
			continue
		}
		require.NoError(t, err, name)
		if c.left == "" {
			require.Empty(t, left, name)
		}
		require.Contains(t, left, c.left, name)
	}
}

func TestInitContainersCrash(t *testing.T) {
	t.Parallel()
	p := pod("a", "r2", 0, func(p *corev1.Pod) {
		p.Status.InitContainerStatuses = []corev1.ContainerStatus{{
			Name: "migrate", RestartCount: 3, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "a-secret"}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2, Message: "a-secret"}},
		}}
	})
	require.Equal(t, "container migrate of pod a waits: CrashLoopBackOff (exit code 2, 3 restarts)", broken(&p, noon))
}

func TestStabilization(t *testing.T) {
	t.Parallel()
	const long = time.Minute
	p := pod("a", "r2", 59*time.Second)
	require.Contains(t, unsettled(&p, noon, long), "is ready since 11:59:01, and has to be for 1m0s")
	p = pod("a", "r2", 61*time.Second)
	require.Empty(t, unsettled(&p, noon, long))
	p.Status.ContainerStatuses[0].RestartCount = 2 // ready again at once, for a probe is slow
	p.Status.ContainerStatuses[0].State.Running.StartedAt = metav1.NewTime(noon.Add(-30 * time.Second))
	require.Contains(t, unsettled(&p, noon, long), "has restarted (2 times), the last time at 11:59:30")
	p.Status.ContainerStatuses[0].State.Running.StartedAt = metav1.NewTime(noon.Add(-61 * time.Second))
	require.Empty(t, unsettled(&p, noon, long), "it has recovered")
	p.Status.ContainerStatuses[0].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
	require.Contains(t, unsettled(&p, noon, long), "does not run")
	unready(&p)
	require.Contains(t, unsettled(&p, noon, long), "is not ready")
}

func TestOtherRollouts(t *testing.T) {
	t.Parallel()
	n := int32(2)
	s := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "app", Generation: 2}, Spec: appsv1.StatefulSetSpec{Replicas: &n},
		Status: appsv1.StatefulSetStatus{ObservedGeneration: 2, ReadyReplicas: 2, UpdatedReplicas: 1, CurrentRevision: "a", UpdateRevision: "b"},
	}
	require.Equal(t, "1 of 2 pods are new", ofStatefulSet(s).left)
	s.Status.CurrentRevision = "b"
	require.Empty(t, ofStatefulSet(s).left)
	s.Status.ReadyReplicas = 1
	require.Equal(t, "1 of 2 pods are ready", ofStatefulSet(s).left)
	s.Status.ObservedGeneration = 0
	require.Contains(t, ofStatefulSet(s).left, "has not seen")
	d := &appsv1.DaemonSet{Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 3, UpdatedNumberScheduled: 2, NumberAvailable: 3}}
	require.Equal(t, "2 of 3 pods are new", ofDaemonSet(d).left)
	d.Status.UpdatedNumberScheduled, d.Status.NumberAvailable = 3, 2
	require.Equal(t, "2 of 3 pods are available", ofDaemonSet(d).left)
	d.Status.NumberAvailable = 3
	require.Empty(t, ofDaemonSet(d).left)
}

func TestPodsOfOthers(t *testing.T) {
	t.Parallel()
	own := func(of, name string) *corev1.Pod {
		p := pod("a", "", 0)
		p.OwnerReferences[0].Kind, p.OwnerReferences[0].Name = of, name
		return &p
	}
	require.True(t, ownedBy(own("ReplicaSet", "web-5d4f"), &workload{kind: deployment, name: "web"}))
	require.False(t, ownedBy(own("ReplicaSet", "web-api-5d4f"), &workload{kind: deployment, name: "web"}))
	require.True(t, ownedBy(own("ReplicaSet", "web-api-5d4f"), &workload{kind: deployment, name: "web-api"}))
	require.False(t, ownedBy(own("Job", "web-1"), &workload{kind: deployment, name: "web"}))
	require.True(t, ownedBy(own(statefulSet, "db"), &workload{kind: statefulSet, name: "db"}))
	require.False(t, ownedBy(own(daemonSet, "db"), &workload{kind: statefulSet, name: "db"}))
	require.False(t, ownedBy(&corev1.Pod{}, &workload{kind: deployment, name: "web"}))
}

func TestRestarters(t *testing.T) {
	t.Parallel()
	for _, key := range restarters {
		w := web(1)
		require.Empty(t, restarter(w))
		w.meta.Annotations = map[string]string{key: "true"}
		require.Equal(t, key, restarter(w))
		w.meta.Annotations[key] = "false"
		require.Empty(t, restarter(w))
	}
}

func TestValuesPrintAsTheirRole(t *testing.T) {
	t.Parallel()
	require.NotContains(t, fmt.Sprintf("%v %+v %#v %s", Value{Role: "db", Secret: "a-secret"}, delivery("r", "a-secret"), []Value{{Role: "db", Field: "password", Secret: "a-secret"}}, &secret{name: "s", data: map[string][]byte{"a": []byte("a-secret")}}), "a-secret")
}
