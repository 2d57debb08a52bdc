package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

func TestConsumers(t *testing.T) {
	b := newBed(t)
	t.Run("guide", func(t *testing.T) { toPods(t, b) })
	t.Run("together", func(t *testing.T) {
		for name, test := range map[string]func(*scene){
			"every-pod": everyPod,
			"five":      fiveSecrets,
			"preflight": silentCases,
			"held":      heldAndResumed,
			"overlap":   crashesWithOverlap,
			"alternate": crashesInTurn,
			"unhealthy": unhealthy,
			"log":       goesBackOnLog,
			"stuck":     stuck,
			"stalled":   stalled,
			"stuck-set": stuckSet,
			"silent":    silent,
			"access":    accessWithdrawn,
			"no-access": accessGone,
			"elsewhere": elsewhere,
			"joined":    joined,
			"evidence":  evidence,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(b.scene(t, name))
			})
		}
	})
	// These disturb everybody.
	t.Run("killed", func(t *testing.T) { pluginKilled(b.scene(t, "killed")) })
	t.Run("scale", func(t *testing.T) { twoHundred(b.scene(t, "scale")) })
	t.Run("killed-back", func(t *testing.T) { killedOnTheWay(b.scene(t, "killed-back")) })
}

// everyPod: a rotation reaches every pod of two workloads, in waves, and is proven;
// then the old password is refused, and no client notices.
func everyPod(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "canary", 1, toRedis(n))
	s.deploy(s.cluster, "Deployment", "web", 3, toRedis(n))
	s.deploy(s.cluster, "StatefulSet", "worker", 2, toRedis(n))
	s.consumer(nil, []string{"canary"}, []string{"web", "StatefulSet/worker"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	plan := s.must("rotate/redis/app", map[string]any{"dry_run": true})
	require.Contains(t, fmt.Sprint(plan["roles"]), "web", "the plan says what is restarted")

	data := s.must("rotate/redis/app", nil)
	told := s.until(data["rotation_id"].(string), "grace")
	timeline := strings.Join(texts(told["timeline"]), "\n")
	require.Less(t, strings.Index(timeline, "sync"), strings.Index(timeline, "restart"))
	require.Less(t, strings.Index(timeline, "restart"), strings.Index(timeline, "check"))
	served := s.served()
	for _, name := range []string{"canary", "web", "worker"} {
		for password := range s.running(name) {
			require.Equal(t, served, password, name)
		}
	}
	s.must("retire/redis/app", nil)
	require.False(t, accepts(t, n, "the-first-password"))
	before := s.sim.Total()
	require.NoError(t, s.sim.Wait(s.ctx, s.ns, "web", func([]kube.SimulatedPod) bool { return s.sim.Total().Logins > before.Logins+100 }))
	total := s.sim.Total()
	figure(t, "every pod: 6 pods of 3 workloads follow a rotation, %d logins, %d refused", total.Logins, total.Refused)
	require.Zero(t, total.Refused)
}

func texts(v any) []string {
	var out []string
	list, _ := v.([]any)
	for _, e := range list {
		out = append(out, fmt.Sprint(e))
	}
	return out
}

// fiveSecrets of one service that are rotated together cost one restart of each of
// its workloads.
func fiveSecrets(s *scene) {
	t := s.t
	for i := range 5 {
		s.must(fmt.Sprintf("roles/key-%d", i), map[string]any{
			"kind": "api-key", "document": "app", "field": fmt.Sprintf("KEY_%d", i), "previous_field": fmt.Sprintf("KEY_%d_OLD", i), "grace_period": "1h",
		})
	}
	s.synced("app")
	for _, name := range []string{"web", "worker"} {
		s.deploy(s.cluster, "Deployment", name, 2, map[string]string{"sim/secret": "app", "sim/target": "none", "sim/password-key": "KEY_0", "sim/username": "none"})
	}
	s.consumer(nil, []string{"web"}, []string{"worker"})
	for i := range 5 {
		s.must(fmt.Sprintf("roles/key-%d", i), map[string]any{"consumers": "web"})
	}
	before := map[string]string{"web": s.revision("deployment", "web"), "worker": s.revision("deployment", "worker")}
	data := s.must("rotate/api-key", nil)
	told := s.until(data["rotation_id"].(string), "grace")
	require.Len(t, told["units"], 1, "%v", told["units"])
	for name, was := range before {
		require.Equal(t, "1", was)
		require.Equal(t, "2", s.revision("deployment", name), "one change of the template")
	}
	secret, err := s.cluster.Secret(s.ctx, s.ns, "app")
	require.NoError(t, err)
	for i := range 5 {
		creds, err := s.read(fmt.Sprintf("creds/key-%d", i))
		require.NoError(t, err)
		require.Equal(t, creds["value"], secret[fmt.Sprintf("KEY_%d", i)])
	}
	figure(t, "five secrets: rotated together, 1 restart of each of 2 workloads")
}

// silentCases: what External Secrets or a workload would ignore without a word is
// found before anything is changed.
func silentCases(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 1, toRedis(n))
	s.consumer(nil, []string{"web"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	refused := func(says string) {
		t.Helper()
		_, err := s.write("rotate/redis/app", nil)
		require.ErrorContains(t, err, says)
		require.Equal(t, "the-first-password", s.served())
	}
	for _, c := range []struct{ patch, undo, says string }{
		{`{"spec":{"refreshPolicy":"CreatedOnce"}}`, `{"spec":{"refreshPolicy":"Periodic"}}`, "CreatedOnce"},
		{`{"spec":{"refreshInterval":"0s"}}`, `{"spec":{"refreshInterval":"1h"}}`, "refreshInterval"},
	} {
		_, err := s.cluster.Kubectl(s.ctx, "patch", "externalsecret", "app", "-n", s.ns, "--type=merge", "-p", c.patch)
		require.NoError(t, err)
		refused(c.says)
		_, err = s.cluster.Kubectl(s.ctx, "patch", "externalsecret", "app", "-n", s.ns, "--type=merge", "-p", c.undo)
		require.NoError(t, err)
	}
	_, err := s.cluster.Kubectl(s.ctx, "rollout", "pause", "deployment/web", "-n", s.ns)
	require.NoError(t, err)
	refused("paused")
	for _, verb := range []string{"resume", "status"} { // status waits until its controller has seen it
		_, err = s.cluster.Kubectl(s.ctx, "rollout", verb, "deployment/web", "-n", s.ns)
		require.NoError(t, err)
	}
	_, err = s.write("roles/app", map[string]any{"consumers": "nobody"})
	require.ErrorContains(t, err, `consumer "nobody" does not exist`)
	data := s.must("rotate/redis/app", nil)
	s.until(data["rotation_id"].(string), "grace")
}

// heldAndResumed: where the role says so, a failure is left to people.
func heldAndResumed(s *scene) {
	t := s.t
	n := s.redis(map[string]any{"on_failure": "hold"})
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(n))
	s.consumer(nil, []string{"web"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	s.sim.CrashWhen(func(p kube.SimulatedPod) bool { return p.Password != "the-first-password" })
	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	s.until(id, "held")
	require.True(t, accepts(t, n, "the-first-password"))
	require.True(t, accepts(t, n, s.served()))
	s.sim.CrashWhen(nil)
	_, err := s.cluster.Kubectl(s.ctx, "delete", "pods", "-n", s.ns, "-l", "app=web", "--field-selector=status.phase!=Running")
	require.NoError(t, err)
	require.NoError(t, s.cluster.WaitRollout(s.ctx, "deployment", s.ns, "web"))
	s.must("resume/"+id, nil)
	s.until(id, "grace")
	require.Zero(t, s.sim.Total().Refused)
}

// pluginKilled in each phase at consumers: the rotation goes on, and nothing is
// restarted twice.
func pluginKilled(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 3, toRedis(n))
	s.consumer(nil, []string{"web"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	generation := 1
	for _, phase := range []string{"sync", "restart", "check"} {
		asked, cancel := context.WithCancel(s.ctx)
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			_, _ = s.c.Logical().WriteWithContext(asked, s.ns+"/rotate/redis/app", nil)
		}()
		var id string
		require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
			role, err := s.read("roles/app")
			if err != nil {
				return err
			}
			if id, _ = role["rotation_id"].(string); id == "" {
				return errors.New("it has not begun")
			}
			told, err := s.read("rotations/" + id)
			if err == nil && !strings.Contains(strings.Join(texts(told["timeline"]), "\n"), phase) {
				err = fmt.Errorf("it is not in phase %s", phase)
			}
			return err
		}))
		_, err := s.vault.KillPlugin()
		require.NoError(t, err)
		cancel()
		<-answered
		s.until(id, "grace")
		generation++
		require.Equal(t, fmt.Sprint(generation), s.revision("deployment", "web"), "restarted once, though killed in %s", phase)
		s.must("retire/redis/app", nil)
		s.until(id, "completed")
	}
	total := s.sim.Total()
	figure(t, "plugin killed in sync, restart and check: 3 rotations, 3 restarts, %d logins, %d refused", total.Logins, total.Refused)
	require.Zero(t, total.Refused)
}
