package postgresql

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// cutter forwards to a server until clients have sent so many messages, or the
// server so many answers, and then cuts every connection.
type cutter struct {
	net.Listener
	wg   sync.WaitGroup
	mu   sync.Mutex
	left int
	sent bool // messages are counted, not answers
	open map[net.Conn]bool
}

func newCutter(t testing.TB, server string, after int, sent bool) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := &cutter{Listener: l, left: after, sent: sent, open: map[net.Conn]bool{}}
	c.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			there, err := net.Dial("tcp", server)
			if err != nil || !c.hold(client, there) {
				_ = client.Close()
				continue
			}
			c.wg.Go(func() { c.pipe(there, client, c.sent) })
			c.wg.Go(func() { c.pipe(client, there, !c.sent) })
		}
	})
	return c
}

func (c *cutter) hold(conns ...net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range conns {
		if c.left <= 0 {
			_ = conn.Close()
		} else {
			c.open[conn] = true
		}
	}
	return c.left > 0
}

func (c *cutter) pipe(to, from net.Conn, counted bool) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if counted && !c.pass() {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// pass counts, and cuts everything at the end.
func (c *cutter) pass() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left--; c.left > 0 {
		return true
	}
	for conn := range c.open {
		_ = conn.Close()
	}
	return false
}

func (c *cutter) end() (cut bool) {
	_ = c.Close()
	c.mu.Lock()
	cut = c.left <= 0
	c.left = 0
	for conn := range c.open {
		_ = conn.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
	return cut
}

// through leads to the shared server by way of c.
func (c *cutter) through(t testing.TB) kind.Target {
	t.Helper()
	e := sharedEntry(t)
	e.AddressMap = map[string]string{shared(t).Addr: c.Addr().String()}
	return targetOf(e)
}

// cutOff does something with a server that is cut off after one message (or
// answer) more each time, until it is not.
func cutOff(t *testing.T, sent bool, do func(after int, c *cutter) (cut bool)) (calls int) {
	t.Helper()
	for after := 1; ; after++ {
		require.Less(t, after, 100)
		if !do(after, newCutter(t, shared(t).Addr, after, sent)) {
			return after
		}
	}
}

var ways = map[string]bool{"messages": true, "answers": false}

// Whichever message or answer is the last that gets through: a change happens as
// a whole or not at all, is never reported as done or refused for good when it
// is not known, and can be repeated.
func TestCutOffAnywhere(t *testing.T) {
	whole := targetOf(sharedEntry(t))
	secret := func(n int) string { return "secret-number-" + strings.Repeat("i", n) }
	for name, self := range map[string]bool{"cut-off": false, "cut-off-itself": true} {
		create(t, name, secret(1))
		number := 1
		for way, sent := range ways {
			landed := 0
			calls := cutOff(t, sent, func(after int, c *cutter) bool {
				wanted := only(name, secret(number+1))
				if self {
					wanted.Self = []kind.Material{material(name, secret(number)), material(name, secret(number+1))}
				}
				out := c.through(t).Change(soon(t, 5*time.Second), []kind.Change{wanted})[0]
				cut := c.end()
				err := out.Err
				if err == nil {
					err = out.Nodes[0].Err
				}
				require.False(t, kind.IsDefinite(err), "%v", err)
				accepts := probeOne(t, whole, name, secret(number), secret(number+1)).Accepts
				require.NotEqual(t, accepts[0], accepts[1], "one of both, after %d %s", after, way)
				require.True(t, err != nil || accepts[1], "after %d %s", after, way)
				if accepts[1] {
					number++
				}
				if accepts[1] && err != nil {
					landed++
				}
				require.True(t, cut || err == nil, "%v", err)
				return cut
			})
			t.Logf("%s: %d changes cut off at another of the %s: %d landed unheard, each as a whole", name, calls-1, way, landed)
		}
	}
}

// A login that was cut off was not refused.
func TestProbeCutOffAnywhere(t *testing.T) {
	create(t, "asked", "its-password")
	for way, sent := range ways {
		answered := 0
		cutOff(t, sent, func(after int, c *cutter) bool {
			a := c.through(t).Probe(soon(t, 5*time.Second), []kind.Question{{
				User: kind.User{Role: "r", Username: "asked"}, Materials: []kind.Material{material("asked", "not-the-secret"), material("asked", "its-password")},
			}})[0]
			cut := c.end()
			if a.Err == nil && a.Nodes[0].Err == nil {
				require.Equal(t, []bool{false, true}, a.Nodes[0].Accepts, "after %d %s", after, way)
				require.Empty(t, a.Nodes[0].Problem)
				answered++
			}
			return cut
		})
		require.Positive(t, answered)
	}
}

// A user is created with all that it is to be, or not at all.
func TestCreationCutOffAnywhere(t *testing.T) {
	whole := targetOf(sharedEntry(t))
	profile := []string{"CREATEDB", "LOGIN", `member of "pg_monitor"`, `setting search_path = "a, \"B c\""`, `setting work_mem = "5MB" in database "postgres"`}
	drop := func() error {
		return shared(t).Exec(context.WithoutCancel(t.Context()), `DROP ROLE IF EXISTS "cut off"`)
	}
	t.Cleanup(func() { require.NoError(t, drop()) })
	for way, sent := range ways {
		made := 0
		cutOff(t, sent, func(after int, c *cutter) bool {
			wanted := only("cut off", "its-first-password")
			wanted.Profile = profile
			out := c.through(t).Change(soon(t, 5*time.Second), []kind.Change{wanted})[0]
			cut := c.end()
			require.False(t, kind.IsDefinite(out.Err), "%v", out.Err)
			accepts := probeOne(t, whole, "cut off", "its-first-password").Accepts[0]
			if f := preflight(t, whole, "cut off"); accepts {
				require.Equal(t, profile, f.Profile, "after %d %s", after, way)
				made++
			} else {
				require.Empty(t, f.Profile, "after %d %s", after, way)
			}
			require.NoError(t, drop())
			return cut
		})
		require.Positive(t, made)
	}
}
