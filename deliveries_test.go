package harmonyflow

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// What is kept of consumers is answered as declared: the first twenty, and any one
// that is asked for.
func TestDeliveriesAreShown(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": "0s"})
	rotation := id(m.must("rotate/redis/app", nil))
	m.ended(rotation)
	at := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	for i := range 25 {
		s := &seen.Consumer{
			Connection: "prod", Namespace: "app", Mode: "restart", At: at, Done: true, Changed: at,
			Externals: []seen.External{{Name: "db", Target: "db", Ready: true, Forced: at, Refreshed: at.Add(time.Second), Interval: "1h"}},
			Values:    []seen.Value{{Role: "app", Field: "password", Secret: "db", Keys: []string{"password"}, Held: true}},
		}
		s.Count()
		require.NoError(t, storage.Put(t.Context(), m.storage, fmt.Sprintf("%s%s/1.sync.web-%02d", storage.Proof, rotation, i), s, 1<<16))
	}
	all := m.read("rotations/" + rotation).data
	require.Len(t, all["consumers"], 20)
	require.Equal(t, int64(5), all["more_consumers"])
	require.Equal(t, "forward, in sync: 1 ExternalSecret synced, 1 of 1 value in the Secrets as served", all["consumer web-00"])
	// A last sync does not hide where pods were brought.
	last := &seen.Consumer{Connection: "prod", Namespace: "app", Mode: "restart", At: at, Done: true}
	last.Count()
	require.NoError(t, storage.Put(t.Context(), m.storage, fmt.Sprintf("%s%s/3.sync.web-00", storage.Proof, rotation), last, 1<<16))
	again := m.read("rotations/" + rotation).data
	require.Equal(t, all["consumer web-00"], again["consumer web-00"])
	require.Equal(t, "afterwards", again["consumers"].([]any)[1].(map[string]any)["direction"])
	one := m.send(request{op: "read", path: "rotations/" + rotation, data: map[string]any{"consumer": "web-24"}}).data
	require.Len(t, one["consumers"], 1)
	web := one["consumers"].([]any)[0].(map[string]any)
	require.Equal(t, []string{
		"2026-11-29T12:00:00Z ExternalSecret db: told to sync", "2026-11-29T12:00:00Z the Secrets got other values",
		"2026-11-29T12:00:00Z Secret db: key password was compared, and holds what role app serves", "2026-11-29T12:00:01Z ExternalSecret db: synced",
	}, web["timeline"])
	require.Equal(t, []any{map[string]any{
		"role": "app", "field": "password", "secret": "db", "keys": []string{"password"}, "matches": true, "no_longer_served": false, "problem": "",
	}}, web["secrets"])
	require.NotContains(t, one, "more_consumers")
	require.Contains(t, strings.Join(one["criteria"].([]string), "\n"), "met: Who asked is recorded (tester, in request ")
}

// Of several roles there is one timeline, and one list of conditions.
func TestSeveralRolesAreShown(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	for i, name := range []string{"app", "web"} {
		m.adopt(name, "cache", i, map[string]any{"grace_period": "0s"})
	}
	all := m.ended(id(m.must("rotate/redis", nil)))
	timeline := strings.Join(all["timeline"].([]string), "\n")
	for _, role := range []string{"redis/app: ", "redis/web: "} {
		for _, what := range []string{"preflight", "promote", "retire", "completed"} {
			require.Contains(t, timeline, role+what)
		}
	}
	require.True(t, slices.IsSortedFunc(all["timeline"].([]string), func(a, b string) int { return lineTime(t, a).Compare(lineTime(t, b)) }), timeline)
	criteria := all["criteria"].([]string)
	require.Len(t, criteria, 10)
	require.Regexp(t, `^met: Vault secret updated with new version \(app: version 2 is served since .*; web: version 2 is served since `, criteria[0])
}

// lineTime is the time at the beginning of a line.
func lineTime(t *testing.T, line string) time.Time {
	t.Helper()
	text, _, _ := strings.Cut(line, " ")
	when, err := time.Parse(time.RFC3339Nano, text)
	require.NoError(t, err)
	return when
}

// A cluster that does not answer costs verify its time there, and what the target
// says is told all the same.
func TestVerifyWithoutCluster(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.cluster("prod")
	m.must("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "allowed_roles": "*", "secrets": "db"})
	m.adopt("app", "cache", 0, nil)
	m.must("roles/app", map[string]any{"consumers": "web"})
	data := m.read("verify/redis/app").data
	require.Equal(t, false, data["ok"])
	require.Contains(t, data["summary"], `consumer "web": the cluster of connection "prod" cannot be reached`)
	require.Equal(t, "vault read harmonyflow/consumers/web", data["follow"])
	require.Equal(t, true, data["checks"].([]any)[0].(map[string]any)["ok"])
	require.Equal(t, false, data["consumers"].([]any)[0].(map[string]any)["ok"])
}
