package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write what the demo prints into README.md")

const readme = "../../README.md"

// transcriptBlock is the first code block of the README.
var transcriptBlock = regexp.MustCompile("(?s)```text\n(.*?)```\n")

// TestREADMEShowsTheDemo plays the demo, which proves itself, and holds the
// README to what it prints.
func TestREADMEShowsTheDemo(t *testing.T) {
	require.True(t, haveRedis(), "redis-server is missing: make test installs it, or says what to install")
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	var out bytes.Buffer
	s := newScreen(&out)
	require.NoError(t, play(t.Context(), s), "the demo printed:\n%s", &out)

	left, err := filepath.Glob(filepath.Join(temporary, "harmonyflow-demo-*"))
	require.NoError(t, err)
	require.Empty(t, left, "the demo left files behind")

	text, err := os.ReadFile(readme)
	require.NoError(t, err)
	if *update {
		first := transcriptBlock.FindIndex(text)
		require.NotNil(t, first)
		text = slices.Concat(text[:first[0]], []byte("```text\n"+s.transcript()+"```\n"), text[first[1]:])
		require.NoError(t, os.WriteFile(readme, text, 0o600))
	}
	block := transcriptBlock.FindSubmatch(text)
	require.NotNil(t, block, "README.md has no ```text block")
	require.Equal(t, normalise(s.transcript()), normalise(string(block[1])),
		"README.md does not show what the demo prints; go test ./scripts/demo -update writes it there")
}

// varying is what no two runs have in common, with a name for each. Where
// equal values have to stay equal, the name is numbered by first appearance.
var varying = []struct {
	pattern  *regexp.Regexp
	name     string
	numbered bool
}{
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "ID", true},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "ADDRESS", true},
	{regexp.MustCompile(`[A-Za-z0-9]{4}…`), "SECRET", true},
	{regexp.MustCompile(`(Vault|Redis) \d+\.\d+\.\d+\S*`), "VERSION", false},
	{regexp.MustCompile(`kill -9 \d+`), "KILL", false},
	{regexp.MustCompile(`\d+\.\d s +[\d,]+ `), "TIME AND COUNT ", false},
	{regexp.MustCompile(`\d+ s after the crash`), "TIME after the crash", false},
	{regexp.MustCompile(`logins tried +[\d,]+`), "logins tried COUNT", false},
	{regexp.MustCompile(` +`), " ", false}, // columns are as wide as what varies
}

func normalise(transcript string) string {
	for _, v := range varying {
		seen := map[string]string{}
		transcript = v.pattern.ReplaceAllStringFunc(transcript, func(value string) string {
			if !v.numbered {
				return v.name
			}
			if seen[value] == "" {
				seen[value] = v.name + strconv.Itoa(len(seen)+1)
			}
			return seen[value]
		})
	}
	return transcript
}

func TestSecretsAreShortened(t *testing.T) {
	shown := hide("password             abcdefgh\nprevious_password    12345678\nusername             app\n")
	require.Equal(t, "password             abcd…\nprevious_password    1234…\nusername             app\n", shown)
}

func TestCommandsAreBrokenIntoLines(t *testing.T) {
	s := newScreen(&bytes.Buffer{})
	s.command("vault", "write", strings.Repeat("x", 90), "reason=two words", `waves=[{"a":1}]`)
	require.Equal(t, "   $ vault write \\\n        "+strings.Repeat("x", 90)+" \\\n        reason=\"two words\" waves='[{\"a\":1}]'\n", s.transcript())
}

// refusing refuses every version after the first.
type refusing struct{}

func (refusing) places() int  { return 2 }
func (refusing) noun() string { return "node" }
func (refusing) login(_ context.Context, _ int, c credential) error {
	if c.Version > 1 {
		return errRefused
	}
	return nil
}

// TestARefusedLoginIsNoticed: a demo that cannot fail would prove nothing.
func TestARefusedLoginIsNoticed(t *testing.T) {
	var served atomic.Int64
	served.Store(1)
	p, err := startPool(t.Context(), refusing{}, func(context.Context) (credential, error) {
		return credential{Secret: "s", Version: served.Load()}, nil
	})
	require.NoError(t, err)
	defer p.stop()
	require.NoError(t, p.moved(t.Context(), 1))
	served.Store(2)
	require.ErrorIs(t, p.moved(t.Context(), 2), errRefused)
	require.ErrorContains(t, p.verdict(), "with version 2")

	show := &performance{stage: &stage{screen: newScreen(&bytes.Buffer{}), target: refusing{}}}
	require.Error(t, show.accepted(t.Context(), credential{Version: 2}, true), "refused, and should be accepted")
	require.Error(t, show.accepted(t.Context(), credential{Version: 1}, false), "accepted, and should be refused")
}
