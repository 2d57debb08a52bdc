// Command dockerfile checks Dockerfiles with BuildKit's own parser and all rules of
// its linter. It builds nothing, and asks no registry.
package main

import (
	"bytes"
	"fmt"
	"os"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

func main() {
	bad := 0
	for _, file := range os.Args[1:] {
		n, problems := check(file)
		for _, problem := range problems {
			fmt.Fprintf(os.Stderr, "%s: %s\n", file, problem)
		}
		fmt.Printf("%s: %d instructions, %d problems\n", file, n, len(problems))
		bad += len(problems)
	}
	if bad > 0 || len(os.Args) < 2 {
		os.Exit(1)
	}
}

func check(file string) (n int, problems []string) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, []string{err.Error()}
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return 0, []string{err.Error()}
	}
	for _, w := range parsed.Warnings {
		problems = append(problems, w.Short)
	}
	stages, args, err := instructions.Parse(parsed.AST, linter.New(&linter.Config{
		ExperimentalAll: true,
		Warn: func(rule, _, url, message string, at []parser.Range) {
			line := 0
			if len(at) > 0 {
				line = at[0].Start.Line
			}
			problems = append(problems, fmt.Sprintf("line %d: %s: %s (%s)", line, rule, message, url))
		},
	}))
	if err != nil {
		problems = append(problems, err.Error())
	}
	n = len(args)
	for _, s := range stages {
		n += 1 + len(s.Commands)
	}
	return n, problems
}
