package servers

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Program is a process that never outlives this one, for packages that start
// servers of their own.
type Program struct {
	proc *process
	dir  string
}

// StartProgram runs name with args in dir, where it appends its output to
// output.log. An env of nil is this program's own.
func StartProgram(dir string, env []string, name string, args ...string) (*Program, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of %s: %w", filepath.Base(name), err)
	}
	proc, err := startAs(dieWithParent(), env, dir, name, args...)
	if err != nil {
		return nil, err
	}
	return &Program{proc: proc, dir: dir}, nil
}

// Running says whether it has not ended.
func (p *Program) Running() bool { return p.proc.running() }

// Signal sends s, unless the program has ended.
func (p *Program) Signal(s syscall.Signal) error { return p.proc.signal(s) }

// End sends s and returns when the program is gone; one that ignores s for long
// is killed. Ending twice is fine.
func (p *Program) End(s syscall.Signal) error { return p.proc.end(s) }

// LastOutput is the end of what it has written, in one line.
func (p *Program) LastOutput() string {
	data, _ := os.ReadFile(filepath.Join(p.dir, "output.log"))
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], " / ")
}

// FreePort returns a loopback port that is free and stays this program's own.
func FreePort() (int, error) { return freePort() }
