package harmonyflow

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

var stolen = map[string]any{"reason": "a laptop was stolen"}

// session is a connection that has logged in and stays.
func session(t testing.TB, n *servers.RedisNode, user, password string) *redis.Conn {
	t.Helper()
	c := n.Client()
	t.Cleanup(func() { _ = c.Close() })
	conn := c.Conn()
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.AuthACL(context.Background(), user, password).Err())
	require.NoError(t, conn.Ping(context.Background()).Err())
	return conn
}

func TestEmergency(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(3))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("idle", "cache", 1, nil)
	m.adopt("other", "cache", 2, nil)
	running := id(m.must("rotate/redis/app", nil))
	second := m.creds("app")["password"].(string)
	thief := session(t, server, "user-0", password(0))
	mine := session(t, server, "user-2", password(2))
	m.must("config", map[string]any{"freeze": true, "freeze_reason": "an audit"})
	require.Equal(t, http.StatusConflict, m.write("rotate/redis/app", nil).code)

	for _, data := range []map[string]any{nil, {"reason": "  "}} {
		r := m.write("emergency/rotate/redis/app", data)
		require.Equal(t, http.StatusBadRequest, r.code)
		require.Contains(t, r.message, "reason is empty")
	}
	require.True(t, canLogIn(t, server, "user-0", password(0)), "nothing has changed")

	r := m.must("emergency/rotate/redis/app", map[string]any{"reason": "a laptop was stolen", "idempotency_key": "ticket-4711"})
	require.Equal(t, "version 3, completed", r.data["redis/app"])
	require.Contains(t, r.data["earlier_versions_refused"], "1 of 1 secret, the last ")
	overrides := strings.Join(r.data["overrides"].([]string), "\n")
	require.Contains(t, overrides, "the mount is frozen: an audit")
	require.Contains(t, overrides, "rotation "+running+" of redis/app (manual, in grace)")
	creds := m.creds("app")
	require.NotContains(t, creds, "previous_password")
	require.True(t, canLogIn(t, server, "user-0", creds["password"].(string)))
	require.False(t, canLogIn(t, server, "user-0", password(0)))
	require.False(t, canLogIn(t, server, "user-0", second))
	require.Error(t, thief.Ping(context.Background()).Err(), "its session is closed")
	require.NoError(t, mine.Ping(context.Background()).Err(), "that of another user is not")
	require.True(t, canLogIn(t, server, "user-1", password(1)), "other roles are left alone")

	ended := m.ended(running)
	require.Equal(t, "superseded", ended["state"])
	require.Contains(t, ended["redis/app"], "superseded by emergency rotation "+id(r))
	detail := m.ended(id(r))
	require.Equal(t, "emergency", detail["trigger"])
	require.Equal(t, "a laptop was stolen", detail["reason"])
	require.Contains(t, strings.Join(detail["timeline"].([]string), "\n"), "every earlier version is refused")
	require.Equal(t, id(r), id(m.must("emergency/rotate/redis/app", map[string]any{"reason": "again", "idempotency_key": "ticket-4711"})))
	for _, v := range m.role("app").Versions[:2] {
		require.EqualValues(t, "compromised", v.Stage)
	}
	// Of a kind, and of all. Those that are in an emergency already are no error.
	r = m.must("emergency/rotate/redis", stolen)
	require.Equal(t, "3 roles: 3 completed", r.data["summary"])
	m.must("roles/token", map[string]any{"kind": "api-key", "previous_field": "OLD", "document": "web", "field": "key"})
	first := m.creds("token")["value"]
	m.must("config", map[string]any{"freeze": false})
	refused := m.write("rollback/redis/app", nil)
	require.Equal(t, http.StatusConflict, refused.code)
	require.Contains(t, refused.message, "keeps no earlier material")
	m.must("rotate/api-key/token", nil)
	require.Equal(t, first, m.read("data/web").data["data"].(map[string]any)["OLD"])
	r = m.must("emergency/rotate/all", stolen)
	require.Equal(t, "4 roles: 4 completed", r.data["summary"])
	body := m.read("data/web").data["data"].(map[string]any)
	require.Empty(t, body["OLD"], "nobody is to accept it any more")
	require.Equal(t, m.creds("token")["value"], body["key"])
	require.Equal(t, http.StatusNotFound, m.send(request{op: logical.ReadOperation, path: "data/web", data: map[string]any{"version": 2}}).code, "an earlier version is gone")

	for path, says := range map[string]string{
		"emergency/rotate/nothing": "kind \"nothing\" is not known", "emergency/rotate/jwt": "there is no role of kind jwt",
		"emergency/rotate/redis/nobody": "there is no role \"nobody\"", "emergency/rotate/redis/all": "reserved",
	} {
		r := m.write(path, stolen)
		require.GreaterOrEqual(t, r.code, 400, path)
		require.Contains(t, r.message, says)
	}
	for says, data := range map[string]map[string]any{
		"consumers of these roles are in none": {"reason": "x", "restart_namespaces": "kube-system"},
		"consumers of these roles have none":   {"reason": "x", "hooks": "revoke"},
		"unknown field":                        {"reason": "x", "grace_period": "1h"},
		"one line":                             {"reason": strings.Repeat("x", 1000)},
	} {
		r := m.write("emergency/rotate/redis/app", data)
		require.Equal(t, http.StatusBadRequest, r.code, says)
		require.Contains(t, r.message, says)
	}
}

// TestEmergencyDryRun: what it would reach is told, and nothing is changed.
func TestEmergencyDryRun(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("idle", "cache", 1, nil)
	m.must("roles/token", map[string]any{"kind": "api-key", "document": "web", "field": "key"})
	running := id(m.must("rotate/redis/app", nil))
	stored, there := m.stored(t), aclList(t, server)
	r := m.must("emergency/rotate/all", map[string]any{"dry_run": true})
	require.Equal(t, "3 secrets at 1 node, and 0 consumers, would be reached; nothing was changed", r.data["summary"])
	require.Equal(t, "would make version 3, and have 1 node refuse versions 1, 2; would end rotation "+running, r.data["redis/app"])
	require.Equal(t, "would make version 2, and have 1 node refuse version 1", r.data["redis/idle"])
	require.Equal(t, "would make version 2, and no longer show version 1; shown in document web", r.data["api-key/token"])
	require.Equal(t, "vault write harmonyflow/emergency/rotate/all reason=…", r.data["follow"])
	require.Contains(t, r.data["overrides"].([]string)[0], running)
	require.Equal(t, there, aclList(t, server))
	require.NoError(t, server.Kill())
	r = m.must("emergency/rotate/redis/idle", map[string]any{"dry_run": true})
	require.Contains(t, r.data["redis/idle"], "would not get far: ")
	require.Equal(t, stored, m.stored(t))
}

// TestEmergencyOfKeys: what signed is not verified any more; what encrypted still
// decrypts.
func TestEmergencyOfKeys(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/signer", map[string]any{"kind": "jwt", "algorithm": "EdDSA", "max_token_ttl": "1h", "public_jwks": true})
	m.must("roles/cipher", map[string]any{
		"kind": "encryption-key", "require_reencryption_ack": true, "document": "app", "field": "key", "keys_field": "keys",
	})
	old, cipher := m.creds("signer"), m.creds("cipher")
	m.must("emergency/rotate/all", stolen)
	m.until(id(m.must("emergency/rotate/all", stolen)), func(s rotation.State) bool { return s == rotation.Completed })
	now := m.creds("signer")
	require.NotEqual(t, old["kid"], now["kid"])
	keys := m.keySet("signer").Keys
	require.Len(t, keys, 1)
	require.Equal(t, now["kid"], keys[0].KeyID)
	body := m.read("data/app").data["data"].(map[string]any)
	require.Contains(t, body["keys"], cipher["kid"], "what it encrypted has to be read")
	require.NotEqual(t, cipher["value"], body["key"])
	require.False(t, m.role("cipher").Versions[0].Compromised.IsZero())
	r := m.write("rollback/encryption-key/cipher", nil)
	require.Equal(t, http.StatusConflict, r.code)
	r = m.write("retire/encryption-key/cipher", map[string]any{"version": 1})
	require.Equal(t, http.StatusConflict, r.code, "it is not acknowledged")
}
