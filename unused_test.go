package harmonyflow

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestGraceFields: when grace may end before its time.
func TestGraceFields(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA))
	refused := func(says string, more map[string]any) {
		t.Helper()
		r := m.turns(server, more)
		require.Equal(t, http.StatusBadRequest, r.code, r.message)
		require.Contains(t, r.message, says)
	}
	refused("grace_minimum is 2h0m0s; it may be 0 to grace_period, which is 1h0m0s", map[string]any{"grace_until_unused": true, "grace_minimum": "2h"})
	refused("set grace_until_unused=true, or clear it", map[string]any{"grace_minimum": "5m"})
	r := m.write("roles/key", map[string]any{"kind": "api-key", "grace_until_unused": true})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "grace_until_unused is true, and strategy is swap")

	r = m.turns(server, map[string]any{"grace_until_unused": true, "grace_period": "2m"})
	require.Equal(t, http.StatusOK, r.code, r.message)
	shown := m.read("roles/app").data
	require.Equal(t, true, shown["grace_until_unused"])
	require.EqualValues(t, 120, shown["grace_minimum"], "not longer than the grace")
	m.must("roles/app", map[string]any{"grace_period": "1h", "grace_minimum": "10m"})
	require.EqualValues(t, 600, m.read("roles/app").data["grace_minimum"])
	m.must("rotate/redis/app", nil)
	m.must("roles/app", map[string]any{"grace_minimum": ""}) // its grace may be written meanwhile
	require.EqualValues(t, 300, m.read("roles/app").data["grace_minimum"])
	require.Equal(t, http.StatusConflict, m.write("roles/app", map[string]any{"length": 40}).code)
}
