package e2e

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// Go programs read documents with the KV version 2 client of Vault's own
// library, and the mount needs no tuning for them.
func TestGoClientReadsDocuments(t *testing.T) {
	ctx := context.Background()
	v := servers.NewVault(t, servers.VaultOptions{})
	c := v.Client()
	role := map[string]any{"kind": "api-key", "document": "shop/web", "field": "key", "previous_field": "key-previous"}
	_, err := c.Logical().Write(servers.DefaultMount+"/roles/key", role)
	require.NoError(t, err)
	kv := c.KVv2(servers.DefaultMount)
	first, err := kv.Get(ctx, "shop/web")
	require.NoError(t, err)
	require.Equal(t, 1, first.VersionMetadata.Version)

	_, err = c.Logical().Write(servers.DefaultMount+"/rotate/api-key/key", nil)
	require.NoError(t, err)
	second, err := kv.Get(ctx, "shop/web")
	require.NoError(t, err)
	require.Equal(t, 2, second.VersionMetadata.Version)
	require.Equal(t, first.Data["key"], second.Data["key-previous"])
	before, err := kv.GetVersion(ctx, "shop/web", 1)
	require.NoError(t, err)
	require.Equal(t, first.Data, before.Data)

	_, err = c.Logical().Write(servers.DefaultMount+"/retire/api-key/key", nil)
	require.NoError(t, err)
	gone, err := kv.GetVersion(ctx, "shop/web", 1)
	require.NoError(t, err, "a destroyed version is 404 with a body, which the client takes")
	require.Nil(t, gone.Data)
	require.True(t, gone.VersionMetadata.Destroyed)
	metadata, err := kv.GetMetadata(ctx, "shop/web")
	require.NoError(t, err)
	require.Equal(t, 3, metadata.CurrentVersion)
}
