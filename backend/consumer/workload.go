package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Annotations that a restart puts on the template of pods.
const (
	// restartedAt is the key of kubectl: GitOps tools know to leave it alone.
	restartedAt = "kubectl.kubernetes.io/restartedAt"
	// Mark holds the id of the delivery, and tells its pods from those before.
	Mark = "harmonyflow.io/rotation"
)

// The kinds of workloads.
const (
	deployment  = "Deployment"
	statefulSet = "StatefulSet"
	daemonSet   = "DaemonSet"
)

var resources = map[string]string{deployment: "deployments", statefulSet: "statefulsets", daemonSet: "daemonsets"}

// workload is what is needed of a Deployment, StatefulSet or DaemonSet.
type workload struct {
	kind, namespace, name string
	meta                  metav1.ObjectMeta
	template              corev1.PodTemplateSpec
	selector              *metav1.LabelSelector
	want                  int32
	wave                  int    // of the consumer, from 1
	revision              string // of the template, as the controller counts or names it
	paused                bool
	strategy              string // of a StatefulSet or DaemonSet
	partition             int32
	waitsForPods          bool // it replaces no pod while one is not ready (kubernetes#67250)
	seen                  bool // the controller has seen the newest generation
	// left says what the rollout waits for, in the words and by the rules of
	// kubectl; "" when it is complete.
	left string
	// stalled: the controller has given up.
	stalled bool
}

func (w *workload) String() string { return w.kind + " " + w.namespace + "/" + w.name }

// mark is the id of the delivery that restarted the workload last.
func (w *workload) mark() string { return w.template.Annotations[Mark] }

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// ofDeployment ports kubectl's rollout status (polymorphichelpers, v0.36).
func ofDeployment(d *appsv1.Deployment) *workload {
	w := &workload{
		kind: deployment, namespace: d.Namespace, name: d.Name, meta: d.ObjectMeta, template: d.Spec.Template, selector: d.Spec.Selector,
		revision: d.Annotations["deployment.kubernetes.io/revision"],
		want:     replicas(d.Spec.Replicas), paused: d.Spec.Paused, seen: d.Generation <= d.Status.ObservedGeneration,
	}
	st := d.Status
	w.stalled = w.seen && slices.ContainsFunc(st.Conditions, func(c appsv1.DeploymentCondition) bool {
		return c.Type == appsv1.DeploymentProgressing && c.Reason == "ProgressDeadlineExceeded"
	})
	switch {
	case !w.seen:
		w.left = "its controller has not seen the change yet"
	case st.UpdatedReplicas < w.want:
		w.left = fmt.Sprintf("%d of %d pods are new", st.UpdatedReplicas, w.want)
	case st.Replicas > st.UpdatedReplicas:
		w.left = fmt.Sprintf("%d old pods have not gone", st.Replicas-st.UpdatedReplicas)
	case st.AvailableReplicas < st.UpdatedReplicas:
		w.left = fmt.Sprintf("%d of %d new pods are available", st.AvailableReplicas, st.UpdatedReplicas)
	}
	return w
}

func ofStatefulSet(s *appsv1.StatefulSet) *workload {
	w := &workload{
		kind: statefulSet, namespace: s.Namespace, name: s.Name, meta: s.ObjectMeta, template: s.Spec.Template, selector: s.Spec.Selector,
		revision: s.Status.UpdateRevision,
		want:     replicas(s.Spec.Replicas), strategy: string(s.Spec.UpdateStrategy.Type),
		waitsForPods: s.Spec.PodManagementPolicy != appsv1.ParallelPodManagement,
		seen:         s.Status.ObservedGeneration != 0 && s.Generation <= s.Status.ObservedGeneration,
	}
	if u := s.Spec.UpdateStrategy.RollingUpdate; u != nil && u.Partition != nil {
		w.partition = *u.Partition
	}
	st := s.Status
	switch {
	case !w.seen:
		w.left = "its controller has not seen the change yet"
	case st.ReadyReplicas < w.want:
		w.left = fmt.Sprintf("%d of %d pods are ready", st.ReadyReplicas, w.want)
	case st.UpdateRevision != st.CurrentRevision:
		w.left = fmt.Sprintf("%d of %d pods are new", st.UpdatedReplicas, w.want)
	}
	return w
}

func ofDaemonSet(d *appsv1.DaemonSet) *workload {
	st := d.Status
	w := &workload{
		kind: daemonSet, namespace: d.Namespace, name: d.Name, meta: d.ObjectMeta, template: d.Spec.Template, selector: d.Spec.Selector,
		revision: d.Annotations["deprecated.daemonset.template.generation"],
		want:     st.DesiredNumberScheduled, strategy: string(d.Spec.UpdateStrategy.Type), seen: d.Generation <= st.ObservedGeneration,
	}
	switch {
	case !w.seen:
		w.left = "its controller has not seen the change yet"
	case st.UpdatedNumberScheduled < w.want:
		w.left = fmt.Sprintf("%d of %d pods are new", st.UpdatedNumberScheduled, w.want)
	case st.NumberAvailable < w.want:
		w.left = fmt.Sprintf("%d of %d pods are available", st.NumberAvailable, w.want)
	}
	return w
}

// workloads reads one workload, or those that a selector finds.
func (s *step) workloads(ctx context.Context, w Workload) ([]*workload, error) {
	if w.Selector == "" {
		one, err := s.getWorkload(ctx, s.c.Namespace, w.Kind, w.Name)
		if err != nil {
			return nil, err
		}
		return []*workload{one}, nil
	}
	found, err := s.listWorkloads(ctx, w.Kind, w.Selector)
	if err == nil && len(found) == 0 {
		err = s.nothingFound(w)
	}
	return found, err
}

func (s *step) nothingFound(w Workload) error {
	return kind.Definitely("no %s of namespace %q has the labels %s; check workloads of the consumer", w.Kind, s.c.Namespace, w.Selector)
}

func (c *cluster) getWorkload(ctx context.Context, ns, of, name string) (*workload, error) {
	switch of {
	case deployment:
		d, err := c.apps.Deployments(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return ofDeployment(d), nil
	case statefulSet:
		d, err := c.apps.StatefulSets(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return ofStatefulSet(d), nil
	case daemonSet:
		d, err := c.apps.DaemonSets(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return ofDaemonSet(d), nil
	}
	return nil, unknownKind(of)
}

func unknownKind(of string) error {
	return kind.Definitely("a workload of kind %.40q cannot be restarted; allowed are %s, %s and %s", of, deployment, statefulSet, daemonSet)
}

// strange: the API server answered, but not about what it was asked.
func (s *step) strange(r ref) error {
	return unsure("the cluster of connection %q answers about something else than %s %s; check that host leads to an API server", s.cluster.name, r.kind, r.name)
}

// listWorkloads lists those of a kind that have the labels of a selector; "": all.
func (s *step) listWorkloads(ctx context.Context, of, selector string) ([]*workload, error) {
	out, err := listed(ctx, s.cluster, selector, func(o metav1.ListOptions) ([]*workload, string, error) { return s.pageOfWorkloads(ctx, of, o) })
	slices.SortFunc(out, func(a, b *workload) int { return strings.Compare(a.name, b.name) })
	return out, err
}

func (s *step) pageOfWorkloads(ctx context.Context, of string, o metav1.ListOptions) (out []*workload, next string, err error) {
	ns := s.c.Namespace
	switch of {
	case deployment:
		all, err := s.apps.Deployments(ns).List(ctx, o)
		if err != nil {
			return nil, "", err
		}
		for i := range all.Items {
			out = append(out, ofDeployment(&all.Items[i]))
		}
		return out, all.Continue, nil
	case statefulSet:
		all, err := s.apps.StatefulSets(ns).List(ctx, o)
		if err != nil {
			return nil, "", err
		}
		for i := range all.Items {
			out = append(out, ofStatefulSet(&all.Items[i]))
		}
		return out, all.Continue, nil
	case daemonSet:
		all, err := s.apps.DaemonSets(ns).List(ctx, o)
		if err != nil {
			return nil, "", err
		}
		for i := range all.Items {
			out = append(out, ofDaemonSet(&all.Items[i]))
		}
		return out, all.Continue, nil
	}
	return nil, "", unknownKind(of)
}

// patchWorkload puts the annotations of a restart on the template of w. A dry run
// asks the API server, its policies and its webhooks, and changes nothing. It returns
// the workload as it is then.
func (c *cluster) patchWorkload(ctx context.Context, w *workload, id string, now time.Time, dry bool) (*workload, error) {
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		// With nanoseconds: of two restarts in one second the second one would be
		// none (vault-secrets-operator#1228).
		"annotations": map[string]string{restartedAt: now.UTC().Format(time.RFC3339Nano), Mark: id},
	}}}})
	if err != nil {
		return nil, err
	}
	o := metav1.PatchOptions{FieldManager: c.manager}
	if dry {
		o.DryRun = []string{metav1.DryRunAll}
	}
	const how = types.StrategicMergePatchType
	switch w.kind {
	case deployment:
		d, err := c.apps.Deployments(w.namespace).Patch(ctx, w.name, how, patch, o)
		if err != nil {
			return nil, err
		}
		return ofDeployment(d), nil
	case statefulSet:
		d, err := c.apps.StatefulSets(w.namespace).Patch(ctx, w.name, how, patch, o)
		if err != nil {
			return nil, err
		}
		return ofStatefulSet(d), nil
	case daemonSet:
		d, err := c.apps.DaemonSets(w.namespace).Patch(ctx, w.name, how, patch, o)
		if err != nil {
			return nil, err
		}
		return ofDaemonSet(d), nil
	}
	return nil, unknownKind(w.kind)
}
