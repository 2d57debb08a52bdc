package harmonyflow

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// anybody reads jwks/ as Vault hands on the request of somebody without a token.
func (m *mount) anybody(name string, headers map[string][]string) (*logical.Response, error) {
	m.Helper()
	return m.b.HandleRequest(context.Background(), &logical.Request{
		Operation: logical.ReadOperation, Path: "jwks/" + name, Storage: m.storage, MountPoint: mountPoint,
		Unauthenticated: true, Headers: headers,
	})
}

func (m *mount) keySet(name string) jose.JSONWebKeySet {
	m.Helper()
	resp, err := m.anybody(name, nil)
	require.NoError(m, err)
	require.NotNil(m, resp, "not shown")
	require.Equal(m, http.StatusOK, resp.Data[logical.HTTPStatusCode])
	require.Equal(m, "application/jwk-set+json", resp.Data[logical.HTTPContentType])
	raw := resp.Data[logical.HTTPRawBody].(string)
	requirePublic(m, raw)
	var set jose.JSONWebKeySet
	require.NoError(m, json.Unmarshal([]byte(raw), &set))
	return set
}

// requirePublic: a set has the members of public keys, and no other.
func requirePublic(t testing.TB, raw string) {
	t.Helper()
	var set struct {
		Keys []map[string]string `json:"keys"`
	}
	decoder := json.NewDecoder(strings.NewReader(raw))
	decoder.DisallowUnknownFields()
	require.NoError(t, decoder.Decode(&set))
	require.NotEmpty(t, set.Keys)
	for _, k := range set.Keys {
		for member := range k {
			require.Contains(t, []string{"kty", "use", "alg", "kid", "n", "e", "crv", "x", "y"}, member)
		}
	}
}

func jwtRole(algorithm string, more map[string]any) map[string]any {
	data := map[string]any{"kind": "jwt", "algorithm": algorithm, "max_token_ttl": "1h"}
	for k, v := range more {
		data[k] = v
	}
	return data
}

func TestJWKS(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, algorithm := range []string{"RS256", "ES256", "ES512", "EdDSA"} {
		m.must("roles/"+algorithm, jwtRole(algorithm, map[string]any{"public_jwks": true, "propagation_delay": "61s"}))
		set := m.keySet(algorithm)
		require.Len(t, set.Keys, 1)
		k := set.Keys[0]
		creds := m.creds(algorithm)
		require.True(t, k.IsPublic())
		require.True(t, k.Valid())
		require.Equal(t, algorithm, k.Algorithm)
		require.Equal(t, "sig", k.Use)
		require.Equal(t, creds["kid"], k.KeyID)
		require.Equal(t, creds["algorithm"], k.Algorithm)

		key := privateKey(t, creds["private_key"])
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(algorithm), Key: key}, nil)
		require.NoError(t, err)
		signed, err := signer.Sign([]byte("claims"))
		require.NoError(t, err)
		_, err = signed.Verify(k)
		require.NoError(t, err, "what is signed with what creds/ serves verifies with what jwks/ shows")
	}
	resp, err := m.anybody("RS256", nil)
	require.NoError(t, err)
	require.Equal(t, "public, max-age=30", resp.Data[logical.HTTPCacheControlHeader])
}

// Every key of the ring is shown, and those that left it are not.
func TestJWKSShowsTheRing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/pair", jwtRole("ES256", map[string]any{"public_jwks": true}))))
	before := m.keySet("pair")
	current := m.creds("pair")["kid"].(string)
	m.stages("pair", version.Next, version.Current, version.Previous, version.Previous, version.Pending, version.Retired, version.Failed, version.Compromised)
	shown := map[version.Stage][]string{}
	for _, v := range m.role("pair").Versions {
		shown[v.Stage] = append(shown[v.Stage], v.Material.KeyID)
	}
	want := append(append(append([]string{}, shown[version.Next]...), shown[version.Current]...), shown[version.Previous]...)
	var got []string
	for _, k := range m.keySet("pair").Keys {
		got = append(got, k.KeyID)
	}
	require.ElementsMatch(t, want, got)
	require.Len(t, got, 4)
	require.NotContains(t, got, current, "it was replaced behind the engine's back")
	require.NotEqual(t, before, m.keySet("pair"))

	creds := m.creds("pair")
	require.Equal(t, shown[version.Next][0], creds["next_kid"])
	require.NotEmpty(t, creds["next_public_key"])
	require.Equal(t, shown[version.Previous][1], creds["previous_kid"], "the newest")
	require.NotEmpty(t, creds["previous_public_key"])
	require.Len(t, creds["keys"], 4)
	for name, value := range creds {
		if text, ok := value.(string); ok && name != "private_key" {
			require.NotContains(t, text, "PRIVATE", name)
		}
	}
	for id, key := range creds["keys"].(map[string]any) {
		require.Contains(t, got, id)
		require.Contains(t, key, "PUBLIC KEY")
	}
}

// stages gives a role versions of its own kind at these stages, the first of
// which is the newest, and no other.
func (m *mount) stages(role string, stages ...version.Stage) {
	m.Helper()
	m.alter(role, func(r *rotation.Role) {
		r.Versions = nil
		for range stages {
			material, err := m.b.kind(r.Kind).Generate(context.Background(), r.Spec, source{m.b})
			require.NoError(m, err)
			r.Add(material, "made", time.Now())
		}
		for i := range r.Versions {
			r.Versions[i].Stage = stages[len(stages)-1-i]
		}
	})
}

// Nobody without a token learns which roles there are: whatever is not shown is
// answered alike, at the cost of at most one read.
func TestJWKSTellsNothing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/shown", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.must("roles/shared", jwtRole("HS256", nil))
	m.must("roles/pair", jwtRole("ES256", nil))
	m.must("roles/key", map[string]any{"kind": "api-key"})
	m.must("roles/cipher", map[string]any{"kind": "encryption-key"})
	m.must("roles/was", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.must("roles/was", map[string]any{"public_jwks": false})
	m.must("roles/gone", jwtRole("EdDSA", map[string]any{"public_jwks": true}))
	require.Len(t, m.keySet("gone").Keys, 1)
	require.Equal(t, http.StatusNoContent, m.delete("roles/gone").code)
	m.must("roles/new", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.stages("new", version.Pending, version.Failed)
	m.must("roles/turned", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.alter("turned", func(r *rotation.Role) { r.Spec.Algorithm = "HS256" })
	m.must("roles/spoilt", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.alter("spoilt", func(r *rotation.Role) {
		r.Versions[0].Material = kind.Material{Secret: "not-a-pair-at-all", KeyID: "k"}
	})
	require.NoError(t, m.storage.Storage.Put(context.Background(), &logical.StorageEntry{Key: storage.Role + "broken", Value: []byte("{")}))

	m.stored(t) // nothing else is at work while operations are counted
	for _, name := range []string{
		"absent", "shared", "pair", "key", "cipher", "was", "gone", "new", "turned", "spoilt", "broken",
		"all", "a/b", "a b", "shown/", "../shown", "shown\n", "rôle", "\xff", strings.Repeat("a", 129), strings.Repeat("a", 1000),
	} {
		before, written := m.storage.operations.Load(), m.storage.writes.Load()
		resp, err := m.anybody(name, map[string][]string{"If-None-Match": {"*"}})
		require.LessOrEqual(t, m.storage.operations.Load()-before, int64(1), name)
		require.Equal(t, written, m.storage.writes.Load(), name)
		code, shown := logical.RespondErrorCommon(&logical.Request{Operation: logical.ReadOperation}, resp, err)
		require.Equal(t, http.StatusNotFound, code, "%q", name)
		require.NoError(t, shown, "%q: the same body for all", name)
		require.Nil(t, resp, "%q", name)
	}
	// What a cache adds to a request changes nothing.
	r := m.send(request{op: logical.ReadOperation, path: "jwks/shown", data: map[string]any{"version": "1", "x": strings.Repeat("y", 10)}})
	require.Equal(t, http.StatusOK, r.code)
	require.Contains(t, m.b.PathsSpecial.Unauthenticated, "jwks/*")
	require.Len(t, m.b.PathsSpecial.Unauthenticated, 1)
}

// Storage that fails is no reason for verifiers to forget their keys.
func TestJWKSWhileStorageFails(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/pair", jwtRole("EdDSA", map[string]any{"public_jwks": true}))
	m.ended(id(m.must("roles/other", map[string]any{"kind": "api-key"})))
	m.b.Cleanup(context.Background())
	gone := errors.New("the disk is gone")
	m.storage.Storage = failing{m.storage.Storage, gone}
	resp, err := m.anybody("pair", nil)
	code, shown := logical.RespondErrorCommon(&logical.Request{Operation: logical.ReadOperation}, resp, err)
	logical.AdjustErrorStatusCode(&code, shown)
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.NotContains(t, shown.Error(), "disk")
}

// failing fails every read.
type failing struct {
	logical.Storage
	err error
}

func (f failing) Get(context.Context, string) (*logical.StorageEntry, error) { return nil, f.err }

func TestJWKSIsNotSentAgain(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/pair", jwtRole("ES256", map[string]any{"public_jwks": true}))))
	first, err := m.anybody("pair", nil)
	require.NoError(t, err)
	etag := first.Headers["ETag"][0]
	require.Regexp(t, `^"[A-Za-z0-9_-]{43}"$`, etag)
	for _, given := range []string{etag, "W/" + etag, `"other", ` + etag, "*"} {
		for _, header := range []string{"If-None-Match", "if-none-match"} {
			resp, err := m.anybody("pair", map[string][]string{header: {given}})
			require.NoError(t, err)
			require.Equal(t, http.StatusNotModified, resp.Data[logical.HTTPStatusCode], given)
			require.Empty(t, resp.Data[logical.HTTPRawBody])
			require.Equal(t, first.Headers, resp.Headers)
			require.Equal(t, first.Data[logical.HTTPCacheControlHeader], resp.Data[logical.HTTPCacheControlHeader])
		}
	}
	for _, given := range []string{"", `"other"`, strings.Trim(etag, `"`)} {
		resp, err := m.anybody("pair", map[string][]string{"If-None-Match": {given}})
		require.NoError(t, err)
		require.Equal(t, first.Data, resp.Data, given)
	}
	m.restart()
	again, err := m.anybody("pair", nil)
	require.NoError(t, err)
	require.Equal(t, first.Data, again.Data, "the same keys are the same bytes")

	m.stages("pair", version.Current, version.Previous)
	resp, err := m.anybody("pair", map[string][]string{"If-None-Match": {etag}})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.Data[logical.HTTPStatusCode])
	require.NotEqual(t, first.Headers, resp.Headers)
}

// A standby answers by itself, from what it reads.
func TestJWKSOnAStandby(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/pair", jwtRole("ES256", map[string]any{"public_jwks": true}))
	m.b.Cleanup(context.Background())
	m.system.ReplicationStateVal = consts.ReplicationPerformanceStandby
	m.start()
	written := m.storage.writes.Load()
	require.Len(t, m.keySet("pair").Keys, 1)
	require.Equal(t, written, m.storage.writes.Load())
}

// More roles than are remembered are shown all the same.
func TestJWKSOfManyRoles(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/pair", jwtRole("EdDSA", map[string]any{"public_jwks": true}))
	r := m.role("pair")
	var sets keySets
	for i := range maxKeySets + 10 {
		one := *r
		one.Name = strings.Repeat("x", i+1)
		set, err := sets.of(&one)
		require.NoError(t, err)
		require.NotNil(t, set)
	}
	require.LessOrEqual(t, len(sets.known), maxKeySets)
}
