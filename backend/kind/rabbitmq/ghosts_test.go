package rabbitmq

import (
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestGhosts(t *testing.T) {
	t.Parallel()
	on := func(node string, names ...string) (out []session) {
		for _, name := range names {
			out = append(out, session{Name: name, Node: node})
		}
		return out
	}
	var g ghosts
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	look := func(user string, after time.Duration, known, silent []session) []session {
		o := openSessions{known: known, silent: slices.Clone(silent)}
		g.forget(userOf{"cluster", user}, &o, noon.Add(after))
		return o.silent
	}
	ghost := on("a", "ghost")
	require.Equal(t, ghost, look("u", 0, on("a", "old"), ghost), "statistics of one that may be older show nothing")
	require.Equal(t, ghost, look("u", time.Second, on("b", "new"), ghost), "nor do those of another broker")
	require.Equal(t, ghost, look("v", 0, on("a", "other"), ghost), "nor do looks at another user")
	both := append(on("a", "late"), ghost...)
	require.Equal(t, both[:1], look("u", 2*time.Second, on("a", "new"), both), "what came with the one that has statistics may live")
	require.Empty(t, look("u", 3*time.Second, nil, ghost), "it stays forgotten")
	require.Equal(t, ghost, look("v", together, nil, ghost))
	require.Equal(t, ghost, look("v", ghostAfter-1, nil, ghost), "a broker that makes none for long")
	require.Empty(t, look("v", ghostAfter, nil, ghost))
	require.Empty(t, look("v", ghostAfter, on("a", "new"), nil))
	require.Equal(t, ghost, look("v", ghostAfter, nil, ghost), "the same name again is another one")
	require.Equal(t, ghost, look("v", 2*ghostAfter, nil, ghost), "nobody knows what was in between")
	require.Len(t, g.users, 1, "nothing is kept of who is no longer looked at")

	// One that had been listed by the end of the look shows nothing later either.
	o := openSessions{silent: on("a", "ghost"), listed: on("a", "ghost", "slow")}
	g.forget(userOf{"cluster", "w"}, &o, noon.Add(2*ghostAfter))
	require.Equal(t, ghost, look("w", 2*ghostAfter+time.Second, on("a", "slow"), ghost))

	failed := openSessions{silent: ghost, err: errNoPassword}
	g.forget(userOf{"cluster", "u"}, &failed, noon.Add(time.Hour))
	require.Equal(t, ghost, failed.silent, "who could not be asked shows nothing")
}

// TestRealGhosts has a broker list connections that are gone: it does so of some of those
// that are cut off as they open.
func TestRealGhosts(t *testing.T) {
	t.Parallel()
	r := newRig(t, servers.RabbitMQ(t))
	u := r.user(t, "ghosted", theirs, "")
	address := url.URL{Scheme: "amqp", User: url.UserPassword(u.Username, theirs), Host: r.n.Addr, Path: "/"}
	dial := func() (*amqp.Connection, net.Conn) {
		var raw net.Conn
		c, err := amqp.DialConfig(address.String(), amqp.Config{Dial: func(network, addr string) (_ net.Conn, err error) {
			raw, err = net.DialTimeout(network, addr, time.Minute)
			return raw, err
		}})
		assert.NoError(t, err)
		return c, raw
	}
	haunted := func() bool {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 40 {
					_, raw := dial()
					if raw == nil {
						return
					}
					_ = raw.(*net.TCPConn).SetLinger(0)
					_ = raw.Close()
				}
			})
		}
		wg.Wait()
		// The broker has its own time to see that they are gone: those that are still
		// listed in several looks are ghosts.
		last, calm := -1, 0
		require.Eventually(t, func() bool {
			var listed []session
			if !assert.NoError(t, r.n.Do(t.Context(), http.MethodGet, "connections/username/"+u.Username, nil, &listed)) {
				return true
			}
			if calm++; len(listed) != last {
				last, calm = len(listed), 0
			}
			return last == 0 || calm == 3
		}, time.Minute, time.Second)
		return last > 0
	}
	for tries := 0; !haunted(); tries++ {
		if tries == 20 {
			t.Skip("this broker forgets whoever is cut off")
		}
	}
	target := r.target()
	look := func() kind.SessionsAnswer {
		return target.(kind.Observer).Sessions(limited(t), []kind.SessionsQuestion{{User: u, Before: time.Now().Add(time.Hour)}})[0]
	}
	require.ErrorContains(t, look().Err, "does not say yet when")
	c, _ := dial()
	seen := func(n int) func() bool {
		return func() bool { a := look(); return a.Err == nil && len(a.Sessions) == n }
	}
	require.Eventually(t, seen(1), time.Minute, time.Second, "one that came later has statistics, and they have none")
	require.NoError(t, c.Close())
	require.Eventually(t, seen(0), time.Minute, time.Second, "it has ended, and they stay forgotten")
}
