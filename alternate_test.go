package harmonyflow

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// turns makes a role whose users a and b take turns: a is in use, and b does not
// exist.
func (m *mount) turns(server *servers.RedisNode, more map[string]any) reply {
	m.Helper()
	m.connect("cache", server.Addr, map[string]any{"allowed_usernames": "a,b"})
	data := map[string]any{
		"kind": "redis", "connection": "cache", "usernames": "a,b", "initial_password": "password-of-a-initial",
	}
	for k, v := range more {
		data[k] = v
	}
	return m.write("roles/app", data)
}

const userA = "a on >password-of-a-initial ~app:* &news +@read +@write"

func TestAlternate(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA))
	r := m.turns(server, nil)
	require.Equal(t, http.StatusOK, r.code, r.message)
	shown := m.read("roles/app").data
	require.Equal(t, "alternate", shown["strategy"])
	require.Equal(t, []string{"a", "b"}, shown["usernames"])
	require.Equal(t, true, m.read("verify/redis/app").data["ok"], "that b does not exist yet is no fault")
	require.Equal(t, "a", m.creds("app")["username"])

	// b is made like a, and both are accepted.
	first := m.must("rotate/redis/app", nil)
	require.Equal(t, "grace", first.data["state"])
	creds := m.creds("app")
	require.Equal(t, "b", creds["username"])
	require.Equal(t, "a", creds["previous_username"])
	require.Equal(t, "password-of-a-initial", creds["previous_password"])
	require.True(t, canLogIn(t, server, "b", creds["password"].(string)))
	require.True(t, canLogIn(t, server, "a", "password-of-a-initial"))
	rules := rulesOf(t, server)
	require.Equal(t, rules["a"], rules["b"])
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])

	// Then a has no password at all.
	m.must("retire/redis/app", nil)
	require.False(t, canLogIn(t, server, "a", "password-of-a-initial"))
	require.Empty(t, hashesOf(t, server, "a"))
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])

	// Back by a new rotation, and forward again by reversing it.
	back := m.must("rollback/redis/app", nil)
	require.Equal(t, "a", m.creds("app")["username"])
	require.Equal(t, "password-of-a-initial", m.creds("app")["password"])
	m.must("rollback/redis/app", nil)
	require.Equal(t, "rolled_back", m.ended(id(back))["state"])
	require.Equal(t, creds["password"], m.creds("app")["password"])
	require.Empty(t, hashesOf(t, server, "a"))
	require.True(t, canLogIn(t, server, "b", creds["password"].(string)))
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])
}

// rulesOf are the rights of every user.
func rulesOf(t *testing.T, n *servers.RedisNode) map[string]string {
	t.Helper()
	list, err := n.Do(context.Background(), "ACL", "LIST")
	require.NoError(t, err)
	rules := map[string]string{}
	for _, line := range list.([]any) {
		_, rights, _ := strings.Cut(line.(string), " ~")
		rules[strings.Fields(line.(string))[1]] = rights
	}
	return rules
}

func hashesOf(t *testing.T, n *servers.RedisNode, user string) []string {
	t.Helper()
	got, err := n.Do(context.Background(), "ACL", "GETUSER", user)
	require.NoError(t, err)
	var out []string
	list := got.([]any)
	i := slices.Index(list, any("passwords"))
	require.GreaterOrEqual(t, i, 0)
	for _, h := range list[i+1].([]any) {
		out = append(out, h.(string))
	}
	return out
}

// TestAlternateIsRefused: what would surprise consumers, or the users' owners.
func TestAlternateIsRefused(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA, "b on >somebody-uses-this ~app:* &news +@read +@write"))
	refused := func(code int, says string, more map[string]any) {
		t.Helper()
		r := m.turns(server, more)
		require.Equal(t, code, r.code, r.message)
		require.Contains(t, r.message, says)
		require.Equal(t, http.StatusNotFound, m.read("roles/app").code)
	}
	refused(http.StatusConflict, `user "b" has a password already`, nil)
	refused(http.StatusBadRequest, "two different users", map[string]any{"usernames": "a"})
	refused(http.StatusBadRequest, "two different users", map[string]any{"usernames": "a,a"})
	refused(http.StatusBadRequest, "give usernames", map[string]any{"username": "a"})
	refused(http.StatusBadRequest, "allowed_usernames", map[string]any{"usernames": "a,c"})
	refused(http.StatusBadRequest, "admin", map[string]any{"usernames": "a," + servers.RedisAdmin})
	refused(http.StatusBadRequest, "username_field is needed", map[string]any{"document": "web", "field": "password"})
	refused(http.StatusBadRequest, "a password without its user is a trap", map[string]any{
		"document": "web", "field": "password", "username_field": "user", "previous_field": "old",
	})
	_, err := server.Do(context.Background(), "ACL", "SETUSER", "b", "resetpass", "+@admin")
	require.NoError(t, err)
	refused(http.StatusConflict, "user b differs from a, whose place it is to take", nil)
	_, err = server.Do(context.Background(), "ACL", "SETUSER", "b", "-@admin", "nocommands", "+@read", "+@write")
	require.NoError(t, err)
	r := m.turns(server, nil)
	require.Equal(t, http.StatusOK, r.code, r.message)

	// A user belongs to one role, whichever of the two it is.
	for _, user := range []string{"a", "b"} {
		r := m.write("roles/other", map[string]any{"kind": "redis", "connection": "cache", "username": user, "overwrite_existing": true})
		require.Equal(t, http.StatusConflict, r.code, r.message)
		require.Contains(t, r.message, `role "app"`)
	}
	r = m.write("roles/app", map[string]any{"usernames": "a,c"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "cannot be changed")

	// A difference that comes later is found before anything is changed, and mended
	// on request.
	_, err = server.Do(context.Background(), "ACL", "SETUSER", "a", "+acl|whoami")
	require.NoError(t, err)
	r = m.write("rotate/redis/app", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "lacks")
	require.Equal(t, false, m.read("verify/redis/app").data["ok"])
	require.Equal(t, "completed", m.ended(id(m.must("reconcile/redis/app", nil)))["state"])
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])
	m.must("rotate/redis/app", nil)
	require.Equal(t, "b", m.creds("app")["username"])
}

// TestOverwritingBoth: what the second user had is taken away, if that was asked
// for.
func TestOverwritingBoth(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA, "b on >somebody-uses-this ~app:* &news +@read +@write"))
	r := m.turns(server, map[string]any{"overwrite_existing": true})
	require.Equal(t, http.StatusOK, r.code, r.message)
	require.False(t, canLogIn(t, server, "b", "somebody-uses-this"))
	require.True(t, canLogIn(t, server, "a", "password-of-a-initial"))
}

// TestAlternateInADocument: user and password are shown together, in one write.
func TestAlternateInADocument(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA))
	r := m.turns(server, map[string]any{"document": "web", "field": "PASSWORD", "username_field": "USER", "grace_period": "0s"})
	require.Equal(t, http.StatusOK, r.code, r.message)
	for _, user := range []string{"b", "a", "b"} {
		m.ended(id(m.must("rotate/redis/app", nil)))
		shown := m.read("data/web").data["data"].(map[string]any)
		require.Equal(t, user, shown["USER"])
		require.True(t, canLogIn(t, server, user, shown["PASSWORD"].(string)))
	}
}

// TestDroppedUsersComeBack: reconcile makes a user again that somebody dropped,
// with the rights that it had; by itself where the role says so.
func TestDroppedUsersComeBack(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA))
	m.connect("cache", server.Addr, nil)
	m.must("roles/app", map[string]any{"kind": "redis", "connection": "cache", "username": "a", "initial_password": "password-of-a-initial"})
	before := rulesOf(t, server)
	drop := func() {
		t.Helper()
		_, err := server.Do(context.Background(), "ACL", "DELUSER", "a")
		require.NoError(t, err)
		data := m.read("verify/redis/app").data
		require.Equal(t, false, data["ok"])
		require.Contains(t, data["summary"], "does not exist")
	}
	drop()
	require.Equal(t, http.StatusBadRequest, m.write("rotate/redis/app", nil).code)
	require.Equal(t, "completed", m.ended(id(m.must("reconcile/redis/app", nil)))["state"])
	require.Equal(t, before, rulesOf(t, server))
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])

	m.must("roles/app", map[string]any{"auto_reconcile": true})
	drop()
	m.b.Cleanup(context.Background())
	m.alter("app", func(r *rotation.Role) { r.LookAt = time.Now().Add(-time.Second) })
	m.start()
	require.Eventually(t, func() bool { return canLogIn(t, server, "a", "password-of-a-initial") }, patience, 100*time.Millisecond)
	require.Eventually(t, func() bool {
		r := m.role("app")
		return r.Run == nil && r.LookAt.After(time.Now()) && r.LastRun.State == rotation.Completed && r.LastRun.Trigger == rotation.Reconcile
	}, patience, glance)

	// A look that finds nothing leaves nothing behind.
	last := m.role("app").LastRun.Rotation
	m.b.Cleanup(context.Background())
	m.alter("app", func(r *rotation.Role) { r.LookAt = time.Now().Add(-time.Second) })
	m.start()
	require.Eventually(t, func() bool { return m.role("app").LookAt.After(time.Now()) }, patience, glance)
	require.Equal(t, last, m.role("app").LastRun.Rotation)
}

// TestPreviousSessions: who is still logged in with the previous version is told,
// and thrown out if the role says so.
func TestPreviousSessions(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers(userA+" +client|setname"))
	r := m.turns(server, map[string]any{"close_connections": true})
	require.Equal(t, http.StatusOK, r.code, r.message)
	c := server.Client().Conn()
	defer func() { _ = c.Close() }()
	require.NoError(t, c.AuthACL(context.Background(), "a", "password-of-a-initial").Err())
	require.NoError(t, c.ClientSetName(context.Background(), "forgotten").Err())
	m.must("rotate/redis/app", nil)
	data := m.read("verify/redis/app").data
	require.EqualValues(t, 1, data["previous_sessions"])
	require.Equal(t, `1 session of user "a": 127.0.0.1 (forgotten)`, data["sessions"])
	require.NoError(t, c.Exists(context.Background(), "app:x").Err())
	told := m.ended(id(m.must("retire/redis/app", nil)))
	require.Contains(t, strings.Join(told["timeline"].([]string), "\n"), "closed")
	require.Error(t, c.Exists(context.Background(), "app:x").Err())
	require.EqualValues(t, 0, m.read("verify/redis/app").data["previous_sessions"])
}

// TestSwapOnRedis: the old password is refused as soon as the new one is accepted,
// where that is wanted.
func TestSwapOnRedis(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"strategy": "swap"})
	require.Equal(t, "completed", m.must("rotate/redis/app", nil).data["state"])
	require.False(t, canLogIn(t, server, "user-0", password(0)))
	require.True(t, canLogIn(t, server, "user-0", m.creds("app")["password"].(string)))
	require.NotContains(t, m.creds("app"), "previous_password")
}

// TestPasswordsThatEnd: the server ends them, and never one that is served.
func TestPasswordsThatEnd(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	n := database(t, "app")
	require.Equal(t, http.StatusOK, m.connectDatabase("db", n.Addr, nil).code)
	role := map[string]any{
		"kind": "postgresql", "connection": "db", "username": "app", "initial_password": "first-secret-of-app", "valid_until": "72h",
	}
	r := m.write("roles/app", role)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "nothing rotates by itself")
	role["rotation_period"] = "48h"
	r = m.write("roles/app", role)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "valid_until is 72h0m0s")
	role["rotation_period"] = "24h"
	m.must("roles/app", role)
	m.must("rotate/postgresql/app", nil)
	until, err := n.Text(t.Context(), "SELECT round(extract(epoch from rolvaliduntil - now()) / 3600)::text FROM pg_roles WHERE rolname = 'app'")
	require.NoError(t, err)
	require.Equal(t, "72", until)
	require.True(t, entersDatabase(t, n, "app", m.creds("app")["password"]))

	// One that was about to end is dated anew when it is put back.
	require.NoError(t, n.Exec(t.Context(), "ALTER ROLE app VALID UNTIL '2020-01-01'"))
	require.Equal(t, false, m.read("verify/postgresql/app").data["ok"])
	require.Equal(t, "completed", m.ended(id(m.must("reconcile/postgresql/app", nil)))["state"])
	require.True(t, entersDatabase(t, n, "app", m.creds("app")["password"]))
	m.must("rollback/postgresql/app", nil)
	require.True(t, entersDatabase(t, n, "app", "first-secret-of-app"))
}
