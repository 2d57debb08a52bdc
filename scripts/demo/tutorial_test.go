package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const tutorial = "../../docs/tutorial.md"

// codeBlock is a block of the tutorial that is pasted, or that shows what comes of it.
var codeBlock = regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```")

// printed is what a screen got so far.
type printed struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func (p *printed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case p.more <- struct{}{}:
	default:
	}
	return p.text.Write(b)
}

// line waits for the first line that begins so.
func (p *printed) line(ctx context.Context, begins string) (string, error) {
	for {
		p.mu.Lock()
		text := p.text.String()
		p.mu.Unlock()
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, begins) {
				return line, nil
			}
		}
		select {
		case <-p.more:
		case <-ctx.Done():
			return "", fmt.Errorf("make dev has printed no line with %q: %s", begins, text)
		}
	}
}

// TestTutorial starts what make dev starts, and pastes the blocks of the tutorial into a
// shell, after the line that make dev prints.
func TestTutorial(t *testing.T) {
	require.True(t, haveRedis(), "redis-server is missing: make test installs it, or says what to install")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out := &printed{more: make(chan struct{}, 1)}
	over := make(chan error, 1)
	playing, stop := context.WithCancel(ctx)
	go func() { over <- develop(playing, newScreen(out)) }()
	defer func() { stop(); require.NoError(t, <-over) }()
	export, err := out.line(ctx, "export ")
	require.NoError(t, err)
	_, err = out.line(ctx, "Vault's log is")
	require.NoError(t, err)

	text, err := os.ReadFile(tutorial)
	require.NoError(t, err)
	script := "set -euo pipefail\n" + export + "\n"
	var shown [][]string
	for _, block := range codeBlock.FindAllStringSubmatch(string(text), -1) {
		if block[1] == "sh" {
			script += fmt.Sprintf("printf '\\n=== %d\\n'\n%s", len(shown), block[2])
			shown = append(shown, nil)
			continue
		}
		require.NotEmpty(t, shown, "the tutorial shows what comes of nothing")
		shown[len(shown)-1] = strings.Split(strings.TrimSpace(block[2]), "\n")
	}
	require.Greater(t, len(shown), 7)
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Env = append(os.Environ(), "VAULT_CLI_NO_COLOR=1", "HOME="+t.TempDir())
	output, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", output)
	parts := regexp.MustCompile(`(?m)^=== \d+\n`).Split(string(output), -1)[1:]
	require.Len(t, parts, len(shown))
	for i, lines := range shown {
		for _, line := range lines {
			pattern := regexp.MustCompile(`\s+`).ReplaceAllString(regexp.QuoteMeta(line), `\s+`)
			pattern = `(?m)^\s*` + strings.ReplaceAll(pattern, "…", `\S+`) + `\s*$`
			require.Regexp(t, pattern, parts[i], "block %d of the tutorial shows %q", i+1, line)
		}
	}
}
