package kind_test

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func TestCompleteRing(t *testing.T) {
	var spec kind.Spec
	require.NoError(t, kind.CompleteRing("jwt", &spec))
	require.Equal(t, kind.Spec{Strategy: kind.KeyRing, PropagationDelay: 5 * time.Minute}, spec)
	for _, delay := range []time.Duration{time.Second, 24 * time.Hour} {
		require.NoError(t, kind.CompleteRing("jwt", &kind.Spec{PropagationDelay: delay}))
	}
	for _, delay := range []time.Duration{-1, time.Second - 1, 24*time.Hour + 1} {
		require.ErrorContains(t, kind.CompleteRing("jwt", &kind.Spec{PropagationDelay: delay}), "1s to 24h are allowed")
	}
	err := kind.CompleteRing("jwt", &kind.Spec{Strategy: kind.Overlap})
	require.ErrorContains(t, err, `strategy is "overlap"`)
	require.ErrorContains(t, err, "kind jwt allow key-ring")
}

func TestRandomKeyID(t *testing.T) {
	src := rand.NewChaCha8([32]byte{1})
	seen := map[string]bool{}
	for range 1000 {
		id, err := kind.RandomKeyID(src)
		require.NoError(t, err)
		require.Regexp(t, `^[0-9a-f]{16}$`, id)
		seen[id] = true
	}
	require.Len(t, seen, 1000)
	gone := errors.New("entropy device gone")
	_, err := kind.RandomKeyID(iotest.ErrReader(gone))
	require.ErrorIs(t, err, gone)
}
