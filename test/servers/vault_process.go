package servers

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// childProcess is a process that ends with this one.
type childProcess struct {
	command *exec.Cmd
	done    chan struct{} // closed when it has ended and was waited for
}

// startChild starts command so that it dies when this process does.
func startChild(command *exec.Cmd) (*childProcess, error) {
	command.SysProcAttr = dieWithParent()
	p := &childProcess{command: command, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The parent-death signal is sent when the thread that started the
		// child ends, so that thread must live as long (go.dev/issue/27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := command.Start()
		started <- err
		if err == nil {
			_ = command.Wait() // how it ended is in its log
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *childProcess) pid() int { return p.command.Process.Pid }

// kill ends the process as a crash does and returns when it is gone.
func (p *childProcess) kill() error {
	if err := p.command.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	return nil
}

// terminate asks the process to end, and kills it when it takes too long.
func (p *childProcess) terminate(patience time.Duration) error {
	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		return p.kill()
	}
}

type processInfo struct{ pid, parent int }

// processesOf lists the processes that run the program at path.
func processesOf(path string) ([]processInfo, error) {
	if !hasProc() {
		return listedProcessesOf(path)
	}
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return nil, err
	}
	var found []processInfo
	for _, link := range links {
		program, err := os.Readlink(link)
		if err != nil || strings.TrimSuffix(program, " (deleted)") != path {
			continue // gone, somebody else's, or another program
		}
		folder := filepath.Dir(link)
		pid, err := strconv.Atoi(filepath.Base(folder))
		if err != nil {
			return nil, err
		}
		state, parent, err := processStat(folder)
		if err == nil && state != "Z" {
			found = append(found, processInfo{pid: pid, parent: parent})
		}
	}
	return found, nil
}

// hasProc says whether /proc is what proc(5) describes: macOS has none.
func hasProc() bool {
	_, err := os.Readlink("/proc/self/exe")
	return err == nil
}

// listedProcessesOf is processesOf where there is no /proc. A program that was
// started by another name than its path is not found.
func listedProcessesOf(path string) ([]processInfo, error) {
	paths := []string{path}
	if real, err := filepath.EvalSymlinks(path); err == nil && real != path {
		paths = append(paths, real) // /var is a link on macOS
	}
	out, err := exec.Command("ps", "-axwwo", "pid=,ppid=,stat=,command=").Output()
	if err != nil {
		return nil, fmt.Errorf("listing processes with ps: %w", err)
	}
	var found []processInfo
	for line := range strings.Lines(string(out)) {
		var pid, parent int
		var state string
		if _, err := fmt.Sscan(line, &pid, &parent, &state); err != nil {
			return nil, fmt.Errorf("a line of ps: %q: %w", line, err)
		}
		_, command, _ := strings.Cut(line, state+" ")
		command = strings.TrimSpace(command) + " "
		runs := slices.ContainsFunc(paths, func(p string) bool { return strings.HasPrefix(command, p+" ") })
		if runs && !strings.HasPrefix(state, "Z") {
			found = append(found, processInfo{pid: pid, parent: parent})
		}
	}
	return found, nil
}

// processState is a letter, or an error when the process is gone.
func processState(pid int) (string, error) {
	if hasProc() {
		state, _, err := processStat(fmt.Sprintf("/proc/%d", pid))
		return state, err
	}
	out, err := exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return "", err
	}
	if state := strings.TrimSpace(string(out)); state != "" {
		return state[:1], nil
	}
	return "", os.ErrProcessDone
}

// processStat reads fields 3 and 4 of proc(5)'s stat. The name before them is
// in parentheses and may hold anything.
func processStat(folder string) (state string, parent int, err error) {
	stat, err := os.ReadFile(filepath.Join(folder, "stat"))
	if err != nil {
		return "", 0, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 2 {
		return "", 0, fmt.Errorf("%s/stat has no parent: %q", folder, stat)
	}
	parent, err = strconv.Atoi(fields[1])
	return fields[0], parent, err
}

// killAll sends SIGKILL to processes, which need not be our children, and
// returns when they are gone. Those that their parent has not waited for yet
// are gone too, unless reaped is asked for.
func killAll(pids []int, reaped bool) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("killing process %d: %w", pid, err)
		}
	}
	deadline := time.Now().Add(readyWithin)
	for _, pid := range pids {
		for {
			state, err := processState(pid)
			if err != nil || (state == "Z" && !reaped) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("process %d is still there %s after SIGKILL", pid, readyWithin)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}
