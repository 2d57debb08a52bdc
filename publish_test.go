package harmonyflow

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// publishPolicy is the least that publishing takes.
const publishPolicy = `
path "secret/data/harmonyflow/*" { capabilities = ["create", "read", "update"] }
path "secret/data/harmonyflow/locked" { capabilities = ["read"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "sys/capabilities-self" { capabilities = ["update"] }
path "sys/internal/ui/mounts/*" { capabilities = ["read"] }
`

// publishing is a mount whose roles publish through connection kv to a real Vault.
func publishing(t *testing.T) (*mount, *servers.Vault, *api.KVv2) {
	t.Helper()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	token, err := v.TokenFor(t.Context(), "engine", publishPolicy)
	require.NoError(t, err)
	m := newMount(t)
	m.must("connections/kv", map[string]any{
		"type": "vault", "address": v.Address, "token": token, "allowed_roles": "*", "allowed_publish_paths": "secret/harmonyflow/*",
	})
	return m, v, v.Client().KVv2("secret")
}

// at is where a role of the tests publishes.
func at(path string, more map[string]any) map[string]any {
	data := map[string]any{
		"kind": "api-key", "publish_connection": "kv", "publish_mount": "secret", "publish_path": "harmonyflow/" + path, "field": "api-key",
	}
	for k, v := range more {
		data[k] = v
	}
	return data
}

// merged has what more says, and not what it says is nil.
func merged(data, more map[string]any) map[string]any {
	maps.Copy(data, more)
	maps.DeleteFunc(data, func(_ string, value any) bool { return value == nil })
	return data
}

func held(t *testing.T, kv *api.KVv2, path string) (map[string]any, int) {
	t.Helper()
	s, err := kv.Get(context.Background(), "harmonyflow/"+path)
	require.NoError(t, err)
	return s.Data, s.VersionMetadata.Version
}

// TestPublishing adopts a secret that consumers read today, and rotates it there:
// one version for each change, what belongs to others kept.
func TestPublishing(t *testing.T) {
	t.Parallel()
	m, _, kv := publishing(t)
	_, err := kv.Put(t.Context(), "harmonyflow/app", map[string]any{"api-key": "the-key-of-today", "theirs": "kept", "port": 5432})
	require.NoError(t, err)

	r := m.write("roles/key", at("app", nil))
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `field "api-key" of secret/harmonyflow/app holds a value already`)
	m.ended(id(m.must("roles/key", at("app", map[string]any{"initial_value": "the-key-of-today", "previous_field": "api-key-previous"}))))
	body, version := held(t, kv, "app")
	require.Equal(t, 2, version, "the field of the previous value is there now")
	require.Equal(t, "", body["api-key-previous"])

	first := id(m.must("rotate/api-key/key", nil))
	body, version = held(t, kv, "app")
	require.Equal(t, 3, version)
	require.Equal(t, m.creds("key")["value"], body["api-key"])
	require.Equal(t, "the-key-of-today", body["api-key-previous"])
	m.must("retire/api-key/key", nil)
	m.ended(first)
	body, version = held(t, kv, "app")
	require.Equal(t, 4, version)
	require.Equal(t, "", body["api-key-previous"])
	require.Equal(t, "kept", body["theirs"])
	require.EqualValues(t, "5432", body["port"].(interface{ String() string }).String())

	// Back again: what was published is taken back with it.
	second := id(m.must("rotate/api-key/key", nil))
	before := body["api-key"]
	m.must("rollback/api-key/key", nil)
	require.Equal(t, "rolled_back", m.ended(second)["state"])
	body, version = held(t, kv, "app")
	require.Equal(t, 6, version)
	require.Equal(t, before, body["api-key"])
	require.Equal(t, before, m.creds("key")["value"])
	read := m.read("roles/key").data
	require.Equal(t, "kv", read["publish_connection"])
	require.Equal(t, "harmonyflow/app", read["publish_path"])
	require.Equal(t, http.StatusConflict, m.delete("connections/kv").code, "a role publishes through it")
}

// TestPublishingTakesOver: what stands in the field of the previous key verifies
// today. It goes on doing so for as long as an earlier key does.
func TestPublishingTakesOver(t *testing.T) {
	t.Parallel()
	const current, earlier = "the-key-that-signs-today-12345678", "the-key-that-signed-before-123456"
	m, _, kv := publishing(t)
	put := func(path string, body map[string]any) {
		_, err := kv.Put(t.Context(), "harmonyflow/"+path, body)
		require.NoError(t, err)
	}
	role := func(path string, more map[string]any) map[string]any {
		return at(path, merged(jwtRole("HS256", map[string]any{
			"field": "key", "previous_field": "before", "initial_value": current, "propagation_delay": "1s",
		}), more))
	}
	today := map[string]any{"key": current, "before": earlier, "theirs": "kept"}
	put("app", today)

	m.ended(id(m.must("roles/session", role("app", nil))))
	body, version := held(t, kv, "app")
	require.Equal(t, 1, version, "all of it stands there already")
	require.Equal(t, today, body)
	creds := m.creds("session")
	require.Equal(t, current, creds["value"])
	require.Equal(t, earlier, creds["previous_value"])
	require.Len(t, creds["keys"], 2)
	require.EqualValues(t, 2, m.read("roles/session").data["version"])
	r := m.write("rotate/jwt/session", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "retire/jwt/session version=1")
	m.ended(id(m.must("retire/jwt/session", map[string]any{"version": 1})))
	body, version = held(t, kv, "app")
	require.Equal(t, 2, version)
	require.Equal(t, map[string]any{"key": current, "before": "", "theirs": "kept"}, body)

	// It leaves by itself, too.
	put("short", today)
	m.ended(id(m.must("roles/short", role("short", map[string]any{"max_token_ttl": "1s"}))))
	require.Eventually(t, func() bool { body, _ := held(t, kv, "short"); return body["before"] == "" }, patience, glance)
	_, version = held(t, kv, "short")
	require.Equal(t, 2, version)

	// What encrypted stays until it is retired.
	put("cipher", map[string]any{"key": "AAAAAAAAAAAAAAAAAAAAAA==", "before": "AQEBAQEBAQEBAQEBAQEBAQ=="})
	m.ended(id(m.must("roles/cipher", at("cipher", map[string]any{
		"kind": "encryption-key", "length": 128, "field": "key", "previous_field": "before", "initial_value": "AAAAAAAAAAAAAAAAAAAAAA==",
	}))))
	require.Equal(t, "AQEBAQEBAQEBAQEBAQEBAQ==", m.creds("cipher")["previous_value"])

	// What is no such key is not thrown away unasked.
	for name, c := range map[string]struct {
		body, role map[string]any
		says       string
	}{
		"too short":         {map[string]any{"key": current, "before": "short"}, nil, "5 bytes long"},
		"nothing was given": {map[string]any{"before": earlier}, map[string]any{"initial_value": nil}, "was not given"},
		"public half":       {map[string]any{"before": "-----BEGIN PUBLIC KEY-----"}, map[string]any{"algorithm": "ES256", "initial_value": nil}, "cannot be taken over"},
		"of an api-key": {
			map[string]any{"key": current, "before": earlier},
			map[string]any{"kind": "api-key", "max_token_ttl": nil, "propagation_delay": nil, "algorithm": nil},
			"empty it",
		},
	} {
		put("bad", c.body)
		_, before := held(t, kv, "bad")
		r := m.write("roles/bad", role("bad", c.role))
		require.Equal(t, http.StatusConflict, r.code, "%s: %s", name, r.message)
		require.Contains(t, r.message, c.says, name)
		require.Contains(t, r.message, "overwrite_existing=true", name)
		require.NotContains(t, r.message, earlier)
		require.Equal(t, http.StatusNotFound, m.read("roles/bad").code, name)
		_, after := held(t, kv, "bad")
		require.Equal(t, before, after, name)
	}
	put("bad", today)
	m.ended(id(m.must("roles/over", role("bad", map[string]any{"overwrite_existing": true}))))
	body, _ = held(t, kv, "bad")
	require.Equal(t, "", body["before"])
	require.Equal(t, current, body["key"])
}

// TestPublishingTogether: roles of one secret are one unit, and so one version for
// each change.
func TestPublishingTogether(t *testing.T) {
	t.Parallel()
	m, _, kv := publishing(t)
	for _, name := range []string{"access", "refresh", "admin"} {
		m.ended(id(m.must("roles/"+name, at("app", map[string]any{"field": name, "previous_field": name + "-previous"}))))
	}
	_, begun := held(t, kv, "app")
	require.Equal(t, 3, begun)
	rotation := id(m.must("rotate/api-key", nil))
	body, version := held(t, kv, "app")
	require.Equal(t, begun+1, version)
	for _, name := range []string{"access", "refresh", "admin"} {
		require.Equal(t, m.creds(name)["value"], body[name])
		require.NotEmpty(t, body[name+"-previous"])
	}
	m.must("retire/api-key/refresh", nil)
	r := m.write("rollback/api-key/admin", nil)
	require.Equal(t, http.StatusConflict, r.code, "one that has retired keeps the others from going back")
	require.Contains(t, r.message, `role "refresh", of the same unit`)
	require.Equal(t, http.StatusConflict, m.write("cancel/"+rotation, nil).code)
	m.must("retire/api-key/admin", nil)
	m.must("retire/api-key/access", nil)
	require.Equal(t, "completed", m.ended(rotation)["state"])
	body, version = held(t, kv, "app")
	require.Equal(t, begun+4, version)
	require.Equal(t, "", body["admin-previous"])

	rotation = id(m.must("rotate/api-key", nil))
	m.must("rollback/api-key/admin", nil)
	require.Equal(t, "rolled_back", m.ended(rotation)["state"])
	again, version := held(t, kv, "app")
	require.Equal(t, begun+6, version)
	require.Equal(t, body, again)
}

func TestPublishingMistakes(t *testing.T) {
	t.Parallel()
	m, v, kv := publishing(t)
	require.NoError(t, v.Client().Sys().Mount("old", &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}))
	m.ended(id(m.must("roles/mine", at("app", nil))))
	m.must("connections/narrow", map[string]any{
		"type": "vault", "address": v.Address, "token": v.Client().Token(), "allowed_roles": "other", "allowed_publish_paths": "old/*",
	})
	stored, written := m.stored(t), 0
	_, written = held(t, kv, "app")
	for says, data := range map[string]map[string]any{
		"publish_connection is missing":       at("app", map[string]any{"publish_connection": ""}),
		"publish_mount":                       at("app", map[string]any{"publish_mount": ""}),
		"publish_path":                        at("../app", nil),
		"allowed_publish_paths":               at("a/b/c", nil),
		"connections/nobody first":            at("app", map[string]any{"publish_connection": "nobody"}),
		`belongs to role "mine"`:              at("app", nil),
		"its allowed_roles":                   at("app", map[string]any{"publish_connection": "narrow"}),
		"may not write":                       at("locked", nil),
		"field is":                            at("app", map[string]any{"field": ""}),
		"which another field of the role":     at("app", map[string]any{"field": "x", "previous_field": "x"}),
		"secrets of kind api-key have no":     at("app", map[string]any{"field": "x", "username_field": "y"}),
		"give document or publish_connection": {"kind": "encryption-key", "keys_field": "keys"},
		"consumers would see no key but":      at("app", map[string]any{"kind": "encryption-key", "field": "x"}),
	} {
		r := m.write("roles/bad", data)
		require.Contains(t, []int{http.StatusBadRequest, http.StatusConflict}, r.code, "%s: %s", says, r.message)
		require.Contains(t, r.message, says)
		require.NotContains(t, r.message, "\n")
	}
	// The token is root's: only the shape of the mount is wrong.
	r := m.write("roles/other", map[string]any{
		"kind": "api-key", "publish_connection": "narrow", "publish_mount": "old", "publish_path": "app", "field": "x",
	})
	require.Contains(t, r.message, "is no mount of KV version 2")
	r = m.write("roles/mine", map[string]any{"publish_path": "harmonyflow/elsewhere"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "cannot be changed")
	require.Equal(t, stored, m.stored(t))
	_, now := held(t, kv, "app")
	require.Equal(t, written, now)
}

// TestPublishingWaits: a write whose reply is lost is not repeated before it can no
// longer land, counts as one version, and holds up nobody else.
func TestPublishingWaits(t *testing.T) {
	t.Parallel()
	m, v, kv := publishing(t)
	proxy, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = proxy.Close() })
	token, err := v.TokenFor(t.Context(), "engine", publishPolicy)
	require.NoError(t, err)
	m.must("connections/far", map[string]any{
		"type": "vault", "address": "http://" + proxy.Addr(), "token": token, "allowed_roles": "*", "allowed_publish_paths": "secret/harmonyflow/*",
	})
	m.ended(id(m.must("roles/far", at("far", map[string]any{"publish_connection": "far", "previous_field": "old"}))))
	m.ended(id(m.must("roles/near", at("near", nil))))
	_, before := held(t, kv, "far")

	proxy.LoseReplyTo("PUT /v1/secret/data/harmonyflow/far")
	waits := make(chan reply, 1)
	go func() { waits <- m.write("rotate/api-key/far", nil) }()
	require.Eventually(t, func() bool { _, now := held(t, kv, "far"); return now > before }, patience, glance)
	m.ended(id(m.must("rotate/api-key/near", nil)))
	require.Equal(t, rotation.Publish, m.role("far").Run.Phase, "it waits, and the other did not")
	proxy.Heal()
	r := <-waits
	require.Equal(t, http.StatusOK, r.code, r.message)
	body, after := held(t, kv, "far")
	require.Equal(t, before+1, after)
	require.Equal(t, m.creds("far")["value"], body["api-key"])
}
