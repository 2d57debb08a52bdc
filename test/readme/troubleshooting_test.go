package readme

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const troubleshooting = "docs/troubleshooting.md"

var (
	tableRow = regexp.MustCompile(`(?m)^\| (.+?) \|`)
	codeSpan = regexp.MustCompile("`([^`]+)`")
	verb     = regexp.MustCompile(`%[-+# 0]*[0-9]*(\.[0-9]+)?[a-zA-Z]`)
)

// TestTroubleshooting looks up every error that the page quotes in the source: a
// sentence that was changed there has to be changed here.
func TestTroubleshooting(t *testing.T) {
	said := sentences(t)
	require.Greater(t, len(said), 1000)
	text, err := os.ReadFile(root + troubleshooting)
	require.NoError(t, err)
	quotes := 0
	for _, row := range tableRow.FindAllStringSubmatch(string(text), -1) {
		for _, span := range codeSpan.FindAllStringSubmatch(row[1], -1) {
			quotes++
			if !isSaid(said, span[1]) {
				t.Errorf("%s quotes what the engine does not say: %s", troubleshooting, span[1])
			}
		}
	}
	require.Greater(t, quotes, 60)
	for _, invented := range []string{"the moon is made of …", "no answer from the moon", "wai"} {
		require.False(t, isSaid(said, invented), invented)
	}
}

// isSaid reports whether a sentence of the source contains a quote, in which … stands
// for anything. A single word has to be one in the source.
func isSaid(said []string, quote string) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(quote), "…", ".*")
	if !strings.Contains(quote, " ") {
		pattern = "^" + pattern + "/?$"
	}
	like := regexp.MustCompile(pattern)
	for _, sentence := range said {
		if like.MatchString(sentence) {
			return true
		}
	}
	return false
}

// sentences are the string literals of the engine, with … for each verb; those that
// are added up are one.
func sentences(t *testing.T) (out []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "test" || d.Name() == "scripts" || d.Name() == "kindtest" || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir(), !strings.HasSuffix(path, ".go"), strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			expression, ok := n.(ast.Expr)
			if !ok {
				return true
			}
			text, ok := literal(expression)
			if ok {
				out = append(out, verb.ReplaceAllString(text, "…"))
			}
			return !ok
		})
		return nil
	})
	require.NoError(t, err)
	return out
}

// literal is the text of a string literal, or of several that are added up with …
// for what stands between them.
func literal(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, e.Kind == token.STRING && err == nil
	case *ast.BinaryExpr:
		left, fromLeft := literal(e.X)
		right, fromRight := literal(e.Y)
		if e.Op != token.ADD || !fromLeft && !fromRight {
			return "", false
		}
		if !fromLeft {
			left = "…"
		}
		if !fromRight {
			right = "…"
		}
		return left + right, true
	}
	return "", false
}
