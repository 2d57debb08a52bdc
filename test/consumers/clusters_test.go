package consumers_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// asServiceAccount has the engine come as deploy/kubernetes has it, with the Role of
// one namespace and under the policies, and nothing else.
func (s *scene) asServiceAccount() {
	s.t.Helper()
	require.NoError(s.t, s.cluster.Namespace(s.ctx, "vault"))
	s.applyDeployed("serviceaccount")
	s.applyDeployed("policy")
	s.bind()
	token, err := s.cluster.ServiceAccountToken(s.ctx, "vault", "harmonyflow")
	require.NoError(s.t, err)
	login := s.reaches(s.cluster)
	login["token"] = token
	s.must("connections/k8s", login)
}

func (s *scene) applyDeployed(file string) {
	s.t.Helper()
	text, err := os.ReadFile("../../deploy/kubernetes/" + file + ".yaml")
	require.NoError(s.t, err)
	require.NoError(s.t, s.cluster.Apply(s.ctx, strings.NewReplacer(
		"namespace: app", "namespace: "+s.ns, "[db-creds]", "[app]", "[web]", "[web, worker]",
	).Replace(string(text))))
}

// bind gives the engine its Role, and unbind takes it away.
func (s *scene) bind() { s.applyDeployed("role") }

func (s *scene) unbind() {
	s.t.Helper()
	_, err := s.cluster.Kubectl(s.ctx, "delete", "rolebinding", "harmonyflow-rotator", "-n", s.ns)
	require.NoError(s.t, err)
}

// says waits until a rotation is in one of states and tells all of texts, and returns
// what it tells.
func (s *scene) says(id string, states []string, texts ...string) string {
	s.t.Helper()
	said := ""
	require.NoError(s.t, kube.Until(s.ctx, func(context.Context) error {
		told, err := s.read("rotations/" + id)
		if err != nil {
			return err
		}
		said = fmt.Sprint(told["roles"])
		for _, text := range texts {
			if !strings.Contains(said, text) {
				return fmt.Errorf("it says nothing of %q: %s", text, said)
			}
		}
		for _, state := range states {
			if told["state"] == state {
				return nil
			}
		}
		return fmt.Errorf("it is %v: %s", told["state"], said)
	}))
	return said
}

// accessWithdrawn half-way, and given back: the rotation waits, says for what, and
// goes on.
func accessWithdrawn(s *scene) {
	t := s.t
	s.asServiceAccount()
	f := s.failing(nil, map[string]any{"rollout_timeout": "3m"})
	id := f.rotate()
	s.inPhase(id, "restart", false)
	s.unbind()
	f.mayNot(id, "waiting")
	f.bothAccepted()
	s.bind()
	s.until(id, "grace")
	f.bothAccepted()
	require.Equal(t, map[string]int{f.failed.password: 2}, s.running("web"))
	require.Equal(t, map[string]int{f.failed.password: 1}, s.running("worker"))
	require.Equal(t, "2", s.revision("deployment", "web"), "restarted once")
	s.must("retire/redis/app", nil)
	s.until(id, "completed")
	require.False(t, f.loginAt(f.set.Nodes[0], login{"app", firstPassword}))
	total := s.sim.Total()
	figure(t, "access withdrawn half-way, and given back: the rotation ends by itself after %.0f s, %d logins, %d refused",
		time.Since(f.began).Seconds(), total.Logins, total.Refused)
	require.Zero(t, total.Refused)
}

// mayNot waits until the rotation says what is not permitted, and where.
func (f *failing) mayNot(id string, states ...string) {
	f.t.Helper()
	f.says(id, states, "user system:serviceaccount:vault:harmonyflow may not ", "in namespace "+f.ns, "add that to a Role")
}

// accessGone for longer than a rollout may take: it is decided to go back, and done
// once it can be.
func accessGone(s *scene) {
	s.asServiceAccount()
	f := s.failing(nil, map[string]any{"rollout_timeout": "8s"})
	id := f.rotate()
	s.inPhase(id, "restart", false)
	s.unbind()
	f.mayNot(id, "waiting")
	f.mayNot(id, "rolling_back", "rollback_failed")
	require.Equal(s.t, firstPassword, s.served())
	f.bothAccepted()
	s.bind()
	f.isBack("access withdrawn for too long", id, "not in time", "may not")
}

// elsewhere is what takes a second cluster.
func elsewhere(s *scene) {
	second := kube.ForTest(s.t)
	require.NoError(s.t, second.StartESO(s.ctx))
	oneOfTwoFails(s, second)
	apiServerGone(s.t, &bed{vault: s.vault, cluster: second})
}

// oneOfTwoFails: of two clusters that use one secret, pods of one crash. Both go back.
func oneOfTwoFails(s *scene, second *kube.Cluster) {
	t := s.t
	f := s.failing(nil, nil)
	other := *s
	other.bed = &bed{vault: s.vault, cluster: second}
	other.settle()
	other.must("connections/second", other.reaches(second))
	f.deployIn(&other)
	other.consumerAt("other", map[string]any{"connection": "second"}, []string{"web", "worker"})
	s.must("roles/app", map[string]any{"consumers": "web,other"})
	other.sim.CrashWhen(renewed)
	id := f.rotate()
	f.bothAccepted()
	f.isBack("two clusters, new pods crash in one", id, `consumer "other"`, "CrashLoopBackOff")
	f.consumerIsBack(second, other.sim)
	total := other.sim.Total()
	figure(t, "two clusters, in the one that fails: %d logins, %d refused", total.Logins, total.Refused)
	require.Zero(t, total.Refused)
	require.Zero(t, total.Failed)
}

// outage is how long the API server is away.
const outage = 2 * time.Minute

// apiServerGone for two minutes: one rotation has the time to wait for it, the
// other decides to go back. Both end by themselves once it is there again.
func apiServerGone(t *testing.T, b *bed) {
	t.Helper()
	on := b.scene(t, "outage-on").failing(nil, map[string]any{"rollout_timeout": "5m"})
	back := b.scene(t, "outage-back").failing(nil, map[string]any{"rollout_timeout": "30s"})
	both := map[*failing]string{on: on.rotate(), back: back.rotate()}
	for f, id := range both {
		f.inPhase(id, "restart", false)
	}
	require.NoError(t, b.cluster.StopESO()) // it would look for the API every half a minute only
	require.NoError(t, b.cluster.KillAPIServer())
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for down := time.Now(); time.Since(down) < outage; <-second.C {
		for f, id := range both {
			f.bothAccepted()
			require.Contains(t, []string{firstPassword, f.failed.password}, f.served())
			require.NotContains(t, []string{"grace", "completed", "rolled_back"}, f.rotation(id)["state"])
		}
	}
	on.says(both[on], []string{"waiting"}, "cannot be reached")
	require.Equal(t, on.failed.password, on.served())
	back.says(both[back], []string{"rolling_back", "rollback_failed"}, "cannot be reached")
	require.Equal(t, firstPassword, back.served())
	require.NoError(t, b.cluster.StartAPIServer(on.ctx))
	there := time.Now()
	require.NoError(t, b.cluster.StartESO(on.ctx))
	on.until(both[on], "grace")
	on.bothAccepted()
	require.Equal(t, "2", on.revision("deployment", "web"), "restarted once")
	require.Equal(t, map[string]int{on.failed.password: 2}, on.running("web"))
	total := on.sim.Total()
	figure(t, "API server down for %.0f s: the rotation ends by itself %.0f s later, %d logins, %d refused",
		outage.Seconds(), time.Since(there).Seconds(), total.Logins, total.Refused)
	require.Zero(t, total.Refused)
	back.isBack("API server down for longer than a rollout may take", both[back], "not in time", "cannot be reached")
}
