package redis

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func authority(t *testing.T) *servers.Authority {
	t.Helper()
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	return ca
}

// trust is what an engine needs at servers of ca.
func trust(t *testing.T, ca *servers.Authority) connection.TLS {
	t.Helper()
	cert, key, err := ca.Issue("engine")
	require.NoError(t, err)
	return connection.TLS{CA: ca.PEM, Cert: cert, Key: key}
}

func overTLS(t *testing.T, ca *servers.Authority, set ...*servers.RedisNode) *connection.Entry {
	t.Helper()
	e := direct(set...)
	e.Redis.TLS, e.TLS = true, trust(t, ca)
	return e
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	loopback := servers.WithTLS(ca, "127.0.0.1", "localhost")
	for topology, set := range map[string]*servers.RedisSet{
		TopologyStandalone: {Nodes: []*servers.RedisNode{servers.Redis(t, loopback)}},
		"replicated":       servers.RedisReplicated(t, 1, loopback),
		TopologyCluster:    servers.RedisCluster(t, loopback),
	} {
		e := overTLS(t, ca, set.Nodes...)
		info, err := Verify(limited(t), e)
		require.NoError(t, err, topology)
		require.Equal(t, topology, info.Topology)
		require.Len(t, info.Nodes, len(set.Nodes), "those that were discovered speak TLS as well")
		for _, n := range set.Nodes {
			do(t, n, "ACL", "SETUSER", "app", "on", ">old")
		}
		fresh := kind.Material{Username: "app", Secret: "fresh"}
		u := kind.User{Username: "app"}
		for _, n := range open(e).Change(limited(t), []kind.Change{{User: u, Accept: []kind.Material{fresh}}})[0].Nodes {
			require.NoError(t, n.Err)
		}
		answer := open(e).Probe(limited(t), []kind.Question{{User: u, Materials: []kind.Material{fresh}}})[0]
		require.Len(t, answer.Nodes, len(set.Nodes))
		for _, n := range answer.Nodes {
			require.NoError(t, n.Err)
			require.Equal(t, []bool{true}, n.Accepts)
		}
	}
}

// Whom the engine does not trust, and who does not trust the engine, is neither
// down nor refuses a password.
func TestTLSDistrust(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	n := servers.Redis(t, servers.WithTLS(ca, "redis.test", "127.0.0.1"))
	named := servers.Redis(t, servers.WithTLS(ca, "redis.test"))
	plain := servers.Redis(t)
	good := trust(t, ca)
	with := func(change func(*connection.TLS)) connection.TLS {
		c := good
		change(&c)
		return c
	}
	for name, c := range map[string]struct {
		at   *servers.RedisNode
		off  bool
		tls  connection.TLS
		says string
	}{
		"another authority":     {n, false, with(func(c *connection.TLS) { c.CA = authority(t).PEM }), "check tls_ca"},
		"another name":          {n, false, with(func(c *connection.TLS) { c.ServerName = "else.test" }), "tls_server_name"},
		"an address":            {named, false, good, "tls_server_name"},
		"no client certificate": {n, false, with(func(c *connection.TLS) { c.Cert, c.Key = "", "" }), "tls_cert"},
		"a stranger's":          {n, false, with(func(c *connection.TLS) { s := trust(t, authority(t)); c.Cert, c.Key = s.Cert, s.Key }), "tls_cert"},
		"without TLS":           {n, true, connection.TLS{}, "tls has to be true"},
		"no TLS there":          {plain, false, good, "TLS"},
	} {
		for range 5 { // who ends a connection first is a matter of luck, but a node without TLS is silent
			e := direct(c.at)
			e.Redis.TLS, e.TLS = !c.off, c.tls
			_, err := Verify(limited(t), e)
			require.ErrorContains(t, err, c.says, name)
			if c.at != plain && !c.off {
				require.False(t, kind.IsUnreachable(err), "%s: clients reach it: %v", name, err)
			}
			require.False(t, kind.IsDefinite(err), "%s: %v", name, err)
			require.NotContains(t, err.Error(), "password", name)
			if c.at == plain {
				break
			}
		}
	}
	e := direct(named)
	e.Redis.TLS, e.TLS = true, with(func(c *connection.TLS) { c.ServerName = "redis.test" })
	_, err := Verify(limited(t), e)
	require.NoError(t, err)
	e.TLS = with(func(c *connection.TLS) { c.CA, c.SkipVerify = "", true })
	_, err = Verify(limited(t), e)
	require.NoError(t, err)
}
