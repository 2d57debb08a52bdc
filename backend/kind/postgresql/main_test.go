package postgresql

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// Servers that tests share which only add users to them.
var (
	one = server{start: func(dir string) (*servers.PostgresNode, error) {
		cert, key, err := authority().Issue("db.example.org")
		if err != nil {
			return nil, err
		}
		return servers.StartPostgres(context.Background(), dir,
			servers.WithPostgresTLS(cert, key, authority().PEM),
			servers.WithHBA(
				"host all trusted,trusted-admin 127.0.0.1/32 trust",
				"host all plain 127.0.0.1/32 password",
				"host all ruled-out 127.0.0.1/32 reject",
				"hostssl all shows-cert 127.0.0.1/32 scram-sha-256 clientcert=verify-ca",
				"host all shows-cert 127.0.0.1/32 reject",
				"host all stored-md5 127.0.0.1/32 md5",
			))
	}}
	// other waits for a standby that it does not have, and speaks no TLS.
	other = server{start: func(dir string) (*servers.PostgresNode, error) {
		return servers.StartPostgres(context.Background(), dir, servers.WithPostgresConfig("synchronous_standby_names = 'nobody'"))
	}}

	authority = sync.OnceValue(func() *servers.Authority {
		a, err := servers.NewAuthority()
		if err != nil {
			panic(err)
		}
		return a
	})
)

// server is started by the first test that needs it, and ended by TestMain.
type server struct {
	start func(dir string) (*servers.PostgresNode, error)

	sync.Mutex
	dir  string
	node *servers.PostgresNode
}

func (s *server) get(t testing.TB) *servers.PostgresNode {
	t.Helper()
	s.Lock()
	defer s.Unlock()
	if s.node != nil {
		return s.node
	}
	var err error
	s.dir, err = os.MkdirTemp("", "postgresql-shared-") //nolint:usetesting // it outlives the test
	require.NoError(t, err)
	s.node, err = s.start(s.dir)
	require.NoError(t, err)
	require.NoError(t, s.node.Exec(context.Background(), "SET synchronous_commit = local", "CREATE ROLE rotator LOGIN CREATEROLE PASSWORD 'rotator-secret'"))
	return s.node
}

func (s *server) end() error {
	if s.node == nil {
		return nil
	}
	return errors.Join(s.node.Abort(), os.RemoveAll(s.dir))
}

func TestMain(m *testing.M) {
	code := m.Run()
	if err := errors.Join(one.end(), other.end()); err != nil {
		fmt.Fprintln(os.Stderr, "clean up:", err)
		code = 1
	}
	if err := errors.Join(leaks.Leaked(), leaks.Find()); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// shared is a server with rules for users of some names, which speaks TLS to
// whoever asks for it.
func shared(t testing.TB) *servers.PostgresNode {
	t.Helper()
	return one.get(t)
}

// sharedEntry is a connection to the shared server.
func sharedEntry(t testing.TB) *connection.Entry {
	t.Helper()
	return entryOf(t, "postgresql://{{username}}:{{password}}@"+shared(t).Addr+"/postgres?sslmode=disable", "rotator", "rotator-secret")
}

// material is a password of username.
func material(username, secret string) kind.Material {
	return kind.Material{Username: username, Secret: secret}
}

func within10s(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), kind.CallTimeout)
	t.Cleanup(cancel)
	return ctx
}

func probe(t testing.TB, target kind.Target, username string, secrets ...string) []kind.NodeAnswer {
	t.Helper()
	q := kind.Question{User: kind.User{Role: "r", Username: username}}
	for _, s := range secrets {
		q.Materials = append(q.Materials, material(username, s))
	}
	a := target.Probe(within10s(t), []kind.Question{q})
	require.Len(t, a, 1)
	require.NoError(t, a[0].Err)
	return a[0].Nodes
}

func probeOne(t testing.TB, target kind.Target, username string, secrets ...string) kind.NodeAnswer {
	t.Helper()
	nodes := probe(t, target, username, secrets...)
	require.Len(t, nodes, 1)
	return nodes[0]
}

func preflight(t testing.TB, target kind.Target, username string) kind.Finding {
	t.Helper()
	f := target.Preflight(within10s(t), []kind.User{{Role: "r", Username: username}})
	require.Len(t, f, 1)
	return f[0]
}

func only(username, secret string) kind.Change {
	return kind.Change{User: kind.User{Role: "r", Username: username}, Accept: []kind.Material{material(username, secret)}, Exclusive: true}
}

func change(ctx context.Context, t testing.TB, target kind.Target, c kind.Change) []kind.NodeError {
	t.Helper()
	out := target.Change(ctx, []kind.Change{c})
	require.Len(t, out, 1)
	require.NoError(t, out[0].Err)
	return out[0].Nodes
}

func mustChange(t testing.TB, target kind.Target, c kind.Change) {
	t.Helper()
	for _, n := range change(within10s(t), t, target, c) {
		require.NoError(t, n.Err, n.Node)
	}
}

// soon is enough for a call that does not have to wait.
func soon(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
