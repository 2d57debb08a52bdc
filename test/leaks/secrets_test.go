package leaks

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestShapes: the search finds a secret wherever something else surrounds it.
func TestShapes(t *testing.T) {
	const secret = `p@ss w/ord+&"q"`
	for before := range 6 {
		text := strings.Repeat("x", before) + secret + "and more"
		held := func(encoded string) bool {
			for _, shape := range Shapes(secret) {
				if strings.Contains(encoded, shape) {
					return true
				}
			}
			return false
		}
		require.True(t, held(text))
		require.True(t, held(base64.StdEncoding.EncodeToString([]byte(text))), before)
		require.True(t, held(base64.RawURLEncoding.EncodeToString([]byte(text))), before)
		require.True(t, held(hex.EncodeToString([]byte(text))))
		require.True(t, held(url.Values{"k": {text}}.Encode()))
		require.True(t, held(fmt.Sprintf("%q", text)))
		require.False(t, held("something else entirely"))
	}
}

// TestLeaked: what was seen before a secret was known counts as well.
func TestLeaked(t *testing.T) {
	t.Cleanup(func() { clear(secrets.planted); clear(secrets.seen) })
	Look("an error", "could not log in with a-planted-password")
	Look("a log", "nothing of interest, and short")
	Plant("a word", "short")
	require.NoError(t, Leaked())
	Plant("the password of app", "a-planted-password")
	require.ErrorContains(t, Leaked(), "an error holds a secret (the password of app, plain)")
	require.NotContains(t, Leaked().Error(), "a-planted-password")
}
