package consumer

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestHeldAllAlong: on the way back, Secrets that never got what is taken back count
// as they are, where External Secrets does not react.
func TestHeldAllAlong(t *testing.T) {
	t.Parallel()
	const served, undone = "what-was-before", "what-has-failed"
	back := delivery("r1-2", served)
	back.Undone = []Value{{Role: back.Holds[0].Role, Secret: undone}}
	ring := delivery("r1-2", served)
	ring.Undone = []Value{{Role: "another", Secret: undone}}
	for name, c := range map[string]struct {
		secrets []*secret
		d       Delivery
		want    bool
	}{
		"as it was":                     {[]*secret{held("a", false, "app", served)}, back, true},
		"got what has failed":           {[]*secret{held("a", false, undone)}, back, false},
		"one of two did":                {[]*secret{held("a", false, served), held("b", false, undone)}, back, false},
		"one of two did, in a template": {[]*secret{held("a", false, served), held("b", true, "redis://:"+undone+"@db")}, back, false},
		"not there":                     {[]*secret{held("a", false, served), {name: "b", missing: true}}, back, false},
		"no Secret at all":              {nil, back, false},
		"of a key ring":                 {[]*secret{held("a", false, served)}, ring, false},
		"on the way there":              {[]*secret{held("a", false, served)}, delivery("r1-1", served), false},
	} {
		require.Equal(t, c.want, heldAllAlong(c.secrets, c.d), name)
	}
	for age, want := range map[time.Duration]bool{enoughAfter: false, enoughAfter + time.Second: true} {
		back.Since = noon.Add(-age)
		require.Equal(t, want, (&step{d: back, now: noon}).enough(), age)
	}
	there := delivery("r1-1", served)
	there.Since = noon.Add(-time.Hour)
	require.False(t, (&step{d: there, now: noon}).enough())
}

// TestRolloutThatIsTakenBack: the way back waits for no rollout of the way there, and
// for none that has failed.
func TestRolloutThatIsTakenBack(t *testing.T) {
	t.Parallel()
	marked := func(d *appsv1.Deployment) { d.Spec.Template.Annotations = map[string]string{Mark: "r1-1"} }
	stalled := func(d *appsv1.Deployment) {
		d.Status.UpdatedReplicas, d.Status.AvailableReplicas = 1, 1
		d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Reason: "ProgressDeadlineExceeded"}}
	}
	underWay := func(d *appsv1.Deployment) { d.Status.UpdatedReplicas = 1 }
	s := &step{c: &Consumer{Mode: Restart}, d: Delivery{ID: "r1-2"}, now: noon}
	for name, c := range map[string]struct {
		w    *workload
		pods []corev1.Pod
	}{
		"stalled": {web(2, marked, stalled), []corev1.Pod{pod("a", "", time.Hour), pod("b", "r1-1", time.Minute, unready)}},
		"hangs":   {web(2, marked, underWay), []corev1.Pod{pod("a", "", time.Hour), pod("b", "r1-1", time.Minute, unready)}},
		"crashes": {web(1, marked), []corev1.Pod{pod("b", "r1-1", time.Second, waitsFor("CrashLoopBackOff"))}},
	} {
		_, begun, err := s.lookAtOne(c.w, c.pods, noon.Add(-30*time.Second))
		require.NoError(t, err, name)
		require.False(t, begun, name)
	}
	set := ofStatefulSet(&appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "app", Generation: 1},
		Status:     appsv1.StatefulSetStatus{ObservedGeneration: 1, CurrentRevision: "1", UpdateRevision: "2"},
	})
	said, err := prove(set, []corev1.Pod{pod("db-0", "", time.Hour), pod("db-1", "r1-1", time.Minute, unready)}, proof{mark: "r1-2", now: noon})
	require.NoError(t, err)
	require.Contains(t, said, "delete it (kubectl delete pod -n app db-1)")
	s.d.ID = "r2-1"
	running := web(2, marked, underWay)
	left, begun, err := s.lookAtOne(running, []corev1.Pod{pod("a", "", time.Hour), pod("b", "r1-1", time.Minute)}, noon.Add(-30*time.Second))
	require.NoError(t, err)
	require.True(t, begun, "one that is under way is waited for")
	require.NotEmpty(t, left)
}

func TestSameRotation(t *testing.T) {
	t.Parallel()
	const id = "01a22528-c7fb-7716-b98b-e8c7b2876208"
	for _, of := range []string{id + "-1", id + "-2", id + "~1", id + "~2"} { // alone, and shared
		require.True(t, sameRotation(of, id+"-2"), of)
		require.False(t, sameRotation(of, "01a22528-c7fb-7716-b98b-e8c7b2876209-2"), of)
		require.False(t, sameRotation(of, "01a22528-c7fb-7716-b98b-000000000000~1"), of)
	}
	require.False(t, sameRotation("", ""))
}
