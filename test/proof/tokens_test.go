package proof_test

import (
	"errors"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestWhatATokenMayDo: what a token may do is decided by paths alone. One that
// may write rotate/redis/* rotates the roles of that kind and does nothing else.
func TestWhatATokenMayDo(t *testing.T) {
	v, set := sharedVault(t), sharedCluster(t)
	m := newMount(t, v, "tokens")
	m.connect(t, "cluster", set)
	m.adopt(t, "cluster", set, "tokens-app", map[string]any{"grace_period": "1h"})
	m.mustWrite(t, "roles/key", map[string]any{"kind": "api-key", "grace_period": "0"})
	addUser(t, set, "tokens-other", "other-before")
	token, err := v.TokenFor(t.Context(), "rotate-redis", `path "tokens/rotate/redis/*" { capabilities = ["update"] }`)
	require.NoError(t, err)
	c := v.Client()
	c.SetToken(token)
	holder := &mount{vault: v, path: m.path, c: c}

	served := func() map[string]any {
		data, err := m.read(t.Context(), "creds/tokens-app")
		require.NoError(t, err)
		return data
	}
	before := served()
	answer := holder.mustWrite(t, "rotate/redis/tokens-app", nil)
	after := served()
	require.NotEqual(t, before["password"], after["password"])
	for _, password := range []any{before["password"], after["password"]} {
		require.NotContains(t, answerText(answer), password, "rotate/ never returns material")
	}
	key, err := m.read(t.Context(), "creds/key")
	require.NoError(t, err)

	id := answer["rotation_id"].(string)
	forbidden := map[string]func() error{
		"read creds/ of the role that it rotates": func() error { return only(holder.read(t.Context(), "creds/tokens-app")) },
		"read creds/ of another role":             func() error { return only(holder.read(t.Context(), "creds/key")) },
		"rotate an api-key":                       func() error { return only(holder.write(t.Context(), "rotate/api-key/key", nil)) },
		"rotate every api-key":                    func() error { return only(holder.write(t.Context(), "rotate/api-key", nil)) },
		"rotate everything":                       func() error { return only(holder.write(t.Context(), "rotate/all", nil)) },
		"write a role": func() error {
			return only(holder.write(t.Context(), "roles/mine", map[string]any{"kind": "redis", "connection": "cluster", "username": "tokens-other"}))
		},
		"change a role": func() error {
			return only(holder.write(t.Context(), "roles/tokens-app", map[string]any{"description": "mine"}))
		},
		"read a role":         func() error { return only(holder.read(t.Context(), "roles/tokens-app")) },
		"delete a role":       func() error { return only(c.Logical().DeleteWithContext(t.Context(), "tokens/roles/tokens-app")) },
		"list roles":          func() error { return only(c.Logical().ListWithContext(t.Context(), "tokens/roles")) },
		"read the connection": func() error { return only(holder.read(t.Context(), "connections/cluster")) },
		"write the connection": func() error {
			return only(holder.write(t.Context(), "connections/cluster", map[string]any{"password": servers.RedisAdminPassword}))
		},
		"write the configuration": func() error { return only(holder.write(t.Context(), "config", map[string]any{"freeze": true})) },
		"read a rotation":         func() error { return only(holder.read(t.Context(), "rotations/"+id)) },
		"cancel a rotation":       func() error { return only(holder.write(t.Context(), "cancel/"+id, nil)) },
		"roll back":               func() error { return only(holder.write(t.Context(), "rollback/redis/tokens-app", nil)) },
		"retire":                  func() error { return only(holder.write(t.Context(), "retire/redis/tokens-app", nil)) },
		"reconcile":               func() error { return only(holder.write(t.Context(), "reconcile/redis/tokens-app", nil)) },
		"verify":                  func() error { return only(holder.read(t.Context(), "verify/redis/tokens-app")) },
		"read the status":         func() error { return only(holder.read(t.Context(), "status")) },
	}
	for what, try := range forbidden {
		t.Run(what, func(t *testing.T) { require.Equal(t, http.StatusForbidden, statusOf(try()), what) })
	}

	// A role of another kind stays out of reach under the allowed path, and no
	// field of the body widens it.
	require.Equal(t, http.StatusNotFound, statusOf(only(holder.write(t.Context(), "rotate/redis/key", nil))))
	for _, body := range []map[string]any{
		{"kind": "api-key", "name": "key"}, {"roles": "key"}, {"name": "key"},
	} {
		_, _ = holder.write(t.Context(), "rotate/redis/tokens-app", body)
	}
	now, err := m.read(t.Context(), "creds/key")
	require.NoError(t, err)
	require.Equal(t, key["value"], now["value"], "the api-key must not have been rotated")
	require.Equal(t, after["password"], served()["password"])
	figure(t, "%d operations refused to a token that may rotate redis", len(forbidden))
}

func only[T any](_ T, err error) error { return err }

func statusOf(err error) int {
	var answer *api.ResponseError
	if errors.As(err, &answer) {
		return answer.StatusCode
	}
	return 0
}
