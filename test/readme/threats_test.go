package readme

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const threatModel = "docs/threat-model.md"

var namedTest = regexp.MustCompile("`((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)`")

// TestThreatModel looks up each test that is said to show a protection.
func TestThreatModel(t *testing.T) {
	tests := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, declared := range file.Decls {
			if f, ok := declared.(*ast.FuncDecl); ok && f.Recv == nil {
				tests[f.Name.Name] = true
			}
		}
		return nil
	})
	require.NoError(t, err)
	text, err := os.ReadFile(root + threatModel)
	require.NoError(t, err)
	named := namedTest.FindAllStringSubmatch(string(text), -1)
	require.Greater(t, len(named), 50)
	for _, m := range named {
		if !tests[m[1]] {
			t.Errorf("%s names %s, and there is no such test", threatModel, m[1])
		}
	}
}
