package apikey_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/apikey"
)

// source is randomness that repeats, and one password policy.
type source struct {
	io.Reader
	made   string
	err    error
	policy string // that was asked for
}

func (s *source) FromPolicy(_ context.Context, policy string) (string, error) {
	s.policy = policy
	return s.made, s.err
}

func seeded(seed uint64) *source {
	var key [32]byte
	key[0], key[1], key[2] = byte(seed), byte(seed>>8), byte(seed>>16)
	return &source{Reader: rand.NewChaCha8(key)}
}

func complete(t require.TestingT, spec kind.Spec) kind.Spec {
	require.NoError(t, apikey.Kind{}.Complete(&spec))
	return spec
}

func TestIsAKindWithoutTarget(t *testing.T) {
	var k kind.Kind = apikey.Kind{}
	require.Equal(t, "api-key", k.Name())
	require.Empty(t, k.ConnectionType())
	require.ElementsMatch(t, []string{"strategy", "length", "encoding", "prefix", "password_policy", "previous_field"}, k.Fields())
}

func TestCompleteFillsDefaults(t *testing.T) {
	for name, c := range map[string]struct{ given, want kind.Spec }{
		"nothing": {
			kind.Spec{},
			kind.Spec{Strategy: kind.Swap, Length: 32, Encoding: "alphanumeric"},
		},
		"previous_field means overlap": {
			kind.Spec{PreviousField: "API_KEY_PREVIOUS"},
			kind.Spec{Strategy: kind.Overlap, Length: 32, Encoding: "alphanumeric", PreviousField: "API_KEY_PREVIOUS"},
		},
		"a policy decides length and alphabet": {
			kind.Spec{PasswordPolicy: "keys", Prefix: "sk_"},
			kind.Spec{Strategy: kind.Swap, PasswordPolicy: "keys", Prefix: "sk_"},
		},
		"what was given stays": {
			kind.Spec{Role: "app", Strategy: kind.Overlap, Length: 64, Encoding: "hex", Prefix: "hf_live_", PreviousField: "old.key"},
			kind.Spec{Role: "app", Strategy: kind.Overlap, Length: 64, Encoding: "hex", Prefix: "hf_live_", PreviousField: "old.key"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := complete(t, c.given)
			require.Equal(t, c.want, got)
			require.Equal(t, got, complete(t, got), "again changes nothing")
		})
	}
}

func TestCompleteAccepts(t *testing.T) {
	for _, spec := range []kind.Spec{
		{Length: 16},
		{Length: 4096},
		{Length: 17},
		{Length: 16, Encoding: "hex"},
		{Length: 43, Encoding: "base64url"},
		{Length: 18, Encoding: "base64url"},
		{Prefix: strings.Repeat("p", 64)},
		{Prefix: "!~\"'{}"},
		{PreviousField: strings.Repeat("f", 253)},
		{PreviousField: ".dot"},
		{PreviousField: "VALUE"},
		{Strategy: kind.Swap},
	} {
		require.NoError(t, apikey.Kind{}.Complete(&spec), "%+v", spec)
	}
}

func TestCompleteRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spec kind.Spec
		says []string
	}{
		"username":                {kind.Spec{Username: "app"}, []string{`username is "app"`, "has none"}},
		"overlap without field":   {kind.Spec{Strategy: kind.Overlap}, []string{`strategy is "overlap"`, "give previous_field"}},
		"swap with field":         {kind.Spec{Strategy: kind.Swap, PreviousField: "old"}, []string{`strategy is "swap"`, "strategy=overlap"}},
		"unknown strategy":        {kind.Spec{Strategy: "alternate"}, []string{`strategy is "alternate"`, "overlap", "swap"}},
		"unknown encoding":        {kind.Spec{Encoding: "base64"}, []string{`encoding is "base64"`, "alphanumeric, hex and base64url"}},
		"short":                   {kind.Spec{Length: 15}, []string{"length is 15", "16 to 4096"}},
		"long":                    {kind.Spec{Length: 4097}, []string{"length is 4097", "16 to 4096"}},
		"negative length":         {kind.Spec{Length: -1}, []string{"length is -1"}},
		"odd hex":                 {kind.Spec{Length: 33, Encoding: "hex"}, []string{"length is 33", "even"}},
		"impossible base64url":    {kind.Spec{Length: 33, Encoding: "base64url"}, []string{"length is 33", "one more or one less"}},
		"prefix with space":       {kind.Spec{Prefix: "sk live"}, []string{`prefix is "sk live"`, "without spaces"}},
		"prefix with new line":    {kind.Spec{Prefix: "sk\n"}, []string{`prefix is "sk\n"`}},
		"prefix with DEL":         {kind.Spec{Prefix: "sk\x7f"}, []string{"printable ASCII"}},
		"prefix beyond ASCII":     {kind.Spec{Prefix: "clé_"}, []string{`prefix is "clé_"`, "printable ASCII"}},
		"prefix not UTF-8":        {kind.Spec{Prefix: "\xff"}, []string{"printable ASCII"}},
		"long prefix":             {kind.Spec{Prefix: strings.Repeat("p", 65)}, []string{"prefix is 65 bytes", "64"}},
		"policy and encoding":     {kind.Spec{PasswordPolicy: "keys", Encoding: "hex"}, []string{`encoding is "hex"`, `password_policy is "keys"`}},
		"policy and length":       {kind.Spec{PasswordPolicy: "keys", Length: 32}, []string{"length is 32", `password_policy is "keys"`}},
		"field with slash":        {kind.Spec{PreviousField: "a/b"}, []string{`previous_field is "a/b"`, "letters"}},
		"field with new line":     {kind.Spec{PreviousField: "a\n"}, []string{`previous_field is "a\n"`}},
		"field of one dot":        {kind.Spec{PreviousField: "."}, []string{`previous_field is "."`}},
		"field of two dots":       {kind.Spec{PreviousField: "..old"}, []string{`previous_field is "..old"`}},
		"long field":              {kind.Spec{PreviousField: strings.Repeat("f", 254)}, []string{"254 bytes", "253"}},
		"field of creds: value":   {kind.Spec{PreviousField: "value"}, []string{`previous_field is "value"`, "another name"}},
		"field of creds: ttl":     {kind.Spec{PreviousField: "ttl"}, []string{"another name"}},
		"field of creds: version": {kind.Spec{PreviousField: "version"}, []string{"another name"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := apikey.Kind{}.Complete(&c.spec)
			require.Error(t, err)
			for _, say := range c.says {
				require.ErrorContains(t, err, say)
			}
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestCheckInitial(t *testing.T) {
	for name, c := range map[string]struct {
		secret, says string
	}{
		"one byte":        {"x", ""},
		"spaces, letters": {"correct horse é 電池", ""},
		"largest":         {strings.Repeat("x", 32<<10), ""},
		"empty":           {"", "empty"},
		"too large":       {strings.Repeat("x", 32<<10+1), "32769 bytes"},
		"NUL":             {"topsecret\x00", "control character"},
		"new line":        {"topsecret\n", "new line"},
		"tab":             {"top\tsecret", "control character"},
		"C1":              {"topsecret\u0085", "control character"},
		"not UTF-8":       {"topsecret\xff", "UTF-8"},
	} {
		t.Run(name, func(t *testing.T) {
			err := apikey.Kind{}.CheckInitial(kind.Spec{}, c.secret)
			if c.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, "initial_value")
			require.NotContains(t, err.Error(), "secret")
		})
	}
}

func TestGenerate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := kind.Spec{
			Role:     "app",
			Encoding: rapid.SampledFrom([]string{"", "alphanumeric", "hex", "base64url"}).Draw(t, "encoding"),
			Length:   rapid.SampledFrom([]int{0, 16, 18, 20, 22, 32, 64, 4096}).Draw(t, "length"),
			Prefix:   rapid.StringMatching(`[!-~]{0,64}`).Draw(t, "prefix"),
		}
		spec = complete(t, spec)
		seed := rapid.Uint64Range(0, 1<<20).Draw(t, "seed")
		got, err := apikey.Kind{}.Generate(t.Context(), spec, seeded(seed))
		require.NoError(t, err)
		require.Empty(t, got.Username)
		require.NoError(t, apikey.Kind{}.CheckInitial(spec, got.Secret), "what is generated can be adopted")

		random, prefixed := strings.CutPrefix(got.Secret, spec.Prefix)
		require.True(t, prefixed)
		require.Len(t, random, spec.Length, "length counts the generated part")
		requireEncoding(t, spec.Encoding, random)

		again, err := apikey.Kind{}.Generate(t.Context(), spec, seeded(seed))
		require.NoError(t, err)
		require.True(t, got.Same(again), "there is no randomness but the source's")
		other, err := apikey.Kind{}.Generate(t.Context(), spec, seeded(seed+1))
		require.NoError(t, err)
		require.False(t, got.Same(other))
	})
}

func requireEncoding(t *rapid.T, encoding, random string) {
	t.Helper()
	switch encoding {
	case "hex":
		_, err := hex.DecodeString(random)
		require.NoError(t, err)
		require.Equal(t, strings.ToLower(random), random)
	case "base64url":
		_, err := base64.RawURLEncoding.Strict().DecodeString(random)
		require.NoError(t, err, "strict decoders accept it too")
	default:
		require.Regexp(t, `^[A-Za-z0-9]+$`, random)
	}
}

func TestGenerateHasEveryBase64URLLength(t *testing.T) {
	for length := 16; length < 64; length++ {
		spec := kind.Spec{Length: length, Encoding: "base64url"}
		if length%4 == 1 {
			continue
		}
		got, err := apikey.Kind{}.Generate(t.Context(), complete(t, spec), seeded(uint64(length)))
		require.NoError(t, err)
		require.Len(t, got.Secret, length)
	}
}

// Chi-squared over 200,000 characters. The limits are far beyond what chance
// gives; a modulo without rejection comes to thousands.
func TestGenerateHasNoFavourites(t *testing.T) {
	for _, c := range []struct {
		encoding string
		size     int
	}{{"alphanumeric", 62}, {"hex", 16}, {"base64url", 64}} {
		t.Run(c.encoding, func(t *testing.T) {
			spec, src := complete(t, kind.Spec{Length: 4000, Encoding: c.encoding}), seeded(7)
			counts := map[rune]int{}
			for range 50 {
				got, err := apikey.Kind{}.Generate(t.Context(), spec, src)
				require.NoError(t, err)
				for _, r := range got.Secret {
					counts[r]++
				}
			}
			require.Len(t, counts, c.size)
			expected, chi := 200_000/float64(c.size), 0.0
			for _, n := range counts {
				chi += (float64(n) - expected) * (float64(n) - expected) / expected
			}
			require.Less(t, chi, 2*float64(c.size))
		})
	}
}

func TestGenerateReadsShortSources(t *testing.T) {
	for _, encoding := range []string{"alphanumeric", "hex", "base64url"} {
		spec := complete(t, kind.Spec{Encoding: encoding})
		want, err := apikey.Kind{}.Generate(t.Context(), spec, seeded(1))
		require.NoError(t, err)
		got, err := apikey.Kind{}.Generate(t.Context(), spec, &source{Reader: iotest.OneByteReader(seeded(1))})
		require.NoError(t, err)
		require.True(t, want.Same(got), "byte by byte it is the same randomness")
	}
}

func TestGenerateGivesNothingWhenTheSourceFails(t *testing.T) {
	gone := errors.New("entropy device gone")
	for _, encoding := range []string{"alphanumeric", "hex", "base64url"} {
		spec := complete(t, kind.Spec{Role: "app", Encoding: encoding, Prefix: "sk_"})
		for _, given := range []int{0, 1, 15} {
			t.Run(fmt.Sprintf("%s after %d bytes", encoding, given), func(t *testing.T) {
				src := io.MultiReader(strings.NewReader(strings.Repeat("k", given)), iotest.ErrReader(gone))
				got, err := apikey.Kind{}.Generate(t.Context(), spec, &source{Reader: src})
				require.ErrorIs(t, err, gone)
				require.ErrorContains(t, err, `"app"`)
				require.False(t, kind.IsDefinite(err), "trying again may help")
				require.True(t, got.Zero())
			})
		}
		_, err := apikey.Kind{}.Generate(t.Context(), spec, &source{Reader: strings.NewReader("short")})
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	}
}

func TestGenerateRefusesASpecThatWasNotCompleted(t *testing.T) {
	got, err := apikey.Kind{}.Generate(t.Context(), kind.Spec{Prefix: "sk_"}, seeded(1))
	require.Error(t, err)
	require.True(t, kind.IsDefinite(err))
	require.True(t, got.Zero(), "a prefix is no secret")
}

func TestGenerateFromPolicy(t *testing.T) {
	spec := complete(t, kind.Spec{PasswordPolicy: "keys", Prefix: "sk_"})
	src := &source{Reader: iotest.ErrReader(errors.New("not to be read")), made: "p0l!cy made"}
	got, err := apikey.Kind{}.Generate(t.Context(), spec, src)
	require.NoError(t, err)
	require.Equal(t, "keys", src.policy)
	require.Equal(t, "sk_p0l!cy made", got.Secret)
}

func TestGenerateRefusesBadPolicyResults(t *testing.T) {
	gone := errors.New("no such policy")
	spec := complete(t, kind.Spec{Role: "app", PasswordPolicy: "keys", Prefix: "sk_"})
	for name, c := range map[string]struct {
		src  *source
		says string
	}{
		"policy fails":           {&source{err: gone, made: "topsecret"}, "no such policy"},
		"empty":                  {&source{}, "empty"},
		"too large with prefix":  {&source{made: strings.Repeat("x", 32<<10-2)}, "32766 bytes"},
		"new line":               {&source{made: "topsecret\n"}, "printed"},
		"NUL":                    {&source{made: "topsecret\x00"}, "printed"},
		"zero width space":       {&source{made: "topsecret\u200b"}, "printed"},
		"not UTF-8":              {&source{made: "topsecret\xff"}, "printed"},
		"replacement is allowed": {&source{made: "\ufffd"}, ""},
		"largest":                {&source{made: strings.Repeat("x", 32<<10-3)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := apikey.Kind{}.Generate(t.Context(), spec, c.src)
			if c.says == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, `"keys"`)
			require.NotContains(t, err.Error(), "topsecret")
			require.True(t, got.Zero())
			require.Equal(t, c.src.err == nil, kind.IsDefinite(err), "a wrong policy stays wrong, a failed call may not")
		})
	}
}
