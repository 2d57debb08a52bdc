package consumers_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// evidence: of every ExternalSecret, Secret, workload, pod and check it is kept what
// was done, when, and how it was proven; verify shows the same as it is now, and tells
// in a sentence what somebody has broken since.
func evidence(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(n))
	s.deploy(s.cluster, "StatefulSet", "worker", 2, toRedis(n))
	var ill atomic.Bool
	health := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if ill.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	t.Cleanup(health.Close)
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.consumer(map[string]any{
		"checks": fmt.Sprintf(`[{"type":"http","url":%q,"times":2},{"type":"pods","selector":"app=web"}]`, health.URL+"/healthz"),
	}, []string{"web"}, []string{"StatefulSet/worker"})
	s.must("roles/app", map[string]any{"consumers": "web"})

	now, err := s.read("verify/redis/app")
	require.NoError(t, err)
	require.Equal(t, true, now["ok"], "%v", now)
	require.Contains(t, fmt.Sprint(now["notes"]), "no rotation has brought it there")

	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	told := s.until(id, "grace")
	facts := s.provenAtWeb(told)
	s.criteria(told, []string{"met", "met", "met", "unknown", "met", "met", "met", "unknown", "unknown", "met"})
	s.holdsNoSecret(told)

	now = s.verified("")
	web := first(t, now["consumers"])
	require.Len(t, web["pods"], 4)
	for _, p := range web["pods"].([]any) {
		require.Equal(t, true, p.(map[string]any)["new"], "%v", p)
	}
	require.Equal(t, true, first(t, web["stores"])["ready"])
	s.holdsNoSecret(now)

	breaks := s.breakAndMend(&ill)

	s.must("retire/redis/app", nil)
	told = s.until(id, "completed")
	require.Len(t, told["consumers"], 2, "forward, and what was left to sync after it was retired: %v", told["consumers"])
	require.Equal(t, facts, s.provenAtWeb(told), "it is kept as it was")
	began := time.Now()
	s.verified("") // pods are from after the change that they were restarted for
	figure(t, "evidence: %d facts kept of 2 workloads, 4 pods and 2 checks; verify tells %d of 4 breaks in a sentence, and answers in %s",
		facts, breaks, time.Since(began).Round(time.Millisecond))
}

func first(t require.TestingT, list any) map[string]any {
	all, _ := list.([]any)
	require.NotEmpty(t, all)
	m, _ := all[0].(map[string]any)
	return m
}

// provenAtWeb looks at everything that is kept of the way forward, and counts it.
func (s *scene) provenAtWeb(told map[string]any) int {
	t := s.t
	t.Helper()
	web := first(t, told["consumers"])
	require.Equal(t, []any{"web", "forward", "proven", "k8s", s.ns}, []any{web["consumer"], web["direction"], web["outcome"], web["connection"], web["namespace"]})
	require.Contains(t, told["consumer web"], "proven", "%v", told["consumer web"])
	when := func(v any) time.Time {
		t.Helper()
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(v))
		require.NoError(t, err, "%v", v)
		return at
	}
	facts := 0
	external := first(t, web["external_secrets"])
	require.Equal(t, []any{"app", true, "1h0m0s"}, []any{external["name"], external["ready"], external["refresh_interval"]})
	forced := when(external["forced_at"])
	require.False(t, when(external["refreshed_at"]).Before(forced.Add(-time.Second)))
	require.NotEmpty(t, external["synced_version"])
	facts += 4
	keys := map[any]any{}
	for _, v := range web["secrets"].([]any) {
		m := v.(map[string]any)
		require.Equal(t, true, m["matches"], "%v", m)
		require.Equal(t, "app", m["secret"])
		keys[m["field"]] = fmt.Sprint(m["keys"])
		facts++
	}
	require.Equal(t, map[any]any{"password": "[password]", "username": "[username]"}, keys)
	restarted := map[any]time.Time{}
	for i, v := range web["workloads"].([]any) {
		m := v.(map[string]any)
		require.Equal(t, []any{"Deployment/web", "StatefulSet/worker"}[i], m["workload"])
		require.Equal(t, []any{json.Number(fmt.Sprint(i + 1)), json.Number("2"), json.Number("2"), json.Number("2"), ""},
			[]any{m["wave"], m["replicas"], m["new_pods"], m["ready_pods"], m["problem"]}, "%v", m)
		require.NotEmpty(t, m["revision"])
		restarted[m["workload"]] = when(m["restarted_at"])
		require.False(t, when(m["complete_at"]).Before(restarted[m["workload"]].Truncate(time.Second)))
		facts += 6
	}
	require.Len(t, web["pods"], 4)
	for _, v := range web["pods"].([]any) {
		m := v.(map[string]any)
		require.Equal(t, []any{true, "", json.Number("0")}, []any{m["new"], m["problem"], m["restarts"]}, "%v", m)
		require.NotEmpty(t, m["node"])
		require.False(t, when(m["created_at"]).Before(restarted[m["workload"]].Truncate(time.Second)), "%v", m)
		require.False(t, when(m["ready_at"]).Before(when(m["created_at"])))
		facts += 6
	}
	check := first(t, web["checks"])
	require.Equal(t, []any{"http", true, "answered with 200", json.Number("2")}, []any{check["type"], check["passed"], check["result"], check["in_row"]})
	require.Contains(t, check["target"], "127.0.0.1:")
	require.Len(t, web["checks"], 2)
	facts += 2 * len(web["checks"].([]any))
	timeline := strings.Join(texts(web["timeline"]), "\n")
	at := -1
	for _, says := range []string{
		"ExternalSecret app: told to sync", "Deployment/web: restarted", "Deployment/web: complete", "StatefulSet/worker: restarted",
		"StatefulSet/worker: complete", "check 1 (http",
	} {
		i := strings.Index(timeline, says)
		require.Greater(t, i, at, "%s is not in its order:\n%s", says, timeline)
		at = i
	}
	require.Contains(t, timeline, "key password was compared, and holds what role app serves")
	return facts
}

// criteria are the nine of the runbook, and who asked.
func (s *scene) criteria(told map[string]any, want []string) {
	t := s.t
	t.Helper()
	lines := texts(told["criteria"])
	require.GreaterOrEqual(t, len(lines), len(want), "%v", lines)
	for i, verdict := range want {
		require.True(t, strings.HasPrefix(lines[i], verdict+": "), "%s, and %s is expected", lines[i], verdict)
	}
	require.Contains(t, lines[0], "Vault secret updated with new version (app: version 2 is served since ")
	require.Contains(t, lines[2], "4 of 4 pods run with it and are ready, with 0 restarts of containers")
	require.Contains(t, lines[3], "not checked: consumer web has no logs check; add one")
	require.Contains(t, lines[5], "accepted by a fresh login at 1 of 1 nodes; the one before is still accepted")
}

func (s *scene) holdsNoSecret(told map[string]any) {
	s.t.Helper()
	raw, err := json.Marshal(told)
	require.NoError(s.t, err)
	for _, secret := range []string{"the-first-password", s.served(), s.cluster.Token, s.vault.Token} {
		require.NotContains(s.t, string(raw), secret)
	}
}

// verified waits until verify says something; "": that all is as it should be.
func (s *scene) verified(says string) map[string]any {
	s.t.Helper()
	var now map[string]any
	require.NoError(s.t, kube.Until(s.ctx, func(context.Context) error {
		var err error
		if now, err = s.read("verify/redis/app"); err != nil {
			return err
		}
		if ok := now["ok"] == true; ok != (says == "") || !strings.Contains(fmt.Sprint(now["summary"]), says) {
			return fmt.Errorf("verify says %v: %v; wanted is %q", now["ok"], now["summary"], says)
		}
		return nil
	}))
	return now
}

// breakAndMend breaks one thing after another, sees that verify names it, and mends it.
func (s *scene) breakAndMend(ill *atomic.Bool) (told int) {
	t := s.t
	patch := func(kindOf, name, text string) {
		t.Helper()
		_, err := s.cluster.Kubectl(s.ctx, "patch", kindOf, name, "-n", s.ns, "--type=merge", "-p", text)
		require.NoError(t, err)
	}
	token := func(name string) {
		t.Helper()
		patch("secretstore", "harmonyflow", fmt.Sprintf(`{"spec":{"provider":{"vault":{"auth":{"tokenSecretRef":{"name":%q,"key":"token"}}}}}}`, name))
	}
	ill.Store(true)
	s.verified("check 1 (http): 127.0.0.1:")
	ill.Store(false)
	told++

	token("nobody-has-it")
	s.verified("SecretStore harmonyflow is not ready")
	told++
	// External Secrets would mend this by itself, could it read.
	require.NoError(t, s.cluster.PatchSecret(s.ctx, s.ns, "app", map[string]string{"password": "written-by-hand"}))
	now := s.verified("key password of Secret app holds something else than what role app serves")
	web := first(t, now["consumers"])
	matches := map[any]any{}
	for _, v := range web["secrets"].([]any) {
		matches[v.(map[string]any)["field"]] = v.(map[string]any)["matches"]
	}
	require.Equal(t, map[any]any{"username": true, "password": false}, matches)
	raw, err := json.Marshal(now)
	require.NoError(t, err)
	require.NotContains(t, string(raw), "written-by-hand")
	told++
	token("harmonyflow-token")
	require.NoError(t, kube.Until(s.ctx, func(ctx context.Context) error { return s.cluster.ForceSync(ctx, s.ns, "app") }))
	s.verified("")

	s.sim.CrashWhen(func(p kube.SimulatedPod) bool { return strings.HasPrefix(p.Name, "worker-") })
	_, err = s.cluster.Kubectl(s.ctx, "delete", "pod", "worker-1", "-n", s.ns, "--wait=false")
	require.NoError(t, err)
	s.verified("CrashLoopBackOff")
	told++
	s.sim.CrashWhen(nil)
	_, err = s.cluster.Kubectl(s.ctx, "delete", "pods", "-n", s.ns, "-l", "app=worker", "--wait=false")
	require.NoError(t, err)
	s.verified("")
	return told
}
