package encryptionkey_test

import (
	"context"
	"crypto/aes"
	"encoding/base64"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/encryptionkey"
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
	require.NoError(t, encryptionkey.Kind{}.Complete(&spec))
	return spec
}

func TestIsARing(t *testing.T) {
	var k kind.Ring = encryptionkey.Kind{}
	require.Equal(t, "encryption-key", k.Name())
	require.Empty(t, k.ConnectionType())
	require.Contains(t, k.Fields(), "retire_after")
	require.NotContains(t, k.Fields(), "max_token_ttl")
}

func TestCompleteFillsDefaults(t *testing.T) {
	for name, c := range map[string]struct{ given, want kind.Spec }{
		"nothing": {
			kind.Spec{},
			kind.Spec{Strategy: kind.KeyRing, Length: 256, PropagationDelay: 5 * time.Minute},
		},
		"what was given stays": {
			kind.Spec{Strategy: kind.KeyRing, Length: 128, PropagationDelay: time.Minute, RetireAfter: time.Minute, RequireReencryptionAck: true, KeysField: "keys"},
			kind.Spec{Strategy: kind.KeyRing, Length: 128, PropagationDelay: time.Minute, RetireAfter: time.Minute, RequireReencryptionAck: true, KeysField: "keys"},
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
	for name, c := range map[string]struct {
		spec kind.Spec
		says []string
	}{
		"strategy":              {kind.Spec{Strategy: kind.Overlap}, []string{`strategy is "overlap"`, "key-ring"}},
		"delay":                 {kind.Spec{PropagationDelay: time.Millisecond}, []string{"propagation_delay is 1ms"}},
		"bytes for bits":        {kind.Spec{Length: 32}, []string{"length is 32", "128, 192 or 256 bits"}},
		"negative length":       {kind.Spec{Length: -1}, []string{"length is -1"}},
		"negative age":          {kind.Spec{RetireAfter: -1}, []string{"retire_after is -1ns"}},
		"an age beyond all":     {kind.Spec{RetireAfter: 87601 * time.Hour}, []string{"retire_after is 87601h"}},
		"an age before it ends": {kind.Spec{RetireAfter: 4 * time.Minute}, []string{"retire_after is 4m0s", "propagation_delay, 5m0s"}},
		"username":              {kind.Spec{Username: "app"}, []string{`username is "app"`}},
		"policy":                {kind.Spec{PasswordPolicy: "keys"}, []string{`password_policy is "keys"`}},
		"encoding":              {kind.Spec{Encoding: "hex"}, []string{`encoding is "hex"`, "base64"}},
		"prefix":                {kind.Spec{Prefix: "p"}, []string{`prefix is "p"`}},
		"algorithm":             {kind.Spec{Algorithm: "AES"}, []string{`algorithm is "AES"`, "length"}},
		"max_token_ttl":         {kind.Spec{MaxTokenTTL: time.Hour}, []string{"max_token_ttl is 1h0m0s", "retire_after"}},
		"public_jwks":           {kind.Spec{PublicJWKS: true}, []string{"public_jwks is true"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := encryptionkey.Kind{}.Complete(&c.spec)
			require.Error(t, err)
			for _, say := range c.says {
				require.ErrorContains(t, err, say)
			}
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestGenerate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := complete(t, kind.Spec{Role: "app", Length: rapid.SampledFrom([]int{0, 128, 192, 256}).Draw(t, "length")})
		seed := rapid.Uint64Range(0, 1<<20).Draw(t, "seed")
		got, err := encryptionkey.Kind{}.Generate(t.Context(), spec, seeded(seed))
		require.NoError(t, err)
		require.Empty(t, got.Username)
		require.Regexp(t, `^[0-9a-f]{16}$`, got.KeyID)
		raw, err := base64.StdEncoding.Strict().DecodeString(got.Secret)
		require.NoError(t, err)
		require.Len(t, raw, spec.Length/8)
		_, err = aes.NewCipher(raw)
		require.NoError(t, err)

		require.NoError(t, encryptionkey.Kind{}.CheckInitial(spec, got.Secret), "what is generated can be adopted")
		adopted, err := encryptionkey.Kind{}.Adopt(t.Context(), spec, got.Secret, seeded(seed+2))
		require.NoError(t, err)
		require.True(t, got.Same(adopted), "unchanged")
		require.NotEqual(t, got.KeyID, adopted.KeyID, "nothing of the key is in its id")
		verifying, err := encryptionkey.Kind{}.Verifying(got)
		require.NoError(t, err)
		require.Equal(t, got.Secret, verifying)

		again, err := encryptionkey.Kind{}.Generate(t.Context(), spec, seeded(seed))
		require.NoError(t, err)
		require.Equal(t, got, again, "there is no randomness but the source's")
		other, err := encryptionkey.Kind{}.Generate(t.Context(), spec, seeded(seed+1))
		require.NoError(t, err)
		require.False(t, got.Same(other))
	})
}

func TestGenerateGivesNothingWhenTheSourceFails(t *testing.T) {
	gone := errors.New("entropy device gone")
	spec := complete(t, kind.Spec{Role: "app"})
	for _, given := range []int{0, 1, 31, 32, 39} {
		src := source{io.MultiReader(strings.NewReader(strings.Repeat("k", given)), iotest.ErrReader(gone))}
		got, err := encryptionkey.Kind{}.Generate(t.Context(), spec, src)
		require.ErrorIs(t, err, gone)
		require.ErrorContains(t, err, `"app"`)
		require.False(t, kind.IsDefinite(err), "trying again may help")
		require.True(t, got.Zero())
	}
	got, err := encryptionkey.Kind{}.Adopt(t.Context(), spec, strings.Repeat("k", 44), source{iotest.ErrReader(gone)})
	require.ErrorIs(t, err, gone)
	require.True(t, got.Zero())
}

func TestGenerateRefusesASpecThatWasNotCompleted(t *testing.T) {
	got, err := encryptionkey.Kind{}.Generate(t.Context(), kind.Spec{}, seeded(1))
	require.True(t, kind.IsDefinite(err))
	require.True(t, got.Zero())
}

func TestCheckInitial(t *testing.T) {
	key := func(n int) string { return base64.StdEncoding.EncodeToString([]byte(strings.Repeat("\xff", n))) }
	for name, c := range map[string]struct {
		length       int
		secret, says string
	}{
		"128 bits":                {128, key(16), ""},
		"192 bits":                {192, key(24), ""},
		"256 bits":                {256, key(32), ""},
		"another length":          {256, key(16), "give length=128"},
		"no length of a key":      {256, key(20), "has 160 bits"},
		"empty":                   {256, "", "empty"},
		"the other alphabet":      {256, base64.URLEncoding.EncodeToString([]byte(strings.Repeat("\xff", 32))), "standard base64"},
		"no padding":              {256, strings.TrimRight(key(32), "="), "standard base64"},
		"new line at the end":     {256, key(32) + "\n", "new line"},
		"new line within":         {256, key(32)[:8] + "\n" + key(32)[8:], "standard base64"},
		"hex":                     {256, strings.Repeat("0a", 31) + "z!", "standard base64"},
		"hex that base64 can be":  {256, strings.Repeat("0a", 32), "has 384 bits"},
		"bits that do not belong": {128, strings.Repeat("A", 21) + "B==", "standard base64"},
	} {
		t.Run(name, func(t *testing.T) {
			err := encryptionkey.Kind{}.CheckInitial(kind.Spec{Length: c.length}, c.secret)
			if c.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, "initial_value")
			require.NotContains(t, err.Error(), "\n")
			if len(c.secret) > 8 {
				require.NotContains(t, err.Error(), c.secret[:8])
			}
		})
	}
}

// FuzzCheckInitial: what is accepted is a key of the length, in the one form
// that every decoder reads alike.
func FuzzCheckInitial(f *testing.F) {
	for _, n := range []int{15, 16, 24, 32} {
		f.Add(256, base64.StdEncoding.EncodeToString(make([]byte, n)))
		f.Add(128, base64.RawStdEncoding.EncodeToString(make([]byte, n)))
	}
	f.Fuzz(func(t *testing.T, length int, text string) {
		if (encryptionkey.Kind{}).CheckInitial(kind.Spec{Length: length}, text) != nil {
			return
		}
		raw, err := base64.StdEncoding.Strict().DecodeString(text)
		require.NoError(t, err)
		require.Equal(t, length, len(raw)*8)
		require.Equal(t, base64.StdEncoding.EncodeToString(raw), text)
	})
}
