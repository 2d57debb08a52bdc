package harmonyflow

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// A role of an application, and one of the user that sentinels and replicas log
// in as, by sentinels alone.
func TestRolesBySentinels(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	const watcher, secret = "watcher", "watcher-first-secret"
	set := servers.RedisSentinel(t, servers.SentinelOptions{
		AuthUser: watcher, AuthPass: secret,
		Options: []servers.RedisOption{servers.WithUsers("default off")},
		Nodes:   []servers.RedisOption{users(1), servers.WithUsers(watcher + " on >" + secret + " ~* &* +@all"), servers.WithConfig("masteruser "+watcher, "masterauth "+secret)},
	})
	login := map[string]any{
		"topology": "sentinel", "sentinel_master": servers.RedisMaster,
		"sentinel_username": servers.RedisAdmin, "sentinel_password": servers.RedisAdminPassword,
	}
	r := m.connect("cache", set.Sentinels[0].Addr, login)
	require.Equal(t, "sentinel, 3 nodes, 3 sentinels", r.data["summary"])
	require.Contains(t, strings.Join(r.data["nodes"].([]string), " "), "sentinel "+set.Sentinels[2].Addr+" (sentinel, Redis ")
	read := m.read("connections/cache").data
	require.Equal(t, servers.RedisMaster, read["sentinel_master"])
	require.NotContains(t, read, "sentinel_password")

	m.adopt("app", "cache", 0, map[string]any{"grace_period": "1h"})
	m.must("roles/links", map[string]any{"kind": "redis", "connection": "cache", "username": watcher, "initial_password": secret, "grace_period": "1h"})
	require.Len(t, m.role("links").Nodes, 3, "sentinels hold no users")
	for _, role := range []string{"app", "links"} {
		running := id(m.must("rotate/redis/"+role, nil))
		m.until(running, func(s rotation.State) bool { return s == rotation.InGrace })
		m.must("retire/redis/"+role, nil)
		m.until(running, func(s rotation.State) bool { return s == rotation.Completed })
	}
	for _, n := range set.Nodes {
		require.False(t, canLogIn(t, n, watcher, secret))
		_, err := n.Do(t.Context(), "CLIENT", "KILL", "USER", watcher)
		require.NoError(t, err)
	}
	require.NoError(t, set.WaitWatched(t.Context()))
	require.NoError(t, set.WaitReplicating(t.Context()))

	t.Run("one owner", func(t *testing.T) {
		m.connect("by-node", set.Nodes[0].Addr, nil)
		r := m.write("roles/second", map[string]any{"kind": "redis", "connection": "by-node", "username": "user-0", "initial_password": m.creds("app")["password"]})
		require.Equal(t, http.StatusConflict, r.code, r.message)
		require.Contains(t, r.message, `belongs to role "app"`)
	})
	t.Run("secrets come again", func(t *testing.T) {
		for says, data := range map[string]map[string]any{
			"stored password is sent":          {"addresses": set.Sentinels[1].Addr},
			"stored sentinel_password is sent": {"addresses": set.Sentinels[1].Addr, "password": servers.RedisAdminPassword},
			"sentinel_username changes":        {"sentinel_username": "somebody"},
		} {
			r := m.write("connections/cache", data)
			require.Equal(t, http.StatusBadRequest, r.code)
			require.Contains(t, r.message, says)
		}
		m.must("connections/cache", map[string]any{
			"addresses": set.Sentinels[1].Addr, "password": servers.RedisAdminPassword, "sentinel_password": servers.RedisAdminPassword,
		})
	})
}

func TestConnectionOverTLS(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := ca.Issue("engine")
	require.NoError(t, err)
	server := servers.Redis(t, users(1), servers.WithTLS(ca, "127.0.0.1"))
	m.connect("cache", server.Addr, map[string]any{"tls": true, "tls_ca": ca.PEM, "tls_cert": cert, "tls_key": key})
	read := m.read("connections/cache").data
	require.Equal(t, true, read["tls"])
	require.NotContains(t, read, "tls_key")
	m.adopt("app", "cache", 0, nil)
	generation := m.role("app").NodesGeneration
	for field, value := range map[string]any{"tls": false, "tls_ca": "", "tls_server_name": "else", "tls_skip_verify": true} {
		r := m.write("connections/cache", map[string]any{field: value})
		require.Equal(t, http.StatusBadRequest, r.code, field)
	}
	m.must("connections/cache", map[string]any{"tls_skip_verify": true, "password": servers.RedisAdminPassword})
	running := id(m.must("rotate/redis/app", nil))
	m.until(running, func(s rotation.State) bool { return s == rotation.InGrace })
	require.Equal(t, generation, m.role("app").NodesGeneration, "whom to trust does not change which nodes there are")
}
