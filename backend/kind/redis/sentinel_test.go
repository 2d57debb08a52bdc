package redis

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	// watchRules are what sentinels need at nodes, and replicas at their primary.
	watchRules = " resetkeys resetchannels -@all &__sentinel__:hello +multi +slaveof +ping +exec +subscribe" +
		" +config|rewrite +role +publish +info +client|setname +client|kill +script|kill +psync +replconf"
	watcherName = "watcher"
)

// watchedSet is a set whose sentinels log in as watcher, and whose replicas do
// where links is set.
func watchedSet(t *testing.T, links bool, config ...string) *servers.WatchedSet {
	t.Helper()
	o := servers.SentinelOptions{AuthUser: watcherName, AuthPass: "one"}
	o.Options = []servers.RedisOption{servers.WithUsers("default off")}
	o.Nodes = []servers.RedisOption{
		servers.WithUsers(watcherName+" on >one"+watchRules, "default off", "app on >old ~* +@read +@write"),
		servers.WithConfig("min-replicas-max-lag 2"), servers.WithConfig(config...),
	}
	if links {
		o.Nodes = append(o.Nodes, servers.WithConfig("masteruser "+watcherName, "masterauth one"))
	} else {
		o.Nodes = append(o.Nodes, servers.WithUsers("repl on >repl resetkeys resetchannels -@all +psync +replconf +ping"),
			servers.WithConfig("masteruser repl", "masterauth repl"))
	}
	return servers.RedisSentinel(t, o)
}

// bySentinels is a connection that knows nothing but sentinels.
func bySentinels(set *servers.WatchedSet) *connection.Entry {
	e := direct(set.Sentinels...)
	e.Redis.Sentinel = connection.Sentinel{
		Master: servers.RedisMaster,
		Login:  kind.Material{Username: servers.RedisAdmin, Secret: servers.RedisAdminPassword},
	}
	return e
}

var (
	watcherUser = kind.User{Username: watcherName}
	one         = kind.Material{Username: watcherName, Secret: "one"}
	two         = kind.Material{Username: watcherName, Secret: "two-is-the-new-one"}
	bothOfThem  = kind.Change{User: watcherUser, Accept: []kind.Material{two, one}, Lead: two}
	onlyTwo     = kind.Change{User: watcherUser, Accept: []kind.Material{two}, Exclusive: true, Lead: two}
)

// change asks for c once, and returns what nodes and sentinels say that failed.
func change(t *testing.T, e *connection.Entry, c kind.Change) map[string]error {
	t.Helper()
	out := open(e).Change(limited(t), []kind.Change{c})[0]
	require.NoError(t, out.Err)
	failed := map[string]error{}
	for _, n := range out.Nodes {
		if n.Err != nil {
			failed[n.Node] = n.Err
		}
	}
	return failed
}

// eventually repeats c until everybody has done it, as the engine does.
func eventually(t *testing.T, e *connection.Entry, c kind.Change) {
	t.Helper()
	require.EventuallyWithT(t, func(collect *assert.CollectT) {
		require.Empty(collect, change(t, e, c))
	}, time.Minute, 100*time.Millisecond)
}

// dropLinks ends every connection of the sentinels to the nodes.
func dropLinks(t *testing.T, set *servers.WatchedSet) {
	t.Helper()
	for _, n := range set.Nodes {
		_, err := n.Do(t.Context(), "CLIENT", "KILL", "USER", watcherName)
		require.NoError(t, err)
	}
}

// epochs are the failovers that sentinels have seen, and the primaries they name.
func epochs(t *testing.T, set *servers.WatchedSet) []string {
	t.Helper()
	var out []string
	for _, s := range set.Sentinels {
		m, err := s.SentinelMaster(t.Context())
		require.NoError(t, err)
		out = append(out, m["config-epoch"]+" "+m["ip"]+":"+m["port"])
	}
	return out
}

// undisturbed watches the sentinels for a multiple of the time after which they
// take a node for dead, and requires that none of them does.
func undisturbed(t *testing.T, set *servers.WatchedSet) {
	t.Helper()
	require.Never(t, func() bool {
		for _, s := range set.Sentinels {
			m, err := s.SentinelMaster(context.Background())
			if err != nil || strings.Contains(m["flags"], "down") || strings.Contains(m["flags"], "failover") {
				return true
			}
		}
		return false
	}, 3*servers.RedisDownAfter, 100*time.Millisecond)
	require.NoError(t, set.WaitWatched(t.Context()))
}

func write(n *servers.RedisNode) error {
	_, err := n.Do(context.Background(), "SET", "a", "b")
	return err
}

func hasPassword(t *testing.T, n *servers.RedisNode, m kind.Material) bool {
	t.Helper()
	return parseUser(do(t, n, "ACL", "GETUSER", m.Username)).has(hashOf(m.Secret))
}

func TestSentinelsLeadToEveryNode(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	e := bySentinels(set)
	info, err := Verify(limited(t), e)
	require.NoError(t, err)
	require.Equal(t, TopologySentinel, info.Topology)
	require.Len(t, info.Nodes, 3)
	require.Len(t, info.Sentinels, 3, "the others are found by the one that was given")
	require.Empty(t, info.Warnings)
	require.NotContains(t, info.Members, set.Sentinels[0].Addr, "it may watch others as well")

	t.Run("one target", func(t *testing.T) {
		byNode := direct(set.Nodes...)
		known, err := Verify(limited(t), byNode)
		require.NoError(t, err)
		require.Equal(t, known.Identity, info.Identity)
		require.Equal(t, known.RunIDs, info.RunIDs)
		e := *e
		e.Members, byNode.Members = info.Members, known.Members
		require.True(t, e.Overlaps(byNode))
		other := e
		other.Members, other.RunIDs = nil, nil
		settings := *e.Redis
		settings.Sentinel.Master = "another-primary"
		other.Redis = &settings
		require.False(t, e.Overlaps(&other), "the same sentinels watch another primary")
	})
	t.Run("a node that is down", func(t *testing.T) {
		require.NoError(t, set.Nodes[2].Kill())
		answer := open(e).Probe(limited(t), []kind.Question{{User: kind.User{Username: "app"}, Materials: []kind.Material{{Username: "app", Secret: "old"}}}})[0]
		require.NoError(t, answer.Err)
		require.Len(t, answer.Nodes, 3, "sentinels remember it")
		for _, n := range answer.Nodes {
			require.Equal(t, n.Node == set.Nodes[2].Addr, kind.IsUnreachable(n.Err), "%v", n.Err)
		}
		require.NoError(t, set.Nodes[2].Start(t.Context()))
	})
	t.Run("mistakes", func(t *testing.T) {
		for says, mistake := range map[string]func(*connection.Entry){
			"watches no primary of the name": func(e *connection.Entry) { e.Redis.Sentinel.Master = "nobody" },
			"the right sentinel_password":    func(e *connection.Entry) { e.Redis.Sentinel.Login.Secret = "wrong" },
			"sentinel_username and":          func(e *connection.Entry) { e.Redis.Sentinel.Login = kind.Material{} },
			"no sentinel of connection":      func(e *connection.Entry) { e.Redis.Addresses = []string{"127.0.0.1:1"} },
			"or leave sentinel_master out":   func(e *connection.Entry) { e.Redis.Addresses = []string{set.Nodes[0].Addr} },
			"is a sentinel: write":           func(e *connection.Entry) { e.Redis.Sentinel = connection.Sentinel{} },
			"allowed_cidrs":                  func(e *connection.Entry) { e.Redis.AllowedCIDRs = []string{"10.0.0.0/8"} },
		} {
			e := bySentinels(set)
			mistake(e)
			_, err := Verify(limited(t), e)
			require.ErrorContains(t, err, says)
			require.NotContains(t, err.Error(), "wrong ")
		}
	})
}

// A user of an application is nothing to sentinels: one that is down stops no
// rotation of it.
func TestSentinelsDoNotHoldUsers(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	e := bySentinels(set)
	require.NoError(t, set.Sentinels[2].Kill())
	app, fresh := kind.User{Username: "app"}, kind.Material{Username: "app", Secret: "fresh"}
	f := open(e).Preflight(limited(t), []kind.User{app, watcherUser})
	require.NoError(t, f[0].Err)
	require.Empty(t, f[0].Problems)
	require.Contains(t, fmt.Sprint(f[0].Notes), "sentinel "+set.Sentinels[2].Addr)
	require.Len(t, f[0].Nodes, 3)
	require.Len(t, f[1].Problems, 1)
	require.Contains(t, f[1].Problems[0], "sentinel "+set.Sentinels[2].Addr)
	require.Empty(t, change(t, e, kind.Change{User: app, Accept: []kind.Material{fresh}, Exclusive: true, Lead: fresh}))
	require.NoError(t, set.Sentinels[1].Pause())
	t.Cleanup(func() { _ = set.Sentinels[1].Resume() })
	info, err := Verify(limited(t), e)
	require.NoError(t, err, "one that hangs leaves time for the nodes")
	for _, s := range set.Sentinels[1:] {
		require.Contains(t, fmt.Sprint(info.Warnings), "sentinel "+s.Addr)
	}
	require.Empty(t, change(t, e, kind.Change{User: app, Accept: []kind.Material{fresh}, Lead: fresh}))
	require.True(t, kind.IsUnreachable(change(t, e, bothOfThem)["sentinel "+set.Sentinels[1].Addr]))
}

func TestContractBySentinels(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	r := newRig(t, &set.RedisSet)
	e := bySentinels(set)
	r.entry.Redis.Addresses, r.entry.Redis.Sentinel = e.Redis.Addresses, e.Redis.Sentinel
	kindtest.Run(t, r.harness(t, ""))
}

// A sentinel whose password went stale is mended by the next call.
func TestStaleSentinelIsMended(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	e := bySentinels(set)
	stale := set.Sentinels[1]
	do(t, stale, "SENTINEL", "SET", servers.RedisMaster, "auth-user", "nobody", "auth-pass", "wrong")
	require.Eventually(t, func() bool {
		f := open(e).Preflight(limited(t), []kind.User{watcherUser})[0]
		return f.Err == nil && len(f.Problems) == 0 && strings.Contains(fmt.Sprint(f.Notes), "sentinel "+stale.Addr)
	}, time.Minute, 100*time.Millisecond)
	require.Empty(t, change(t, e, kind.Change{User: watcherUser, Accept: []kind.Material{one}, Lead: one}))
	require.NoError(t, set.WaitWatched(t.Context()))
}

// The outages that a user of sentinels and replicas is rotated without.
func TestSentinelUserIsRotated(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, true, "min-replicas-to-write 1")
	e := bySentinels(set)
	f := open(e).Preflight(limited(t), []kind.User{watcherUser})
	require.NoError(t, f[0].Err)
	require.Empty(t, f[0].Problems)
	before := epochs(t, set)

	require.Empty(t, change(t, e, bothOfThem))
	require.Empty(t, change(t, e, onlyTwo))
	require.Empty(t, change(t, e, onlyTwo), "once more is no harm")
	require.NoError(t, set.WaitWatched(t.Context()))

	t.Run("sentinels that reconnect see no failure", func(t *testing.T) {
		dropLinks(t, set)
		undisturbed(t, set)
		require.Equal(t, before, epochs(t, set))
	})
	t.Run("replicas that reconnect take writes", func(t *testing.T) {
		do(t, set.Nodes[0], "CLIENT", "KILL", "TYPE", "replica")
		require.Eventually(t, func() bool { return write(set.Nodes[0]) == nil }, 10*time.Second, 50*time.Millisecond)
		require.EqualValues(t, 2, do(t, set.Nodes[0], "WAIT", 2, 10_000), "replicas that have it")
	})
	t.Run("sentinels that restart log in", func(t *testing.T) {
		for _, s := range set.Sentinels {
			require.NoError(t, s.Restart(t.Context()))
		}
		undisturbed(t, set)
	})
}

// What the driver prevents, without the driver.
func TestSentinelsWithoutTheirPassword(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	before := epochs(t, set)
	for _, n := range set.Nodes {
		do(t, n, "ACL", "SETUSER", watcherName, "resetpass", ">"+two.Secret)
	}
	undisturbed(t, set) // as long as their links live
	do(t, set.Nodes[0], "CLIENT", "KILL", "USER", watcherName)
	require.Eventually(t, func() bool { return !strings.HasSuffix(epochs(t, set)[0], " "+set.Nodes[0].Addr) }, time.Minute, 100*time.Millisecond,
		"a primary that is well is taken for dead: %v", before)
	info, err := set.Nodes[0].Info(t.Context(), "replication")
	require.NoError(t, err)
	require.Equal(t, "master", info["role"], "split brain: nobody can tell it that it is none any more")
}

// And a replica whose masterauth is stale stops writes, where they need one.
func TestReplicasWithoutTheirPassword(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithReplicationUser("repl", "one"),
		servers.WithConfig("min-replicas-to-write 1", "min-replicas-max-lag 2"))
	for _, n := range set.Nodes {
		do(t, n, "ACL", "SETUSER", "repl", "resetpass", ">two")
	}
	require.Eventually(t, func() bool { return write(set.Nodes[0]) == nil }, time.Minute, 50*time.Millisecond)
	do(t, set.Nodes[0], "CLIENT", "KILL", "TYPE", "replica")
	require.Eventually(t, func() bool {
		err := write(set.Nodes[0])
		return replyCode(err) == "NOREPLICAS"
	}, time.Minute, 100*time.Millisecond)
}

// One sentinel that is down keeps the old password, for it comes back with it.
func TestOneSentinelIsDown(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, true)
	e := bySentinels(set)
	last := set.Sentinels[2]
	require.NoError(t, last.Kill())
	for _, c := range []kind.Change{bothOfThem, onlyTwo, {User: watcherUser, Refuse: []kind.Material{one}, Lead: two}} {
		failed := change(t, e, c)
		require.True(t, kind.IsUnreachable(failed["sentinel "+last.Addr]), "%v", failed)
		require.Equal(t, refuses(c), len(failed) > 1, "nodes say that they did not refuse it: %v", failed)
		for name, err := range failed {
			require.False(t, kind.IsDefinite(err), "%s: %v", name, err)
			require.NotContains(t, err.Error(), two.Secret)
		}
		for _, n := range set.Nodes {
			require.True(t, hasPassword(t, n, one))
			require.True(t, hasPassword(t, n, two))
		}
	}
	require.NoError(t, last.Start(t.Context()))
	eventually(t, e, onlyTwo)
	require.False(t, hasPassword(t, set.Nodes[0], one))
	dropLinks(t, set)
	undisturbed(t, set)
}

// The primary dies between the two calls of a rotation.
func TestFailoverWhileRotating(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, true)
	e := bySentinels(set)
	require.Empty(t, change(t, e, bothOfThem))
	require.NoError(t, set.WaitWatched(t.Context()))
	old := set.Nodes[0]
	require.NoError(t, old.Kill())
	failed := change(t, e, onlyTwo)
	require.NotEmpty(t, failed[old.Addr])
	require.ErrorContains(t, failed["sentinel "+set.Sentinels[0].Addr], "was left as it is")
	require.True(t, hasPassword(t, set.Nodes[1], one), "nobody knows yet which node is the primary: %v", failed)

	require.Eventually(t, func() bool {
		m, err := set.Sentinels[0].SentinelMaster(context.Background())
		return err == nil && m["flags"] == "master" && m["ip"]+":"+m["port"] != old.Addr
	}, time.Minute, 100*time.Millisecond)
	for _, n := range set.Nodes[1:] {
		require.True(t, hasPassword(t, n, two))
	}
	require.NoError(t, old.Start(t.Context()))
	eventually(t, e, onlyTwo)
	for _, n := range set.Nodes {
		require.False(t, hasPassword(t, n, one))
		require.True(t, hasPassword(t, n, two))
	}
	require.NoError(t, set.WaitWatched(t.Context()))
	require.NoError(t, set.WaitReplicating(t.Context()))
}

// Sentinels that a connection does not know are not locked out by it.
func TestSentinelsThatNobodyNamed(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	e := direct(set.Nodes...)
	require.Contains(t, fmt.Sprint(open(e).Preflight(limited(t), []kind.User{watcherUser})[0].Problems), "and sentinel_master")
	failed := change(t, e, onlyTwo)
	require.Len(t, failed, 3)
	require.True(t, hasPassword(t, set.Nodes[0], one))
}

// Where nobody shows which user the sentinels log in as, those that could be it
// keep their passwords, until it is named.
func TestSentinelUserIsNotSeen(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, false)
	for _, n := range set.Nodes {
		do(t, n, "ACL", "SETUSER", "rot", "on", ">rot", "-@all", "+info", "+config", "+acl|getuser", "+acl|setuser")
	}
	e := bySentinels(set)
	e.Admin = connection.NewAdmin(kind.Material{Username: "rot", Secret: "rot"})
	app, fresh := kind.User{Username: "app"}, kind.Material{Username: "app", Secret: "fresh"}
	f := open(e).Preflight(limited(t), []kind.User{app, watcherUser})
	require.Empty(t, f[0].Problems, "it can do nothing that a sentinel has to")
	require.Contains(t, fmt.Sprint(f[1].Problems), "CLIENT LIST")
	require.Empty(t, change(t, e, kind.Change{User: app, Accept: []kind.Material{fresh}, Exclusive: true, Lead: fresh}))
	require.Len(t, change(t, e, onlyTwo), 3)
	require.True(t, hasPassword(t, set.Nodes[0], one))

	e.Redis.Sentinel.AuthUser = watcherName
	require.Empty(t, open(e).Preflight(limited(t), []kind.User{watcherUser})[0].Problems)
	require.Empty(t, change(t, e, onlyTwo))
	dropLinks(t, set)
	undisturbed(t, set)
}

// ruleOf is what the documentation gives to the user name.
func ruleOf(t *testing.T, name string) []any {
	t.Helper()
	doc, err := os.ReadFile("../../../docs/reference/redis.md")
	require.NoError(t, err)
	rule := regexp.MustCompile(`(?m)^ACL SETUSER ` + name + ` (.*)$`).FindSubmatch(bytes.ReplaceAll(doc, []byte("\\\n"), nil))
	require.NotNil(t, rule)
	var out []any
	for word := range strings.FieldsSeq(string(rule[1])) {
		out = append(out, word)
	}
	return out
}

func TestLeastPrivilegeAtSentinels(t *testing.T) {
	t.Parallel()
	set := watchedSet(t, true)
	for _, n := range set.Nodes {
		do(t, n, append(append([]any{"ACL", "SETUSER", "vault"}, ruleOf(t, "vault")...), "+config|set", "+client|list")...)
	}
	for _, s := range set.Sentinels {
		do(t, s, append([]any{"ACL", "SETUSER", "engine"}, ruleOf(t, "engine")...)...)
	}
	e := bySentinels(set)
	e.Admin = connection.NewAdmin(kind.Material{Username: "vault", Secret: "PASSWORD"})
	e.Redis.Sentinel.Login = kind.Material{Username: "engine", Secret: "PASSWORD"}
	info, err := Verify(limited(t), e)
	require.NoError(t, err)
	require.Empty(t, info.Warnings)
	require.Empty(t, open(e).Preflight(limited(t), []kind.User{watcherUser})[0].Problems)
	require.Empty(t, change(t, e, onlyTwo))

	for _, s := range set.Sentinels {
		do(t, s, "ACL", "SETUSER", "engine", "-sentinel|set")
	}
	require.Contains(t, fmt.Sprint(open(e).Preflight(limited(t), []kind.User{watcherUser})[0].Problems), "+sentinel|set")
	for name, err := range change(t, e, kind.Change{User: watcherUser, Accept: []kind.Material{one}, Exclusive: true, Lead: one}) {
		require.Equal(t, strings.HasPrefix(name, "sentinel "), kind.IsDefinite(err), "%s: %v", name, err)
	}
	require.True(t, hasPassword(t, set.Nodes[0], two), "not refused")
}

func TestSentinelsOverTLS(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	secure := servers.WithTLS(ca, "127.0.0.1")
	set := servers.RedisSentinel(t, servers.SentinelOptions{
		AuthUser: watcherName, AuthPass: "one",
		Options: []servers.RedisOption{secure},
		Nodes: []servers.RedisOption{
			secure, servers.WithUsers(watcherName + " on >one" + watchRules), servers.WithConfig("masteruser "+watcherName, "masterauth one"),
		},
	})
	e := bySentinels(set)
	e.Redis.TLS, e.TLS = true, trust(t, ca)
	info, err := Verify(limited(t), e)
	require.NoError(t, err)
	require.Len(t, info.Sentinels, 3)
	require.Empty(t, change(t, e, onlyTwo))
	dropLinks(t, set)
	undisturbed(t, set)
}
