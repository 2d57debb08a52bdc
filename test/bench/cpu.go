package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of times in /proc, which Linux has fixed (USER_HZ).
const clockTick = time.Second / 100

// processorTime is how long Vault and its plugins have had a processor. A machine that is
// busy with other things makes everything slow, and leaves this as it is.
func (s *stage) processorTime() (time.Duration, error) {
	vault := s.vault.PID()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	var total time.Duration
	for _, file := range stats {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything; see proc(5).
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 13 || filepath.Base(filepath.Dir(file)) != strconv.Itoa(vault) && fields[1] != strconv.Itoa(vault) {
			continue
		}
		for _, field := range fields[11:13] { // utime, stime
			ticks, err := strconv.Atoi(field)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", file, err)
			}
			total += time.Duration(ticks) * clockTick
		}
	}
	return total, nil
}
