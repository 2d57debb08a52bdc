package report

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTables(t *testing.T) {
	head, rows := []string{"a", "b"}, [][]string{{"größer", "1"}, {"x", ""}}
	require.Equal(t, "  a       b\n  größer  1\n  x\n", Text(head, rows))
	require.Equal(t, "| a | b |\n|---|---|\n| größer | 1 |\n| x |  |\n", Markdown(head, rows))
}

func TestReplace(t *testing.T) {
	const document = "before\n<!-- begin part -->\nold\n<!-- end part -->\nafter\n"
	text, err := Replace(document, "part", "new\n")
	require.NoError(t, err)
	require.Equal(t, "before\n<!-- begin part -->\nnew\n<!-- end part -->\nafter\n", text)
	_, old, _, err := Between(document, "part")
	require.NoError(t, err)
	require.Equal(t, "old\n", old)
	_, err = Replace(document, "other", "new\n")
	require.ErrorContains(t, err, "no place")
}

func TestFigure(t *testing.T) {
	file := filepath.Join(t.TempDir(), "figures")
	t.Setenv("A_FILE", file)
	Figure(t, "A_FILE", "%d of %d", 2, 3)
	Figure(t, "A_FILE", "3 of 3")
	Figure(t, "NO_SUCH_FILE", "is only printed")
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "2 of 3\n3 of 3\n", string(text))
}
