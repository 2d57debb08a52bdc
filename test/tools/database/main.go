// Command database does to Vault's database engine what the fault suite of this
// repository does to its own: one rotation for each operation on storage and on the
// server that it makes, with a fault at that operation, and then with a second one soon
// after it. It runs the engine's code in this process, on storage that fails, at a real Redis.
//
// It prints what became of the credential, as rows for docs/faults.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

func main() {
	log.SetFlags(0)
	server := flag.String("redis", "redis-server", "the program")
	atOnce := flag.Int("at-once", 400, "how many rotations; most of their time they wait")
	document := flag.String("document", "", "write the rows into this file, between its markers; without it they are printed")
	flag.Parse()
	if err := run(*server, *atOnce, *document); err != nil {
		log.Fatalf("database: %v", err)
	}
}

// outcome is what became of rotations.
type outcome struct {
	name                                        string
	trials, moment, lasting, lost, double, shut int
}

func (o *outcome) add(r result) {
	o.trials++
	for _, c := range []struct {
		is bool
		n  *int
	}{
		{r.refused > 0, &o.moment}, {r.lasting, &o.lasting}, {r.lost, &o.lost}, {r.passwords > 1, &o.double}, {r.shut, &o.shut},
	} {
		if c.is {
			*c.n++
		}
	}
}

func (o *outcome) row() string {
	return fmt.Sprintf("| %s | %d | %d | %d | %d | %d | %d |", o.name, o.trials, o.lost, o.lasting, o.moment, o.double, o.shut)
}

func run(program string, atOnce int, document string) error {
	ctx := context.Background()
	server, err := startRedis(ctx, program)
	if err != nil {
		return err
	}
	defer server.stop()
	var rows []string
	for _, what := range []scenario{staticRole, rootCredential} {
		clean, err := newTrial(server, what, nil).run(ctx)
		if err != nil {
			return fmt.Errorf("%s, without a fault: %w", what, err)
		}
		without := &outcome{name: what.String() + ", no fault"}
		without.add(clean)
		rows = append(rows, without.row())
		single, points, err := singles(ctx, server, what, clean.ops, atOnce)
		if err != nil {
			return err
		}
		rows = append(rows, single.row())
		log.Printf("%s: each fault at each operation was tried, %d rotations; next, a second fault soon after each", what, single.trials)
		pairs, err := pairsOf(ctx, server, what, points, atOnce)
		if err != nil {
			return err
		}
		rows = append(rows, pairs.row())
	}
	if document == "" {
		fmt.Println(strings.Join(rows, "\n"))
		return nil
	}
	return write(document, rows)
}

// singles tries each fault at each operation, and says how many operations each of
// those made until all was over.
func singles(ctx context.Context, server *redis, what scenario, ops []string, atOnce int) (*outcome, map[point]int, error) {
	out := &outcome{name: what.String() + ", one fault"}
	var all [][]point
	for at, op := range ops {
		for _, f := range faultsOf(op) {
			all = append(all, []point{{at, f}})
		}
	}
	results, err := tryAll(ctx, server, what, all, atOnce)
	if err != nil {
		return nil, nil, err
	}
	points := map[point]int{}
	for i, r := range results {
		out.add(r)
		points[all[i][0]] = len(r.ops)
	}
	return out, points, nil
}

// reach is how many operations after the first fault a second one is tried at.
const reach = 10

func pairsOf(ctx context.Context, server *redis, what scenario, points map[point]int, atOnce int) (*outcome, error) {
	out := &outcome{name: what.String() + ", two faults"}
	var all [][]point
	for p, ops := range points {
		for at := p.at + 1; at < min(ops, p.at+reach); at++ {
			for _, f := range []fault{fails, applied, crash} {
				all = append(all, []point{p, {at, f}})
			}
		}
	}
	slices.SortFunc(all, func(a, b []point) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	results, err := tryAll(ctx, server, what, all, atOnce)
	if err != nil {
		return nil, err
	}
	for _, r := range results {
		out.add(r)
	}
	return out, nil
}

func tryAll(ctx context.Context, server *redis, what scenario, all [][]point, atOnce int) ([]result, error) {
	out, errs := make([]result, len(all)), make([]error, len(all))
	room := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, points := range all {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			out[i], errs[i] = newTrial(server, what, points).run(ctx)
			if errs[i] != nil {
				errs[i] = fmt.Errorf("%s, %v: %w", what, points, errs[i])
			}
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

const begin, end = "<!-- begin database -->\n", "<!-- end database -->"

func write(document string, rows []string) error {
	raw, err := os.ReadFile(document) //nolint:gosec // the caller's
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(raw), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the markers", document)
	}
	head := "| | rotations | lost | refused until somebody acts | served but refused for a moment | rotated twice | earlier password refused at once |\n|---|---:|---:|---:|---:|---:|---:|\n"
	text := before + begin + "As of " + time.Now().UTC().Format(time.DateOnly) + ":\n\n" + head + strings.Join(rows, "\n") + "\n" + end + after
	return os.WriteFile(document, []byte(text), 0o644) //nolint:gosec // a document
}
