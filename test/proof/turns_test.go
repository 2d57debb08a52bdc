package proof_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	turnRotations = 50
	turnClients   = 8
	turnRead      = 200 * time.Millisecond // how often a client reads creds/
	turnPause     = 20 * time.Millisecond  // between two logins of a client
	swapRotations = 20
)

// bench is a server of one kind, with a user "app" whose password is in use.
type bench struct {
	kind string
	// connection leads to the server by way of address, as the user engine.
	connection func(address string) map[string]any
	// address is where the engine reaches the server, and change what a request to
	// change a user holds.
	address, change string
	// login opens a connection of its own; errRefused is the server's answer.
	login func(ctx context.Context, user, password string) error
	// hold opens a connection that stays until it is closed, under a name.
	hold func(ctx context.Context, user, password, name string) (io.Closer, error)
	// stored is what the server keeps of a user's password.
	stored func(ctx context.Context, user string) (string, error)
}

const (
	firstPassword  = "the-first-password-of-app"
	enginePassword = "the-first-password-of-the-engine"
)

func redisBench(t *testing.T) bench {
	t.Helper()
	n := servers.Redis(t, servers.WithUsers("app on >"+firstPassword+" ~app:* +@all -@admin", "engine on >"+enginePassword+" ~* &* +@all"))
	return bench{
		kind: "redis", address: n.Addr, change: "SETUSER",
		connection: func(address string) map[string]any { return map[string]any{"type": "redis", "addresses": address} },
		login: func(ctx context.Context, user, password string) error {
			return login(ctx, n.Addr, func() (string, string, error) { return user, password, nil })
		},
		hold: func(ctx context.Context, user, password, name string) (io.Closer, error) {
			c := redis.NewClient(&redis.Options{Addr: n.Addr, Username: user, Password: password, ClientName: name, PoolSize: 1, MinIdleConns: 1})
			return c, c.Ping(ctx).Err()
		},
		stored: func(ctx context.Context, user string) (string, error) {
			answer, err := n.Do(ctx, "ACL", "GETUSER", user)
			return fmt.Sprint(answer), err
		},
	}
}

func postgresBench(t *testing.T) bench {
	t.Helper()
	n := servers.Postgres(t)
	require.NoError(t, n.Exec(t.Context(), "CREATE ROLE engine LOGIN CREATEROLE PASSWORD '"+enginePassword+"'",
		"GRANT pg_read_all_stats TO engine", "GRANT SELECT (rolname, rolpassword) ON pg_authid TO engine",
		"CREATE ROLE owner NOLOGIN", "CREATE ROLE app LOGIN IN ROLE owner PASSWORD '"+firstPassword+"'", "ALTER ROLE app SET role TO owner"))
	return bench{
		kind: "postgresql", address: n.Addr, change: "ALTER ROLE",
		connection: func(address string) map[string]any {
			return map[string]any{
				"type": "postgresql", "connection_url": "postgresql://{{username}}:{{password}}@" + address + "/postgres?sslmode=disable",
			}
		},
		login: func(ctx context.Context, user, password string) error {
			c, err := n.Login(ctx, user, password)
			if err == nil {
				return c.Close(ctx)
			}
			if strings.Contains(err.Error(), "28P01") {
				return fmt.Errorf("%w: %w", errRefused, err)
			}
			return err
		},
		hold: func(ctx context.Context, user, password, name string) (io.Closer, error) {
			c, err := n.Login(ctx, user, password)
			if err != nil {
				return nil, err
			}
			_, err = c.Exec(ctx, "SET application_name TO "+name)
			return closer(func() error { return c.Close(context.WithoutCancel(ctx)) }), err
		},
		stored: func(ctx context.Context, user string) (string, error) {
			return n.Text(ctx, "SELECT coalesce(rolpassword, '') FROM pg_authid WHERE rolname = $1", user)
		},
	}
}

func rabbitBench(t *testing.T) bench {
	t.Helper()
	n := servers.RabbitMQ(t)
	require.NoError(t, n.SetUser(t.Context(), "app", firstPassword, ""))
	require.NoError(t, n.SetUser(t.Context(), "engine", enginePassword, "administrator"))
	return bench{
		kind: "rabbitmq", address: n.ManagementAddr, change: "PUT /api/users",
		connection: func(address string) map[string]any {
			return map[string]any{"type": "rabbitmq", "management_urls": "http://" + address, "amqp_urls": "amqp://" + n.Addr}
		},
		login: func(ctx context.Context, user, password string) error {
			u := url.URL{Scheme: "amqp", User: url.UserPassword(user, password), Host: n.Addr, Path: "/"}
			c, err := amqp.DialConfig(u.String(), amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
				conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
				if err == nil {
					err = conn.SetDeadline(time.Now().Add(20 * time.Second))
				}
				return conn, err
			}})
			if errors.Is(err, amqp.ErrCredentials) {
				return fmt.Errorf("%w: %w", errRefused, err)
			}
			if err == nil {
				err = c.Close()
			}
			return err
		},
		hold: func(_ context.Context, user, password, name string) (io.Closer, error) {
			u := url.URL{Scheme: "amqp", User: url.UserPassword(user, password), Host: n.Addr, Path: "/"}
			return amqp.DialConfig(u.String(), amqp.Config{Properties: amqp.Table{"connection_name": name}})
		},
		stored: func(ctx context.Context, user string) (string, error) {
			var u struct {
				Hash string `json:"password_hash"`
			}
			err := n.Do(ctx, http.MethodGet, "users/"+user, nil, &u)
			return u.Hash, err
		},
	}
}

// TestTurns keeps clients logging in anew through fifty rotations with two users
// that take turns, at each server: none is ever refused. A client goes by nothing
// but creds/, which it reads five times a second, and a rotation is retired as soon
// as every client has read what it promoted.
func TestTurns(t *testing.T) {
	v := sharedVault(t)
	for _, make := range []func(*testing.T) bench{redisBench, postgresBench, rabbitBench} {
		b := make(t)
		t.Run(b.kind, func(t *testing.T) {
			t.Parallel() // most of it waits for clients to read creds/ again
			takeTurns(t, newMount(t, v, "turns-"+b.kind), b)
		})
	}
}

func takeTurns(t *testing.T, m *mount, b bench) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	m.open(t, b, b.address)
	m.mustWrite(t, "roles/app", map[string]any{
		"kind": b.kind, "connection": "server", "usernames": "app,app_b", "initial_password": firstPassword, "grace_period": "10m",
	})
	running, stop := context.WithCancel(ctx)
	crowd := &crowd{}
	var clients sync.WaitGroup
	for i := range turnClients {
		clients.Go(func() { crowd.work(running, i, m, b) })
	}
	users := map[string]int{}
	for n := range turnRotations {
		data := m.mustWrite(t, "rotate/"+b.kind+"/app", nil)
		require.Equal(t, "grace", data["state"], "%v", data)
		require.NoError(t, crowd.reads(ctx, int64(n+2)))
		data = m.mustWrite(t, "retire/"+b.kind+"/app", nil)
		require.Equal(t, "completed", data["state"], "%v", data)
		creds, err := m.read(ctx, "creds/app")
		require.NoError(t, err)
		users[creds["username"].(string)]++
	}
	stop()
	clients.Wait()
	figure(t, "alternate %s: %d rotations, %d logins, %d refused", b.kind, turnRotations, crowd.logins.Load(), crowd.refused.Load())
	require.NoError(t, errors.Join(crowd.problems...))
	require.Zero(t, crowd.refused.Load())
	require.Equal(t, map[string]int{"app": turnRotations / 2, "app_b": turnRotations / 2}, users)
	require.Greater(t, crowd.logins.Load(), int64(turnRotations*turnClients), "every client logged in during every rotation")
	idle, err := b.stored(ctx, "app_b")
	require.NoError(t, err)
	require.NotContains(t, idle, "SCRAM", "the idle user has no password")
}

func (m *mount) open(t *testing.T, b bench, address string) {
	t.Helper()
	data := b.connection(address)
	data["allowed_roles"], data["username"], data["password"] = "*", "engine", enginePassword
	m.mustWrite(t, "connections/server", data)
}

// crowd is what clients have read and seen.
type crowd struct {
	logins, refused atomic.Int64
	read            [turnClients]atomic.Int64
	mu              sync.Mutex
	problems        []error
}

// reads waits until every client has read version, and so has ended every login
// with an earlier one.
func (c *crowd) reads(ctx context.Context, version int64) error {
	return until(ctx, time.Minute, func(context.Context) error {
		for i := range c.read {
			if got := c.read[i].Load(); got < version {
				return fmt.Errorf("client %d is at version %d of %d", i, got, version)
			}
		}
		return nil
	})
}

func (c *crowd) work(ctx context.Context, i int, m *mount, b bench) {
	var user, password string
	var readAt time.Time
	for ctx.Err() == nil {
		if time.Since(readAt) > turnRead {
			data, err := m.read(context.WithoutCancel(ctx), "creds/app")
			if err != nil {
				c.report(err)
				return
			}
			user, password, readAt = data["username"].(string), data["password"].(string), time.Now()
			c.read[i].Store(number(data["version"]))
		}
		err := b.login(context.WithoutCancel(ctx), user, password)
		c.logins.Add(1)
		if err != nil {
			if errors.Is(err, errRefused) {
				c.refused.Add(1)
			}
			c.report(fmt.Errorf("client %d as %s: %w", i, user, err))
		}
		wait(ctx, turnPause)
	}
}

func (c *crowd) report(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.problems) < 5 {
		c.problems = append(c.problems, err)
	}
}

func number(v any) int64 {
	var n int64
	_, _ = fmt.Sscan(fmt.Sprint(v), &n)
	return n
}

// TestSwapInterval measures how long a served password may be refused where a user
// has one and no second user takes turns: from the change at the server until
// creds/ serves the new one. A login that proves it and a write lie between them,
// whose price is measured in the same run.
func TestSwapInterval(t *testing.T) {
	v := sharedVault(t)
	for _, make := range []func(*testing.T) bench{redisBench, postgresBench, rabbitBench} {
		b := make(t)
		t.Run(b.kind, func(t *testing.T) { measureSwap(t, newMount(t, v, "swap-"+b.kind), b) })
	}
}

func measureSwap(t *testing.T, m *mount, b bench) {
	t.Helper()
	m.open(t, b, b.address)
	m.mustWrite(t, "roles/app", map[string]any{
		"kind": b.kind, "connection": "server", "username": "app", "strategy": "swap", "initial_password": firstPassword,
	})
	var intervals, logins, writes []time.Duration
	for n := range swapRotations {
		watch := m.watchSwap(t, b, int64(n+2))
		data := m.mustWrite(t, "rotate/"+b.kind+"/app", nil)
		require.Equal(t, "completed", data["state"])
		took := <-watch
		intervals = append(intervals, took)
		if took > 300*time.Millisecond {
			told, err := m.read(t.Context(), "rotations/"+data["rotation_id"].(string))
			require.NoError(t, err)
			t.Logf("%s: %v", took, told["timeline"])
		}
		creds, err := m.read(t.Context(), "creds/app")
		require.NoError(t, err)
		began := time.Now()
		require.NoError(t, b.login(t.Context(), "app", creds["password"].(string)))
		logins = append(logins, time.Since(began))
		began = time.Now()
		m.mustWrite(t, "config", map[string]any{"workers": 32})
		writes = append(writes, time.Since(began))
	}
	figure(t, "swap %s: refused for %s (median of %d rotations, longest %s); a login takes %s, a write %s",
		b.kind, median(intervals), swapRotations, slices.Max(intervals).Round(time.Millisecond), median(logins), median(writes))
	require.Less(t, median(intervals), 2*time.Second)
}

func median(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2].Round(100 * time.Microsecond)
}

// watchSwap tells the time between the change at the server and that of creds/.
func (m *mount) watchSwap(t *testing.T, b bench, version int64) <-chan time.Duration {
	t.Helper()
	before, err := b.stored(t.Context(), "app")
	require.NoError(t, err)
	out := make(chan time.Duration, 1)
	var changed, served atomic.Int64
	var both sync.WaitGroup
	both.Go(func() {
		for t.Context().Err() == nil {
			if now, err := b.stored(t.Context(), "app"); err == nil && now != before {
				changed.Store(time.Now().UnixNano())
				return
			}
		}
	})
	both.Go(func() {
		for t.Context().Err() == nil {
			if data, err := m.read(t.Context(), "creds/app"); err == nil && number(data["version"]) >= version {
				served.Store(time.Now().UnixNano())
				return
			}
		}
	})
	go func() { both.Wait(); out <- time.Duration(served.Load() - changed.Load()) }()
	return out
}
