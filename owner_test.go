package harmonyflow

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/apikey"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// A replica that is down vanishes from its primary's INFO: only what roles
// remember keeps a rotation from passing without it.
func TestOnlyWhoSaysSoForgetsNodes(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	set := servers.RedisReplicated(t, 1, users(1), servers.WithReplicationUser("replica", "replica-secret-1"))
	primary, replica := set.Nodes[0], set.Nodes[1]
	m.connect("cache", primary.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	require.Len(t, m.role("app").Nodes, 2)
	require.NoError(t, replica.Kill())
	require.Eventually(t, func() bool {
		info, err := primary.Info(t.Context(), "replication")
		return err == nil && info["connected_slaves"] == "0"
	}, patience, glance)

	would := func() string {
		return m.must("rotate/redis/app", map[string]any{"dry_run": true}).data["redis/app"].(string)
	}
	require.Contains(t, would(), "would fail")
	for name, edit := range map[string]map[string]any{
		"who may use it":     {"allowed_roles": "app,web"},
		"its users":          {"allowed_usernames": "user-*"},
		"the same addresses": {"addresses": primary.Addr, "password": servers.RedisAdminPassword, "topology": "auto", "allowed_cidrs": ""},
		"untried":            {"verify_connection": false, "persistence": "auto"},
		"forget_nodes=false": {"forget_nodes": false},
	} {
		r := m.must("connections/cache", edit)
		require.NotContains(t, strings.Join(r.warnings, " "), "forgotten", name)
		require.Contains(t, would(), "would fail", name)
	}

	r := m.must("connections/cache", map[string]any{"forget_nodes": true})
	require.Contains(t, strings.Join(r.warnings, " "), "are forgotten; where one comes back it may accept old passwords: "+replica.Addr)
	require.NotContains(t, would(), "would fail")
	r = m.must("connections/cache", map[string]any{"forget_nodes": true, "verify_connection": false})
	require.Contains(t, strings.Join(r.warnings, " "), "down now are forgotten")
}

// A role writer must not become admin through the admin user of another
// connection to the same server, and not replace what nobody named.
func TestNoRoleOfAnotherConnectionsAdmin(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	const secret = "admin-two-secret"
	server := servers.Redis(t, users(1), servers.WithUsers("admin2 on >"+secret+" ~* +@all", "admin3 on >"+secret+" ~* +@all"))
	m.connect("cache", server.Addr, nil)
	m.connect("second", proxy(t, server.Addr).Addr(), map[string]any{"username": "admin2", "password": secret})
	m.connect("untried", server.Addr, map[string]any{"username": "admin3", "password": secret, "verify_connection": false})
	for _, user := range []string{"admin2", "admin3"} {
		before := aclList(t, server)
		for _, more := range []map[string]any{{"initial_password": secret}, {"overwrite_existing": true}} {
			m.must("connections/cache", map[string]any{"allowed_usernames": "*"})
			data := map[string]any{"kind": "redis", "connection": "cache", "username": user}
			maps.Copy(data, more)
			r := m.write("roles/evil", data)
			require.Equal(t, http.StatusBadRequest, r.code, "%s %v", user, more)
			require.Contains(t, r.message, "admin user of connection")
		}
		require.Equal(t, before, aclList(t, server))
	}

	// A password that nobody gave may be replaced where the connection names its user.
	r := m.must("connections/cache", map[string]any{"allowed_usernames": ""})
	require.Contains(t, strings.Join(r.warnings, " "), "allowed_usernames is empty")
	app := map[string]any{"kind": "redis", "connection": "cache", "username": "user-0", "overwrite_existing": true}
	r = m.write("roles/app", app)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "allowed_usernames")
	r = m.must("connections/cache", map[string]any{"allowed_usernames": "user-0"})
	require.NotContains(t, strings.Join(r.warnings, " "), "allowed_usernames")
	m.must("roles/app", app)
}

// A connection must not log in as a user that a role rotates: it would be locked
// out when the role retires.
func TestNoAdminThatARoleRotates(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	const secret = "password-boss-1"
	server := servers.Redis(t, servers.WithUsers("boss on >"+secret+" ~* +@all"))
	m.connect("cache", server.Addr, nil)
	m.must("roles/boss", map[string]any{"kind": "redis", "connection": "cache", "username": "boss", "initial_password": secret})
	boss := map[string]any{
		"type": "redis", "addresses": server.Addr, "username": "boss", "password": secret, "allowed_roles": "*",
	}
	for _, name := range []string{"cache", "new"} {
		r := m.write("connections/"+name, boss)
		require.Equal(t, http.StatusBadRequest, r.code, name)
		require.Contains(t, r.message, `rotated by role "boss"`)
	}
	boss["verify_connection"] = false
	r := m.write("connections/cache", boss)
	require.Equal(t, http.StatusBadRequest, r.code, "its target is known")
	boss["addresses"] = proxy(t, server.Addr).Addr()
	m.must("connections/untried", boss)
	r = m.write("roles/other", map[string]any{"kind": "redis", "connection": "untried", "username": "unused"})
	require.Equal(t, http.StatusBadRequest, r.code, r.message)
	require.Contains(t, r.message, `rotated by role "boss"`)

	require.Equal(t, http.StatusNoContent, m.delete("roles/boss").code)
	boss["verify_connection"] = true
	m.must("connections/cache", boss)
	r = m.write("roles/boss", map[string]any{"kind": "redis", "connection": "cache", "username": "boss", "initial_password": secret})
	require.Equal(t, http.StatusBadRequest, r.code)
}

// However the two race, a user is rotated by a role or logs in for a connection,
// not both.
func TestAdminAndRoleRace(t *testing.T) {
	t.Parallel()
	const secret = "password-boss-1"
	server := servers.Redis(t, servers.WithUsers("boss on >"+secret+" ~* +@all"))
	m := newMount(t)
	m.connect("cache", server.Addr, nil)
	for i := range 20 {
		m.connect("second", server.Addr, nil)
		var role, conn reply
		var wg sync.WaitGroup
		wg.Go(func() {
			role = m.write("roles/boss", map[string]any{"kind": "redis", "connection": "cache", "username": "boss", "initial_password": secret})
		})
		wg.Go(func() {
			<-time.After(time.Duration(i) * time.Millisecond) // they meet at another point each time
			conn = m.write("connections/second", map[string]any{"username": "boss", "password": secret})
		})
		wg.Wait()
		require.False(t, role.code < 300 && conn.code < 300, "both")
		m.delete("roles/boss")
	}
}

// One server behind two addresses has one owner for a user, also after it has
// restarted, and also where the two were once taken for two.
func TestOneOwnerByEveryAddress(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(t *testing.T, m *mount, server *servers.RedisNode, other *servers.Proxy){
		"at once": func(t *testing.T, m *mount, _ *servers.RedisNode, other *servers.Proxy) {
			m.connect("other", other.Addr(), nil)
			require.Equal(t, m.read("connections/cache").data["identity"], m.read("connections/other").data["identity"])
		},
		"after a restart": func(t *testing.T, m *mount, server *servers.RedisNode, other *servers.Proxy) {
			require.NoError(t, server.Restart(t.Context()))
			m.connect("other", other.Addr(), nil)
		},
		"once taken for two": func(t *testing.T, m *mount, server *servers.RedisNode, other *servers.Proxy) {
			m.connect("other", other.Addr(), map[string]any{"verify_connection": false})
			e, err := m.b.connections.Get(t.Context(), "other")
			require.NoError(t, err)
			e.Identity, e.Members = "redis:another", []string{other.Addr()}
			require.NoError(t, m.b.connections.Put(t.Context(), e))
			require.NoError(t, server.Restart(t.Context()))
		},
		"with roles of its own": func(t *testing.T, m *mount, server *servers.RedisNode, other *servers.Proxy) {
			m.connect("other", other.Addr(), nil)
			m.adopt("mine", "other", 1, nil)
			e, err := m.b.connections.Get(t.Context(), "other")
			require.NoError(t, err)
			e.Identity = "redis:another"
			require.NoError(t, m.b.connections.Put(t.Context(), e))
			m.alter("mine", func(r *rotation.Role) { r.Target = "redis:another" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t)
			server := servers.Redis(t, users(2))
			m.connect("cache", server.Addr, nil)
			m.adopt("app", "cache", 0, nil)
			between(t, m, server, proxy(t, server.Addr))
			m.must("connections/other", map[string]any{"allowed_usernames": "user-*"})
			r := m.write("roles/app2", map[string]any{"kind": "redis", "connection": "other", "username": "user-0", "overwrite_existing": true})
			require.Equal(t, http.StatusConflict, r.code, r.message)
			require.Contains(t, r.message, `belongs to role "app"`)
			require.True(t, canLogIn(t, server, "user-0", m.creds("app")["password"].(string)))
		})
	}
}

// A target that hangs holds up the roles of others once, and not for long.
func TestLookingAtOthersIsBounded(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	hanging := proxy(t, servers.Redis(t).Addr)
	m.connect("hanging", hanging.Addr(), nil)
	hanging.Blackhole(true)
	heard := hanging.Capture()
	r := m.adopt("first", "cache", 0, nil)
	require.Less(t, r.took, kind.CallTimeout, "a look is shorter than a call")
	require.NotEmpty(t, heard())
	heard = hanging.Capture()
	m.adopt("second", "cache", 1, nil)
	require.Empty(t, heard(), "it is left alone for a while")
	hanging.Heal()
}

// What a connection takes back counts at the next rotation, not only for new
// roles; what runs may end.
func TestRevokedRolesDoNotRotate(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.must("config", map[string]any{"grace_period": "1h"})
	m.adopt("app", "cache", 0, nil)
	m.adopt("kept", "cache", 1, nil)
	running := id(m.must("rotate/redis/app", nil))

	revoke := func(fields map[string]any, says string) {
		m.must("connections/cache", fields)
		for _, path := range []string{"rotate/redis/app", "reconcile/redis/app"} {
			r := m.write(path, nil)
			require.Equal(t, http.StatusBadRequest, r.code, path)
			require.Contains(t, r.message, says, path)
		}
	}
	const byRole, byUser = `does not allow role "app"`, `does not allow user "user-0"`
	revoke(map[string]any{"allowed_roles": "kept"}, byRole)
	m.must("retire/redis/app", nil)
	require.Equal(t, "completed", m.ended(running)["state"], "what runs may end")
	served := m.creds("app")["password"].(string)
	require.True(t, canLogIn(t, server, "user-0", served))
	require.False(t, canLogIn(t, server, "user-0", password(0)))

	revoke(map[string]any{"allowed_roles": "*", "allowed_usernames": "user-1"}, byUser)
	r := m.write("rollback/redis/app", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, byUser)
	r = m.must("rotate/redis/app", map[string]any{"dry_run": true})
	require.Contains(t, r.data["redis/app"], byUser)

	// In a batch it fails alone.
	r = m.must("rotate/redis", nil)
	require.Contains(t, r.data["redis/app"], byUser)
	require.Contains(t, r.data["redis/kept"], "promoted")

	// And so it does when its time has come.
	m.alter("app", func(r *rotation.Role) { r.Schedule.Period, r.Next = 24*time.Hour, time.Now().Add(-time.Second) })
	m.restart()
	require.Eventually(t, func() bool {
		last := m.role("app").LastRun
		return last != nil && last.Trigger == rotation.Scheduled && last.State == rotation.Failed && strings.Contains(last.Error, byUser)
	}, patience, glance)
	require.Equal(t, served, m.creds("app")["password"])
	require.True(t, canLogIn(t, server, "user-0", served))

	// The way back of a rotation that runs is no new one.
	m.must("connections/cache", map[string]any{"allowed_usernames": ""})
	m.must("rotate/redis/app", nil)
	m.must("connections/cache", map[string]any{"allowed_roles": "kept"})
	m.must("rollback/redis/app", nil)
	require.Equal(t, served, m.creds("app")["password"])
}

// A change of the configuration is not lost under another one.
func TestConfigChangesAreNotLost(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range 100 {
		m.must("config", map[string]any{"freeze": false})
		var wg sync.WaitGroup
		for _, change := range []map[string]any{{"freeze": true}, {"workers": 8 + i%5}, {"keep_versions": 3 + i%5}} {
			wg.Go(func() { m.must("config", change) })
		}
		wg.Go(func() { m.read("config") })
		wg.Wait()
		got := m.read("config").data
		require.Equal(t, true, got["freeze"])
		require.EqualValues(t, 8+i%5, got["workers"])
		require.EqualValues(t, 3+i%5, got["keep_versions"])
	}
}

// slowReads answers reads of a key with what it held when they began.
type slowReads struct {
	logical.Storage
	key           string
	read, release chan struct{}
}

func (s *slowReads) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	e, err := s.Storage.Get(ctx, key)
	if key == s.key {
		s.read <- struct{}{}
		<-s.release
	}
	return e, err
}

// Who read the configuration before a change does not have the engine go by it.
func TestOldConfigIsNotRemembered(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("config", map[string]any{"workers": 7})
	inner := m.storage.Storage
	slow := &slowReads{Storage: inner, key: "config", read: make(chan struct{}), release: make(chan struct{})}
	m.b.Cleanup(context.Background())
	m.storage.Storage = slow
	e := rotation.New(rotation.Options{Storage: m.storage})
	loaded := make(chan error)
	go func() { _, err := e.LoadConfig(context.Background()); loaded <- err }()
	<-slow.read
	changed := make(chan error)
	go func() {
		changed <- e.ChangeConfig(context.Background(), func(c *rotation.Config) error { c.Workers = 9; return nil })
	}()
	<-slow.read
	slow.release <- struct{}{} // one of the two readers: both have read 7
	slow.release <- struct{}{}
	require.NoError(t, <-changed)
	require.NoError(t, <-loaded)
	require.Equal(t, 9, e.Config().Workers)
	m.storage.Storage = inner
	m.start()
}

// Vault's storage refuses keys with two dots in a row.
func TestNamesThatStorageRefuses(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, path := range []string{"roles/a..b", "connections/a..b", "documents/a..b", "documents/x/a..b"} {
		data := map[string]any{"kind": "api-key", "type": "redis", "addresses": "127.0.0.1:1", "password": "an-admin-password"}
		if strings.HasPrefix(path, "roles/") {
			data = map[string]any{"kind": "api-key"}
		}
		if strings.HasPrefix(path, "documents/") {
			data = map[string]any{"allowed_roles": "*"}
		}
		require.Equal(t, http.StatusBadRequest, m.write(path, data).code, path)
		require.Equal(t, http.StatusBadRequest, m.read(path).code, path)
		require.Equal(t, http.StatusBadRequest, m.delete(path).code, path)
	}
	for path, data := range map[string]map[string]any{
		"roles/fills":    {"kind": "api-key", "document": "a..b", "field": "key"},
		"documents/a..b": {"allowed_roles": "*"},
	} {
		r := m.write(path, data)
		require.Equal(t, http.StatusBadRequest, r.code)
		require.Contains(t, r.message, "two dots in a row", "not what storage says")
	}
	for _, path := range []string{"creds/a..b", "data/a..b", "data/x/a..b", "metadata/a..b", "verify/api-key/a..b"} {
		require.Equal(t, http.StatusBadRequest, m.read(path).code, path)
	}
	for _, path := range []string{"metadata/a..b/", "metadata/../"} {
		require.Less(t, m.list(path).code, http.StatusInternalServerError, path)
		require.GreaterOrEqual(t, m.list(path).code, http.StatusBadRequest, path)
	}
	for _, path := range []string{"rotate/api-key/a..b", "rollback/api-key/a..b", "retire/api-key/a..b", "reconcile/api-key/a..b"} {
		require.Equal(t, http.StatusBadRequest, m.write(path, nil).code, path)
	}
	require.Less(t, m.read("rotations/a..b").code, http.StatusInternalServerError)
	require.Less(t, m.write("cancel/a..b", nil).code, http.StatusInternalServerError)
}

// What creds/ shows beside the previous secret cannot be its name.
func TestPreviousFieldIsNoFieldOfCreds(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	path := m.b.pathCreds()[0]
	fields := slices.Sorted(maps.Keys(path.Operations[logical.ReadOperation].Properties().Responses[http.StatusOK][0].Fields))
	require.NotEmpty(t, fields)
	for _, field := range fields {
		require.Error(t, apikey.Kind{}.Complete(&kind.Spec{PreviousField: field}), field)
	}
	require.NoError(t, apikey.Kind{}.Complete(&kind.Spec{PreviousField: "OLD"}))
}

// A setting that no node can follow is told when it is given.
func TestPersistenceThatCannotBe(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	r := m.connect("cache", server.Addr, map[string]any{"persistence": "acl-save"})
	require.Contains(t, strings.Join(r.warnings, " "), "has no aclfile")
}
