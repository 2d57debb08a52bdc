package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ErrStalled is the end of a rollout that made no progress for as long as its
// Deployment allows.
var ErrStalled = errors.New("the rollout makes no progress")

// Restart restarts a workload ("deployment", "statefulset" or "daemonset") as
// kubectl does, but that two restarts in one second are two.
func (c *Cluster) Restart(ctx context.Context, kind, namespace, name string) error {
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]any{"kubectl.kubernetes.io/restartedAt": time.Now().Format(time.RFC3339Nano)},
	}}}})
	if err != nil {
		return err
	}
	request := c.Apps.RESTClient().Patch(types.StrategicMergePatchType).Namespace(namespace).Resource(kind + "s").Name(name)
	if err := request.Body(patch).Do(ctx).Error(); err != nil {
		return fmt.Errorf("restart the %s %s: %w", kind, name, err)
	}
	return nil
}

// WaitRollout returns when every pod of a workload is new and ready and the old
// ones are gone, with ErrStalled when a Deployment has given up, or when ctx
// ends.
func (c *Cluster) WaitRollout(ctx context.Context, kind, namespace, name string) error {
	var stalled error
	err := Until(ctx, func(ctx context.Context) error {
		left, selector, err := c.rollout(ctx, kind, namespace, name)
		if errors.Is(err, ErrStalled) {
			stalled = fmt.Errorf("%s %s: %w", kind, name, err)
			return nil
		}
		if err == nil && left != "" {
			err = fmt.Errorf("%s %s: %s", kind, name, left)
		}
		if err != nil {
			return err
		}
		return c.noneTerminating(ctx, namespace, selector)
	})
	return errors.Join(err, stalled)
}

// rollout tells what a rollout waits for, as `kubectl rollout status` does.
func (c *Cluster) rollout(ctx context.Context, kind, namespace, name string) (left string, selector *metav1.LabelSelector, err error) {
	switch kind {
	case "deployment":
		d, err := c.Apps.Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", nil, err
		}
		left, err := deploymentWaits(d)
		return left, d.Spec.Selector, err
	case "statefulset":
		s, err := c.Apps.StatefulSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", nil, err
		}
		want, status := *s.Spec.Replicas, s.Status
		switch {
		case status.ObservedGeneration < s.Generation:
			left = "not yet seen"
		case status.ReadyReplicas < want, status.UpdateRevision != status.CurrentRevision:
			left = fmt.Sprintf("%d pods of %d are ready, %d are new", status.ReadyReplicas, want, status.UpdatedReplicas)
		}
		return left, s.Spec.Selector, nil
	case "daemonset":
		d, err := c.Apps.DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", nil, err
		}
		want, status := d.Status.DesiredNumberScheduled, d.Status
		switch {
		case status.ObservedGeneration < d.Generation:
			left = "not yet seen"
		case status.UpdatedNumberScheduled < want, status.NumberAvailable < want:
			left = fmt.Sprintf("%d pods of %d are new, %d are available", status.UpdatedNumberScheduled, want, status.NumberAvailable)
		}
		return left, d.Spec.Selector, nil
	}
	return "", nil, fmt.Errorf("a %s cannot be rolled out: it is deployment, statefulset or daemonset", kind)
}

func deploymentWaits(d *appsv1.Deployment) (string, error) {
	want, status := *d.Spec.Replicas, d.Status
	if status.ObservedGeneration < d.Generation {
		return "not yet seen", nil
	}
	for _, condition := range status.Conditions {
		if condition.Type == appsv1.DeploymentProgressing && condition.Reason == "ProgressDeadlineExceeded" {
			return "", ErrStalled
		}
	}
	if status.UpdatedReplicas < want || status.Replicas > status.UpdatedReplicas || status.AvailableReplicas < status.UpdatedReplicas {
		return fmt.Sprintf("of %d pods, %d are there, %d are new, %d are available",
			want, status.Replicas, status.UpdatedReplicas, status.AvailableReplicas), nil
	}
	return "", nil
}

func (c *Cluster) noneTerminating(ctx context.Context, namespace string, selector *metav1.LabelSelector) error {
	pods, err := c.Core.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(selector)})
	if err != nil {
		return err
	}
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp != nil {
			return fmt.Errorf("pod %s is terminating", pod.Name)
		}
	}
	return nil
}

// PodsOf lists the pods of a workload, terminating ones too.
func (c *Cluster) PodsOf(ctx context.Context, namespace, name string) ([]corev1.Pod, error) {
	pods, err := c.Core.Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var own []corev1.Pod
	for _, pod := range pods.Items {
		if workloadOf(&pod) == (workload{namespace, name}) {
			own = append(own, pod)
		}
	}
	return own, nil
}

// Waiting is why the containers of a pod wait ("CrashLoopBackOff"), "" where
// they do not.
func Waiting(pod corev1.Pod) string {
	var reasons []string
	for _, status := range pod.Status.ContainerStatuses {
		if status.State.Waiting != nil {
			reasons = append(reasons, status.State.Waiting.Reason)
		}
	}
	return strings.Join(reasons, ", ")
}
