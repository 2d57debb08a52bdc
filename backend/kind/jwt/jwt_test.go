package jwt_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/jwt"
)

// source is randomness that repeats, without password policies.
type source struct{ io.Reader }

func (source) FromPolicy(context.Context, string) (string, error) {
	return "", errors.New("no policy is asked for")
}

func seeded(seed uint64) source {
	var key [32]byte
	key[0], key[1], key[2] = byte(seed), byte(seed>>8), byte(seed>>16)
	return source{rand.NewChaCha8(key)}
}

func complete(t require.TestingT, spec kind.Spec) kind.Spec {
	if spec.MaxTokenTTL == 0 {
		spec.MaxTokenTTL = time.Hour
	}
	require.NoError(t, jwt.Kind{}.Complete(&spec))
	return spec
}

func generate(t require.TestingT, spec kind.Spec, src kind.Source) kind.Material {
	m, err := jwt.Kind{}.Generate(context.Background(), spec, src)
	require.NoError(t, err)
	return m
}

func adopt(t require.TestingT, spec kind.Spec, secret string) kind.Material {
	require.NoError(t, jwt.Kind{}.CheckInitial(spec, secret))
	m, err := jwt.Kind{}.Adopt(context.Background(), spec, secret, seeded(1))
	require.NoError(t, err)
	return m
}

var (
	hmacs = []string{"HS256", "HS384", "HS512"}
	pairs = []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"}
	// Drawn from the source, unlike RSA keys.
	numbers = []string{"ES256", "ES384", "ES512", "EdDSA"}
)

// Keys that take a while to make.
var (
	rsa2048 = sync.OnceValue(func() *rsa.PrivateKey { return rsaKey(2048) })
	rsa1024 = sync.OnceValue(func() *rsa.PrivateKey { return rsaKey(1024) })

	twoRSAKeys = sync.OnceValue(func() (keys []kind.Material) {
		for range 2 {
			m, err := jwt.Kind{}.Generate(context.Background(), kind.Spec{Algorithm: "RS256", Length: 2048}, seeded(1))
			if err != nil {
				panic(err)
			}
			keys = append(keys, m)
		}
		return keys
	})
)

func rsaKey(bits int) *rsa.PrivateKey {
	key, err := rsa.GenerateKey(crand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return key
}

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, crand.Reader)
	require.NoError(t, err)
	return key
}

func armor(label string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: label, Bytes: der}))
}

func pkcs8(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return armor("PRIVATE KEY", der)
}

func pkcs1(key *rsa.PrivateKey) string {
	return armor("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key))
}

func sec1(t testing.TB, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	return armor("EC PRIVATE KEY", der)
}

func TestIsARing(t *testing.T) {
	var k kind.Ring = jwt.Kind{}
	require.Equal(t, "jwt", k.Name())
	require.Empty(t, k.ConnectionType())
	require.Contains(t, k.Fields(), "max_token_ttl")
	require.NotContains(t, k.Fields(), "retire_after")
}

func TestCompleteFillsDefaults(t *testing.T) {
	ring := func(spec kind.Spec) kind.Spec {
		spec.Strategy, spec.MaxTokenTTL, spec.PropagationDelay = kind.KeyRing, time.Hour, 5*time.Minute
		return spec
	}
	for name, c := range map[string]struct{ given, want kind.Spec }{
		"nothing": {kind.Spec{}, ring(kind.Spec{Algorithm: "HS256", Length: 32, Encoding: "base64"})},
		"HS384":   {kind.Spec{Algorithm: "HS384"}, ring(kind.Spec{Algorithm: "HS384", Length: 48, Encoding: "base64"})},
		"HS512":   {kind.Spec{Algorithm: "HS512", Encoding: "hex"}, ring(kind.Spec{Algorithm: "HS512", Length: 64, Encoding: "hex"})},
		"RS256":   {kind.Spec{Algorithm: "RS256"}, ring(kind.Spec{Algorithm: "RS256", Length: 2048})},
		"ES256":   {kind.Spec{Algorithm: "ES256", PublicJWKS: true}, ring(kind.Spec{Algorithm: "ES256", PublicJWKS: true})},
		"EdDSA":   {kind.Spec{Algorithm: "EdDSA"}, ring(kind.Spec{Algorithm: "EdDSA"})},
		"what was given stays": {
			kind.Spec{Role: "app", Algorithm: "RS512", Length: 4096, NextField: "next", KeysField: "keys", PreviousField: "old"},
			ring(kind.Spec{Role: "app", Algorithm: "RS512", Length: 4096, NextField: "next", KeysField: "keys", PreviousField: "old"}),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := complete(t, c.given)
			require.Equal(t, c.want, got)
			require.Equal(t, got, complete(t, got), "again changes nothing")
		})
	}
}

func TestCompleteRefuses(t *testing.T) {
	const ttl = time.Hour
	for name, c := range map[string]struct {
		spec kind.Spec
		says []string
	}{
		"no life of a token":         {kind.Spec{}, []string{"max_token_ttl is missing", "for example 1h"}},
		"negative life of a token":   {kind.Spec{MaxTokenTTL: -1}, []string{"max_token_ttl is -1ns", "8760h"}},
		"a life of years":            {kind.Spec{MaxTokenTTL: 8761 * time.Hour}, []string{"max_token_ttl is 8761h"}},
		"strategy":                   {kind.Spec{MaxTokenTTL: ttl, Strategy: kind.Swap}, []string{`strategy is "swap"`, "key-ring"}},
		"delay":                      {kind.Spec{MaxTokenTTL: ttl, PropagationDelay: 25 * time.Hour}, []string{"propagation_delay is 25h"}},
		"unknown algorithm":          {kind.Spec{MaxTokenTTL: ttl, Algorithm: "none"}, []string{`algorithm is "none"`, "HS256", "EdDSA"}},
		"algorithm in small letters": {kind.Spec{MaxTokenTTL: ttl, Algorithm: "hs256"}, []string{`algorithm is "hs256"`}},
		"PSS":                        {kind.Spec{MaxTokenTTL: ttl, Algorithm: "PS256"}, []string{`algorithm is "PS256"`}},
		"short secret":               {kind.Spec{MaxTokenTTL: ttl, Length: 31}, []string{"length is 31", "HS256", "32 to 512"}},
		"secret shorter than hash":   {kind.Spec{MaxTokenTTL: ttl, Algorithm: "HS512", Length: 63}, []string{"length is 63", "64 to 512"}},
		"long secret":                {kind.Spec{MaxTokenTTL: ttl, Length: 513}, []string{"length is 513"}},
		"negative length":            {kind.Spec{MaxTokenTTL: ttl, Length: -1}, []string{"length is -1"}},
		"unknown encoding":           {kind.Spec{MaxTokenTTL: ttl, Encoding: "base32"}, []string{`encoding is "base32"`, "base64, base64url and hex"}},
		"encoding of a pair":         {kind.Spec{MaxTokenTTL: ttl, Algorithm: "ES256", Encoding: "hex"}, []string{`encoding is "hex"`, "PEM"}},
		"short RSA key":              {kind.Spec{MaxTokenTTL: ttl, Algorithm: "RS256", Length: 1024}, []string{"length is 1024", "2048, 3072 or 4096"}},
		"odd RSA key":                {kind.Spec{MaxTokenTTL: ttl, Algorithm: "RS256", Length: 2049}, []string{"length is 2049"}},
		"length of a curve":          {kind.Spec{MaxTokenTTL: ttl, Algorithm: "ES256", Length: 256}, []string{"length is 256", "leave length out"}},
		"length of Ed25519":          {kind.Spec{MaxTokenTTL: ttl, Algorithm: "EdDSA", Length: 256}, []string{"length is 256"}},
		"a secret at jwks/":          {kind.Spec{MaxTokenTTL: ttl, PublicJWKS: true}, []string{"public_jwks is true", "HS256", "RS256"}},
		"username":                   {kind.Spec{MaxTokenTTL: ttl, Username: "app"}, []string{`username is "app"`}},
		"policy":                     {kind.Spec{MaxTokenTTL: ttl, PasswordPolicy: "keys"}, []string{`password_policy is "keys"`}},
		"prefix":                     {kind.Spec{MaxTokenTTL: ttl, Prefix: "p"}, []string{`prefix is "p"`}},
		"retire_after":               {kind.Spec{MaxTokenTTL: ttl, RetireAfter: ttl}, []string{"retire_after is 1h0m0s", "give max_token_ttl"}},
		"ack":                        {kind.Spec{MaxTokenTTL: ttl, RequireReencryptionAck: true}, []string{"require_reencryption_ack is true"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := jwt.Kind{}.Complete(&c.spec)
			require.Error(t, err)
			for _, say := range c.says {
				require.ErrorContains(t, err, say)
			}
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestGenerateSharedSecret(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := complete(t, kind.Spec{
			Role:      "app",
			Algorithm: rapid.SampledFrom(hmacs).Draw(t, "algorithm"),
			Encoding:  rapid.SampledFrom([]string{"", "base64", "base64url", "hex"}).Draw(t, "encoding"),
			Length:    rapid.SampledFrom([]int{0, 64, 65, 66, 512}).Draw(t, "length"),
		})
		seed := rapid.Uint64Range(0, 1<<20).Draw(t, "seed")
		got := generate(t, spec, seeded(seed))
		require.Empty(t, got.Username)
		require.Regexp(t, `^[0-9a-f]{16}$`, got.KeyID)
		require.NoError(t, jwt.Kind{}.CheckInitial(spec, got.Secret), "what is generated can be adopted")
		require.Equal(t, got.Secret, adopt(t, spec, got.Secret).Secret, "unchanged")

		raw, err := map[string]func(string) ([]byte, error){
			"base64": base64.StdEncoding.Strict().DecodeString, "base64url": base64.RawURLEncoding.Strict().DecodeString, "hex": hex.DecodeString,
		}[spec.Encoding](got.Secret)
		require.NoError(t, err)
		require.Len(t, raw, spec.Length, "length counts random bytes")

		verifying, err := jwt.Kind{}.Verifying(got)
		require.NoError(t, err)
		require.Equal(t, got.Secret, verifying)
		requireSigns(t, spec.Algorithm, []byte(got.Secret), []byte(verifying))

		require.Equal(t, got, generate(t, spec, seeded(seed)), "there is no randomness but the source's")
		other := generate(t, spec, seeded(seed+1))
		require.False(t, got.Same(other))
		require.NotEqual(t, got.KeyID, other.KeyID)
	})
}

func TestGeneratePair(t *testing.T) {
	for _, algorithm := range numbers {
		spec := complete(t, kind.Spec{Role: "app", Algorithm: algorithm})
		got := generate(t, spec, seeded(1))
		requirePair(t, spec, got)
		require.Equal(t, got, generate(t, spec, seeded(1)), "there is no randomness but the source's")
		other := generate(t, spec, seeded(2))
		requirePair(t, spec, other)
		require.False(t, got.Same(other))
	}
}

func TestGenerateRSA(t *testing.T) {
	for _, algorithm := range []string{"RS256", "RS384", "RS512"} {
		spec := complete(t, kind.Spec{Algorithm: algorithm})
		got := generate(t, spec, seeded(1))
		key := requirePair(t, spec, got).(*rsa.PrivateKey)
		require.Equal(t, 2048, key.N.BitLen())
		require.Equal(t, 65537, key.E)
	}
	if testing.Short() {
		return
	}
	spec := complete(t, kind.Spec{Algorithm: "RS256", Length: 3072})
	require.Equal(t, 3072, requirePair(t, spec, generate(t, spec, seeded(1))).(*rsa.PrivateKey).N.BitLen())
}

// requirePair holds a key pair to what its users rely on, and returns its
// private half.
func requirePair(t require.TestingT, spec kind.Spec, m kind.Material) crypto.Signer {
	block, rest := pem.Decode([]byte(m.Secret))
	require.NotNil(t, block)
	require.Equal(t, "PRIVATE KEY", block.Type)
	require.Empty(t, rest)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	require.NoError(t, err)
	private := parsed.(crypto.Signer)

	text, err := jwt.Kind{}.Verifying(m)
	require.NoError(t, err)
	block, rest = pem.Decode([]byte(text))
	require.NotNil(t, block)
	require.Equal(t, "PUBLIC KEY", block.Type)
	require.Empty(t, rest)
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	require.NoError(t, err)
	require.Equal(t, private.Public(), public)
	requireSigns(t, spec.Algorithm, private, public)

	require.Equal(t, rfc7638(t, public), m.KeyID)
	require.Equal(t, m, adopt(t, spec, m.Secret), "what is generated can be adopted, and keeps its id")
	return private
}

// rfc7638 is the thumbprint of a key, written down from the RFC.
func rfc7638(t require.TestingT, public crypto.PublicKey) string {
	raw, err := json.Marshal(jose.JSONWebKey{Key: public})
	require.NoError(t, err)
	var members map[string]string
	require.NoError(t, json.Unmarshal(raw, &members))
	canonical, err := json.Marshal(members) // in the order of the names
	require.NoError(t, err)
	require.NotContains(t, members, "d")
	sum := sha256.Sum256(canonical)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// requireSigns signs with one half of a key and verifies with the other, as
// applications do.
func requireSigns(t require.TestingT, algorithm string, private, public any) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(algorithm), Key: private}, nil)
	require.NoError(t, err)
	signed, err := signer.Sign([]byte("claims"))
	require.NoError(t, err)
	token, err := signed.CompactSerialize()
	require.NoError(t, err)
	read, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(algorithm)})
	require.NoError(t, err)
	payload, err := read.Verify(public)
	require.NoError(t, err)
	require.Equal(t, "claims", string(payload))
}

// RFC 8037, appendix A.
func TestThumbprintOfTheRFC(t *testing.T) {
	seed, err := base64.RawURLEncoding.DecodeString("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
	require.NoError(t, err)
	spec := complete(t, kind.Spec{Algorithm: "EdDSA"})
	m := adopt(t, spec, pkcs8(t, ed25519.NewKeyFromSeed(seed)))
	require.Equal(t, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k", m.KeyID)
	set, err := jwt.JWKS([]kind.Material{m}, "EdDSA")
	require.NoError(t, err)
	require.JSONEq(t, `{"keys":[{"kty":"OKP","crv":"Ed25519","use":"sig","alg":"EdDSA",
		"kid":"kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`, string(set))
}

// A number that is not in the group is drawn again; none is bent into it.
func TestGenerateDrawsAgain(t *testing.T) {
	for _, c := range []struct {
		algorithm string
		bytes     int
		bad       []byte
	}{
		{"ES256", 32, bytes.Repeat([]byte{0xff}, 32)},
		{"ES384", 48, make([]byte, 48)},
		{"ES512", 66, bytes.Repeat([]byte{0xff}, 66)},
	} {
		spec := complete(t, kind.Spec{Algorithm: c.algorithm})
		good := bytes.Repeat([]byte{1}, c.bytes)
		want := generate(t, spec, source{bytes.NewReader(good)})
		got := generate(t, spec, source{io.MultiReader(bytes.NewReader(c.bad), bytes.NewReader(good))})
		require.Equal(t, want, got)
		_, err := jwt.Kind{}.Generate(t.Context(), spec, source{endless{c.bad}})
		require.ErrorContains(t, err, "keeps giving numbers")
	}
	// Seven of the eight highest bits of a P-521 number do not count.
	spec := complete(t, kind.Spec{Algorithm: "ES512"})
	low, high := bytes.Repeat([]byte{1}, 66), bytes.Repeat([]byte{1}, 66)
	high[0] = 0xff
	require.Equal(t, generate(t, spec, source{bytes.NewReader(low)}), generate(t, spec, source{bytes.NewReader(high)}))
}

type endless struct{ of []byte }

func (e endless) Read(p []byte) (int, error) { return copy(p, e.of), nil }

func TestGenerateReadsShortSources(t *testing.T) {
	for _, algorithm := range append(numbers, hmacs...) {
		spec := complete(t, kind.Spec{Algorithm: algorithm})
		require.Equal(t, generate(t, spec, seeded(1)), generate(t, spec, source{iotest.OneByteReader(seeded(1))}))
	}
}

func TestGenerateGivesNothingWhenTheSourceFails(t *testing.T) {
	gone := errors.New("entropy device gone")
	for _, algorithm := range append(numbers, hmacs...) {
		spec := complete(t, kind.Spec{Role: "app", Algorithm: algorithm})
		for _, given := range []int{0, 1, 31} {
			src := source{io.MultiReader(strings.NewReader(strings.Repeat("k", given)), iotest.ErrReader(gone))}
			got, err := jwt.Kind{}.Generate(t.Context(), spec, src)
			require.ErrorIs(t, err, gone)
			require.ErrorContains(t, err, `"app"`)
			require.False(t, kind.IsDefinite(err), "trying again may help")
			require.True(t, got.Zero())
		}
	}
	spec := complete(t, kind.Spec{})
	src := source{io.MultiReader(strings.NewReader(strings.Repeat("k", 32)), iotest.ErrReader(gone))}
	got, err := jwt.Kind{}.Generate(t.Context(), spec, src)
	require.ErrorIs(t, err, gone, "a key without an id")
	require.True(t, got.Zero())
	_, err = jwt.Kind{}.Adopt(t.Context(), spec, strings.Repeat("k", 32), source{iotest.ErrReader(gone)})
	require.ErrorIs(t, err, gone)
}

func TestGenerateRefusesASpecThatWasNotCompleted(t *testing.T) {
	for _, spec := range []kind.Spec{
		{}, {Algorithm: "HS256"}, {Algorithm: "RS256"}, {Algorithm: "RS256", Length: 512}, {Algorithm: "HS256", Encoding: "base64", Length: 16},
	} {
		got, err := jwt.Kind{}.Generate(t.Context(), spec, seeded(1))
		require.True(t, kind.IsDefinite(err), "%+v: %v", spec, err)
		require.True(t, got.Zero())
	}
	_, err := jwt.Kind{}.Adopt(t.Context(), kind.Spec{}, strings.Repeat("k", 32), seeded(1))
	require.True(t, kind.IsDefinite(err))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = jwt.Kind{}.Generate(ctx, complete(t, kind.Spec{Algorithm: "RS256"}), seeded(1))
	require.ErrorIs(t, err, context.Canceled)
}

func TestAdoptSharedSecret(t *testing.T) {
	for name, c := range map[string]struct{ algorithm, secret, says string }{
		"of the runbook":              {"HS256", "Vb3kQ9yXw2LmN7cRt5JhZs8PdF4gTaEu", ""},
		"weaker than the hash":        {"HS512", "sixteen bytes ok", ""},
		"other letters":               {"HS256", "schlüssel für jwt", ""},
		"largest":                     {"HS256", strings.Repeat("x", 8<<10), ""},
		"empty":                       {"HS256", "", "empty"},
		"short":                       {"HS256", "topsecret-topse", "15 bytes"},
		"too large":                   {"HS256", strings.Repeat("x", 8<<10+1), "8193 bytes"},
		"new line at the end":         {"HS256", "topsecret-topsecret-topsecret\n", "new line"},
		"NUL":                         {"HS256", "topsecret-topsecret\x00topsecret", "control character"},
		"not UTF-8":                   {"HS256", "topsecret-topsecret\xfftopsecret", "UTF-8"},
		"a private key":               {"HS256", pkcs8(t, ecKey(t, elliptic.P256())), "algorithm of the key"},
		"a private key in one line":   {"HS256", `-----BEGIN PRIVATE KEY-----\ntopsecret\n-----END PRIVATE KEY-----`, "algorithm of the key"},
		"algorithm that is not known": {"HS1", "topsecret-topsecret-topsecret", `algorithm is "HS1"`},
	} {
		t.Run(name, func(t *testing.T) {
			spec := kind.Spec{Algorithm: c.algorithm}
			err := jwt.Kind{}.CheckInitial(spec, c.secret)
			if c.says == "" {
				require.NoError(t, err)
				m := adopt(t, spec, c.secret)
				require.Equal(t, c.secret, m.Secret)
				require.Regexp(t, `^[0-9a-f]{16}$`, m.KeyID)
				return
			}
			require.ErrorContains(t, err, c.says)
			requireTellsNothing(t, err)
		})
	}
}

func requireTellsNothing(t *testing.T, err error) {
	t.Helper()
	require.NotContains(t, err.Error(), "topsecret")
	require.NotContains(t, err.Error(), "MII")
	require.NotContains(t, err.Error(), "\n")
}

func TestAdoptPair(t *testing.T) {
	p256 := ecKey(t, elliptic.P256())
	_, ed, err := ed25519.GenerateKey(crand.Reader)
	require.NoError(t, err)
	parameters := armor("EC PARAMETERS", []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07})
	for name, c := range map[string]struct {
		algorithm, text string
		key             crypto.Signer
	}{
		"RSA, PKCS #8":             {"RS256", pkcs8(t, rsa2048()), rsa2048()},
		"RSA, PKCS #1":             {"RS512", pkcs1(rsa2048()), rsa2048()},
		"P-256, PKCS #8":           {"ES256", pkcs8(t, p256), p256},
		"P-256, SEC 1":             {"ES256", sec1(t, p256), p256},
		"as openssl ecparam":       {"ES256", parameters + sec1(t, p256), p256},
		"with words before it":     {"ES256", "Private-Key: (256 bit)\n" + pkcs8(t, p256), p256},
		"with CRLF":                {"ES256", strings.ReplaceAll(pkcs8(t, p256), "\n", "\r\n"), p256},
		"without the last newline": {"EdDSA", strings.TrimSpace(pkcs8(t, ed)), ed},
	} {
		t.Run(name, func(t *testing.T) {
			spec := complete(t, kind.Spec{Algorithm: c.algorithm})
			m := adopt(t, spec, c.text)
			require.Equal(t, pkcs8(t, c.key), m.Secret, "one form, whatever was given")
			require.Equal(t, rfc7638(t, c.key.Public()), m.KeyID)
			requirePair(t, spec, m)
		})
	}
}

func TestAdoptRefusesPair(t *testing.T) {
	p256, p384 := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384())
	x25519, err := ecdh.X25519().GenerateKey(crand.Reader)
	require.NoError(t, err)
	public, err := x509.MarshalPKIXPublicKey(p256.Public())
	require.NoError(t, err)
	locked := "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\ndG9wc2VjcmV0\n-----END RSA PRIVATE KEY-----\n"
	for name, c := range map[string]struct{ algorithm, text, says string }{
		"a shared secret":          {"RS256", "topsecret-topsecret-topsecret-topsecret", "initial_value=@key.pem"},
		"another curve":            {"ES256", pkcs8(t, p384), "a P-384 key, but algorithm is ES256"},
		"a curve for RSA":          {"RS256", pkcs8(t, p256), "a P-256 key, but algorithm is RS256"},
		"RSA for a curve":          {"ES512", pkcs1(rsa2048()), "an RSA key, but algorithm is ES512"},
		"RSA for Ed25519":          {"EdDSA", pkcs1(rsa2048()), "(Ed25519 key)"},
		"a curve without jwt":      {"ES256", pkcs8(t, ecKey(t, elliptic.P224())), "a P-224 key"},
		"a short RSA key":          {"RS256", pkcs1(rsa1024()), "1024 bits"},
		"a key that cannot sign":   {"EdDSA", pkcs8(t, x25519), "openssl pkey"},
		"a public key":             {"ES256", armor("PUBLIC KEY", public), `"PUBLIC KEY"`},
		"a certificate beside it":  {"ES256", pkcs8(t, p256) + armor("CERTIFICATE", []byte("topsecret")), `"CERTIFICATE"`},
		"two keys":                 {"ES256", pkcs8(t, p256) + sec1(t, p256), "several private keys"},
		"encrypted, PKCS #8":       {"RS256", armor("ENCRYPTED PRIVATE KEY", []byte("topsecret")), "decrypt it first"},
		"encrypted, PKCS #1":       {"RS256", locked, "decrypt it first"},
		"no key inside":            {"RS256", armor("PRIVATE KEY", []byte("topsecret")), "no private key that can be read"},
		"half a file":              {"ES256", pkcs8(t, p256)[:100], "no private key in PEM"},
		"a wrong label":            {"ES256", strings.ReplaceAll(sec1(t, p256), "EC PRIVATE", "RSA PRIVATE"), "no private key that can be read"},
		"larger than what is kept": {"RS256", strings.Repeat("topsecret", 1000), "9000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := complete(t, kind.Spec{Algorithm: c.algorithm})
			err := jwt.Kind{}.CheckInitial(spec, c.text)
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, "initial_value")
			requireTellsNothing(t, err)
			m, err := jwt.Kind{}.Adopt(t.Context(), spec, c.text, seeded(1))
			if len(c.text) <= 8<<10 {
				require.True(t, kind.IsDefinite(err))
				require.True(t, m.Zero())
			}
		})
	}
}

// A stored private key that cannot be read is never taken for a shared secret.
func TestVerifyingFailsClosed(t *testing.T) {
	for _, secret := range []string{
		"-----BEGIN PRIVATE KEY-----\ntopsecret\n-----END PRIVATE KEY-----\n", armor("PRIVATE KEY", []byte("topsecret")), "topsecret\n",
		`-----BEGIN PRIVATE KEY-----\ntopsecret`,
	} {
		got, err := jwt.Kind{}.Verifying(kind.Material{Secret: secret, KeyID: "k"})
		require.ErrorContains(t, err, `"k"`)
		requireTellsNothing(t, err)
		require.Empty(t, got)
	}
}

func TestJWKS(t *testing.T) {
	for _, algorithm := range pairs {
		t.Run(algorithm, func(t *testing.T) {
			spec := complete(t, kind.Spec{Algorithm: algorithm})
			keys := twoRSAKeys()
			if !strings.HasPrefix(algorithm, "RS") {
				keys = []kind.Material{generate(t, spec, seeded(1)), generate(t, spec, seeded(2))}
			}
			keys = []kind.Material{keys[0], keys[1], keys[0]}
			raw, err := jwt.JWKS(keys, algorithm)
			require.NoError(t, err)
			again, err := jwt.JWKS(keys, algorithm)
			require.NoError(t, err)
			require.Equal(t, string(raw), string(again))
			require.NotContains(t, string(raw), "\n")

			var set jose.JSONWebKeySet
			require.NoError(t, json.Unmarshal(raw, &set))
			require.Len(t, set.Keys, 2, "each once")
			for i, k := range set.Keys {
				require.True(t, k.IsPublic())
				require.True(t, k.Valid())
				require.Equal(t, keys[i].KeyID, k.KeyID)
				require.Equal(t, algorithm, k.Algorithm)
				require.Equal(t, "sig", k.Use)
				requireSigns(t, algorithm, requirePair(t, spec, keys[i]), k)
			}
			requireOnlyPublicMembers(t, raw)
		})
	}
}

// The members of public keys (RFC 7518 section 6, RFC 8037 section 2).
func requireOnlyPublicMembers(t *testing.T, raw []byte) {
	t.Helper()
	var set struct {
		Keys []map[string]string `json:"keys"`
	}
	require.NoError(t, json.Unmarshal(raw, &set))
	for _, k := range set.Keys {
		for member := range k {
			require.Contains(t, []string{"kty", "use", "alg", "kid", "n", "e", "crv", "x", "y"}, member)
		}
	}
}

func TestJWKSRefusesSecrets(t *testing.T) {
	shared := generate(t, complete(t, kind.Spec{}), seeded(1))
	_, err := jwt.JWKS([]kind.Material{shared}, "HS256")
	require.Error(t, err)
	for _, algorithm := range pairs {
		require.True(t, jwt.Publishable(algorithm))
		raw, err := jwt.JWKS([]kind.Material{shared}, algorithm)
		require.Error(t, err, "a shared secret has no public half")
		require.NotContains(t, err.Error(), shared.Secret)
		require.Empty(t, raw)
	}
	for _, algorithm := range append(hmacs, "", "none") {
		require.False(t, jwt.Publishable(algorithm))
	}
	raw, err := jwt.JWKS(nil, "ES256")
	require.NoError(t, err)
	require.Equal(t, `{"keys":[]}`, string(raw))
}

// FuzzAdopt: whatever is given is refused with one sentence that repeats none of
// it, or becomes a key that signs and has a public half.
func FuzzAdopt(f *testing.F) {
	p256 := ecKey(f, elliptic.P256())
	for _, seed := range []string{
		pkcs8(f, p256), sec1(f, p256), pkcs1(rsa2048()), pkcs8(f, ecKey(f, elliptic.P521())), strings.Repeat("k", 32), "-----BEGIN ",
		armor("EC PARAMETERS", nil), armor("ENCRYPTED PRIVATE KEY", nil),
	} {
		for i := range append(hmacs, pairs...) {
			f.Add(uint8(i), seed)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, text string) {
		names := append(append([]string{}, hmacs...), pairs...)
		spec := complete(t, kind.Spec{Algorithm: names[int(which)%len(names)]})
		err := jwt.Kind{}.CheckInitial(spec, text)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 300)
			return
		}
		m := adopt(t, spec, text)
		require.NotEmpty(t, m.KeyID)
		verifying, err := jwt.Kind{}.Verifying(m)
		require.NoError(t, err)
		if !jwt.Publishable(spec.Algorithm) {
			require.Equal(t, text, verifying)
			return
		}
		requirePair(t, spec, m)
		_, err = jwt.JWKS([]kind.Material{m}, spec.Algorithm)
		require.NoError(t, err)
	})
}

// Anybody may ask for a key set, so it must be cheap to make.
func BenchmarkJWKS(b *testing.B) {
	for _, algorithm := range pairs {
		spec := complete(b, kind.Spec{Algorithm: algorithm})
		keys := []kind.Material{generate(b, spec, seeded(1)), generate(b, spec, seeded(2)), generate(b, spec, seeded(3))}
		b.Run(fmt.Sprint(algorithm), func(b *testing.B) {
			for b.Loop() {
				_, err := jwt.JWKS(keys, algorithm)
				require.NoError(b, err)
			}
		})
	}
}
