// Command bench measures the engine beside its neighbours, on real servers: what
// is compared takes turns in one run, so that a ratio does not depend on what
// else the machine did. `make bench` writes what it finds into docs/benchmarks.md.
//
//	main.go       flags, parts
//	result.go     tables, targets, plots, and how they get into the document
//	series.go     medians and ratios of rounds
//	cpu.go        how long servers had a processor
//	record.go     the engine in this process, and what it asks of storage
//	sizes.go      how much is measured
//	stage.go      servers and requests
//	reads.go      creds/ and data/ beside KV version 2
//	rotations.go  a thousand due roles beside Vault's database engine
//	scale.go      from ten roles to a hundred thousand
//	restarts.go   many secrets of one service
//	latency.go    one rotation
//	floor.go      what servers are sent, from a plain loop
//	floor/        a plugin that does the least that there is to do
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// part is one benchmark.
type part struct {
	name string
	run  func(context.Context, *bench) (*result, error)
}

var parts = []part{
	{"reads", reads},
	{"rotations", rotations},
	{"scale", scale},
	{"restarts", restarts},
	{"latency", latency},
}

// bench is what all parts share.
type bench struct {
	sizes
	programs
	dir   string // for files of servers, removed at the end
	notes []string
	say   func(format string, args ...any)
}

// programs are what benchmarks need beside the engine. A comparison whose program is
// missing is left out, and said to be.
type programs struct {
	kv        string // KV version 2 as an external plugin
	vaultFull string // a Vault with the database engine
	kube, eso string // Kubernetes and External Secrets
	plugin    string // instead of the one of this checkout
	plot      string
}

func fromEnvironment() programs {
	return programs{
		kv: os.Getenv("HARMONYFLOW_KV"), vaultFull: os.Getenv("HARMONYFLOW_VAULT_FULL"), kube: os.Getenv("HARMONYFLOW_KUBE"),
		eso: os.Getenv("HARMONYFLOW_ESO"), plugin: os.Getenv("HARMONYFLOW_PLUGIN"), plot: os.Getenv("HARMONYFLOW_PLOT"),
	}
}

func main() {
	only := flag.String("only", "", "a `part` of the benchmarks: "+names()+"; without it, all")
	small := flag.Bool("small", false, "sizes that show that it works, and measure nothing")
	document := flag.String("document", "", "`file` whose tables and plots are replaced")
	flag.Parse()
	if *only != "" && !slices.ContainsFunc(parts, func(p part) bool { return p.name == *only }) {
		fmt.Fprintf(os.Stderr, "there is no part %q; give one of %s\n", *only, names())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	s := full()
	if *small {
		s = tiny()
	}
	err := run(ctx, *only, s, *document)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func names() string {
	var out []string
	for _, p := range parts {
		out = append(out, p.name)
	}
	return strings.Join(out, ", ")
}

func run(ctx context.Context, only string, s sizes, document string) (err error) {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	// Servers under other accounts have files in it.
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{sizes: s, programs: fromEnvironment(), dir: dir}
	missed := 0
	for _, p := range parts {
		if only != "" && p.name != only {
			continue
		}
		began := time.Now()
		b.say = func(format string, args ...any) {
			fmt.Fprintf(os.Stderr, "%s %4.0f s: %s\n", p.name, time.Since(began).Seconds(), fmt.Sprintf(format, args...))
		}
		r, err := p.run(ctx, b)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		r.part, r.took = p.name, time.Since(began)
		fmt.Println(r.text())
		missed += r.missed()
		if document != "" {
			if err := b.write(ctx, r, document); err != nil {
				return err
			}
		}
	}
	if missed > 0 {
		fmt.Fprintf(os.Stderr, "targets that were missed: %d\n", missed)
	}
	return nil
}
