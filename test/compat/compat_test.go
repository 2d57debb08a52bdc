package compat

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
)

// part is the place of the table in the document.
const (
	document = root + "docs/compatibility.md"
	part     = "matrix"
)

// TestMatrix plays the scenario in every cell, and writes down what became of each. A
// version that cannot be built is a cell that fails, with the reason.
func TestMatrix(t *testing.T) {
	if os.Getenv("COMPAT") == "" {
		t.Skip("it takes minutes, and as many builds of Vault as there are hosts: make compat")
	}
	all, err := cells()
	require.NoError(t, err)
	b := newBuilds(t.TempDir())
	var rows [][]string
	for _, c := range all {
		t.Run(c.name(), func(t *testing.T) {
			r := result{cell: c, outcome: "**not built**", on: time.Now()}
			defer func() { rows = append(rows, r.row()) }()
			vault, err := b.vault(c.host)
			require.NoError(t, err)
			plugin, err := b.plugin(c.sdk)
			require.NoError(t, err)

			r.outcome, r.on = "**failed**", time.Now()
			r.rotations = play(t, c, vault, plugin)
			r.outcome, r.seconds = passed, time.Since(r.on).Seconds()
		})
	}
	require.NotEmpty(t, rows, "no cell has such a name; docs/compatibility.md shows which there are")
	fmt.Println("\n" + report.Text(head, rows))
	old, err := os.ReadFile(document)
	require.NoError(t, err)
	_, table, _, err := report.Between(string(old), part)
	require.NoError(t, err)
	text, err := report.Replace(string(old), part, report.Markdown(head, merged(all, rowsOf(table), rows)))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(document, []byte(text), 0o600)) // its mode stays as it is
}

// TestDocument: the table in the document is of this matrix, and everything in it has
// passed. Where it is not, make compat writes it anew.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile(document)
	require.NoError(t, err)
	_, table, _, err := report.Between(string(text), part)
	require.NoError(t, err)
	all, err := cells()
	require.NoError(t, err)
	var want, have [][]string
	for _, c := range all {
		want = append(want, append(c.columns(), passed))
	}
	for _, row := range rowsOf(table) {
		have = append(have, row[:4])
	}
	require.Equal(t, want, have, "the matrix has changed since make compat was run")
}

func TestMerged(t *testing.T) {
	cellOf := func(vault string) cell { return cell{vault: vault, sdk: "v1", mode: aclFile} }
	row := func(vault, outcome string) []string {
		return result{cell: cellOf(vault), outcome: outcome, rotations: 5, on: time.Unix(0, 0)}.row()
	}
	old := rowsOf(report.Markdown(head, [][]string{row("gone", passed), row("kept", passed), row("again", "**failed**")}))
	require.Len(t, old, 3)
	require.Equal(t, []string{"kept", "1", "ACL file", passed, "5", "0", "1970-01-01"}, old[1])
	now := [][]string{row("again", passed), row("new", "**not built**")}
	require.Equal(t, [][]string{row("kept", passed), row("again", passed), row("new", "**not built**")},
		merged([]cell{cellOf("kept"), cellOf("again"), cellOf("new"), cellOf("never")}, old, now))
}

// TestHosts: there is a module for every host, no other, and it pins what it is named
// for.
func TestHosts(t *testing.T) {
	folders, err := filepath.Glob(root + "test/tools/vaults/*")
	require.NoError(t, err)
	var have, want []string
	for _, f := range folders {
		have = append(have, "test/tools/vaults/"+filepath.Base(f))
	}
	for _, h := range hosts {
		version, err := h.version()
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(version, h.minor+"."), "%s pins %s", h.module, version)
		if h != pinnedHost {
			want = append(want, h.module)
		}
	}
	require.Equal(t, want, have)
}
