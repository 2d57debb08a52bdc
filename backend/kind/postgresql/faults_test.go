package postgresql

import (
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

// Whichever message or answer is the last that gets through: a change happens as
// a whole or not at all, is never reported as done or refused for good when it
// is not known, and can be repeated; a login that was cut off was not refused.
func TestCutOffAnywhere(t *testing.T) {
	create(t, "cut-off", "secret-number-0")
	whole := targetOf(sharedEntry(t))
	secret := func(n int) string { return "secret-number-" + strings.Repeat("i", n) }
	number := 1
	mustChange(t, whole, only("cut-off", secret(number)))
	for way, sent := range map[string]bool{"messages": true, "answers": false} {
		landed, calls := 0, 0
		for after := 1; ; after++ {
			require.Less(t, after, 100)
			c := newCutter(t, shared(t).Addr, after, sent)
			e := sharedEntry(t)
			e.AddressMap = map[string]string{shared(t).Addr: c.Addr().String()}
			out := targetOf(e).Change(soon(t, 5*time.Second), []kind.Change{only("cut-off", secret(number+1))})[0]
			cut := c.end()
			err := out.Err
			if err == nil {
				err = out.Nodes[0].Err
			}
			require.False(t, kind.IsDefinite(err), "%v", err)

			accepts := probeOne(t, whole, "cut-off", secret(number), secret(number+1)).Accepts
			require.NotEqual(t, accepts[0], accepts[1], "one of both, after %d %s", after, way)
			calls++
			if err == nil {
				require.True(t, accepts[1], "after %d %s", after, way)
			}
			if accepts[1] {
				number++
			}
			if accepts[1] && err != nil {
				landed++
			}
			if !cut {
				require.NoError(t, err)
				break
			}
		}
		t.Logf("%d changes cut off at another of the %s: %d landed unheard, each as a whole", calls-1, way, landed)

		answered := 0
		for after := 1; ; after++ {
			require.Less(t, after, 100)
			c := newCutter(t, shared(t).Addr, after, sent)
			e := sharedEntry(t)
			e.AddressMap = map[string]string{shared(t).Addr: c.Addr().String()}
			a := targetOf(e).Probe(soon(t, 5*time.Second), []kind.Question{{
				User: kind.User{Role: "r", Username: "cut-off"}, Materials: []kind.Material{material("cut-off", "not-the-secret"), material("cut-off", secret(number))},
			}})[0]
			cut := c.end()
			if a.Err == nil && a.Nodes[0].Err == nil {
				require.Equal(t, []bool{false, true}, a.Nodes[0].Accepts, "after %d %s", after, way)
				require.Empty(t, a.Nodes[0].Problem)
				answered++
			}
			if !cut {
				require.Positive(t, answered)
				break
			}
		}
	}
}
