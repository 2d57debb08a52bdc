package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
)

// result is what a part found.
type result struct {
	part    string
	took    time.Duration
	tables  []table
	targets []target
	plots   []plot
	notes   []string
}

type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// target is what was asked for, and what came of it.
type target struct {
	what, goal, found string
	met               bool
	// unknown: what it is compared with is not there.
	unknown bool
}

// plot is what test/tools/plot draws.
type plot struct {
	Name   string   `json:"name"` // of the file
	Title  string   `json:"title"`
	Y      string   `json:"y"`
	X      string   `json:"x,omitempty"`
	Log    bool     `json:"log,omitempty"`
	Labels []string `json:"labels,omitempty"` // of bars; without them, lines over x
	Lines  []line   `json:"lines"`
	Limit  *limit   `json:"limit,omitempty"`
}

type line struct {
	Name string    `json:"name"`
	X    []float64 `json:"x,omitempty"`
	Y    []float64 `json:"y"`
	Low  []float64 `json:"low,omitempty"`
	High []float64 `json:"high,omitempty"`
}

// limit is a target in a plot.
type limit struct {
	Name string  `json:"name"`
	Y    float64 `json:"y"`
}

func (l *line) add(s series) {
	l.Y, l.Low, l.High = append(l.Y, s.median()), append(l.Low, quantile(s, 0)), append(l.High, quantile(s, 1))
}

// most is a target that s is to stay at or below, least one that it is to reach.
func (r *result) most(what string, s series, goal float64) {
	r.targets = append(r.targets, target{what, "at most " + digits(goal), s.String(), s.median() <= goal, len(s) == 0})
}

func (r *result) least(what string, s series, goal float64) {
	r.targets = append(r.targets, target{what, "at least " + digits(goal), s.String(), s.median() >= goal, len(s) == 0})
}

func (r *result) missed() int {
	n := 0
	for _, t := range r.targets {
		if !t.met && !t.unknown {
			n++
		}
	}
	return n
}

func (r *result) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// all tables, targets last.
func (r *result) all() []table {
	t := table{head: []string{"target", "asked for", "found", ""}}
	for _, target := range r.targets {
		verdict := "met"
		switch {
		case target.unknown:
			verdict = "not measured"
		case !target.met:
			verdict = "**missed**"
		}
		t.add(target.what, target.goal, target.found, verdict)
	}
	if len(t.rows) == 0 {
		return r.tables
	}
	return append(r.tables[:len(r.tables):len(r.tables)], t)
}

// text is the result for a terminal.
func (r *result) text() string {
	var out strings.Builder
	fmt.Fprintf(&out, "\n%s\n", r.part)
	for _, t := range r.all() {
		out.WriteString("\n" + report.Text(t.head, t.rows))
	}
	for _, n := range r.notes {
		fmt.Fprintf(&out, "\n  %s\n", n)
	}
	return out.String()
}

// markdown is the result for the document.
func (r *result) markdown(files []string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "`make bench BENCH=%s`, %s, %s, in %s.\n", r.part, time.Now().UTC().Format("2 January 2006"), report.Machine(), r.took.Round(time.Second))
	for _, t := range r.all() {
		out.WriteString("\n" + report.Markdown(t.head, t.rows))
	}
	for _, n := range r.notes {
		fmt.Fprintf(&out, "\n%s\n", n)
	}
	for i, file := range files {
		fmt.Fprintf(&out, "\n![%s](%s)\n", r.plots[i].Title, file)
	}
	return out.String()
}

// write puts r between the marks that document has for it, and its plots beside.
func (b *bench) write(ctx context.Context, r *result, document string) error {
	old, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	var files []string
	for _, p := range r.plots {
		folder := strings.TrimSuffix(filepath.Base(document), filepath.Ext(document))
		name := filepath.Join(folder, p.Name+".svg")
		if err := b.draw(ctx, p, filepath.Join(filepath.Dir(document), name)); err != nil {
			return err
		}
		files = append(files, filepath.ToSlash(name))
	}
	text, err := report.Replace(string(old), r.part, r.markdown(files))
	if err != nil {
		return fmt.Errorf("%s: %w", document, err)
	}
	return os.WriteFile(document, []byte(text), 0o644)
}

// draw makes file of p.
func (b *bench) draw(ctx context.Context, p plot, file string) error {
	raw, err := json.Marshal(p)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	command := exec.CommandContext(ctx, b.plot, file)
	command.Stdin = bytes.NewReader(raw)
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("drawing %s: %w: %s", file, err, out)
	}
	return nil
}
