package harmonyflow

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// enginePolicy is the least that a role with every feature needs of the token.
const enginePolicy = `
path "transit/keys/orders"        { capabilities = ["read"] }
path "transit/keys/orders/rotate" { capabilities = ["update"] }
path "transit/keys/orders/config" { capabilities = ["update"] }
path "transit/keys/locked"        { capabilities = ["read"] }
path "transit/keys/none"          { capabilities = ["read"] }
path "sys/capabilities-self"      { capabilities = ["update"] }
path "auth/token/lookup-self"     { capabilities = ["read"] }
`

// transitVault is a Vault with transit keys, and a mount with a connection to it.
func transitVault(t *testing.T) (*mount, *api.Client) {
	t.Helper()
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	client := v.Client()
	require.NoError(t, client.Sys().MountWithContext(ctx, "transit", &api.MountInput{Type: "transit"}))
	for _, key := range []string{"orders", "locked"} {
		_, err := client.Logical().WriteWithContext(ctx, "transit/keys/"+key, nil)
		require.NoError(t, err)
	}
	token, err := v.TokenFor(ctx, "engine", enginePolicy)
	require.NoError(t, err)
	m := newMount(t)
	m.must("connections/other", map[string]any{"type": "vault", "address": v.Address, "token": token, "allowed_roles": "orders*,payments"})
	return m, client
}

func keyOf(t *testing.T, client *api.Client, name string) (latest, oldest string) {
	t.Helper()
	s, err := client.Logical().ReadWithContext(context.Background(), "transit/keys/"+name)
	require.NoError(t, err)
	return fmt.Sprint(s.Data["latest_version"]), fmt.Sprint(s.Data["min_decryption_version"])
}

func TestTransit(t *testing.T) {
	t.Parallel()
	m, client := transitVault(t)

	r := m.must("roles/orders", map[string]any{"kind": "transit", "connection": "other", "key": "orders", "rotation_period": "720h"})
	require.Equal(t, "completed", r.data["state"])
	latest, _ := keyOf(t, client, "orders")
	require.Equal(t, "1", latest, "creating a role rotates nothing")
	data := m.read("roles/orders").data
	require.Equal(t, "transit", data["mount"])
	require.Equal(t, "orders", data["key"])
	require.Equal(t, "kept", data["strategy"])
	require.NotContains(t, data, "grace_period")
	require.Equal(t, "transit key version 1, as it was found", data["versions"].(map[string]any)["1"].(map[string]any)["evidence"])

	r = m.must("rotate/transit/orders", map[string]any{"dry_run": true})
	require.Equal(t, "would ask for a new version of transit/orders, of which 1 is the newest", r.data["transit/orders"])

	sealed, err := client.Logical().WriteWithContext(t.Context(), "transit/encrypt/orders", map[string]any{"plaintext": "c2VjcmV0"})
	require.NoError(t, err)
	r = m.must("rotate/transit/orders", nil)
	require.Equal(t, "completed", r.data["state"], "there is no grace")
	require.Equal(t, "version 2, completed", r.data["transit/orders"])
	latest, oldest := keyOf(t, client, "orders")
	require.Equal(t, []string{"2", "1"}, []string{latest, oldest})
	evidence := m.ended(r.data["rotation_id"].(string))
	require.Regexp(t, `(?m)^met: a new version was made \(transit key version 1 → 2, request [0-9a-f-]{36}\)$`, strings.Join(evidence["criteria"].([]string), "\n"))
	data = m.read("roles/orders").data
	require.NotEmpty(t, data["next_rotations"])
	require.Equal(t, "retired", data["versions"].(map[string]any)["1"].(map[string]any)["stage"])
	_, err = client.Logical().WriteWithContext(t.Context(), "transit/decrypt/orders", map[string]any{"ciphertext": sealed.Data["ciphertext"]})
	require.NoError(t, err, "what was encrypted before still decrypts")

	data = m.read("verify/transit/orders").data
	require.Equal(t, true, data["ok"])
	require.Equal(t, int64(2), data["key_version"])
	require.Equal(t, int64(1), data["min_decryption_version"])
	require.Contains(t, data["summary"], "version 2 is the newest of transit/orders")

	// The limit is set after the version is proven, and shown.
	m.must("roles/orders", map[string]any{"min_decryption_version": 3})
	require.Equal(t, "would ask for a new version of transit/orders, of which 2 is the newest, and end decryption with versions before 3",
		m.must("rotate/transit/orders", map[string]any{"dry_run": true}).data["transit/orders"])
	r = m.must("rotate/transit/orders", nil)
	latest, oldest = keyOf(t, client, "orders")
	require.Equal(t, []string{"3", "3"}, []string{latest, oldest})
	require.Contains(t, m.ended(r.data["rotation_id"].(string))["criteria"], "met: versions before 3 no longer decrypt")
	_, err = client.Logical().WriteWithContext(t.Context(), "transit/decrypt/orders", map[string]any{"ciphertext": sealed.Data["ciphertext"]})
	require.Error(t, err)
	r = m.write("roles/orders", map[string]any{"min_decryption_version": 2})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "is not lowered to 2")
	m.must("roles/orders", map[string]any{"min_decryption_version": 9})
	r = m.write("rotate/transit/orders", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "the next version of the key is 4")
	m.must("roles/orders", map[string]any{"min_decryption_version": 0})
	m.must("rotate/transit/orders", nil)
	latest, oldest = keyOf(t, client, "orders")
	require.Equal(t, []string{"4", "3"}, []string{latest, oldest}, "0 leaves it alone")
}

func TestTransitRefusals(t *testing.T) {
	t.Parallel()
	m, client := transitVault(t)
	good := func(more map[string]any) map[string]any {
		data := map[string]any{"kind": "transit", "connection": "other", "key": "orders"}
		for k, v := range more {
			data[k] = v
		}
		return data
	}
	for name, c := range map[string]struct {
		role string
		data map[string]any
		code int
		says string
	}{
		"without a key":        {"orders", map[string]any{"kind": "transit", "connection": "other"}, 400, "key is missing"},
		"a key that is a path": {"orders", good(map[string]any{"key": "a/b"}), 400, "key is"},
		"a mount that is none": {"orders", good(map[string]any{"mount": "/transit/"}), 400, "mount is"},
		"an initial password":  {"orders", good(map[string]any{"initial_password": "initial-secret"}), 400, `field "initial_password" is not for kind transit`},
		"an initial value":     {"orders", good(map[string]any{"initial_value": "initial-secret"}), 400, `"initial_value"`},
		"a document":           {"orders", good(map[string]any{"document": "d", "field": "f"}), 400, "whose secret another Vault keeps"},
		"a grace period":       {"orders", good(map[string]any{"grace_period": "1h"}), 400, `"grace_period"`},
		"a length":             {"orders", good(map[string]any{"length": 12}), 400, `field "length" is not for kind transit`},
		"a strategy":           {"orders", good(map[string]any{"strategy": "overlap"}), 400, `"strategy"`},
		"a user":               {"orders", good(map[string]any{"username": "u"}), 400, `"username"`},
		"overwriting":          {"orders", good(map[string]any{"overwrite_existing": true}), 400, `"overwrite_existing"`},
		"a negative limit":     {"orders", good(map[string]any{"min_decryption_version": -1}), 400, "min_decryption_version is -1"},
		"a limit too high":     {"orders", good(map[string]any{"min_decryption_version": 5}), 409, "the next version of the key is 2"},
		"a limit of a root":    {"orders", good(map[string]any{"kind": "database-root", "min_decryption_version": 1}), 400, "is not for kind database-root"},
		"no such key":          {"orders", good(map[string]any{"key": "none"}), 409, "there is no transit key at transit/keys/none"},
		"a locked key":         {"orders", good(map[string]any{"key": "locked"}), 409, `path "transit/keys/locked/rotate" { capabilities = ["update"] }`},
		"an unreadable key":    {"orders", good(map[string]any{"key": "secretive"}), 409, "permission denied"},
		"not allowed":          {"stranger", good(nil), 400, "does not allow role"},
		"no connection":        {"orders", map[string]any{"kind": "transit", "key": "orders"}, 400, "connection is missing"},
		"a mount elsewhere":    {"orders", map[string]any{"kind": "api-key", "mount": "transit"}, 400, `field "mount" is not for kind api-key`},
	} {
		r := m.write("roles/"+c.role, c.data)
		require.Equal(t, c.code, r.code, "%s: %s", name, r.message)
		require.Contains(t, r.message, c.says, name)
		require.Equal(t, http.StatusNotFound, m.read("roles/"+c.role).code, name)
	}
	m.must("roles/orders", good(nil))
	r := m.write("roles/payments", good(nil))
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `belongs to role "orders"`)
	r = m.write("roles/orders", map[string]any{"key": "locked"})
	require.Contains(t, r.message, "cannot be changed")

	for _, c := range []struct{ path, says string }{
		{"rollback/transit/orders", "no earlier version can be put back"},
		{"reconcile/transit/orders", "there is nothing to apply again"},
	} {
		r := m.write(c.path, nil)
		require.Equal(t, http.StatusBadRequest, r.code, c.path)
		require.Contains(t, r.message, c.says)
		require.Contains(t, r.message, "read verify/transit/orders")
	}
	r = m.read("creds/orders")
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "nobody sees it")
	require.Contains(t, m.must("retire/transit/orders", nil).data["summary"], "nothing to retire")

	// Deleted and created again it goes on with its numbers, and another role may
	// have the key.
	m.must("rotate/transit/orders", nil)
	require.Equal(t, http.StatusNoContent, m.delete("roles/orders").code)
	m.must("roles/orders", good(nil))
	data := m.read("roles/orders").data
	require.Equal(t, int64(3), data["version"])
	require.Equal(t, "transit key version 2, as it was found", data["versions"].(map[string]any)["3"].(map[string]any)["evidence"])
	require.Equal(t, http.StatusNoContent, m.delete("roles/orders").code)
	require.Contains(t, m.write("restore/orders", map[string]any{"overwrite_existing": true}).message, "nobody sees")
	m.must("restore/orders", nil)
	data = m.read("roles/orders").data
	require.Equal(t, int64(4), data["version"])
	require.Equal(t, "transit key version 2, as it was found", data["versions"].(map[string]any)["4"].(map[string]any)["evidence"])
	require.Equal(t, http.StatusNoContent, m.delete("roles/orders").code)
	m.must("roles/payments", good(nil))

	// A key that was deleted meanwhile is a failed rotation with a sentence.
	_, err := client.Logical().WriteWithContext(t.Context(), "transit/keys/orders/config", map[string]any{"deletion_allowed": true})
	require.NoError(t, err)
	_, err = client.Logical().DeleteWithContext(t.Context(), "transit/keys/orders")
	require.NoError(t, err)
	r = m.write("rotate/transit/payments", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "there is no transit key at transit/keys/orders")
	data = m.read("verify/transit/payments").data
	require.Equal(t, false, data["ok"])
	require.Contains(t, data["summary"], "there is no transit key")
}

// rootVault answers as Vault does whose database engine rotates its root; lose
// says what becomes of a rotation.
func rootVault(t *testing.T, rotate http.HandlerFunc) (address string) {
	t.Helper()
	mux := http.NewServeMux()
	answer := func(path, body string) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
	}
	answer("/v1/auth/token/lookup-self", `{"data": {"ttl": 0, "renewable": false, "policies": ["engine"]}}`)
	answer("/v1/sys/health", `{"version": "1.21.0", "cluster_id": "c-1", "initialized": true}`)
	answer("/v1/sys/capabilities-self", `{"data": {"database/rotate-root/app": ["update"]}}`)
	answer("/v1/database/config/app", `{"data": {"connection_details": {"username": "vault-root"}, "rotation_period": 0}}`)
	answer("/v1/database/config/nobody", `{"data": {"connection_details": {}}}`)
	mux.HandleFunc("/v1/database/rotate-root/app", rotate)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"errors": []}`))
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL
}

func TestDatabaseRoot(t *testing.T) {
	t.Parallel()
	var turns atomic.Int64
	var fails atomic.Bool
	address := rootVault(t, func(w http.ResponseWriter, _ *http.Request) {
		turns.Add(1)
		if fails.Load() {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = w.Write([]byte(`{"errors": ["failed to update user: the-password"]}`))
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	m := newMount(t)
	m.must("connections/other", map[string]any{"type": "vault", "address": address, "token": "engine-token", "allowed_roles": "*"})
	r := m.write("roles/app", map[string]any{"kind": "database-root", "connection": "other", "key": "nobody"})
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "has no username of its own")
	r = m.write("roles/app", map[string]any{"kind": "database-root", "connection": "other", "key": "missing"})
	require.Contains(t, r.message, "there is no database at database/config/missing")

	m.must("roles/app", map[string]any{"kind": "database-root", "connection": "other", "key": "app", "rotation_period": "720h"})
	require.Zero(t, turns.Load())
	r = m.must("rotate/database-root/app", nil)
	require.Equal(t, "version 2, completed", r.data["database-root/app"])
	evidence := m.ended(r.data["rotation_id"].(string))
	require.Contains(t, strings.Join(evidence["criteria"].([]string), "\n"), "met: its server answered that a new version was made (answered 204 No Content on ")
	require.Contains(t, m.read("verify/database-root/app").data["summary"], "its Vault shows no version")
	require.Equal(t, int64(1), turns.Load())

	// Nobody knows what became of it: said, and never repeated by itself.
	fails.Store(true)
	r = m.write("rotate/database-root/app", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "whether database/app was rotated is unknown")
	require.Contains(t, r.message, "rotate/database-root/app rotates it again")
	require.Equal(t, int64(2), turns.Load())
	data := m.read("roles/app").data
	require.Equal(t, "suspended", data["state"])
	require.Equal(t, int64(2), data["version"])
	require.Contains(t, data["suspended"], "is unknown")
	require.Equal(t, "vault write -f harmonyflow/rotate/database-root/app", m.read("verify/database-root/app").data["follow"])
	m.restart()
	require.NoError(t, m.b.engine.Update(t.Context(), "app", func(r *rotation.Role) error { r.Next = time.Now(); return nil }))
	m.b.engine.Tick()
	require.Never(t, func() bool { return turns.Load() > 2 }, 2*time.Second, 50*time.Millisecond)
	require.Equal(t, "suspended", m.read("roles/app").data["state"])

	fails.Store(false)
	r = m.must("rotate/database-root/app", nil)
	require.Equal(t, "version 4, completed", r.data["database-root/app"])
	require.Equal(t, "idle", m.read("roles/app").data["state"])
	require.Equal(t, int64(3), turns.Load())
	r = m.write("rollback/database-root/app", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
}
