package harmonyflow

import (
	"net/http"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestDeclared: who declares all of a role writes all that can be read of it, each
// time. That changes nothing, also in the middle of a rotation; a difference does,
// and is refused then where the rotation would mind it.
func TestDeclared(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("redis", "cache", 0, map[string]any{"rotation_schedule": "0 2 1 * *", "grace_period": "1h"})
	for name, fields := range map[string]map[string]any{
		"api-key":        {"encoding": "hex", "previous_field": "key-previous", "field": "key", "grace_period": "1h"},
		"jwt":            {"max_token_ttl": "24h", "propagation_delay": "1h", "field": "jwt", "previous_field": "jwt-previous", "rotation_schedule": "0 2 1 */3 *", "rotation_window": "48h"},
		"encryption-key": {"propagation_delay": "1h", "field": "enc", "keys_field": "encs", "require_reencryption_ack": true},
	} {
		fields["kind"], fields["document"] = name, "shop/web"
		m.must("roles/"+name, fields)
	}
	writable := roleFields()
	for _, name := range []string{"redis", "api-key", "jwt", "encryption-key"} {
		all := func() map[string]any {
			t.Helper()
			read, out := m.read("roles/"+name).data, map[string]any{}
			for field, value := range read {
				own := !slices.Contains(kindsOwn, field) || slices.Contains(m.b.offered(name).Fields(), field)
				if _, ok := writable[field]; ok && own && field != "next_rotation" {
					out[field] = value
				}
			}
			return out
		}
		before := all()
		require.Greater(t, len(before), 20, name)
		m.must("roles/"+name, before)
		require.Equal(t, before, all(), name)

		begun := m.must("rotate/"+name+"/"+name, nil)
		require.NotEmpty(t, m.read("roles/" + name).data["rotation_id"], name)
		run, next := m.role(name).Run, m.role(name).Next
		m.must("roles/"+name, before)
		require.Equal(t, before, all(), name)
		require.Equal(t, run, m.role(name).Run, name)
		require.Equal(t, next, m.role(name).Next, name)

		before["description"] = "of the platform team"
		m.must("roles/"+name, before)
		require.Equal(t, before, all(), name)

		for field, value := range map[string]any{"keep_versions": 7, "allow_partial": true, "on_failure": "hold", "auto_reconcile": true, "next_rotation": "5h"} {
			if before[field] == nil && field != "next_rotation" || field == "auto_reconcile" && name != "redis" {
				continue
			}
			if field == "next_rotation" && (name == "api-key" || name == "encryption-key" || name == "redis") {
				continue // without a schedule, or promoted
			}
			was := before[field]
			before[field] = value
			r := m.write("roles/"+name, before)
			require.Equal(t, http.StatusConflict, r.code, "%s of %s: %s", field, name, r.message)
			require.Contains(t, r.message, "not "+field)
			require.Contains(t, r.message, id(begun))
			if delete(before, field); was != nil {
				before[field] = was
			}
			require.Equal(t, before, all(), name)
		}
	}

	// None is 0 where it is read, and so where it is written.
	require.EqualValues(t, 0, m.read("roles/redis").data["rotation_period"])
	m.must("roles/api-key", map[string]any{"rotation_period": "24h"})
	m.must("roles/api-key", map[string]any{"rotation_period": 0})
	require.EqualValues(t, 0, m.read("roles/api-key").data["rotation_period"])
	require.Empty(t, m.read("roles/api-key").data["next_rotation"])
	m.must("roles/api-key", map[string]any{"rotation_period": "24h"})
	m.must("roles/api-key", map[string]any{"rotation_period": 0, "rotation_schedule": "0 2 1 * *"})
	require.Equal(t, http.StatusBadRequest, m.write("roles/never", map[string]any{"kind": "api-key", "rotation_period": 0}).code)
	m.must("roles/monthly", map[string]any{"kind": "api-key", "rotation_period": 0, "rotation_schedule": "0 2 1 * *"})
}
