package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// logs are what containers have written, by pod or by workload.
type logs struct{ *sharedLogs }

type sharedLogs struct {
	mu    sync.Mutex
	lines map[workload][]logLine
	more  chan struct{} // closed and made anew with every line
	ended chan struct{}
	once  sync.Once
}

type logLine struct {
	at   time.Time
	text string
}

func newLogs() logs {
	return logs{&sharedLogs{lines: map[workload][]logLine{}, more: make(chan struct{}), ended: make(chan struct{})}}
}

func (l logs) end() { l.once.Do(func() { close(l.ended) }) }

// Log appends lines to what the containers have written of one pod, or of every
// pod of a workload. It can be read as the logs of the pod.
func (c *Cluster) Log(namespace, podOrWorkload string, lines ...string) {
	c.LogAt(time.Now(), namespace, podOrWorkload, lines...)
}

// LogAt is Log for lines that were written at another time.
func (c *Cluster) LogAt(at time.Time, namespace, podOrWorkload string, lines ...string) {
	l := c.network.logs
	l.mu.Lock()
	defer l.mu.Unlock()
	key := workload{namespace, podOrWorkload}
	for _, text := range lines {
		l.lines[key] = append(l.lines[key], logLine{at, text})
	}
	close(l.more)
	l.more = make(chan struct{})
}

// of returns the lines of pod in the order of time, and a channel that is
// closed when there are more.
func (l logs) of(pod *corev1.Pod) ([]logLine, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := slices.Concat(l.lines[workloadOf(pod)], l.lines[workload{pod.Namespace, pod.Name}])
	slices.SortStableFunc(lines, func(a, b logLine) int { return a.at.Compare(b.at) })
	return lines, l.more
}

// serveLog answers as a kubelet does.
func (n *network) serveLog(w http.ResponseWriter, r *http.Request) {
	pod, err := n.cluster.Core.Pods(r.PathValue("namespace")).Get(r.Context(), r.PathValue("pod"), metav1.GetOptions{})
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	options, err := parseLogOptions(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	container := r.PathValue("container")
	for _, status := range pod.Status.ContainerStatuses {
		switch {
		case status.Name != container:
		case options.previous && status.RestartCount == 0:
			http.Error(w, fmt.Sprintf("previous terminated container %q in pod %q not found", container, pod.Name), http.StatusBadRequest)
			return
		case status.State.Waiting != nil && status.RestartCount == 0:
			http.Error(w, fmt.Sprintf("container %q in pod %q is waiting to start: %s", container, pod.Name, status.State.Waiting.Reason), http.StatusBadRequest)
			return
		}
	}
	options.write(r.Context(), n.logs, pod, w)
}

// logOptions are those of corev1.PodLogOptions that the API server hands on.
type logOptions struct {
	follow, previous, timestamps bool
	since                        time.Time
	tail, limit                  int64 // -1: all
}

func parseLogOptions(query url.Values) (logOptions, error) {
	o := logOptions{
		follow: query.Get("follow") == "true", previous: query.Get("previous") == "true",
		timestamps: query.Get("timestamps") == "true", tail: -1, limit: -1,
	}
	var seconds int64
	for name, into := range map[string]*int64{"tailLines": &o.tail, "limitBytes": &o.limit, "sinceSeconds": &seconds} {
		if text := query.Get(name); text != "" {
			value, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return o, fmt.Errorf("%s: %w", name, err)
			}
			*into = value
		}
	}
	if seconds > 0 {
		o.since = time.Now().Add(-time.Duration(seconds) * time.Second)
	}
	if text := query.Get("sinceTime"); text != "" {
		since, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return o, fmt.Errorf("sinceTime: %w", err)
		}
		o.since = since
	}
	return o, nil
}

// write writes what is there, and what comes where the log is followed. As a
// kubelet does it counts the tail before it looks at the time.
func (o logOptions) write(ctx context.Context, l logs, pod *corev1.Pod, w http.ResponseWriter) {
	written := 0
	lines, more := l.of(pod)
	if o.tail >= 0 {
		written = max(0, len(lines)-int(o.tail))
	}
	left := o.limit
	for {
		for _, line := range lines[min(written, len(lines)):] {
			if line.at.Before(o.since) {
				continue
			}
			text := line.text + "\n"
			if o.timestamps {
				text = line.at.UTC().Format(time.RFC3339Nano) + " " + text
			}
			if left >= 0 {
				text = text[:min(left, int64(len(text)))]
				left -= int64(len(text))
			}
			if _, err := io.WriteString(w, text); err != nil || left == 0 {
				return
			}
		}
		written = len(lines)
		_ = http.NewResponseController(w).Flush()
		if !o.follow {
			return
		}
		select {
		case <-more:
		case <-ctx.Done():
			return
		case <-l.ended:
			return
		}
		lines, more = l.of(pod)
	}
}

// workloadOf is what a pod belongs to: for one of a ReplicaSet the Deployment,
// whose name the ReplicaSet's begins with.
func workloadOf(pod *corev1.Pod) workload {
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return workload{pod.Namespace, pod.Name}
	}
	name := owner.Name
	if hash := pod.Labels["pod-template-hash"]; hash != "" {
		name = strings.TrimSuffix(name, "-"+hash)
	}
	return workload{pod.Namespace, name}
}
