package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of times in /proc, which Linux has fixed (USER_HZ).
const clockTick = time.Second / 100

// Who has a processor in a benchmark.
const (
	byVault   = "Vault"
	byPlugins = "its plugins"
	byServers = "the server"
	byBench   = "the benchmark"
)

var everybody = []string{byVault, byPlugins, byServers, byBench}

// used is how long each of them has had a processor. A machine that is busy with other
// things makes everything slow, and leaves this as it is.
type used map[string]time.Duration

// process is what /proc says of one.
type process struct {
	parent int
	// own is its processor time, with that of its ended children.
	own time.Duration
}

// processors is what was used so far.
func (s *stage) processors() (used, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	self, vault := os.Getpid(), s.vault.PID()
	out := used{}
	for pid, p := range all {
		switch {
		case pid == self:
			out[byBench] += p.own
		case pid == vault:
			out[byVault] += p.own
		case p.parent == vault:
			out[byPlugins] += p.own
		case descends(all, pid, self):
			out[byServers] += p.own
		}
	}
	return out, nil
}

// processes are those that there are, without the time of children that this program
// itself had: those are builds, and servers that have ended.
func processes() (map[int]process, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	out := map[int]process{}
	for _, file := range stats {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything; see proc(5).
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 15 {
			continue
		}
		numbers := make([]int, 0, 6)
		for _, field := range append([]string{filepath.Base(filepath.Dir(file)), fields[1]}, fields[11:15]...) {
			n, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			numbers = append(numbers, n)
		}
		p := process{parent: numbers[1], own: time.Duration(numbers[2]+numbers[3]) * clockTick}
		if numbers[0] != os.Getpid() {
			p.own += time.Duration(numbers[4]+numbers[5]) * clockTick
		}
		out[numbers[0]] = p
	}
	return out, nil
}

func descends(all map[int]process, pid, from int) bool {
	for range len(all) {
		p, ok := all[pid]
		if !ok || pid == from {
			return ok
		}
		pid = p.parent
	}
	return false
}

// since is what was used after before.
func (u used) since(before used) used {
	out := maps.Clone(u)
	for who, d := range before {
		out[who] -= d
	}
	return out
}

// each is the time of who for one of n, in milliseconds.
func (u used) each(who string, n int) float64 { return milliseconds(u[who]) / float64(n) }

// busy is the part of all processors that they had together, in percent.
func (u used) busy(took time.Duration) float64 {
	var all time.Duration
	for _, d := range u {
		all += d
	}
	return 100 * float64(all) / float64(took) / float64(runtime.NumCPU())
}
