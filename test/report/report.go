// Package report prints what commands of this repository measure: a line, a table for a
// terminal, the same for a document, and the place that a document has for it.
package report

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"
)

// Figure prints a line that a test has found, and appends it to the file that a variable
// of the environment names: go test shows nothing of what passes, and make shows that.
func Figure(t testing.TB, variable, format string, args ...any) {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	fmt.Println(line)
	name := os.Getenv(variable)
	if name == "" {
		return
	}
	file, err := os.OpenFile(filepath.Clean(name), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintln(file, line)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
}

// Text is a table for a terminal: columns under each other, by two spaces to the right.
func Text(head []string, rows [][]string) string {
	all := append([][]string{head}, rows...)
	widths := make([]int, len(head))
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var out strings.Builder
	for _, row := range all {
		text := "  "
		for i, cell := range row {
			text += cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2)
		}
		out.WriteString(strings.TrimRight(text, " ") + "\n")
	}
	return out.String()
}

// Markdown is the table for a document.
func Markdown(head []string, rows [][]string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	for _, row := range rows {
		fmt.Fprintf(&out, "| %s |\n", strings.Join(row, " | "))
	}
	return out.String()
}

// Between returns what stands in a document between its marks for part, and what
// is before and after it, marks included.
func Between(document, part string) (before, text, after string, err error) {
	begin, end := "<!-- begin "+part+" -->\n", "<!-- end "+part+" -->"
	before, rest, ok := strings.Cut(document, begin)
	text, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return "", "", "", fmt.Errorf("it has no place between %q and %q", strings.TrimSpace(begin), end)
	}
	return before + begin, text, end + after, nil
}

// Replace puts text between the marks that a document has for part.
func Replace(document, part, text string) (string, error) {
	before, _, after, err := Between(document, part)
	if err != nil {
		return "", err
	}
	return before + text + after, nil
}

// Machine says what figures were measured on.
func Machine() string {
	s := fmt.Sprintf("%d cores", runtime.NumCPU())
	if cpu, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(cpu)) {
			if name, ok := strings.CutPrefix(l, "model name"); ok {
				s += " (" + strings.TrimSpace(strings.TrimLeft(name, "\t :")) + ")"
				break
			}
		}
	}
	return s + ", " + runtime.GOOS + ", " + runtime.Version()
}
