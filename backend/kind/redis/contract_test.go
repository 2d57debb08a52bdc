package redis

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) { leaks.Main(m) }

func TestContract(t *testing.T) {
	slow := servers.WithConfig("slowlog-log-slower-than 0", "slowlog-max-len 1024")
	one := func(opts ...servers.RedisOption) func(*testing.T) *servers.RedisSet {
		return func(t *testing.T) *servers.RedisSet {
			return &servers.RedisSet{Nodes: []*servers.RedisNode{servers.Redis(t, append(opts, slow)...)}}
		}
	}
	ca := authority(t)
	for name, c := range map[string]struct {
		start    func(*testing.T) *servers.RedisSet
		username string
	}{
		"tls": {func(t *testing.T) *servers.RedisSet {
			return servers.RedisReplicated(t, 1, slow, servers.WithTLS(ca, "127.0.0.1"))
		}, ""},
		"config file": {one(), ""},
		"acl file":    {one(servers.WithACLFile()), ""},
		"requirepass": {one(servers.WithConfig("requirepass first")), "default"},
		"replicas":    {func(t *testing.T) *servers.RedisSet { return servers.RedisReplicated(t, 2, slow) }, ""},
		"cluster":     {func(t *testing.T) *servers.RedisSet { return servers.RedisCluster(t, slow) }, ""},
		"link default": {func(t *testing.T) *servers.RedisSet {
			return servers.RedisReplicated(t, 1, servers.WithRequirePass("first"))
		}, "default"},
		"link user": {func(t *testing.T) *servers.RedisSet {
			return servers.RedisReplicated(t, 1, servers.WithACLFile(), servers.WithReplicationUser("repl", "first"))
		}, "repl"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of the time is spent waiting for nodes that hang
			r := newRig(t, c.start(t))
			if name == "tls" {
				r.entry.Redis.TLS, r.entry.TLS = true, trust(t, ca)
			}
			h := r.harness(t, c.username)
			if r.entry.Redis.TLS { // the wire shows nothing
				h.ChangeRequest, h.Capture = "", nil
			}
			kindtest.Run(t, h)
		})
	}
}

// rig is running servers, each behind a proxy, and a connection to them.
type rig struct {
	set     *servers.RedisSet
	proxies []*servers.Proxy
	entry   *connection.Entry
	cluster bool
}

func newRig(t *testing.T, set *servers.RedisSet) *rig {
	t.Helper()
	r := &rig{set: set, entry: &connection.Entry{
		Name: "test", Type: connection.TypeRedis, AddressMap: map[string]string{},
		Redis: &connection.Redis{Topology: TopologyAuto, Persistence: PersistAuto},
		Admin: connection.NewAdmin(kind.Material{Username: servers.RedisAdmin, Secret: servers.RedisAdminPassword}),
	}}
	for _, n := range set.Nodes {
		p, err := servers.NewProxy(n.Addr)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, p.Close()) })
		r.proxies = append(r.proxies, p)
		r.entry.AddressMap[n.Addr] = p.Addr()
	}
	r.entry.Redis.Addresses = []string{r.proxies[0].Addr()}
	info, err := set.Nodes[0].Info(t.Context(), "cluster")
	require.NoError(t, err)
	r.cluster = info["cluster_enabled"] == "1"
	return r
}

func (r *rig) target() kind.Target {
	return kindtest.Watch(Open(func(context.Context) (*connection.Entry, error) { return r.entry, nil }))
}

func (r *rig) harness(t *testing.T, username string) kindtest.Harness {
	t.Helper()
	wrong := *r.entry
	wrong.Admin = connection.NewAdmin(kind.Material{Username: servers.RedisAdmin, Secret: "not-the-password"})
	h := kindtest.Harness{
		Target:   r.target(),
		Network:  r,
		Username: username,
		NewUser: func(t testing.TB, name string, accepted ...kind.Material) {
			rules := []any{"on", "resetpass"}
			for _, m := range accepted {
				rules = append(rules, ">"+m.Secret)
			}
			r.setUser(t, name, rules...)
			if username != "" && len(accepted) > 0 {
				r.link(t, username, accepted[0].Secret)
			}
		},
		OpenUser:      func(t testing.TB, name string) { r.setUser(t, name, "nopass") },
		WrongAdmin:    Open(func(context.Context) (*connection.Entry, error) { return &wrong, nil }),
		ChangeRequest: "SETUSER",
		Settle:        r.settle,
		Hold:          r.hold,
	}
	h.Admin, h.AdminTarget = r.secondAdmin(t), r.targetAs
	if username == "" {
		h.Grant = func(t testing.TB, name string) {
			r.setUser(t, name, "+@hash", "~other:*", "&news.*", "(%R~more:* +get)")
		}
		h.Drop = r.drop
	}
	if len(r.set.Nodes) == 1 || username == "" {
		h.Capture = r.capture
	}
	for _, n := range r.set.Nodes {
		h.Nodes = append(h.Nodes, n)
	}
	return h
}

// setUser gives the user to every node, and saves it as a real one would be.
func (r *rig) setUser(t testing.TB, name string, rules ...any) {
	t.Helper()
	r.acl(t, append([]any{"SETUSER", name}, rules...)...)
}

// drop takes the user from every node.
func (r *rig) drop(t testing.TB, name string) {
	t.Helper()
	r.acl(t, "DELUSER", name)
}

func (r *rig) acl(t testing.TB, args ...any) {
	t.Helper()
	for _, n := range r.set.Nodes {
		_, err := n.Do(context.Background(), append([]any{"ACL"}, args...)...)
		require.NoError(t, err)
		if _, err := n.Do(context.Background(), "ACL", "SAVE"); err != nil {
			_, err = n.Do(context.Background(), "CONFIG", "REWRITE")
			require.NoError(t, err)
		}
	}
}

// hold logs in with m at the last node. What that user may not do is an answer, too.
func (r *rig) hold(t testing.TB, m kind.Material) func() bool {
	t.Helper()
	n := r.set.Nodes[len(r.set.Nodes)-1]
	to := peer{node: n.Addr}
	if r.entry != nil && r.entry.Redis.TLS {
		var err error
		to.tls, err = r.entry.TLS.Config("127.0.0.1")
		require.NoError(t, err)
	}
	s, err := dial(t.Context(), t.Context(), to, []string{n.Addr}) // which never dials again
	require.NoError(t, err)
	t.Cleanup(s.close)
	require.NoError(t, s.run(t.Context(), []command{{"AUTH", m.Username, m.Secret}})[0].err)
	return func() bool {
		err := s.run(t.Context(), []command{{"PING"}})[0].err
		return err == nil || isReply(err)
	}
}

// minimalAdmin are the rights that are enough, as the reference says.
var minimalAdmin = []any{
	"resetkeys", "resetchannels", "-@all", "+info", "+cluster|nodes",
	"+config|get", "+config|rewrite", "+acl|getuser", "+acl|setuser", "+acl|save",
}

// secondAdmin makes an admin user with those rights alone.
func (r *rig) secondAdmin(t *testing.T) kind.Material {
	t.Helper()
	m := kind.Material{Username: "rotator", Secret: "old-password-of-the-admin"}
	r.setUser(t, m.Username, append([]any{"on", ">" + m.Secret}, minimalAdmin...)...)
	return m
}

// targetAs is the same servers, for who has one of candidates.
func (r *rig) targetAs(candidates ...kind.Material) kind.Target {
	entry := *r.entry
	entry.Admin = connection.NewAdmin(candidates[0])
	for _, m := range candidates[1:] {
		entry.Admin.Add(m, "", time.Time{})
	}
	return kindtest.Watch(Open(func(context.Context) (*connection.Entry, error) { return &entry, nil }))
}

// link sets masterauth where nodes log in to each other as user.
func (r *rig) link(t testing.TB, user, secret string) {
	t.Helper()
	if len(r.set.Nodes) == 1 {
		return
	}
	for _, n := range r.set.Nodes {
		_, err := n.Do(context.Background(), "CONFIG", "SET", "masterauth", secret)
		require.NoError(t, err)
		_, err = n.Do(context.Background(), "CONFIG", "REWRITE")
		require.NoError(t, err)
	}
	r.settle(t)
}

func (r *rig) settle(t testing.TB) {
	t.Helper()
	if r.cluster {
		require.NoError(t, r.set.WaitCluster(context.Background()))
		return
	}
	require.NoError(t, r.set.WaitReplicating(context.Background()))
}

func (r *rig) Blackhole(on bool) {
	for _, p := range r.proxies {
		p.Blackhole(on)
	}
}

func (r *rig) LoseReplyTo(text string) {
	for _, p := range r.proxies {
		p.LoseReplyTo(text)
	}
}

func (r *rig) Heal() {
	for _, p := range r.proxies {
		p.Heal()
	}
}

// capture records what goes over the wire, what MONITOR shows of it and what
// stands in the slow log afterwards.
func (r *rig) capture(t testing.TB) func() []byte {
	t.Helper()
	var stops []func() []byte
	for i, n := range r.set.Nodes {
		_, err := n.Do(t.Context(), "SLOWLOG", "RESET")
		require.NoError(t, err)
		stops = append(stops, r.proxies[i].Capture(), monitor(t, n), func() []byte {
			entries, err := n.Do(t.Context(), "SLOWLOG", "GET", 1024)
			require.NoError(t, err)
			return fmt.Append(nil, entries)
		})
	}
	return func() []byte {
		var all [][]byte
		for _, stop := range stops {
			all = append(all, stop())
		}
		return slices.Concat(all...)
	}
}

func monitor(t testing.TB, n *servers.RedisNode) func() []byte {
	t.Helper()
	c, err := net.Dial("tcp", n.Addr)
	require.NoError(t, err)
	_, err = fmt.Fprintf(c, "AUTH %s %s\r\nMONITOR\r\n", servers.RedisAdmin, servers.RedisAdminPassword)
	require.NoError(t, err)
	_, err = io.ReadFull(c, make([]byte, len("+OK\r\n+OK\r\n")))
	require.NoError(t, err)
	var seen bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&seen, c)
	}()
	return func() []byte {
		_ = c.Close()
		<-done
		return seen.Bytes()
	}
}
