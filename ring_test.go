package harmonyflow

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func privateKey(t testing.TB, text any) any {
	t.Helper()
	block, rest := pem.Decode([]byte(text.(string)))
	require.NotNil(t, block)
	require.Empty(t, rest)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	require.NoError(t, err)
	return key
}

func TestCredsOfSharedSecrets(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/session", map[string]any{"kind": "jwt", "max_token_ttl": "1h", "initial_value": "Vb3kQ9yXw2LmN7cRt5JhZs8PdF4gTaEu"})))
	creds := m.creds("session")
	require.Equal(t, "Vb3kQ9yXw2LmN7cRt5JhZs8PdF4gTaEu", creds["value"])
	require.Equal(t, "HS256", creds["algorithm"])
	require.Regexp(t, "^[0-9a-f]{16}$", creds["kid"])
	require.Equal(t, map[string]any{creds["kid"].(string): creds["value"]}, creds["keys"])
	for _, absent := range []string{"private_key", "public_key", "previous_value", "previous_kid", "next_value", "next_kid", "username", "password"} {
		require.NotContains(t, creds, absent)
	}

	m.stages("session", version.Next, version.Current, version.Previous, version.Failed, version.Pending)
	creds = m.creds("session")
	require.Len(t, creds["keys"], 3)
	for _, prefix := range []string{"", "previous_", "next_"} {
		require.Equal(t, creds[prefix+"value"], creds["keys"].(map[string]any)[creds[prefix+"kid"].(string)])
	}
}

func TestCredsOfEncryptionKeys(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	key := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", 16)))
	m.ended(id(m.must("roles/cipher", map[string]any{"kind": "encryption-key", "length": 128, "initial_value": key})))
	creds := m.creds("cipher")
	require.Equal(t, key, creds["value"])
	require.NotContains(t, creds, "algorithm")
	require.Equal(t, map[string]any{creds["kid"].(string): key}, creds["keys"])
	m.stages("cipher", version.Current, version.Previous, version.Previous, version.Previous, version.Retired)
	require.Len(t, m.creds("cipher")["keys"], 4)
}

func TestCredsOfPairs(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	given, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.MarshalECPrivateKey(given)
	require.NoError(t, err)
	m.must("roles/pair", jwtRole("ES256", map[string]any{
		"initial_value": string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
	}))
	creds := m.creds("pair")
	require.Equal(t, given, privateKey(t, creds["private_key"]))
	block, _ := pem.Decode([]byte(creds["public_key"].(string)))
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	require.NoError(t, err)
	require.Equal(t, given.Public(), public)
	require.Equal(t, map[string]any{creds["kid"].(string): creds["public_key"]}, creds["keys"])
	require.NotContains(t, creds, "value")
}

// What a role of a ring is like is read back as it was given, and what is not
// given stays.
func TestRingFields(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/session", jwtRole("HS512", map[string]any{"encoding": "hex", "propagation_delay": "90s", "rotation_period": "2160h"}))))
	want := map[string]any{
		"kind": "jwt", "strategy": "key-ring", "algorithm": "HS512", "max_token_ttl": int64(3600), "propagation_delay": int64(90),
		"length": int64(64), "encoding": "hex", "public_jwks": false, "next_field": "", "keys_field": "",
	}
	require.Subset(t, m.read("roles/session").data, want)
	m.must("roles/session", map[string]any{"description": "sessions"})
	require.Subset(t, m.read("roles/session").data, want)
	require.Equal(t, http.StatusOK, m.patch("roles/session", map[string]any{"max_token_ttl": "2h", "algorithm": "HS512"}).code)
	want["max_token_ttl"] = int64(7200)
	require.Subset(t, m.read("roles/session").data, want)
	m.must("roles/session", map[string]any{"propagation_delay": "", "encoding": nil, "grace_period": ""})
	want["propagation_delay"], want["encoding"] = int64(300), "base64"
	got := m.read("roles/session").data
	require.Subset(t, got, want)
	for _, absent := range []string{"grace_period", "retire_after", "require_reencryption_ack"} {
		require.NotContains(t, got, absent)
	}

	m.ended(id(m.must("roles/cipher", map[string]any{"kind": "encryption-key", "retire_after": "720h", "require_reencryption_ack": true})))
	want = map[string]any{
		"kind": "encryption-key", "strategy": "key-ring", "length": int64(256), "propagation_delay": int64(300),
		"retire_after": int64(720 * 3600), "require_reencryption_ack": true,
	}
	require.Subset(t, m.read("roles/cipher").data, want)
	m.must("roles/cipher", map[string]any{"retire_after": 0, "require_reencryption_ack": false})
	want["retire_after"], want["require_reencryption_ack"] = int64(0), false
	got = m.read("roles/cipher").data
	require.Subset(t, got, want)
	for _, absent := range []string{"grace_period", "algorithm", "max_token_ttl", "public_jwks"} {
		require.NotContains(t, got, absent)
	}
	m.must("roles/plain", map[string]any{"kind": "api-key"})
	require.NotContains(t, m.read("roles/plain").data, "propagation_delay")
}

func TestRingRefusals(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	document := map[string]any{"document": "app", "field": "jwt"}
	with := func(data map[string]any, more ...any) map[string]any {
		out := map[string]any{}
		for k, v := range data {
			out[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			out[more[i].(string)] = more[i+1]
		}
		return out
	}
	session, cipher := jwtRole("HS256", nil), map[string]any{"kind": "encryption-key"}
	m.ended(id(m.must("roles/session", jwtRole("HS256", with(document, "keys_field", "jwt-keys", "next_field", "jwt-next")))))
	m.ended(id(m.must("roles/pair", jwtRole("ES256", map[string]any{"document": "pair", "field": "key", "public_jwks": true}))))
	m.ended(id(m.must("roles/loose", session)))
	for name, c := range map[string]struct {
		path string
		data map[string]any
		code int // 400 when 0
		says string
	}{
		"no life of a token":           {"roles/new", map[string]any{"kind": "jwt"}, 0, "max_token_ttl is missing"},
		"cleared life of a token":      {"roles/loose", map[string]any{"max_token_ttl": ""}, 0, "max_token_ttl is missing"},
		"life of a token of 0":         {"roles/new", with(session, "max_token_ttl", 0), 0, "max_token_ttl"},
		"negative life of a token":     {"roles/new", with(session, "max_token_ttl", "-1h"), 0, "max_token_ttl"},
		"life that is no duration":     {"roles/new", with(session, "max_token_ttl", "soon"), 0, "max_token_ttl"},
		"no delay":                     {"roles/new", with(session, "propagation_delay", 0), 0, "at least 1s"},
		"no delay, as text":            {"roles/loose", map[string]any{"propagation_delay": "0s"}, 0, "at least 1s"},
		"long delay":                   {"roles/new", with(cipher, "propagation_delay", "25h"), 0, "1s to 24h"},
		"unknown algorithm":            {"roles/new", with(session, "algorithm", "none"), 0, `algorithm is "none"`},
		"another algorithm":            {"roles/loose", map[string]any{"algorithm": "HS512"}, 0, "cannot be changed"},
		"grace":                        {"roles/new", with(session, "grace_period", "1h"), 0, "max_token_ttl"},
		"grace of 0":                   {"roles/new", with(session, "grace_period", 0), 0, "max_token_ttl"},
		"grace of encryption keys":     {"roles/new", with(cipher, "grace_period", "1h"), 0, "retire_after"},
		"grace later":                  {"roles/loose", map[string]any{"grace_period": "1h"}, 0, "key ring"},
		"another strategy":             {"roles/new", with(session, "strategy", "overlap"), 0, "key-ring"},
		"key-ring of another kind":     {"roles/new", map[string]any{"kind": "api-key", "strategy": "key-ring"}, 0, "strategy"},
		"retire_after of jwt":          {"roles/new", with(session, "retire_after", "1h"), 0, `"retire_after" is not for kind jwt`},
		"ack of jwt":                   {"roles/new", with(session, "require_reencryption_ack", true), 0, "not for kind jwt"},
		"algorithm of encryption":      {"roles/new", with(cipher, "algorithm", "HS256"), 0, "not for kind encryption-key"},
		"tokens of encryption":         {"roles/new", with(cipher, "max_token_ttl", "1h"), 0, "not for kind encryption-key"},
		"public encryption keys":       {"roles/new", with(cipher, "public_jwks", true), 0, "not for kind encryption-key"},
		"public shared secrets":        {"roles/new", with(session, "public_jwks", true), 0, "public_jwks is true"},
		"public_jwks of an api-key":    {"roles/new", map[string]any{"kind": "api-key", "public_jwks": true}, 0, "not for kind api-key"},
		"next_field of an api-key":     {"roles/new", map[string]any{"kind": "api-key", "document": "d", "field": "f", "next_field": "n"}, 0, "not for kind api-key"},
		"username":                     {"roles/new", with(session, "username", "me"), 0, "username"},
		"connection":                   {"roles/new", with(session, "connection", "cache"), 0, "need none"},
		"initial_password":             {"roles/new", with(session, "initial_password", "topsecret-topsecret"), 0, "use initial_value"},
		"short secret":                 {"roles/new", with(session, "initial_value", "topsecret"), 0, "9 bytes"},
		"secret with a new line":       {"roles/new", with(session, "initial_value", "topsecret-topsecret-topsecret\n"), 0, "new line"},
		"a secret for a pair":          {"roles/new", jwtRole("ES256", map[string]any{"initial_value": "topsecret-topsecret-topsecret"}), 0, "PEM"},
		"a key that is no base64":      {"roles/new", with(cipher, "initial_value", "topsecret-topsecret-topsecret"), 0, "base64"},
		"a key of another length":      {"roles/new", with(cipher, "initial_value", base64.StdEncoding.EncodeToString(make([]byte, 16))), 0, "length=128"},
		"previous without document":    {"roles/new", with(session, "previous_field", "old"), 0, "give document"},
		"next without document":        {"roles/new", with(session, "next_field", "next"), 0, "give document"},
		"keys without document":        {"roles/loose", map[string]any{"keys_field": "keys"}, 0, "give document"},
		"nothing for verifiers":        {"roles/new", jwtRole("HS256", with(document, "document", "other")), 0, "keys_field or previous_field"},
		"next alone":                   {"roles/new", jwtRole("HS256", with(document, "document", "other", "next_field", "next")), 0, "keys_field or previous_field"},
		"nothing for those decrypting": {"roles/new", with(cipher, "document", "other", "field", "key"), 0, "keys_field or previous_field"},
		"keys no longer public":        {"roles/pair", map[string]any{"public_jwks": false}, 0, "public_jwks=true"},
		"the same field twice":         {"roles/new", jwtRole("HS256", map[string]any{"document": "other", "field": "f", "keys_field": "f"}), 0, "another field"},
		"next beside previous":         {"roles/new", jwtRole("HS256", map[string]any{"document": "other", "field": "f", "previous_field": "p", "next_field": "p"}), 0, "another field"},
		"a field with a slash":         {"roles/new", jwtRole("HS256", map[string]any{"document": "other", "field": "f", "keys_field": "a/b"}), 0, "keys_field"},
		"another keys_field":           {"roles/session", map[string]any{"keys_field": "others"}, 0, "cannot be changed"},
		"no next_field any more":       {"roles/session", map[string]any{"next_field": ""}, 0, "cannot be changed"},
		"a period within the grace":    {"roles/new", with(session, "max_token_ttl", "24h", "rotation_period", "24h"), 0, "rotat"},
	} {
		before := m.stored(t)
		r := m.write(c.path, c.data)
		code := c.code
		if code == 0 {
			code = http.StatusBadRequest
		}
		require.Equal(t, code, r.code, "%s: %s", name, r.message)
		require.Contains(t, r.message, c.says, name)
		require.NotContains(t, r.message, "topsecret", name)
		require.NotContains(t, strings.TrimSpace(r.message), "\n", name)
		require.Equal(t, before, m.stored(t), name)
	}
}

// A document of a ring is left with keys in it when its role is deleted. Who
// fills it next either has them or says that they do not count any more.
func TestRingIsCreatedAgain(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	data := jwtRole("HS256", map[string]any{"document": "app", "field": "jwt", "keys_field": "jwt-keys", "next_field": "jwt-next"})
	m.ended(id(m.must("roles/session", data)))
	shown, _ := m.document("app")
	var keys map[string]string
	require.NoError(t, json.Unmarshal([]byte(shown["jwt-keys"].(string)), &keys))
	require.Equal(t, map[string]string{m.creds("session")["kid"].(string): shown["jwt"].(string)}, keys)
	require.Empty(t, shown["jwt-next"])

	require.Equal(t, http.StatusNoContent, m.delete("roles/session").code)
	r := m.write("roles/heir", data)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "overwrite_existing=true")
	data["initial_value"] = shown["jwt"]
	require.Equal(t, http.StatusConflict, m.write("roles/heir", data).code, "the same key by another id: verifiers would not find it")
	delete(data, "initial_value")
	m.ended(id(m.must("roles/session", data)))
	again, _ := m.document("app")
	var after map[string]string
	require.NoError(t, json.Unmarshal([]byte(again["jwt-keys"].(string)), &after))
	for id, key := range keys {
		require.Equal(t, key, after[id], "tokens that the deleted role's key signed still count")
	}
}

// One rotation of a ring, as those who sign and those who verify see it.
func TestRingRotates(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/pair", jwtRole("ES256", map[string]any{
		"public_jwks": true, "propagation_delay": "1s", "max_token_ttl": "1s", "document": "app", "field": "key", "keys_field": "keys", "next_field": "next",
	}))))
	first := m.creds("pair")
	rotation := id(m.must("rotate/jwt/pair", nil))

	ahead := m.creds("pair")
	require.Equal(t, first["kid"], ahead["kid"], "shown before it is used")
	second := ahead["next_kid"]
	require.NotEmpty(t, second)
	require.Len(t, m.keySet("pair").Keys, 2)
	shown, _ := m.document("app")
	require.Equal(t, ahead["next_public_key"], shown["next"])
	require.Equal(t, first["private_key"], shown["key"])
	keys, err := json.Marshal(ahead["keys"])
	require.NoError(t, err)
	require.JSONEq(t, string(keys), shown["keys"].(string))

	require.Eventually(t, func() bool { return m.creds("pair")["kid"] == second }, patience, glance)
	used := m.creds("pair")
	require.Equal(t, first["kid"], used["previous_kid"], "what it signed still counts")
	require.Equal(t, first["public_key"], used["previous_public_key"])
	require.Len(t, m.keySet("pair").Keys, 2)

	m.ended(rotation)
	last := m.creds("pair")
	require.NotContains(t, last, "previous_kid")
	require.Len(t, last["keys"], 1)
	require.Len(t, m.keySet("pair").Keys, 1)
	shown, _ = m.document("app")
	require.Equal(t, last["private_key"], shown["key"])
	require.Empty(t, shown["next"])
}

// A key that is adopted again is named as what it made names it.
func TestRingKeepsItsIDs(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, data := range []map[string]any{jwtRole("HS256", nil), {"kind": "encryption-key"}} {
		m.ended(id(m.must("roles/ring", data)))
		before := m.creds("ring")
		require.Equal(t, http.StatusNoContent, m.delete("roles/ring").code)
		data["initial_value"] = before["value"]
		m.ended(id(m.must("roles/ring", data)))
		after := m.creds("ring")
		require.Equal(t, before["value"], after["value"])
		require.Equal(t, before["kid"], after["kid"])
		require.Equal(t, before["keys"], after["keys"])
		require.Equal(t, http.StatusNoContent, m.delete("roles/ring").code)
	}
}

// Every field of a document that a ring fills is its own.
func TestRingOwnsItsFields(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/ring", jwtRole("HS256", map[string]any{"document": "app", "field": "f", "previous_field": "p", "next_field": "n", "keys_field": "k"}))))
	for _, field := range []string{"f", "p", "n", "k"} {
		r := m.write("roles/other", map[string]any{"kind": "api-key", "document": "app", "field": field, "overwrite_existing": true})
		require.Equal(t, http.StatusConflict, r.code, "%s: %s", field, r.message)
	}
}
