package redis

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func direct(set ...*servers.RedisNode) *connection.Entry {
	return &connection.Entry{
		Name: "test", Type: connection.TypeRedis,
		Redis: &connection.Redis{Addresses: []string{set[0].Addr}},
		Admin: connection.NewAdmin(kind.Material{Username: servers.RedisAdmin, Secret: servers.RedisAdminPassword}),
	}
}

func open(e *connection.Entry) kind.Target {
	return Open(func(context.Context) (*connection.Entry, error) { return e, nil })
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), kind.CallTimeout)
	t.Cleanup(cancel)
	return ctx
}

func do(t *testing.T, n *servers.RedisNode, args ...any) any {
	t.Helper()
	v, err := n.Do(t.Context(), args...)
	require.NoError(t, err)
	return v
}

// calls returns how often a command ran at n.
func calls(t *testing.T, n *servers.RedisNode, command string) int {
	t.Helper()
	info, err := n.Info(t.Context(), "commandstats")
	require.NoError(t, err)
	count, _, _ := strings.Cut(strings.TrimPrefix(info["cmdstat_"+command], "calls="), ",")
	number, _ := strconv.Atoi(count)
	return number
}

// Each of the two calls ends within its time.
func TestManyUsersCostOneSave(t *testing.T) {
	t.Parallel()
	const count = 500
	n := servers.Redis(t)
	var changes []kind.Change
	var questions []kind.Question
	for i := range count {
		name := fmt.Sprintf("app-%d", i)
		do(t, n, "ACL", "SETUSER", name, "on", ">old")
		u := kind.User{Username: name}
		fresh := kind.Material{Username: name, Secret: "fresh-" + name}
		changes = append(changes, kind.Change{User: u, Accept: []kind.Material{fresh}})
		questions = append(questions, kind.Question{User: u, Materials: []kind.Material{fresh, {Username: name, Secret: "old"}}})
	}
	target := open(direct(n))
	for _, o := range target.Change(limited(t), changes) {
		require.NoError(t, o.Err)
		require.NoError(t, o.Nodes[0].Err)
	}
	require.Equal(t, 1, calls(t, n, "config|rewrite"))
	before := calls(t, n, "auth")
	for _, a := range target.Probe(limited(t), questions) {
		require.NoError(t, a.Err)
		require.Equal(t, []bool{true, true}, a.Nodes[0].Accepts)
	}
	require.GreaterOrEqual(t, calls(t, n, "auth")-before, 2*count, "every login is a fresh one")
}

func TestNothingIsChangedThatCannotBeSaved(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t, servers.WithoutConfigFile())
	do(t, n, "ACL", "SETUSER", "app", "on", ">old")
	e := direct(n)
	e.Admin = connection.NewAdmin(kind.Material{})
	change := []kind.Change{{User: kind.User{Username: "app"}, Accept: []kind.Material{{Username: "app", Secret: "new"}}}}
	out := open(e).Change(limited(t), change)
	require.True(t, kind.IsDefinite(out[0].Nodes[0].Err))
	require.ErrorContains(t, out[0].Nodes[0].Err, n.Addr)
	require.Zero(t, calls(t, n, "acl|setuser")-1, "only the one of this test")
	f := open(e).Preflight(limited(t), []kind.User{{Username: "app"}})
	require.Len(t, f[0].Problems, 1)

	e.Redis.Persistence = PersistNone
	require.NoError(t, open(e).Change(limited(t), change)[0].Nodes[0].Err)
}

func TestAdminIsTriedWithEveryCandidate(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t, servers.WithUsers("app on >old"))
	e := direct(n)
	e.Admin = connection.NewAdmin(kind.Material{Username: servers.RedisAdmin, Secret: "not yet"})
	e.Admin.Add(kind.Material{Username: servers.RedisAdmin, Secret: servers.RedisAdminPassword}, "", time.Time{})
	f := open(e).Preflight(limited(t), []kind.User{{Username: "app"}})
	require.NoError(t, f[0].Err)
	require.Empty(t, f[0].Problems)
}

func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	const minimal = "rot on >rot resetkeys resetchannels -@all +acl|getuser +acl|setuser +acl|save +config|get +config|rewrite +info +cluster|nodes"
	n := servers.Redis(t, servers.WithUsers(minimal, "weak on >weak -@all +acl|getuser +config|get +info", "app on >old"))
	e := direct(n)
	e.Admin = connection.NewAdmin(kind.Material{Username: "rot", Secret: "rot"})
	info, err := Verify(limited(t), e)
	require.NoError(t, err)
	require.Equal(t, TopologyStandalone, info.Topology)
	require.Len(t, info.Warnings, 1, "the open default user")
	change := []kind.Change{{User: kind.User{Username: "app"}, Accept: []kind.Material{{Secret: "a-new-one"}}}}
	require.NoError(t, open(e).Change(limited(t), change)[0].Nodes[0].Err)

	e.Admin = connection.NewAdmin(kind.Material{Username: "weak", Secret: "weak"})
	_, err = Verify(limited(t), e)
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.NotEmpty(t, open(e).Preflight(limited(t), []kind.User{{Username: "app"}})[0].Problems)
	change[0].Accept = []kind.Material{{Secret: "another-one"}}
	err = open(e).Change(limited(t), change)[0].Nodes[0].Err
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.NotContains(t, err.Error(), hashOf("another-one"))
}

func TestVerifyNamesOneTargetFromEveryNode(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 2)
	e := direct(set.Nodes...)
	first, err := Verify(limited(t), e)
	require.NoError(t, err)
	require.Equal(t, "replicated", first.Topology)
	require.Len(t, first.Nodes, 3)
	for _, n := range set.Nodes {
		e.Redis.Addresses = []string{"localhost" + n.Addr[strings.LastIndex(n.Addr, ":"):]}
		again, err := Verify(limited(t), e)
		require.NoError(t, err)
		require.Equal(t, first.Identity, again.Identity)
		require.Len(t, again.Nodes, 3)
	}
	e.Redis.AllowedCIDRs = []string{"10.0.0.0/8"}
	_, err = Verify(limited(t), e)
	require.ErrorContains(t, err, "allowed_cidrs")
	require.True(t, kind.IsDefinite(err))
}

// A replica whose masterauth went stale replicates on until it reconnects.
func TestStaleMasterauthIsAProblem(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithReplicationUser("repl", "one"))
	do(t, set.Nodes[1], "CONFIG", "SET", "masterauth", "wrong")
	target := open(direct(set.Nodes...))
	q := kind.Question{User: kind.User{Username: "repl"}, Materials: []kind.Material{{Username: "repl", Secret: "one"}}}
	problems := 0
	for _, n := range target.Probe(limited(t), []kind.Question{q})[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{true}, n.Accepts)
		if n.Problem != "" {
			require.Contains(t, n.Problem, set.Nodes[1].Addr)
			require.NotContains(t, n.Problem, "wrong ")
			problems++
		}
	}
	require.Equal(t, 1, problems)

	lead := kind.Material{Username: "repl", Secret: "two"}
	for _, n := range target.Change(limited(t), []kind.Change{{User: q.User, Accept: []kind.Material{lead}, Exclusive: true, Lead: lead}})[0].Nodes {
		require.NoError(t, n.Err)
	}
	do(t, set.Nodes[0], "CLIENT", "KILL", "TYPE", "replica")
	require.NoError(t, set.WaitReplicating(t.Context()))
}

// Where the primary cannot be asked, its replicas keep the login that works.
func TestMasterauthWaitsForThePrimary(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithReplicationUser("repl", "one"))
	e := direct(set.Nodes...)
	e.Redis.Addresses = []string{set.Nodes[1].Addr}
	require.NoError(t, set.Nodes[0].Kill())
	lead := kind.Material{Username: "repl", Secret: "two"}
	out := open(e).Change(limited(t), []kind.Change{{User: kind.User{Username: "repl"}, Accept: []kind.Material{lead}, Exclusive: true, Lead: lead}})
	require.Len(t, out[0].Nodes, 2)
	for _, n := range out[0].Nodes {
		require.Error(t, n.Err)
		require.False(t, kind.IsDefinite(n.Err), "%v", n.Err)
	}
	require.Equal(t, []any{"masterauth", "one"}, do(t, set.Nodes[1], "CONFIG", "GET", "masterauth"))
	u := parseUser(do(t, set.Nodes[1], "ACL", "GETUSER", "repl"))
	require.ElementsMatch(t, []string{hashOf("one"), hashOf("two")}, u.hashes)
}
