package redis

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// hears feeds text to what guards a connection, in pieces as r gives them.
func hears(r io.Reader) (replies, error) {
	got := replies{left: maxSession}
	p := make([]byte, 512)
	for {
		n, err := r.Read(p)
		if wrong := got.follow(p[:n]); wrong != nil {
			return got, wrong
		}
		if err != nil {
			return got, nil //nolint:nilerr // it is the end
		}
	}
}

// TestGuard: what redis says passes, however it is cut into pieces, and what would cost
// more than it sends does not.
func TestGuard(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]error{
		"+OK\r\n": nil, "-ERR no\r\n": nil, ":-12\r\n": nil, "$-1\r\n": nil, "*-1\r\n": nil, "*0\r\n": nil, "$0\r\n\r\n": nil,
		"$5\r\n*9\r\n\r\r\n":                                nil,
		"*3\r\n:1\r\n$2\r\nab\r\n*1\r\n+x\r\n+next\r\n":     nil,
		"+a\rb\r\n:1\r\n":                                   nil,
		strings.Repeat("*1\r\n", maxDepth) + ":1\r\n:2\r\n": nil,
		strings.Repeat("*1\r\n", maxDepth+1):                bounded.ErrTooMuch,
		"$99999999999\r\n":                                  bounded.ErrTooMuch,
		fmt.Sprintf("$%d\r\n", maxReply):                    bounded.ErrTooMuch,
		"*2147483647\r\n":                                   bounded.ErrTooMuch,
		"*1000000\r\n*1000000\r\n*1000000\r\n":              bounded.ErrTooMuch, // each is small enough
		"*1000000000000000000\r\n":                          bounded.ErrTooMuch,
		"$" + strings.Repeat("9", 30) + "\r\n":              errStrange,
		"$-2\r\n":                                           errStrange,
		"*x\r\n":                                            errStrange,
		"$\r\n":                                             errStrange,
		"%1\r\n+a\r\n+b\r\n":                                errStrange, // of the third version
		">2\r\n":                                            errStrange,
		"HTTP/1.1 400 Bad Request\r\n":                      errStrange,
	} {
		for way, r := range map[string]io.Reader{"whole": strings.NewReader(text), "in bytes": iotest.OneByteReader(strings.NewReader(text))} {
			got, err := hears(r)
			require.ErrorIs(t, err, want, "%.40q %s", text, way)
			if want == nil {
				require.NoError(t, err, text)
				require.Empty(t, got.open, "%q: it is over", text)
				require.Zero(t, got.reply, text)
			}
		}
	}
	_, err := hears(io.MultiReader(strings.NewReader("+"), io.LimitReader(forever("x"), maxReply+1)))
	require.ErrorIs(t, err, bounded.ErrTooMuch, "a line without an end")
	_, err = hears(io.LimitReader(forever("+OK\r\n"), 2*maxSession))
	require.ErrorIs(t, err, bounded.ErrTooMuch, "replies without an end")
}

// forever repeats itself.
type forever string

func (f forever) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = f[i%len(f)]
	}
	return len(p) / len(f) * len(f), nil
}

// TestHostileNode: a node that announces gigabytes, nests without end or never stops
// costs a bounded amount of memory, and an error that says what it does.
func TestHostileNode(t *testing.T) {
	for name, c := range map[string]struct {
		servers.Hostile
		says string
	}{
		"a text of ten terabytes":    {servers.Hostile{Begins: "$9999999999999\r\n"}, "more than is read"},
		"a list of two billion":      {servers.Hostile{Begins: "*2147483647\r\n"}, "more than is read"},
		"lists within lists":         {servers.Hostile{GoesOn: "*1\r\n"}, "more than is read"},
		"lists in lists, each large": {servers.Hostile{GoesOn: "*1000000\r\n"}, "more than is read"},
		"a line without an end":      {servers.Hostile{Begins: "+", GoesOn: "x"}, "more than is read"},
		"an error without an end":    {servers.Hostile{Begins: "-ERR ", GoesOn: "x"}, "more than is read"},
		"replies without an end":     {servers.Hostile{GoesOn: "+OK\r\n"}, ""},
		"another protocol":           {servers.Hostile{GoesOn: "HTTP/1.1 200 OK\r\n"}, "does not speak the protocol"},
		"pushed messages":            {servers.Hostile{GoesOn: ">2\r\n+a\r\n+b\r\n"}, "does not speak the protocol"},
		"a byte at a time":           {servers.Hostile{Begins: "-ERR unknown command 'HELLO'\r\n$1000\r\n", GoesOn: "x", Pause: 50 * time.Millisecond}, "did not answer"},
		"nothing":                    {servers.Hostile{}, "did not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &connection.Entry{
				Name: "cache", Redis: &connection.Redis{Addresses: []string{c.Start(t)}},
				Admin: connection.NewAdmin(kind.Material{Username: "admin", Secret: "its-password"}),
			}
			require.NoError(t, ValidateConfig(e.Redis))
			const deadline = kind.CallTimeout
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			_, err := Verify(ctx, e)
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			require.ErrorContains(t, err, c.says)
			require.False(t, c.says != "" && kind.IsDefinite(err), "what answers may be another tomorrow")
			require.NotContains(t, err.Error(), "its-password")
			require.Less(t, took, 2*deadline)
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(8*maxReply))
		})
	}
}

// TestAnnouncedNodesGetNoPassword: a node that was taken over names a primary somewhere
// else. Nobody is asked there, unless it was allowed.
func TestAnnouncedNodesGetNoPassword(t *testing.T) {
	t.Parallel()
	for _, allowed := range []bool{false, true} {
		thief, heard := newThief(t)
		node := servers.Redis(t, servers.WithConfig("replicaof 127.9.9.9 "+thief))
		e := direct(node)
		if allowed {
			e.Redis.AllowedCIDRs = []string{"127.0.0.0/8"}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := Verify(ctx, e)
		require.NotContains(t, fmt.Sprint(err), servers.RedisAdminPassword)
		if !allowed {
			require.ErrorContains(t, err, "127.9.9.9")
			require.ErrorContains(t, err, "allowed_cidrs")
		}
		require.Equal(t, allowed, strings.Contains(heard(), servers.RedisAdminPassword))
	}
}

// newThief listens at 127.9.9.9, and says what it has heard once it was left alone.
func newThief(t *testing.T) (port string, heard func() string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.9.9.9:0")
	require.NoError(t, err)
	var mu sync.Mutex
	var all strings.Builder
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(3 * time.Second))
				for raw := make([]byte, 4096); ; {
					n, err := c.Read(raw)
					mu.Lock()
					all.Write(raw[:n])
					mu.Unlock()
					if err == nil {
						_, err = io.WriteString(c, "-ERR unknown command\r\n")
					}
					if err != nil {
						return
					}
				}
			})
		}
	})
	end := sync.OnceFunc(func() { _ = l.Close(); wg.Wait() })
	t.Cleanup(end)
	_, port, err = net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port, func() string { end(); return all.String() }
}

// FuzzReplies: whatever a node says, what guards a connection takes it or refuses it,
// keeps little of it, and comes to the same however it is cut into pieces.
func FuzzReplies(f *testing.F) {
	for _, text := range []string{
		"+OK\r\n", "$3\r\nabc\r\n", "*2\r\n$1\r\na\r\n:1\r\n", "*-1\r\n", "-ERR unknown command\r\n", "*1\r\n*1\r\n*1\r\n:0\r\n", "$99999999999\r\n",
		"*2147483647\r\n", "+a\rb\n\r\n", "%1\r\n", "$-1\r\n$0\r\n\r\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		whole := replies{left: maxSession}
		err := whole.follow(said)
		pieces := replies{left: maxSession}
		var inBytes error
		for i := range said {
			if inBytes = pieces.follow(said[i : i+1]); inBytes != nil {
				break
			}
		}
		if err != inBytes { //nolint:errorlint // it is the very same
			t.Fatalf("%q: %v, and in bytes %v", said, err, inBytes)
		}
		if len(whole.open) > maxDepth || len(whole.head) > maxNumber+1 || whole.reply > maxReply || whole.left < 0 {
			t.Fatalf("%q: %+v", said, whole)
		}
	})
}

// FuzzFacts: what a node says about itself and its users is understood, or passed over.
func FuzzFacts(f *testing.F) {
	f.Add("redis_version:7.2.0\r\nrole:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\nslave0:ip=10.0.0.2,port=6379,state=online\r\n",
		"07c37df 127.0.0.1:30004@31004,host handshake,slave e7d1 0 1426238317239 4 connected\ne7d1 :0@0 myself,master - 0 0 1 connected 0-5460\n",
		"id=3 addr=127.0.0.1:1 laddr=127.0.0.1:6379 name= age=12 idle=0 flags=N user=app resp=2\n", "flags,on,passwords,ab,commands,+@all -debug,keys,~*,channels,&*,selectors")
	f.Fuzz(func(t *testing.T, info, nodes, clients, user string) {
		var facts facts
		values := fields(info)
		facts.version = values["redis_version"]
		facts.readReplication(values)
		facts.readMembers(nodes)
		for _, cluster := range []bool{false, true} {
			facts.cluster = cluster
			for _, addr := range facts.neighbours() {
				if _, _, err := net.SplitHostPort(addr); err != nil && !strings.ContainsAny(addr, "[]%") {
					t.Fatalf("%q is no address: %v", addr, err)
				}
			}
		}
		facts.since(7, 0)
		for _, c := range parseClients(clients) {
			c.before(time.Unix(1, 0), time.Unix(2, 0))
			c.session("node", time.Unix(2, 0))
		}
		var list []any
		for part := range strings.SplitSeq(user, ",") {
			list = append(list, part)
		}
		for _, value := range []any{user, list, []any{"selectors", []any{list}}, []any{"flags", list, "passwords", list}} {
			u := parseUser(value)
			u.profile()
			facts.foreign(u.profile())
			pairs(value)
			records([]any{value})
		}
	})
}
