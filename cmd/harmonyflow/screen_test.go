package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// What is drawn covers what was drawn before, and nothing in it moves the cursor.
func TestScreen(t *testing.T) {
	t.Parallel()
	file, err := os.Create(filepath.Join(t.TempDir(), "out")) // no terminal: 80 columns are taken
	require.NoError(t, err)
	defer func() { require.NoError(t, file.Close()) }()
	s := &screen{out: file}
	s.draw([]string{"one", "two"})
	s.draw([]string{"three\x1b[2J"})
	s.add("four")
	raw, err := os.ReadFile(file.Name())
	require.NoError(t, err)
	require.Equal(t, "\x1b[2Kone\n\x1b[2Ktwo\n"+
		"\x1b[2A\x1b[2Kthree?[2J\n\x1b[2K\n\x1b[1A"+
		"\x1b[1A\x1b[2Kthree?[2J\n\x1b[2Kfour\n", string(raw))
	require.Equal(t, "ab…", cut("abcdef", 3))
}

// A rotation of many roles shows those that are worth a look.
func TestProgress(t *testing.T) {
	t.Parallel()
	roles := map[string]any{"z-bad": map[string]any{"kind": "redis", "state": "rolling_back", "phase": "publish", "error": "why"}}
	for i := range 30 {
		roles[string(rune('a'+i))] = map[string]any{"kind": "redis", "state": "completed", "version": 2}
	}
	out := progress(map[string]any{"rotation_id": "id", "state": "rolling_back", "roles": roles})
	require.Len(t, out, maxParts+2)
	require.Contains(t, out[1], "redis/z-bad")
	require.Contains(t, out[1], "▒▒▒▒▒░░░░░░ rolling_back (publish): why")
	require.Equal(t, "  and 11 more", out[len(out)-1])
	for state, code := range map[rotation.State]int{
		rotation.Completed: exitDone, rotation.InGrace: exitDone, rotation.Running: exitDone, rotation.Held: exitHeld,
		rotation.RolledBack: exitFailed, rotation.Failed: exitFailed, rotation.Partial: exitFailed, rotation.Cancelled: exitFailed,
	} {
		require.Equal(t, code, outcome(state), state)
	}
}
