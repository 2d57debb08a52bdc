package main

import (
	"io"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// Much of what is shown was said by targets, by clusters, or by whoever wrote a reason.
// None of it is to move the cursor, name the window or look like a line of ours.

// harmless writes what a terminal prints, and nothing that it acts on.
type harmless struct{ io.Writer }

func (h harmless) Write(p []byte) (int, error) {
	lines := strings.Split(string(p), "\n")
	for i := range lines {
		lines[i] = strings.ReplaceAll(lines[i], "\t", "  ")
		lines[i] = bounded.Line(lines[i])
	}
	_, err := io.WriteString(h.Writer, strings.Join(lines, "\n"))
	return len(p), err
}

// clean has every text of an answer on one line.
func (p *program) clean(s *api.Secret) *api.Secret {
	if s != nil && p.o.format != "json" { // where they are written as JSON writes them
		s.Data, _ = oneLine(s.Data).(map[string]any)
	}
	return s
}

func oneLine(value any) any {
	switch v := value.(type) {
	case string:
		return bounded.Line(v)
	case []any:
		for i := range v {
			v[i] = oneLine(v[i])
		}
	case map[string]any:
		out := make(map[string]any, len(v))
		for key, inner := range v {
			out[bounded.Line(key)] = oneLine(inner)
		}
		return out
	}
	return value
}
