package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
)

// TestKubernetesDemo plays the demo of a cluster, which proves itself.
func TestKubernetesDemo(t *testing.T) {
	if os.Getenv(kube.Program) == "" {
		t.Skip(kube.Program + " is not set; make e2e builds Kubernetes and sets it")
	}
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	var out bytes.Buffer
	s := newScreen(&out)
	d, err := deliver(t.Context(), s)
	require.NoError(t, err, "the demo printed:\n%s", &out)
	require.Contains(t, s.transcript(), "CrashLoopBackOff", "pods that crash are shown")
	require.Contains(t, s.transcript(), d.summary())
	report.Figure(t, "CONSUMERS_FILE", "make demo-k8s: %s", d.summary())

	left, err := filepath.Glob(filepath.Join(temporary, "harmonyflow-demo-*"))
	require.NoError(t, err)
	require.Empty(t, left, "the demo left files behind")
}

// TestPodsThatAreNotAsSaidAreNoticed: a demo that cannot fail would prove nothing.
func TestPodsThatAreNotAsSaidAreNoticed(t *testing.T) {
	began := time.Now()
	four := func(change func(*pod)) []pod {
		pods := make([]pod, replicas)
		for i := range pods {
			pods[i] = pod{name: fmt.Sprintf("web-%d", i), created: began, ready: true, password: "second"}
		}
		change(&pods[replicas-1])
		return pods
	}
	require.NoError(t, allRun(four(func(*pod) {}), "second", began))
	require.ErrorContains(t, allRun(four(func(p *pod) { p.ready, p.waiting = false, "CrashLoopBackOff" }), "second", began), "CrashLoopBackOff")
	require.ErrorContains(t, allRun(four(func(p *pod) { p.password = "first" }), "second", began), "firs…, and should with seco…")
	require.ErrorContains(t, allRun(four(func(p *pod) { p.created = began.Add(-time.Minute) }), "second", began), "older than the rotation")
	require.ErrorContains(t, allRun(four(func(*pod) {})[1:], "second", began), "3 pods live")
	require.NoError(t, noneRefused(kube.Figures{Logins: 100}))
	require.ErrorContains(t, noneRefused(kube.Figures{Logins: 100, Refused: 1}), "1 were refused")
	require.ErrorContains(t, noneRefused(kube.Figures{Logins: 100, Failed: 2}), "2 failed otherwise")
}

func TestLongLinesAreWrapped(t *testing.T) {
	require.Equal(t, "one two\n  three four", wrap("one two three four", 12, "  "))
	require.Equal(t, "one", wrap("one", 12, "  "))
}
