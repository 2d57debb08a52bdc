package servers

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What the other tests and the demo rely on: the plugin can be killed alone,
// Vault can be killed alone, data survives, nothing is left over.
func TestVaultOnDiskSurvivesKills(t *testing.T) {
	if _, err := os.Stat("/proc/self/exe"); err != nil {
		t.Skip("needs /proc")
	}
	ctx := t.Context()
	v := NewVault(t, VaultOptions{Raft: true})

	_, err := v.CLI(ctx, "write", "harmonyflow/config", "grace_period=2h")
	require.NoError(t, err)
	before, err := v.PluginPIDs()
	require.NoError(t, err)
	require.Len(t, before, 1)

	killed, err := v.KillPlugin()
	require.NoError(t, err)
	require.Equal(t, 1, killed)
	period, err := v.CLI(ctx, "read", "-field=grace_period", "harmonyflow/config")
	require.NoError(t, err, "vault starts the plugin again at the next request")
	require.Equal(t, "7200", strings.TrimSpace(period))
	after, err := v.PluginPIDs()
	require.NoError(t, err)
	require.Len(t, after, 1)
	require.NotEqual(t, before, after)

	for range 2 {
		require.NoError(t, v.Kill())
		require.Zero(t, v.PID())
		require.Eventually(t, func() bool {
			left, err := v.pluginProcesses()
			return err == nil && len(left) == 0
		}, readyWithin, 50*time.Millisecond, "a plugin ends by itself when its vault is gone")
		require.NoError(t, v.Restart(ctx))
		config, err := v.Client().Logical().ReadWithContext(ctx, "harmonyflow/config")
		require.NoError(t, err)
		require.Equal(t, "7200", fmt.Sprint(config.Data["grace_period"]))
	}

	token, err := v.TokenFor(ctx, "reader", `path "harmonyflow/config" { capabilities = ["read"] }`)
	require.NoError(t, err)
	client := v.Client()
	client.SetToken(token)
	_, err = client.Logical().ReadWithContext(ctx, "harmonyflow/config")
	require.NoError(t, err)
	_, err = client.Logical().WriteWithContext(ctx, "harmonyflow/config", map[string]any{"grace_period": "3h"})
	require.ErrorContains(t, err, "permission denied")

	require.NoError(t, v.Stop())
	require.NoError(t, v.Stop())
	left, err := v.pluginProcesses()
	require.NoError(t, err)
	require.Empty(t, left)
	audit, err := os.ReadFile(v.AuditPath)
	require.NoError(t, err)
	require.Contains(t, string(audit), "harmonyflow/config")
	require.NotContains(t, string(audit), token)
}
