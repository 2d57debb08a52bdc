package consumers_test

import (
	"fmt"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// joined: rotations that waited together for a consumer cost it one restart. When one of
// those is bad, pods crash with what all of them serve: everything goes back, the others
// complete alone, and the bad one is rolled back.
func joined(s *scene) {
	t := s.t
	n := s.redis(nil)
	keys := []string{"key-0", "key-1", "key-2"}
	for i, key := range keys {
		s.must("roles/"+key, map[string]any{
			"kind": "api-key", "document": "app", "field": fmt.Sprintf("KEY_%d", i), "previous_field": fmt.Sprintf("KEY_%d_OLD", i), "grace_period": "1h",
		})
	}
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 3, toRedis(n))
	s.consumer(nil, []string{"web"})
	for _, role := range append(keys, "app") {
		s.must("roles/"+role, map[string]any{"consumers": "web"})
	}

	// One has the consumer, and three wait for it.
	first := s.begin("redis/app")
	var waited []string
	for _, key := range keys {
		waited = append(waited, s.begin("api-key/"+key))
	}
	for _, id := range waited {
		require.Equal(t, "preflight", s.rotation(id)["phase"], "it waits")
	}
	s.until(first, "grace")
	for _, id := range waited {
		told := s.until(id, "grace")
		require.Contains(t, strings.Join(texts(told["timeline"]), "\n"), "what 3 rotations serve")
	}
	require.Equal(t, "3", s.revision("deployment", "web"), "one restart for the first, one for three that waited")
	s.carries(keys)
	figure(t, "joined: 3 rotations that waited for a consumer, 1 restart")
	s.retire(append(keys, "app")...)

	// The next time the password is one that pods do not start with.
	was, before := s.served(), s.restartsOf("web")
	s.sim.CrashWhen(func(p kube.SimulatedPod) bool { return p.Password != was })
	first = s.begin("api-key/key-0")
	bad, good := s.begin("redis/app"), s.begin("api-key/key-1")
	s.until(first, "grace")
	told := s.until(bad, "rolled_back")
	require.Contains(t, strings.Join(texts(told["timeline"]), "\n"), "goes on alone")
	require.Contains(t, fmt.Sprint(told["roles"]), "CrashLoopBackOff", "for its own fault: %v", told)
	s.until(good, "grace")
	s.carries(keys)
	require.Equal(t, was, s.served())
	require.Equal(t, map[string]int{was: 3}, s.running("web"))
	total := s.sim.Total()
	figure(t, "joined with a bad one: the good one completes, %d restarts, %d logins, %d refused", s.restartsOf("web")-before, total.Logins, total.Refused)
	require.Zero(t, total.Refused)
	// the first; both and back; the good one; the bad one and back
	require.Equal(t, 6, s.restartsOf("web")-before)
}

// begin starts a rotation and returns its id, however far it has come.
func (s *scene) begin(role string) string {
	s.t.Helper()
	return s.must("rotate/"+role, nil)["rotation_id"].(string)
}

// retire ends the grace of roles.
func (s *scene) retire(roles ...string) {
	s.t.Helper()
	for _, role := range roles {
		kind := "api-key"
		if role == "app" {
			kind = "redis"
		}
		data := s.must("retire/"+kind+"/"+role, nil)
		s.until(data["rotation_id"].(string), "completed")
	}
}

// carries checks that the Secret holds what keys serve.
func (s *scene) carries(keys []string) {
	s.t.Helper()
	secret, err := s.cluster.Secret(s.ctx, s.ns, "app")
	require.NoError(s.t, err)
	for i, key := range keys {
		creds, err := s.read("creds/" + key)
		require.NoError(s.t, err)
		require.Equal(s.t, creds["value"], secret[fmt.Sprintf("KEY_%d", i)])
	}
	require.Equal(s.t, s.served(), secret["password"])
}
