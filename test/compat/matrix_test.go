// Package compat runs one scenario on versions of Vault that can be built from
// published modules, with the plugin built with several versions of Vault's sdk, and a
// Redis that keeps its users in each of the ways that there are. `make compat` writes
// what it finds into docs/compatibility.md.
package compat

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const root = "../../"

// host is a Vault that the plugin is put into.
type host struct {
	minor  string
	module string // which pins it, below root
}

// hosts are the minor versions, oldest first. Each module pins the last release of its
// minor version that compiles with an sdk that was published. 1.20 has none.
var hosts = []host{
	{"1.17", "test/tools/vaults/v1.17"},
	{"1.18", "test/tools/vaults/v1.18"},
	{"1.19", "test/tools/vaults/v1.19"},
	pinnedHost,
}

// pinnedHost is what all other tests run on.
var pinnedHost = host{"1.21", "test/tools/vault"}

// otherSDKs are versions of the sdk that the plugin is built with beside the one that
// its go.mod asks for: the oldest that it compiles with, and the newest that there is.
var otherSDKs = []string{"v0.17.0", "v0.25.1"}

// mode is how a Redis keeps its users.
type mode string

const (
	aclFile    mode = "ACL file"
	configFile mode = "configuration file"
	neither    mode = "neither"
)

var modes = []mode{aclFile, configFile, neither}

// cell is one combination.
type cell struct {
	host  host
	vault string // version
	sdk   string
	mode  mode
}

// name is what CELL of `make compat` selects by.
func (c cell) name() string {
	return fmt.Sprintf("vault-%s,sdk-%s,%s", c.vault, strings.TrimPrefix(c.sdk, "v"), strings.ReplaceAll(string(c.mode), " ", "-"))
}

// cells are the matrix: every host with the sdk of go.mod, every other sdk in the pinned
// host.
func cells() ([]cell, error) {
	sdk, err := required("go.mod", "github.com/hashicorp/vault/sdk")
	if err != nil {
		return nil, err
	}
	var out []cell
	add := func(h host, sdk string, modes ...mode) error {
		version, err := h.version()
		for _, m := range modes {
			out = append(out, cell{h, version, sdk, m})
		}
		return err
	}
	for _, h := range hosts {
		if err := add(h, sdk, modes...); err != nil {
			return nil, err
		}
	}
	for _, other := range otherSDKs {
		if err := add(pinnedHost, other, modes...); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// version is what the module of a host pins, without the v.
func (h host) version() (string, error) {
	version, err := required(filepath.Join(h.module, "go.mod"), "github.com/hashicorp/vault")
	return strings.TrimPrefix(version, "v"), err
}

// required is the version of a module that the go.mod at path, below root, asks for.
func required(path, module string) (string, error) {
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		return "", err
	}
	found := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(module) + ` (v\S+)`).FindSubmatch(text)
	if found == nil {
		return "", fmt.Errorf("%s does not require %s", path, module)
	}
	return string(found[1]), nil
}

// head is that of the table.
var head = []string{"Vault", "sdk", "users of Redis in", "", "rotations", "seconds", "run on"}

// columns are the ones that say which cell a row is of.
func (c cell) columns() []string {
	return []string{c.vault, strings.TrimPrefix(c.sdk, "v"), string(c.mode)}
}

// result is what became of a cell.
type result struct {
	cell
	outcome   string
	rotations int
	seconds   float64
	on        time.Time
}

const passed = "passed"

func (r result) row() []string {
	row := append(r.columns(), r.outcome, "", "", r.on.UTC().Format(time.DateOnly))
	if r.outcome == passed {
		row[4], row[5] = fmt.Sprint(r.rotations), fmt.Sprintf("%.0f", r.seconds)
	}
	return row
}

// rowsOf are those of a table in a document.
func rowsOf(text string) (rows [][]string) {
	for line := range strings.Lines(text) {
		row := strings.Split(strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "| "), " |"), " | ")
		if len(row) == len(head) && row[0] != head[0] {
			rows = append(rows, row)
		}
	}
	return rows
}

// merged are the rows of the matrix: new ones, and of the cells that were not run those
// that are there already.
func merged(all []cell, old, now [][]string) (rows [][]string) {
	for _, c := range all {
		is := func(row []string) bool { return slices.Equal(row[:3], c.columns()) }
		for _, from := range [][][]string{now, old} {
			if i := slices.IndexFunc(from, is); i >= 0 {
				rows = append(rows, from[i])
				break
			}
		}
	}
	return rows
}
