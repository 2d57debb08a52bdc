package redis

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// mute takes connections at every loopback address, and never answers.
func mute(t *testing.T) (port string) {
	t.Helper()
	l, err := net.Listen("tcp4", "0.0.0.0:0") // every loopback address is what it is for
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	_, port, err = net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port
}

func loopbacks(n int, port string) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("127.0.%d.%d:%s", 1+i/250, 1+i%250, port)
	}
	return out
}

// Not parallel: it counts goroutines.
func TestDiscoveryIsBounded(t *testing.T) {
	e := direct(&servers.RedisNode{})
	port := mute(t)

	e.Redis.Addresses = loopbacks(maxNodes+1, port)
	began := time.Now()
	_, err := Verify(t.Context(), e)
	require.ErrorContains(t, err, "more than 1000 nodes")
	require.True(t, kind.IsDefinite(err))
	require.Less(t, time.Since(began), connectTimeout, "nobody was asked")

	e.Redis.Addresses = loopbacks(maxNodes, port)
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := Verify(ctx, e)
		require.Error(t, err) //nolint:testifylint // it is the last line
	}()
	most := 0
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		case <-time.After(10 * time.Millisecond):
			most = max(most, runtime.NumGoroutine()-before)
		}
	}
	require.Less(t, most, 10*maxParallel)
}

// What a server says of others is bounded like what was given.
func TestNamedNodesAreBounded(t *testing.T) {
	t.Parallel()
	f := &fleet{entry: direct(&servers.RedisNode{Addr: "127.0.0.1:1"})}
	require.Len(t, f.newNodes(loopbacks(600, "1"), false, false), 600)
	require.Empty(t, f.newNodes(loopbacks(600, "1"), false, false))
	require.False(t, f.full)
	require.Len(t, f.newNodes(loopbacks(1200, "1"), false, false), 400)
	require.True(t, f.full)
	require.Len(t, f.nodes, maxNodes)
}

// A server has the same run id by whatever address it is reached, and seeds are
// members as they are dialled.
func TestRunIDsTellServersApart(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t)
	p, err := servers.NewProxy(n.Addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	entry := func(addr string) *connection.Entry {
		e := direct(n)
		e.Redis.Addresses = []string{addr}
		info, err := Verify(limited(t), e)
		require.NoError(t, err)
		require.Len(t, info.RunIDs, 1)
		require.Contains(t, info.Members, addr)
		e.Identity, e.Members, e.RunIDs = info.Identity, info.Members, info.RunIDs
		return e
	}
	_, port, _ := net.SplitHostPort(n.Addr)
	first, second := entry(n.Addr), entry(p.Addr())
	require.NotEqual(t, first.Identity, second.Identity)
	require.True(t, first.Overlaps(second))
	second.Recognize([]*connection.Entry{first})
	require.Equal(t, first.Identity, second.Identity)
	require.Equal(t, first.Identity, entry("localhost:"+port).Identity, "a name is no other server")

	require.NoError(t, n.Restart(t.Context()))
	require.False(t, entry(p.Addr()).Overlaps(first), "a run id ends with its process")
}
