package report

import (
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
