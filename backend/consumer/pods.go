package consumer

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// patience is how long a new pod may wait for each of these reasons before it
// counts as broken. What is not listed is part of every start.
var patience = map[string]time.Duration{
	"CrashLoopBackOff":           0,
	"InvalidImageName":           0,
	"ErrImageNeverPull":          0,
	"CreateContainerConfigError": 10 * time.Second, // a kubelet may not have seen a new key yet
	"CreateContainerError":       10 * time.Second,
	"RunContainerError":          10 * time.Second,
	"ImagePullBackOff":           30 * time.Second,
	"ErrImagePull":               time.Minute, // registries have their moments
}

// listPods lists the pods that have the labels of a selector; "": all.
func (c *cluster) listPods(ctx context.Context, ns, selector string) ([]corev1.Pod, error) {
	return listed(ctx, c, selector, func(o metav1.ListOptions) ([]corev1.Pod, string, error) {
		page, err := c.core.Pods(ns).List(ctx, o)
		if err != nil {
			return nil, "", err
		}
		return page.Items, page.Continue, nil
	})
}

// ownedBy tells by names alone: reading ReplicaSets would need a right more.
func ownedBy(p *corev1.Pod, w *workload) bool { return ownerOf(p) == ref{w.kind, w.name} }

// living are the pods that run, or will.
func living(pods []corev1.Pod) (out []corev1.Pod) {
	for _, p := range pods {
		if !ended(&p) && !terminating(&p) {
			out = append(out, p)
		}
	}
	return out
}

// terminating pods run until they are gone.
func terminating(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }

// ended pods run nothing any more: evicted ones stay to be looked at.
func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func ready(p *corev1.Pod) (bool, time.Time) {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue, c.LastTransitionTime.Time
		}
	}
	return false, time.Time{}
}

// broken says why a pod will not become ready; "" when it may.
func broken(p *corev1.Pod, now time.Time) string {
	for _, all := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, c := range all {
			if c.State.Waiting == nil {
				continue
			}
			most, listed := patience[c.State.Waiting.Reason]
			if listed && now.Sub(p.CreationTimestamp.Time) >= most {
				return fmt.Sprintf("container %s of pod %s waits: %s%s", c.Name, p.Name, c.State.Waiting.Reason, ending(c))
			}
		}
	}
	return ""
}

func ending(c corev1.ContainerStatus) string {
	if t := c.LastTerminationState.Terminated; t != nil {
		return fmt.Sprintf(" (exit code %d, %d restarts)", t.ExitCode, c.RestartCount)
	}
	return ""
}

// unsettled says what a ready pod has not been for the length of a stabilization;
// "" when it has. Nothing is remembered: a pod tells since when it is ready, and a
// container since when it runs, so that one that restarts begins anew.
func unsettled(p *corev1.Pod, now time.Time, stabilization time.Duration) string {
	is, since := ready(p)
	if !is {
		return fmt.Sprintf("pod %s is not ready", p.Name)
	}
	if left := stabilization - now.Sub(since); left > 0 {
		return fmt.Sprintf("pod %s is ready since %s, and has to be for %s", p.Name, since.UTC().Format(time.TimeOnly), stabilization)
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Running == nil {
			return fmt.Sprintf("container %s of pod %s does not run", c.Name, p.Name)
		}
		if c.RestartCount > 0 && now.Sub(c.State.Running.StartedAt.Time) < stabilization {
			return fmt.Sprintf("container %s of pod %s has restarted (%d times), the last time at %s", c.Name, p.Name, c.RestartCount,
				c.State.Running.StartedAt.UTC().Format(time.TimeOnly))
		}
	}
	return ""
}
