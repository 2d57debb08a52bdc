package kind_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// every gives each byte value once, over and over.
type every struct{ next byte }

func (e *every) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.next
		e.next++
	}
	return len(p), nil
}

type always byte

func (a always) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(a)
	}
	return len(p), nil
}

func TestRandomStringHasNoFavourites(t *testing.T) {
	// 62 does not divide 256: without rejection the first 8 characters would
	// come 5 times in 256 bytes and the others 4 times.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	got, err := kind.RandomString(&every{}, 248, alphabet)
	require.NoError(t, err)
	for _, c := range alphabet {
		require.Equal(t, 4, strings.Count(got, string(c)), "character %q", c)
	}
}

func TestRandomStringKeepsToAlphabetAndLength(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		runes := rapid.SliceOfNDistinct(rapid.ByteRange(0, 127), 2, 128, rapid.ID[byte]).Draw(t, "alphabet")
		n := rapid.IntRange(1, 300).Draw(t, "n")
		seed := rapid.Uint8().Draw(t, "seed")
		src := rand.NewChaCha8([32]byte{seed})
		got, err := kind.RandomString(iotest.OneByteReader(src), n, string(runes))
		require.NoError(t, err)
		require.Len(t, got, n)
		require.Empty(t, strings.Trim(got, string(runes)))
	})
}

func TestRandomStringRefusesBadSources(t *testing.T) {
	gone := errors.New("entropy device gone")
	for name, c := range map[string]struct {
		src  io.Reader
		want error
	}{
		"fails at once":   {iotest.ErrReader(gone), gone},
		"fails half way":  {io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(gone)), gone},
		"ends too early":  {bytes.NewReader(make([]byte, 31)), io.ErrUnexpectedEOF},
		"empty":           {bytes.NewReader(nil), io.EOF},
		"nothing but 255": {always(255), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := kind.RandomString(c.src, 32, "abc")
			require.Error(t, err)
			require.Empty(t, got)
			if c.want != nil {
				require.ErrorIs(t, err, c.want)
			}
		})
	}
}

func TestRandomStringRefusesBadRequests(t *testing.T) {
	for name, c := range map[string]struct {
		n        int
		alphabet string
	}{
		"no characters":       {0, "ab"},
		"negative":            {-1, "ab"},
		"one letter":          {8, "a"},
		"no alphabet":         {8, ""},
		"letter twice":        {8, "aba"},
		"letter beyond ASCII": {8, "aé"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kind.RandomString(&every{}, c.n, c.alphabet)
			require.Error(t, err)
		})
	}
	_, err := kind.RandomBytes(&every{}, 0)
	require.Error(t, err)
}
