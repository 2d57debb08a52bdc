package redis

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestReadClientList(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	peers := parseClients("id=3 addr=10.0.0.7:5000 laddr=127.0.0.1:6379 fd=8 name=worker age=60 idle=0 flags=N db=0 cmd=get user=app redir=-1\n" +
		"id=4 addr=[2001:db8::1]:5001 fd=9 name= age=5 flags=P cmd=subscribe user=app\n" +
		"id=5 addr=10.0.0.8:5002 name= age=9 flags=S cmd=replconf user=app\n" +
		"id=6 addr=10.0.0.9:6379 name= age=9 flags=M cmd=ping user=app\n" +
		"id=7 addr=10.0.0.1:5003 name= age=0 flags=N cmd=client|list user=app\n" +
		"id=8 addr=10.0.0.1:5004 name= age=1 flags=N cmd=get user=other\n")
	of := func(user, admin string) (ids string) {
		for _, p := range peers {
			if p.of(user, admin) {
				ids += p.id
			}
		}
		return ids
	}
	require.Equal(t, "347", of("app", "admin"), "no replication")
	require.Equal(t, "34", of("app", "app"), "nor who asks")
	require.Equal(t, kind.Session{Node: "n", Client: "10.0.0.7", Name: "worker", Opened: now.Add(-time.Minute)}, peers[0].session("n", now))
	require.Equal(t, "2001:db8::1", peers[1].session("n", now).Client)

	// An age of 60 seconds is anything from 60 to 61.
	require.True(t, peers[0].before(now.Add(-time.Minute+time.Second), now))
	require.True(t, peers[0].before(now.Add(-time.Minute), now))
	require.False(t, peers[0].before(now.Add(-time.Minute-time.Second), now))
}

// Who may not see clients changes passwords all the same.
func TestClosingNeedsRightsOfItsOwn(t *testing.T) {
	t.Parallel()
	const rights = " resetkeys resetchannels -@all +acl|getuser +acl|setuser +config|get +config|rewrite +info +cluster|nodes"
	n := servers.Redis(t, servers.WithUsers("blind on >blind"+rights, "looks on >looks"+rights+" +client|list", "app on >old"))
	m := kind.Material{Username: "app", Secret: "old"}
	for admin, missing := range map[string]string{"blind": "CLIENT LIST", "looks": "CLIENT KILL"} {
		e := direct(n)
		e.Admin = connection.NewAdmin(kind.Material{Username: admin, Secret: admin})
		u := kind.User{Username: "app"}
		alive := (&rig{set: &servers.RedisSet{Nodes: []*servers.RedisNode{n}}}).hold(t, m)
		out := open(e).Change(limited(t), []kind.Change{{User: u, Accept: []kind.Material{m}, Exclusive: true, CloseBefore: time.Now()}})[0]
		require.NoError(t, out.Nodes[0].Err)
		require.Len(t, out.Notes, 1)
		require.Contains(t, out.Notes[0], missing)
		require.Contains(t, out.Notes[0], "ACL SETUSER "+admin+" +client|list +client|kill")
		require.True(t, alive())

		a := open(e).(kind.Observer).Sessions(limited(t), []kind.SessionsQuestion{{User: u, Before: time.Now()}})[0]
		if admin == "blind" {
			require.True(t, kind.IsDefinite(a.Err), "%v", a.Err)
		} else {
			require.NoError(t, a.Err)
			require.NotEmpty(t, a.Sessions)
		}
	}
}

// What nodes replicate over stays, whoever it is logged in as.
func TestReplicationIsNotClosed(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithReplicationUser("repl", "one"))
	target := open(direct(set.Nodes...))
	link := func() (ids []string) {
		for line := range strings.Lines(text(do(t, set.Nodes[0], "CLIENT", "LIST", "TYPE", "replica"))) {
			ids = append(ids, strings.Fields(line)[0])
		}
		return ids
	}
	was := link()
	require.Len(t, was, 1)
	lead := kind.Material{Username: "repl", Secret: "two"}
	u := kind.User{Username: "repl"}
	out := target.Change(limited(t), []kind.Change{{
		User: u, Accept: []kind.Material{lead}, Exclusive: true, Lead: lead, CloseBefore: time.Now().Add(time.Hour),
	}})[0]
	for _, n := range out.Nodes {
		require.NoError(t, n.Err)
	}
	require.Empty(t, out.Notes)
	require.Equal(t, was, link())
	a := target.(kind.Observer).Sessions(limited(t), []kind.SessionsQuestion{{User: u, Before: time.Now().Add(time.Hour)}})[0]
	require.NoError(t, a.Err)
	require.Empty(t, a.Sessions)
}

// One node that is down makes the number unknown, and hides no session of others.
func TestSessionsOfSomeNodes(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithUsers("app on >old"))
	target := open(direct(set.Nodes...))
	first := &rig{set: &servers.RedisSet{Nodes: set.Nodes[:1]}}
	first.hold(t, kind.Material{Username: "app", Secret: "old"})
	require.NoError(t, set.Nodes[1].Kill())
	u := kind.User{Username: "app", Known: set.Addrs()}
	a := target.(kind.Observer).Sessions(limited(t), []kind.SessionsQuestion{{User: u, Before: time.Now()}})[0]
	require.ErrorContains(t, a.Err, set.Nodes[1].Addr)
	require.True(t, kind.IsUnreachable(a.Err))
	require.Len(t, a.Sessions, 1)
	require.Equal(t, set.Nodes[0].Addr, a.Sessions[0].Node)
}
