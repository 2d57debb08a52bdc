package approle

import (
	"context"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

type source struct{}

func (source) Read(p []byte) (int, error) { return rand.Read(p) }

func (source) FromPolicy(context.Context, string) (string, error) { panic("there is no policy") }

func TestKind(t *testing.T) {
	t.Parallel()
	spec := kind.Spec{Username: "a-role-id", Strategy: kind.Swap}
	require.NoError(t, Kind{}.Complete(&spec))
	require.Equal(t, kind.Overlap, spec.Strategy)
	require.Empty(t, Kind{}.Fields())
	one, err := Kind{}.Generate(t.Context(), spec, source{})
	require.NoError(t, err)
	require.Equal(t, "a-role-id", one.Username)
	require.Regexp(t, `^[A-Za-z0-9]{40}$`, one.Secret)
	two, err := Kind{}.Generate(t.Context(), spec, source{})
	require.NoError(t, err)
	require.False(t, one.Same(two))
	for secret, says := range map[string]string{
		"": "is empty", "with a space": "holds a space", "with-a-line\n": "does not end with a new line", strings.Repeat("x", 5000): "has 5000 bytes",
	} {
		require.ErrorContains(t, Kind{}.CheckInitial(spec, secret), says)
	}
	require.NoError(t, Kind{}.CheckInitial(spec, one.Secret))
}
