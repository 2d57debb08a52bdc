package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

const rootPassword = "root"

// redis is a server of this program's own.
type redis struct {
	host string
	port int
	dir  string
	cmd  *exec.Cmd
}

func startRedis(ctx context.Context, program string) (*redis, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return nil, err
	}
	r := &redis{host: "127.0.0.1", port: port, dir: dir}
	//nolint:gosec // the caller's program
	r.cmd = exec.CommandContext(ctx, program, "--port", fmt.Sprint(port), "--bind", r.host, "--save", "", "--dir", dir, "--requirepass", rootPassword)
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Redis: %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if r.accepts("default", rootPassword) {
			return r, nil
		}
		if time.Now().After(deadline) {
			r.stop()
			return nil, fmt.Errorf("redis did not answer in time")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (r *redis) stop() {
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait()
	_ = os.RemoveAll(r.dir)
}

// do sends lines over a connection of its own, and returns the last answer.
func (r *redis) do(lines ...string) (string, error) {
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", r.host, r.port), 10*time.Second)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	in, answer := bufio.NewReader(conn), ""
	for _, line := range lines {
		if _, err := fmt.Fprintf(conn, "%s\r\n", line); err != nil {
			return "", err
		}
		if answer, err = in.ReadString('\n'); err != nil {
			return "", err
		}
	}
	return strings.TrimSpace(answer), nil
}

// accepts reports whether a login is accepted. The server is there all the time.
func (r *redis) accepts(user, password string) bool {
	if password == "" {
		return false
	}
	answer, err := r.do("AUTH " + user + " " + password)
	return err == nil && answer == "+OK"
}

func (r *redis) user(name, password, rights string) error {
	answer, err := r.do("AUTH default "+rootPassword, "ACL SETUSER "+name+" on >"+password+" ~* &* "+rights)
	if err != nil || answer != "+OK" {
		return fmt.Errorf("make user %s: %s %w", name, answer, err)
	}
	return nil
}
