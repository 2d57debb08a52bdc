package harmonyflow

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestVaultConnection(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	roleID, secretID, err := v.AppRole(ctx, "engine", `path "secret/data/app/*" { capabilities = ["create", "read", "update"] }`, "1h")
	require.NoError(t, err)
	m := newMount(t)

	r := m.must("connections/other", map[string]any{
		"type": "vault", "address": v.Address + "/", "auth": "approle", "role_id": roleID, "secret_id": secretID,
		"allowed_roles": "app-*", "allowed_publish_paths": "secret/app/*",
	})
	require.Equal(t, "logged in by approle", r.data["summary"])
	require.Empty(t, r.warnings)
	data := m.read("connections/other").data
	identity := data["identity"].(string)
	require.True(t, strings.HasPrefix(identity, "vault:"), identity)
	delete(data, "identity")
	require.Equal(t, map[string]any{
		"type": "vault", "allowed_roles": []string{"app-*"}, "address": v.Address, "namespace": "", "auth": "approle", "auth_mount": "approle",
		"role_id": roleID, "role": "", "allowed_publish_paths": []string{"secret/app/*"},
		"tls_ca": "", "tls_cert": "", "tls_server_name": "", "tls_skip_verify": false, "managed": false,
	}, data)
	require.Equal(t, map[string]any{"type": "vault"}, m.list("connections/").data["key_info"].(map[string]any)["other"])

	// A partial write keeps the rest, and its login.
	m.must("connections/other", map[string]any{"allowed_roles": "*"})
	data = m.read("connections/other").data
	require.Equal(t, []string{"*"}, data["allowed_roles"])
	require.Equal(t, identity, data["identity"])
	m.must("connections/other", map[string]any{"allowed_publish_paths": ""})
	require.Empty(t, m.read("connections/other").data["allowed_publish_paths"])

	// The name of the AppRole is no part of the credential.
	m.must("connections/other", map[string]any{"role": "engine"})
	data = m.read("connections/other").data
	require.Equal(t, "engine", data["role"])
	require.Equal(t, roleID, data["role_id"])
	m.must("connections/other", map[string]any{"role": ""})
	require.Empty(t, m.read("connections/other").data["role"])
	m.must("connections/other", map[string]any{"role": "engine"})

	stored, err := m.storage.Get(ctx, storage.Connection+"other")
	require.NoError(t, err)
	require.Contains(t, string(stored.Value), secretID, "it stands in what is seal-wrapped, and nowhere else")
	require.Contains(t, storage.SealWrapped(), storage.Connection)

	for name, c := range map[string]struct {
		data map[string]any
		says string
	}{
		"moved":                     {map[string]any{"address": "http://127.0.0.1:1"}, "give secret_id in the same request"},
		"moved, untried":            {map[string]any{"address": "http://127.0.0.1:1", "verify_connection": false}, "give secret_id in the same request"},
		"moved, with an empty one":  {map[string]any{"address": "http://127.0.0.1:1", "secret_id": ""}, "secret_id"},
		"another namespace":         {map[string]any{"namespace": "stranger"}, "give secret_id in the same request"},
		"another mount":             {map[string]any{"auth_mount": "stranger"}, "give secret_id in the same request"},
		"trusting everybody":        {map[string]any{"tls_skip_verify": true}, "give secret_id in the same request"},
		"another name":              {map[string]any{"tls_server_name": "stranger"}, "give secret_id in the same request"},
		"another role_id":           {map[string]any{"role_id": "stranger"}, "give its secret_id in the same request"},
		"another auth":              {map[string]any{"auth": "token"}, "token is missing"},
		"a field of another auth":   {map[string]any{"token": "app"}, `field "token" is not for auth approle, which takes role_id, secret_id, auth_mount, role`},
		"a field of another type":   {map[string]any{"topology": "cluster"}, `field "topology" is not for a connection of type vault`},
		"another type":              {map[string]any{"type": "redis"}, "the connection is one of type vault"},
		"a file with a new line":    {map[string]any{"secret_id": "a-secret-id-with\n"}, "does not end with a new line"},
		"a list":                    {map[string]any{"secret_id": []any{"listed-secret-1", "listed-secret-2"}}, "must be a string"},
		"a wrong one":               {map[string]any{"secret_id": "wrong-secret-id"}, "invalid role or secret ID"},
		"a role of no AppRole":      {map[string]any{"role": "a/b"}, "give the name of the AppRole"},
		"a path of no mount":        {map[string]any{"allowed_publish_paths": "secret"}, "allowed_publish_paths"},
		"http to somebody else":     {map[string]any{"address": "http://vault.example.com", "secret_id": "a-secret-id"}, "use https://"},
		"the metadata service":      {map[string]any{"address": "https://169.254.169.254", "secret_id": "a-secret-id"}, "metadata service"},
		"a key without certificate": {map[string]any{"tls_key": "a-private-key"}, "give both"},
		"without anything":          {map[string]any{"address": ""}, "address is missing"},
	} {
		r := m.write("connections/other", c.data)
		require.Equal(t, http.StatusBadRequest, r.code, name)
		require.Contains(t, r.message, c.says, name)
		for field, v := range c.data {
			if text, ok := v.(string); ok && text != "" && (field == "secret_id" || field == "tls_key") {
				require.NotContains(t, r.message, strings.TrimSpace(text), name)
			}
		}
	}
	require.Contains(t, m.write("connections/new", map[string]any{"type": "vault", "address": v.Address, "auth": "kubernetes"}).message, "role is missing")
	require.Contains(t, m.write("connections/new", map[string]any{"type": "redis", "address": v.Address}).message, `field "address" is not for a connection of type redis`)

	// Another way to log in, with its own credential.
	periodic, err := v.Client().Auth().Token().CreateWithContext(ctx, &api.TokenCreateRequest{Policies: []string{"engine"}, Period: "1h"})
	require.NoError(t, err)
	m.must("connections/other", map[string]any{"auth": "token", "token": periodic.Auth.ClientToken})
	data = m.read("connections/other").data
	require.Equal(t, "token", data["auth"])
	require.Empty(t, data["auth_mount"])
	require.Empty(t, data["role_id"])
	require.Empty(t, data["role"])
	require.Equal(t, identity, data["identity"])
	require.NoError(t, m.b.vaults.Do(ctx, "other", func(_ context.Context, c *api.Client) error {
		require.Equal(t, periodic.Auth.ClientToken, c.Token())
		return nil
	}))

	// The engine looks after the token by itself, from when it starts.
	p := proxy(t, strings.TrimPrefix(v.Address, "http://"))
	m.must("connections/other", map[string]any{"address": "http://" + p.Addr(), "token": periodic.Auth.ClientToken, "verify_connection": false})
	p.Cut(true)
	m.restart()
	require.Eventually(t, func() bool {
		return strings.Contains(m.log.String(), "the token of a connection cannot be kept alive: connection=other")
	}, patience, glance)
	m.b.Cleanup(ctx)
	require.ErrorContains(t, m.b.vaults.Do(ctx, "other", nil), "the engine is being stopped")
	m.start()

	// Nothing that stands there is told.
	for _, secret := range []string{secretID, periodic.Auth.ClientToken, "wrong-secret-id", "listed-secret-1"} {
		require.NotContains(t, m.told.String(), secret)
		require.NotContains(t, m.log.String(), secret)
	}
	require.Equal(t, http.StatusNoContent, m.delete("connections/other").code)
}

// The engine rotates its own secret-id as a role of a kind that users never see.
func TestHiddenKind(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	require.NotNil(t, m.b.kind("approle"))
	require.NotNil(t, m.b.target("approle", "self"))
	for path, data := range map[string]map[string]any{
		"roles/mine": {"kind": "approle"}, "rotate/approle": {}, "rotate/approle/mine": {},
	} {
		r := m.write(path, data)
		require.GreaterOrEqual(t, r.code, 400, path)
		require.Contains(t, r.message, "allowed are redis, ", path)
		require.NotContains(t, r.message, "approle, ", path)
		require.NotContains(t, r.message, ", approle", path)
	}
}
