package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// Every part runs, in small, against what there is, and says something of everything that
// it compares. How fast anything is, is not looked at.
func TestEveryPart(t *testing.T) {
	if fromEnvironment().kube == "" {
		t.Skip("it takes minutes, and a Kubernetes: HARMONYFLOW_KUBE and HARMONYFLOW_ESO say where")
	}
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			b := &bench{sizes: tiny(), programs: fromEnvironment(), dir: openDir(t), say: t.Logf}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			r, err := p.run(ctx, b)
			require.NoError(t, err)
			if p.name == "restarts" && (b.kube == "" || b.eso == "") {
				require.Contains(t, strings.Join(r.notes, " "), "Left out")
				return
			}
			require.NotEmpty(t, r.tables)
			for _, table := range r.tables {
				require.NotEmpty(t, table.rows)
				for _, row := range table.rows {
					require.Len(t, row, len(table.head), "%v", row)
				}
			}
			require.NotEmpty(t, r.plots)
			for _, p := range r.plots {
				for _, l := range p.Lines {
					require.Len(t, l.Y, max(len(p.Labels), len(l.X)), p.Name)
					for _, v := range l.Y {
						require.False(t, math.IsNaN(v), "%s: %v", p.Name, l.Y)
						require.Positive(t, v, "%s: %v", p.Name, l.Y)
					}
				}
			}
			for _, target := range r.targets {
				if strings.Contains(target.what, "storage requests") || p.name == "restarts" {
					require.True(t, target.met, "it does not depend on the machine: %+v", target)
				}
			}
			r.part = p.name
			require.Contains(t, r.text(), r.tables[0].head[0])
		})
	}
}

// openDir is a folder that servers under other accounts find their files in.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bench-") //nolint:usetesting // that of t.TempDir lies in one that is root's alone
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o711))
	return dir
}

// What is made by copying is what the engine would have stored: it reads, verifies and
// rotates it.
func TestCopiesAreRoles(t *testing.T) {
	ctx := t.Context()
	b := &bench{sizes: tiny(), programs: fromEnvironment(), dir: openDir(t), say: t.Logf}
	m := &mountSize{roles: 20}
	require.NoError(t, b.seed(ctx, m))
	t.Cleanup(func() { require.NoError(t, m.stage.stop()) })
	s := m.stage
	// What counts what is stored has to count it anew.
	require.NoError(t, s.vault.Client().Sys().SealWithContext(ctx))
	require.NoError(t, s.vault.Unseal(ctx))
	require.NoError(t, await(ctx, "an unsealed vault", time.Minute, func() (bool, error) {
		status, err := s.read(ctx, "harmonyflow/status")
		return err == nil && status["roles"] == 20.0, err
	}))
	copied, err := s.read(ctx, "harmonyflow/creds/"+role(7))
	require.NoError(t, err)
	require.Equal(t, user(7), copied["username"])
	require.Equal(t, firstPassword(7), copied["password"])
	rotations, err := s.read(ctx, "harmonyflow/rotations")
	require.NoError(t, err)
	require.Len(t, rotations["keys"], 20)

	// Once its user is there, too.
	connection, err := s.read(ctx, "harmonyflow/connections/cache")
	require.NoError(t, err)
	addr := strings.Trim(strings.Split(fmt.Sprint(connection["addresses"]), " ")[0], "[]")
	redis := &servers.RedisNode{Addr: addr}
	_, err = redis.Do(ctx, "ACL", "SETUSER", user(7), "on", ">"+firstPassword(7), "~*", "+@all", "-@admin")
	require.NoError(t, err)
	_, err = s.write(ctx, "harmonyflow/rotate/redis/"+role(7), fields{})
	require.NoError(t, err)
	require.NoError(t, s.calm(ctx))
	now, err := s.read(ctx, "harmonyflow/creds/"+role(7))
	require.NoError(t, err)
	require.EqualValues(t, 2, now["version"])

	_, err = redis.Do(ctx, "ACL", "SETUSER", user(9), "on", ">"+firstPassword(9), "~*", "+@all", "-@admin")
	require.NoError(t, err)
	_, err = s.write(ctx, "harmonyflow/roles/other", fields{
		"kind": "redis", "connection": "cache", "username": user(9), "initial_password": firstPassword(9),
	})
	require.ErrorContains(t, err, "belongs to", "its user is claimed")
}

func TestDocument(t *testing.T) {
	dir := t.TempDir()
	document := filepath.Join(dir, "benchmarks.md")
	require.NoError(t, os.WriteFile(document, []byte("before\n<!-- begin reads -->\nold\n<!-- end reads -->\nafter\n"), 0o600))
	plotter := filepath.Join(dir, "plot")
	require.NoError(t, os.WriteFile(plotter, []byte("#!/bin/sh\ncat >\"$1\"\n"), 0o700))
	b := &bench{programs: programs{plot: plotter}}
	r := &result{part: "reads", took: time.Minute, plots: []plot{{Name: "reads", Title: "A read", Lines: []line{{}}}}}
	r.plots[0].Lines[0].add(series{1, 2, 4})
	r.most("p50", series{0.5, 0.4, 0.6}, 0.55)
	r.least("rate", series{1.7}, 1.8)
	r.least("nothing", nil, 1)
	require.Equal(t, 1, r.missed())
	require.NoError(t, b.write(t.Context(), r, document))
	text, err := os.ReadFile(document)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(text), "before\n<!-- begin reads -->\n"))
	require.True(t, strings.HasSuffix(string(text), "<!-- end reads -->\nafter\n"))
	require.NotContains(t, string(text), "old")
	for _, row := range []string{
		"| p50 | at most 0.55 | 0.50 (0.40–0.60) | met |", "| rate | at least 1.80 | 1.70 (1.70–1.70) | **missed** |",
		"| nothing | at least 1.00 | not measured | not measured |", "![A read](benchmarks/reads.svg)",
	} {
		require.Contains(t, string(text), row)
	}
	drawn, err := os.ReadFile(filepath.Join(dir, "benchmarks", "reads.svg"))
	require.NoError(t, err)
	var p plot
	require.NoError(t, json.Unmarshal(drawn, &p))
	require.Equal(t, []float64{2}, p.Lines[0].Y)
	r.part = "scale"
	require.ErrorContains(t, b.write(t.Context(), r, document), "no place")
}

func TestSeries(t *testing.T) {
	require.InDelta(t, 2.5, series{4, 1, 2, 3}.median(), 0)
	require.Equal(t, series{2, 0.5}, series{4, 1}.over(series{2, 2}))
	require.True(t, math.IsNaN(quantile(nil, 0.5)))
	require.InDelta(t, 9.9, quantile([]float64{0, 10}, 0.99), 1e-9)
	var order []int
	require.NoError(t, turns(3, 3, func(_, which int) error { order = append(order, which); return nil }))
	require.Equal(t, []int{0, 1, 2, 1, 2, 0, 2, 0, 1}, order)
}
