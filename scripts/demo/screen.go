package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"
)

// screen prints for people, in colour only on a terminal, and keeps the same
// text without colour.
type screen struct {
	mu       sync.Mutex
	out      io.Writer
	terminal bool
	plain    strings.Builder
	passing  bool // a passing line is on the terminal and not in the transcript
	passedAt time.Time
	scenes   int
}

const (
	bold  = "1"
	dim   = "2"
	green = "32"
	red   = "31"
	cyan  = "36"
)

func newScreen(out io.Writer) *screen {
	s := &screen{out: out}
	if f, ok := out.(*os.File); ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
		info, err := f.Stat()
		s.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return s
}

func (s *screen) transcript() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plain.String()
}

// print writes whole lines.
func (s *screen) print(style, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	for line := range strings.Lines(text + "\n") {
		line = strings.TrimRight(line, " \n")
		fmt.Fprintln(&s.plain, line)
		if s.terminal && style != "" && line != "" {
			line = "\x1b[" + style + "m" + line + "\x1b[0m"
		}
		fmt.Fprintln(s.out, line)
	}
}

func (s *screen) erase() {
	if s.passing {
		fmt.Fprint(s.out, "\r\x1b[K")
		s.passing = false
	}
}

// pass shows a line that the next one replaces, on a terminal only.
func (s *screen) pass(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.terminal && time.Since(s.passedAt) > 100*time.Millisecond {
		s.passedAt = time.Now()
		fmt.Fprintf(s.out, "\r\x1b[K\x1b["+dim+"m   "+format+"\x1b[0m", args...)
		s.passing = true
	}
}

func (s *screen) blank() { s.print("", "") }

// scene begins a numbered part of the story.
func (s *screen) scene(title string) {
	s.scenes++
	s.blank()
	s.print(bold, fmt.Sprintf("%d  %s", s.scenes, title))
	s.blank()
}

func (s *screen) say(format string, args ...any) {
	s.print("", indent(fmt.Sprintf(format, args...), "   "))
}

// command shows what a user types, broken into lines where it is long.
func (s *screen) command(words ...string) {
	const width = 100
	line, text := "   $", ""
	for _, w := range words {
		name, value, _ := strings.Cut(w, "=")
		switch { // as the shell wants it
		case strings.ContainsAny(w, `"{[`):
			w = name + "='" + value + "'"
		case strings.Contains(w, " "):
			w = name + `="` + value + `"`
		}
		if len(line)+1+len(w) > width {
			text += line + " \\\n"
			line = "       "
		}
		line += " " + w
	}
	s.print(cyan, text+line)
}

func (s *screen) output(text string) { s.print(dim, indent(text, "   ")) }

// check states something that was just seen to be true.
func (s *screen) check(format string, args ...any) {
	s.print(green, "   ✓ "+fmt.Sprintf(format, args...))
}

func (s *screen) failure(err error) {
	s.blank()
	s.print(red, indent("✗ not as claimed: "+hide(err.Error()), "   "))
}

func indent(text, by string) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return by + strings.Join(lines, "\n"+by)
}

// shown is how much of a secret is printed.
const shown = 4

func mask(secret string) string { return secret[:min(shown, len(secret))] + "…" }

var secretLine = regexp.MustCompile(`(?m)^((?:previous_)?(?:password|value) +)(\S{` + fmt.Sprint(shown) + `})\S+`)

// hide shortens the secrets that `vault read` prints.
func hide(output string) string { return secretLine.ReplaceAllString(output, "${1}${2}…") }

// pick keeps the lines of a table that begin with one of keys, in their order
// there.
func pick(output string, keys ...string) string {
	var kept []string
	for line := range strings.Lines(output) {
		for _, k := range keys {
			if rest, ok := strings.CutPrefix(line, k); ok && (strings.HasSuffix(k, " ") || strings.HasPrefix(rest, " ")) {
				kept = append(kept, strings.TrimRight(line, "\n"))
			}
		}
	}
	return strings.Join(kept, "\n")
}

// grouped prints 12345 as 12,345.
func grouped(n int64) string {
	digits := fmt.Sprint(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
