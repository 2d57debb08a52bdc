package main

import (
	"fmt"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// screen draws lines over those it drew before.
type screen struct {
	out   *os.File
	drawn []string
}

func (s *screen) draw(list []string) {
	width, height, err := term.GetSize(int(s.out.Fd()))
	if err != nil || width < 1 || height < 2 {
		width, height = 80, 24
	}
	list = list[:min(len(list), height-1)] // what has left the screen cannot be drawn over
	var b strings.Builder
	if n := len(s.drawn); n > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", n)
	}
	for _, line := range list {
		fmt.Fprintf(&b, "\x1b[2K%s\n", cut(line, width-1))
	}
	for range len(s.drawn) - len(list) {
		b.WriteString("\x1b[2K\n")
	}
	if n := len(s.drawn) - len(list); n > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", n)
	}
	fmt.Fprint(s.out, b.String())
	s.drawn = list
}

// add draws one more line than before.
func (s *screen) add(line string) { s.draw(append(s.drawn[:len(s.drawn):len(s.drawn)], line)) }

// done leaves what was drawn where it is.
func (s *screen) done() { s.drawn = nil }

// cut shortens a line to what fits, and takes out what would move the cursor.
func cut(line string, width int) string {
	line = bounded.Line(line)
	if utf8.RuneCountInString(line) <= width {
		return line
	}
	runes := []rune(line)
	return string(runes[:width-1]) + "…"
}
