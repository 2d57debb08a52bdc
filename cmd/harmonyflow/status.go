package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// lists are those of status, in the order in which they matter.
var lists = []string{"failed", "overdue", "drifted", "suspended", "unreadable", "running", "due"}

// status is one look. What needs somebody makes it fail, for scripts.
func (p *program) status(ctx context.Context) int {
	data, err := p.read(ctx, "status")
	if err != nil {
		return p.fail(err)
	}
	if p.o.format == "json" {
		p.line(data)
	} else {
		for _, line := range overview(data) {
			fmt.Fprintln(p.out, line)
		}
	}
	for _, in := range []string{"failed", "overdue", "drifted", "unreadable"} {
		if len(lines(data[in])) > 0 {
			return exitFailed
		}
	}
	return exitDone
}

func overview(data map[string]any) []string {
	out := []string{fmt.Sprint(data["summary"])}
	counts, _ := data["counts"].(map[string]any)
	for _, in := range lists {
		for _, role := range lines(data[in]) {
			out = append(out, fmt.Sprintf("  %-10s %s", in, role))
		}
		if shown := len(lines(data[in])); fmt.Sprint(counts[in]) != fmt.Sprint(shown) && counts[in] != nil {
			out = append(out, fmt.Sprintf("  %-10s first %d of %v", in, shown, counts[in]))
		}
	}
	if frozen, _ := data["frozen"].(bool); frozen {
		out = append(out, fmt.Sprintf("  frozen until %v: %v", data["frozen_until"], data["freeze_reason"]))
	}
	if next, _ := data["next"].(string); next != "" {
		out = append(out, "  next       "+next)
	}
	return out
}

// watch looks again and again, until it is interrupted.
func (p *program) watch(ctx context.Context) int {
	last, looked := "", false
	for {
		data, err := p.read(ctx, "status")
		switch {
		case ctx.Err() != nil:
			if p.screen != nil {
				p.screen.done()
			}
			return exitDone
		case err != nil && !looked:
			return p.fail(err)
		case err != nil && p.screen != nil:
			p.screen.draw([]string{last, "Vault does not answer: " + err.Error()})
		case err != nil:
		case p.o.format == "json":
			p.line(data)
		default:
			list := overview(data)
			if p.screen != nil {
				p.screen.draw(list)
			} else if list[0] != last {
				fmt.Fprintln(p.out, strings.Join(list, "\n"))
			}
			last = list[0]
		}
		looked = true
		select {
		case <-time.After(p.o.every):
		case <-ctx.Done():
		}
	}
}
