package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// pod is what the API server and the client inside tell of one that lives.
type pod struct {
	name     string
	created  time.Time
	ready    bool
	waiting  string // why it is not ready
	password string
	kube.Figures
}

// pods are those of the workload that are not on their way out, the oldest first.
func (st *clusterStage) pods(ctx context.Context) ([]pod, error) {
	objects, err := st.cluster.PodsOf(ctx, namespace, workload)
	if err != nil {
		return nil, err
	}
	inside := map[string]kube.SimulatedPod{}
	for _, p := range st.sim.Pods(namespace, workload) {
		inside[p.Name] = p
	}
	var pods []pod
	for i := range objects {
		o := &objects[i]
		if o.DeletionTimestamp != nil {
			continue
		}
		known := inside[o.Name]
		p := pod{
			name: o.Name, created: o.CreationTimestamp.Time, waiting: kube.Waiting(*o),
			password: known.Password, Figures: known.Figures,
		}
		for _, c := range o.Status.Conditions {
			p.ready = p.ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		}
		pods = append(pods, p)
	}
	slices.SortFunc(pods, func(a, b pod) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
	return pods, nil
}

func (st *clusterStage) showPods(pods []pod) {
	var table strings.Builder
	fmt.Fprintf(&table, "%-22s  %-8s  %-16s  %-8s  %6s  %7s\n", "pod", "created", "state", "password", "logins", "refused")
	for _, p := range pods {
		state, password := "ready", ""
		if !p.ready {
			state = cmp.Or(p.waiting, "starting")
		}
		if p.password != "" {
			password = mask(p.password)
		}
		fmt.Fprintf(&table, "%-22s  %-8s  %-16s  %-8s  %6d  %7d\n",
			p.name, p.created.Format(time.TimeOnly), state, password, p.Logins, p.Refused)
	}
	st.output(table.String())
}

// allRun returns an error unless there are as many pods as there should be, each
// ready with password, and made at since or later.
func allRun(pods []pod, password string, since time.Time) error {
	if len(pods) != replicas {
		return fmt.Errorf("%d pods live, and %d should", len(pods), replicas)
	}
	for _, p := range pods {
		switch {
		case !p.ready:
			return fmt.Errorf("pod %s is not ready: %s", p.name, p.waiting)
		case p.password != password:
			return fmt.Errorf("pod %s runs with %s, and should with %s", p.name, mask(p.password), mask(password))
		case p.created.Before(since.Truncate(time.Second)): // a creation time has whole seconds
			return fmt.Errorf("pod %s is older than the rotation", p.name)
		}
	}
	return nil
}

// noneRefused is nil when every login of every pod that there was succeeded.
func noneRefused(f kube.Figures) error {
	if f.Refused > 0 || f.Failed > 0 {
		return fmt.Errorf("of %d logins %d were refused, and %d failed otherwise", f.Logins+f.Refused+f.Failed, f.Refused, f.Failed)
	}
	return nil
}
