package e2e

import (
	"path"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestUpgrade installs another release as docs/operations.md says, in the middle
// of a rotation, and goes back. Vault says each time which one is running;
// nothing that is served changes, and the rotation is there to be ended.
func TestUpgrade(t *testing.T) {
	const older, newer = "v0.1.7", "v0.2.3"
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	c := v.Client()
	require.NoError(t, v.Install(ctx, older))
	require.NoError(t, c.Sys().MountWithContext(ctx, servers.DefaultMount, &api.MountInput{
		Type: servers.PluginName, Config: api.MountConfigInput{PluginVersion: older},
	}))
	running := func() string {
		mounts, err := c.Sys().ListMountsWithContext(ctx)
		require.NoError(t, err)
		return mounts[servers.DefaultMount+"/"].RunningVersion
	}
	read := func(name string) map[string]any {
		t.Helper()
		secret, err := c.Logical().ReadWithContext(ctx, path.Join(servers.DefaultMount, name))
		require.NoError(t, err)
		require.NotNil(t, secret, name)
		return secret.Data
	}
	require.Equal(t, older, running())

	_, err := c.Logical().WriteWithContext(ctx, servers.DefaultMount+"/roles/key", map[string]any{
		"kind": "api-key", "document": "shop/web", "field": "key", "previous_field": "key-previous", "grace_period": "1h",
	})
	require.NoError(t, err)
	begun, err := c.Logical().WriteWithContext(ctx, servers.DefaultMount+"/rotate/api-key/key", nil)
	require.NoError(t, err)
	rotation := "rotations/" + begun.Data["rotation_id"].(string)
	require.Equal(t, "grace", read(rotation)["state"])
	served, document := read("creds/key"), read("data/shop/web")["data"]

	for _, to := range []string{newer, older} {
		if to == newer {
			require.NoError(t, v.Install(ctx, to))
		}
		require.NoError(t, c.Sys().TuneMountAllowNilWithContext(ctx, servers.DefaultMount, api.TuneMountConfigInput{PluginVersion: &to}))
		_, err = c.Sys().ReloadPluginWithContext(ctx, &api.ReloadPluginInput{Plugin: servers.PluginName, Scope: "global"})
		require.NoError(t, err)
		require.Eventually(t, func() bool { return running() == to }, time.Minute, 50*time.Millisecond, "%s is not running", to)
		require.Equal(t, served["value"], read("creds/key")["value"])
		require.Equal(t, document, read("data/shop/web")["data"])
		require.Equal(t, "grace", read(rotation)["state"])
	}
	info, err := c.Sys().GetPluginWithContext(ctx, &api.GetPluginInput{Name: servers.PluginName, Type: api.PluginTypeSecrets, Version: newer})
	require.NoError(t, err)
	require.Equal(t, newer, info.Version)

	_, err = c.Logical().WriteWithContext(ctx, servers.DefaultMount+"/retire/api-key/key", nil)
	require.NoError(t, err)
	require.Equal(t, "completed", read(rotation)["state"])
	require.Equal(t, served["value"], read("creds/key")["value"])
	require.Empty(t, read("data/shop/web")["data"].(map[string]any)["key-previous"])
}
