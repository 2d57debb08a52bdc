package harmonyflow

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestTemplatesOfChecks: a consumer may show the secret of a role only where the role
// says so.
func TestTemplatesOfChecks(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.cluster("prod")
	m.must("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "secrets": "app", "allowed_roles": "*"})
	m.must("roles/key", map[string]any{"kind": "api-key"})
	m.must("roles/jwt", map[string]any{"kind": "jwt", "max_token_ttl": "1h"})
	checks := func(role string) map[string]any {
		return map[string]any{"checks": []any{map[string]any{
			"type": "http", "url": "https://api.example.com/v1/health", "headers": map[string]any{"X-API-Key": "{{" + role + ".value}}"},
		}}}
	}
	refused := func(says string, role string) {
		t.Helper()
		r := m.write("consumers/web", checks(role))
		require.Equal(t, http.StatusBadRequest, r.code)
		require.Contains(t, r.message, says)
		require.Empty(t, m.read("consumers/web").data["checks"])
	}
	refused(`there is no role "gone" that has consumer "web"`, "gone")
	refused(`there is no role "key" that has consumer "web"`, "key")
	m.must("roles/key", map[string]any{"consumers": "web"})
	refused("add api.example.com to its secret_hosts", "key")
	m.must("roles/key", map[string]any{"secret_hosts": "api.example.com:8443"})
	refused("add api.example.com to its secret_hosts", "key")
	m.must("roles/key", map[string]any{"secret_hosts": "other.example.com,API.example.com:443"})
	m.must("consumers/web", checks("key"))
	require.Equal(t, checks("key")["checks"], m.read("consumers/web").data["checks"])
	require.Equal(t, []string{"api.example.com", "other.example.com"}, m.read("roles/key").data["secret_hosts"])

	// A role that takes it back is asked again by the next rotation, and what has
	// nothing to do with it can still be written.
	m.must("roles/key", map[string]any{"secret_hosts": ""})
	require.Empty(t, m.read("roles/key").data["secret_hosts"])
	m.must("consumers/web", map[string]any{"rollout_timeout": "10m"})
	r := m.write("consumers/web", checks("key"))
	require.Contains(t, r.message, "does not let its secret be sent to api.example.com")

	for says, data := range map[string]map[string]any{
		"no scheme, path or wildcard":           {"secret_hosts": "https://api.example.com"},
		`secret_hosts holds "*.example.com"`:    {"secret_hosts": "api.example.com,*.example.com"},
		`secret_hosts holds "api.example.com."`: {"secret_hosts": "api.example.com."},
	} {
		r := m.write("roles/key", data)
		require.Equal(t, http.StatusBadRequest, r.code)
		require.Contains(t, r.message, says)
	}
	require.Contains(t, m.write("roles/jwt", map[string]any{"secret_hosts": "api.example.com"}).message, "keys of kind jwt are sent to nobody")
}
