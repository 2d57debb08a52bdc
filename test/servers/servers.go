// Package servers starts private servers for tests and demonstrations: each on
// a free loopback port, with its files in a directory of its own, and never
// outliving the program that started it.
//
// Every server comes in two forms: a function that takes a testing.TB and
// cleans up after the test (Redis), and one that returns errors and leaves
// stopping to its caller (StartRedis).
package servers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// readyWithin bounds how long a server may take until it answers. It is long: a
// machine that is busy with other things starts six of them slowly, and no test
// waits for it where a server is well.
const readyWithin = time.Minute

// process is one running program, known by its process id alone.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has exited and was waited for
}

// start runs name with args. The kernel kills the program when its parent
// dies; because it watches the parent's thread and not the parent
// (golang/go#27505), one locked goroutine starts the program and waits for it.
func start(dir, name string, args ...string) (*process, error) {
	return startAs(dieWithParent(), nil, dir, name, args...)
}

// startAs is start with other attributes and, unless it is nil, another
// environment than this program's own.
func startAs(attributes *syscall.SysProcAttr, env []string, dir, name string, args ...string) (*process, error) {
	logFile, err := os.OpenFile(dir+"/output.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", name, err)
	}
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr, p.cmd.Env = dir, logFile, logFile, env
	p.cmd.SysProcAttr = attributes

	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		defer func() { _ = logFile.Close() }()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended is of no interest: tests kill servers
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

func (p *process) signal(s syscall.Signal) error {
	if !p.running() {
		return nil
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %s to process %d: %w", s, p.cmd.Process.Pid, err)
	}
	return nil
}

// end sends s, wakes the process in case it is paused, and waits for its exit.
// A process that ignores s for long is killed.
func (p *process) end(s syscall.Signal) error {
	if err := p.signal(s); err != nil {
		return err
	}
	if err := p.signal(syscall.SIGCONT); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(readyWithin):
	}
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// poll calls try until it succeeds, ctx ends, or readyWithin has passed, and
// returns the last error that time itself did not cause: what a server said
// before tells more than the call that was cut off at the end.
func poll(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	deadline, _ := ctx.Deadline()
	var last error
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := try(ctx)
		if err == nil {
			return nil
		}
		var fatal *fatalError
		if errors.As(err, &fatal) {
			return err
		}
		// A dial may see the deadline a moment before ctx does.
		if last == nil || ctx.Err() == nil && time.Now().Before(deadline) {
			last = err
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(pause):
		}
	}
}

// fatalError ends polling: waiting longer cannot help.
type fatalError struct{ error }

// The range lies below the ports that the kernel hands out for outgoing
// connections, so that a server finds its port free again after a restart, and
// leaves room for a second port 10000 above (the bus of a Redis cluster).
//
// Tests of several packages run at the same time, and while a server is down its
// port is free to anybody. So each program takes ports from blocks of its own,
// and holds a block by listening on its first port, which ends with the program.
const (
	firstPort = 15000
	lastPort  = 21999
	blockSize = 100
)

var ports = portBlocks{}

// portBlocks is what a program may still take ports from.
type portBlocks struct {
	mu   sync.Mutex
	held []net.Listener
	left []int // of the newest block
}

// take returns a port that no other program takes, and that this one did not
// take before.
func (b *portBlocks) take() (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.left) == 0 {
		if err := b.hold(); err != nil {
			return 0, err
		}
	}
	port := b.left[0]
	b.left = b.left[1:]
	return port, nil
}

// hold takes one more block.
func (b *portBlocks) hold() error {
	const blocks = (lastPort + 1 - firstPort) / blockSize
	for _, i := range rand.Perm(blocks) {
		first := firstPort + i*blockSize
		l, err := net.Listen("tcp", loopback(first))
		if err != nil {
			continue
		}
		b.held = append(b.held, l) // until the program ends
		for port := first + 1; port < first+blockSize; port++ {
			b.left = append(b.left, port)
		}
		return nil
	}
	return fmt.Errorf("every block of loopback ports from %d to %d is held; end other tests first", firstPort, lastPort)
}

// freePort returns a loopback port that is free, together with the one 10000
// above it, and stays this program's own.
func freePort() (int, error) {
	for {
		port, err := ports.take()
		if err != nil {
			return 0, err
		}
		if isFree(port) && isFree(port+10000) {
			return port, nil
		}
	}
}

func isFree(port int) bool {
	l, err := net.Listen("tcp", loopback(port))
	if err != nil {
		return false
	}
	return l.Close() == nil
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
