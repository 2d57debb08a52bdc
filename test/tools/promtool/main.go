// Command promtool checks rule files and dashboards with Prometheus's own parser.
package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

func main() {
	bad := 0
	for _, file := range os.Args[1:] {
		n, errs := check(file)
		for _, err := range errs {
			fmt.Fprintf(os.Stderr, "%s: %v\n", file, err)
		}
		fmt.Printf("%s: %d expressions, %d wrong\n", file, n, len(errs))
		bad += len(errs)
	}
	if bad > 0 || len(os.Args) < 2 {
		os.Exit(1)
	}
}

func check(file string) (int, []error) {
	if !strings.HasSuffix(file, ".json") {
		groups, errs := rulefmt.ParseFile(file, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
		n := 0
		if groups != nil {
			for _, g := range groups.Groups {
				n += len(g.Rules)
			}
		}
		return n, errs
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, []error{err}
	}
	var board struct {
		Panels []struct {
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal(raw, &board); err != nil {
		return 0, []error{err}
	}
	n := 0
	var errs []error
	for _, p := range board.Panels {
		for _, t := range p.Targets {
			n++
			if _, err := parser.NewParser(parser.Options{}).ParseExpr(t.Expr); err != nil {
				errs = append(errs, fmt.Errorf("panel %q: %w", p.Title, err))
			}
		}
	}
	return n, errs
}
