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

// one is the server that tests share which only add users to it.
var one struct {
	sync.Mutex
	dir       string
	node      *servers.PostgresNode
	authority *servers.Authority
}

func TestMain(m *testing.M) {
	code := m.Run()
	if one.node != nil {
		if err := errors.Join(one.node.Abort(), os.RemoveAll(one.dir)); err != nil {
			fmt.Fprintln(os.Stderr, "clean up:", err)
			code = 1
		}
	}
	if err := leaks.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// shared returns a server with rules for users of some names: those that begin
// with trusted- need no password, those with plain- send it as it is, and those
// with ruled-out- match no rule. It speaks TLS to whoever asks for it.
func shared(t testing.TB) *servers.PostgresNode {
	t.Helper()
	one.Lock()
	defer one.Unlock()
	if one.node != nil {
		return one.node
	}
	var err error
	one.dir, err = os.MkdirTemp("", "postgresql-shared-") //nolint:usetesting // it outlives the test
	require.NoError(t, err)
	one.authority, err = servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := one.authority.Issue("db.example.org")
	require.NoError(t, err)
	one.node, err = servers.StartPostgres(context.Background(), one.dir,
		servers.WithPostgresTLS(cert, key, one.authority.PEM),
		servers.WithHBA(
			"host all trusted,trusted-admin 127.0.0.1/32 trust",
			"host all plain 127.0.0.1/32 password",
			"host all ruled-out 127.0.0.1/32 reject",
			"hostssl all shows-cert 127.0.0.1/32 scram-sha-256 clientcert=verify-ca",
			"host all shows-cert 127.0.0.1/32 reject",
			"host all stored-md5 127.0.0.1/32 md5",
		))
	require.NoError(t, err)
	require.NoError(t, one.node.Exec(context.Background(), "CREATE ROLE rotator LOGIN CREATEROLE PASSWORD 'rotator-secret'"))
	return one.node
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
