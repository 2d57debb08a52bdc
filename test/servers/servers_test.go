package servers

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRedisKeepsWhatItSavedThroughAKill(t *testing.T) {
	ctx := t.Context()
	for name, opts := range map[string][]RedisOption{
		"config file":         {WithUsers("app on >one ~* +@all")},
		"acl file":            {WithACLFile(), WithUsers("app on >one ~* +@all")},
		"required password":   {WithRequirePass("one")},
		"no config file":      {WithoutConfigFile()},
		"replication account": {WithReplicationUser("repl", "one")},
	} {
		t.Run(name, func(t *testing.T) {
			n := Redis(t, opts...)
			_, err := n.Do(ctx, "PING")
			require.NoError(t, err)
			require.NoError(t, n.Restart(ctx))
			_, err = n.Do(ctx, "PING")
			require.NoError(t, err)
			require.NoError(t, n.Stop())
			_, err = n.Do(ctx, "PING")
			require.Error(t, err)
		})
	}
}

func TestRedisPauseAndResume(t *testing.T) {
	n := Redis(t)
	require.NoError(t, n.Pause())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := n.Do(ctx, "PING")
	require.Error(t, err)
	require.NoError(t, n.Resume())
	_, err = n.Do(t.Context(), "PING")
	require.NoError(t, err)
}

func TestReplicatedLogsInWithItsReplicationUser(t *testing.T) {
	set := RedisReplicated(t, 2, WithReplicationUser("repl", "one"))
	info, err := set.Nodes[0].Info(t.Context(), "replication")
	require.NoError(t, err)
	require.Equal(t, "2", info["connected_slaves"])
}

func TestClusterIsWhole(t *testing.T) {
	set := RedisCluster(t)
	require.Len(t, set.Addrs(), 6)
}

func TestProxyFaults(t *testing.T) {
	n := Redis(t, WithoutConfigFile())
	p, err := NewProxy(n.Addr)
	require.NoError(t, err)
	defer func() { require.NoError(t, p.Close()) }()

	const long, short = readyWithin, 200 * time.Millisecond
	stop := p.Capture()
	require.NoError(t, ping(p.Addr(), long))
	require.Contains(t, string(stop()), "PING")

	p.SetLatency(30*time.Millisecond, 30*time.Millisecond)
	before := time.Now()
	require.NoError(t, ping(p.Addr(), long))
	require.GreaterOrEqual(t, time.Since(before), 60*time.Millisecond)

	for name, fault := range map[string]func(){
		"blackhole":        func() { p.Blackhole(true) },
		"lost replies":     func() { p.LoseReplies(true) },
		"one lost reply":   func() { p.LoseReplyTo("ping") },
		"connections died": func() { p.Cut(true) },
	} {
		p.Heal()
		require.NoError(t, ping(p.Addr(), long))
		fault()
		require.Error(t, ping(p.Addr(), short), name)
	}
}

// A proxy for several cuts one of them off, on connections that are open, too.
func TestProxyIsolatesAnOwner(t *testing.T) {
	n := Redis(t, WithoutConfigFile())
	own := map[string]string{}
	var mu sync.Mutex
	p, err := NewOwnedProxy(n.Addr, func(client, _ net.Addr) string {
		mu.Lock()
		defer mu.Unlock()
		return own[client.String()]
	})
	require.NoError(t, err)
	defer func() { require.NoError(t, p.Close()) }()

	dial := func(owner string) net.Conn {
		t.Helper()
		// The owner is known before the proxy asks: its port is.
		port, err := freePort()
		require.NoError(t, err)
		mu.Lock()
		own[loopback(port)] = owner
		mu.Unlock()
		from := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}
		c, err := (&net.Dialer{LocalAddr: from, Timeout: readyWithin}).Dial("tcp", p.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	const long, short = readyWithin, 200 * time.Millisecond
	for _, silent := range []bool{false, true} {
		one, other := dial("one"), dial("other")
		require.NoError(t, pingOn(one, long))
		require.NoError(t, pingOn(other, long))
		p.Isolate("one", silent)
		for _, c := range []net.Conn{one, dial("one")} {
			err := pingOn(c, short)
			var timeout net.Error
			require.Error(t, err)
			require.Equal(t, silent, errors.As(err, &timeout) && timeout.Timeout(), "silent %t: %v", silent, err)
		}
		require.NoError(t, pingOn(other, long))
		require.NoError(t, pingOn(dial("other"), long))
		require.GreaterOrEqual(t, p.Rejoin(), 2)
		require.Zero(t, p.Rejoin())
		require.Error(t, pingOn(one, long), "a connection that has lost something does not go on")
		require.NoError(t, pingOn(dial("one"), long))
		require.NoError(t, pingOn(other, long))
	}
}

func ping(addr string, within time.Duration) error {
	deadline := time.Now().Add(within)
	c, err := net.DialTimeout("tcp", addr, within)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return pingOn(c, time.Until(deadline))
}

func pingOn(c net.Conn, within time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, len("+PONG\r\n")))
	return err
}

func TestPollKeepsTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		reason, tries := errors.New("still loading"), 0
		err := poll(ctx, func(ctx context.Context) error {
			tries++
			if tries < 3 {
				return reason
			}
			<-ctx.Done()
			return ctx.Err()
		})
		require.Equal(t, reason, err)
		require.Equal(t, 3, tries)

		tries = 0
		ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		require.Equal(t, reason, poll(ctx, func(context.Context) error { tries++; return reason }))
		require.Equal(t, 6, tries, "after 10, 20, 40, 80, 100 ms")
	})
}

// Several programs take ports at the same time, each from blocks of its own.
func TestPortsAreTakenOnce(t *testing.T) {
	var one, other portBlocks
	t.Cleanup(func() {
		for _, l := range slices.Concat(one.held, other.held) {
			_ = l.Close()
		}
	})
	taken := map[int]bool{}
	for range 2 * blockSize {
		for _, b := range []*portBlocks{&one, &other} {
			port, err := b.take()
			require.NoError(t, err)
			require.False(t, taken[port], port)
			require.Greater(t, port, firstPort)
			require.LessOrEqual(t, port, lastPort)
			taken[port] = true
		}
	}
}

// What macOS has instead of /proc finds the same processes.
func TestProcessesAreFoundWithPS(t *testing.T) {
	if _, err := exec.LookPath("ps"); err != nil {
		t.Skip("no ps")
	}
	sleep, err := exec.LookPath("sleep")
	require.NoError(t, err)
	program := filepath.Join(t.TempDir(), "a program")
	data, err := os.ReadFile(sleep)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(program, data, 0o700))
	child, err := startChild(exec.Command(program, "4711"))
	require.NoError(t, err)
	want := []processInfo{{pid: child.pid(), parent: os.Getpid()}}
	for name, list := range map[string]func(string) ([]processInfo, error){"processesOf": processesOf, "ps": listedProcessesOf} {
		found, err := list(program)
		require.NoError(t, err, name)
		require.Equal(t, want, found, name)
		found, err = list(program[:len(program)-1])
		require.NoError(t, err, name)
		require.Empty(t, found, name)
	}
	require.NoError(t, child.kill())
	found, err := listedProcessesOf(program)
	require.NoError(t, err)
	require.Empty(t, found)
}

func TestPostgresKeepsWhatItHasThroughAKill(t *testing.T) {
	ctx := t.Context()
	nodes := PostgresReplicated(t, 1, WithHBA("host all open 127.0.0.1/32 trust"))
	n, standby := nodes[0], nodes[1]
	require.NoError(t, n.Exec(ctx, "CREATE ROLE open LOGIN", "CREATE ROLE app LOGIN PASSWORD 'one'"))
	require.NoError(t, n.Kill())
	_, err := n.Text(ctx, "SELECT 1")
	require.Error(t, err)
	require.NoError(t, n.Start(ctx))
	require.NoError(t, WaitPostgresReplicating(ctx, nodes))
	for _, n := range nodes {
		c, err := n.Login(ctx, "app", "one")
		require.NoError(t, err)
		require.NoError(t, c.Close(ctx))
		_, err = n.Login(ctx, "app", "two")
		require.Error(t, err)
		c, err = n.Login(ctx, "open", "anything")
		require.NoError(t, err)
		require.NoError(t, c.Close(ctx))
	}
	require.NoError(t, standby.SetHBA(ctx))
	_, err = standby.Login(ctx, "open", "anything")
	require.Error(t, err)
	log, err := n.Log()
	require.NoError(t, err)
	require.Contains(t, string(log), "CREATE ROLE app LOGIN PASSWORD 'one'")

	require.NoError(t, n.Pause())
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = n.Text(short, "SELECT 1")
	require.Error(t, err)
	require.NoError(t, n.Resume())
	_, err = n.Text(ctx, "SELECT 1")
	require.NoError(t, err)
	require.NoError(t, n.Stop())
	_, err = n.Text(ctx, "SELECT 1")
	require.Error(t, err)
}
