package consumer

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// proof is what tells pods that run with what is delivered from all others.
type proof struct {
	// mark is the id that pods of the delivery have; "": somebody else restarts them.
	mark string
	// since, when set, is from when on a pod counts as well, whoever made it.
	since time.Time
	now   time.Time
}

// isNew reports whether a pod has read what is delivered.
func (p proof) isNew(pod *corev1.Pod) bool {
	if p.mark != "" && pod.Annotations[Mark] == p.mark {
		return true
	}
	return !p.since.IsZero() && !pod.CreationTimestamp.Time.Before(p.since)
}

// surely is from when on pods are sure to be from after a change. Times of
// Kubernetes have seconds, so that one of the same second may be from before.
func surely(changed time.Time) time.Time { return changed.Truncate(time.Second).Add(time.Second) }

// prove says what a workload waits for until every pod of it runs with what is
// delivered; "" when each does. The rules of kubectl are not enough: they are
// content with a rollout that somebody has turned back, with pods that a StatefulSet
// leaves as they are, and with old pods that go on working while they terminate.
func prove(w *workload, pods []corev1.Pod, p proof) (string, error) {
	if w.stalled {
		return "", kind.Definitely("%s makes no progress (ProgressDeadlineExceeded); look at its pods", w)
	}
	living, old := 0, ""
	var stopped, notReady string
	for i := range pods {
		pod := &pods[i]
		isNew := p.isNew(pod)
		switch {
		case ended(pod):
		case terminating(pod):
			if !isNew {
				old = fmt.Sprintf("old pod %s still terminates", pod.Name)
			}
		case !isNew:
			living, old = living+1, fmt.Sprintf("pod %s is from before the change", pod.Name)
			if is, _ := ready(pod); !is && w.waitsForPods {
				stopped = fmt.Sprintf("pod %s is from before the change and not ready, and a StatefulSet replaces none before it is: delete it (kubectl delete pod -n %s %s)",
					pod.Name, w.namespace, pod.Name)
			}
		default:
			living++
			if why := broken(pod, p.now); why != "" {
				return "", kind.Definitely("%s: %s; it cannot start, or not with what was delivered: look at its log (kubectl logs --previous)", w, why)
			}
			if is, _ := ready(pod); !is {
				notReady = fmt.Sprintf("pod %s is not ready", pod.Name)
			}
		}
	}
	for _, left := range []string{stopped, w.left, old, notReady} {
		if left != "" {
			return fmt.Sprintf("%s: %s", w, left), nil
		}
	}
	if living < int(w.want) {
		return fmt.Sprintf("%s: %d of %d pods are there", w, living, w.want), nil
	}
	return "", nil
}

// look proves one workload by what the cluster says now. pods are all of it.
func (s *step) look(w *workload, pods []corev1.Pod, changed time.Time) (string, error) {
	if s.c.Mode != Restart {
		// Whoever observes a change restarts within the second: the rules of the
		// rollout find the pod that was there before.
		return prove(w, pods, proof{since: changed.Truncate(time.Second), now: s.now})
	}
	if why := unfit(w); s.d.urgent() && why != "" && w.mark() != s.d.ID {
		return "", kind.Definitely("%s %s", w, why)
	}
	if w.mark() == s.d.ID {
		return prove(w, pods, proof{mark: s.d.ID, now: s.now})
	}
	left, err := prove(w, pods, proof{mark: s.d.ID, since: surely(changed), now: s.now})
	if err == nil && left != "" && w.left == "" {
		err = kind.Definitely("%s was restarted, and something has taken the annotation %s away (%s); let what manages it ignore annotations of the template, or restart it by that and set mode=observe", w, Mark, left)
	}
	return left, err
}

// lookAtOther says whether the restart of another delivery is under way, which is
// not to be disturbed, or does for this one as well: two consumers may name one
// workload, and would restart it in turn for ever.
func (s *step) lookAtOther(w *workload, pods []corev1.Pod, changed time.Time) (left string, does bool, err error) {
	if w.mark() == "" {
		return "", false, nil
	}
	left, err = prove(w, pods, proof{since: surely(changed), now: s.now})
	if err != nil && s.d.urgent() && s.memory.wasRestarted(ref{w.kind, w.name}) { // once is enough: the other one may say so as well
		return "", true, err
	}
	if err != nil { // it has failed, and is over: on the way back the next restart is what mends it
		return "", false, nil //nolint:nilerr // whoever made it has been told
	}
	underWay := w.left != "" && awaits(s.d.ID, w.mark())
	return left, left == "" || underWay, nil
}

// sameRotation reports whether two deliveries are ways of one rotation.
func sameRotation(a, b string) bool {
	i, j := strings.LastIndexAny(a, "-~"), strings.LastIndexAny(b, "-~")
	return i > 0 && i == j && a[:i] == b[:j]
}

// marked reports whether pods of a workload are of this delivery.
func marked(pods []corev1.Pod, id string) bool {
	return slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Annotations[Mark] == id })
}
