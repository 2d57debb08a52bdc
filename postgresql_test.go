package harmonyflow

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// database starts a PostgreSQL with an admin that is no superuser, and users
// whose password is first-secret-of- and their name.
func database(t testing.TB, users ...string) *servers.PostgresNode {
	t.Helper()
	n := servers.Postgres(t)
	statements := []string{"CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'vault-secret-of-db'"}
	for _, u := range users {
		statements = append(statements, "CREATE ROLE "+u+" LOGIN PASSWORD 'first-secret-of-"+u+"'")
	}
	require.NoError(t, n.Exec(t.Context(), statements...))
	return n
}

// connectDatabase makes a connection to a PostgreSQL at address.
func (m *mount) connectDatabase(name, address string, more map[string]any) reply {
	m.Helper()
	data := map[string]any{
		"type": "postgresql", "connection_url": "postgresql://{{username}}:{{password}}@" + address + "/postgres?sslmode=disable",
		"username": "vault", "password": "vault-secret-of-db", "allowed_roles": "*",
	}
	for k, v := range more {
		data[k] = v
	}
	return m.write("connections/"+name, data)
}

func entersDatabase(t testing.TB, n *servers.PostgresNode, user string, password any) bool {
	t.Helper()
	c, err := n.Login(t.Context(), user, password.(string))
	if err != nil {
		require.ErrorContains(t, err, "28P01")
		return false
	}
	require.NoError(t, c.Close(context.WithoutCancel(t.Context())))
	return true
}

func TestPostgreSQL(t *testing.T) {
	t.Parallel()
	n := database(t, "app", "web", "shop")
	t.Run("rotations", func(t *testing.T) { postgreSQLRotates(t, n) })
	t.Run("clients that read again", func(t *testing.T) { postgreSQLClientsReadAgain(t, n) })
	t.Run("refused connections", func(t *testing.T) { postgreSQLConnectionsAreRefused(t, n) })
}

// TestOldVersionsCostNoLogins: a role that keeps five versions is rotated with as many
// logins as one that keeps two, and each rotation sees a refusal of what it retires. Who puts
// a role right sees them all refused once more.
func TestOldVersionsCostNoLogins(t *testing.T) {
	t.Parallel()
	n := database(t, "app")
	m := newMount(t)
	require.Less(t, m.connectDatabase("db", n.Addr, nil).code, 300)
	m.must("roles/app", map[string]any{
		"kind": "postgresql", "connection": "db", "username": "app", "initial_password": "first-secret-of-app", "grace_period": "0s",
	})
	refused := func(path string) int {
		t.Helper()
		before, err := n.Log()
		require.NoError(t, err)
		m.must(path, nil)
		m.idle("app")
		after, err := n.Log()
		require.NoError(t, err)
		return strings.Count(string(after[len(before):]), `password authentication failed for user "app"`)
	}
	for range 6 {
		require.Equal(t, 2, refused("rotate/postgresql/app"), "that of a password that nobody has, and that of the retired one")
	}
	require.GreaterOrEqual(t, refused("reconcile/postgresql/app"), 5)
}

func postgreSQLRotates(t *testing.T, n *servers.PostgresNode) {
	t.Helper()
	m := newMount(t)
	p := proxy(t, n.Addr)
	r := m.connectDatabase("db", p.Addr(), nil)
	require.Equal(t, http.StatusOK, r.code, r.message)
	require.Equal(t, "a primary", r.data["summary"])
	require.Contains(t, r.data["nodes"].([]string)[0], "primary, PostgreSQL ")
	shown := m.read("connections/db").data
	require.Equal(t, "vault", shown["username"])
	require.NotContains(t, shown, "password")
	require.True(t, strings.HasPrefix(shown["identity"].(string), "postgresql:"))

	role := map[string]any{"kind": "postgresql", "connection": "db", "username": "app"}
	refused := m.write("roles/app", role)
	require.Equal(t, http.StatusConflict, refused.code, refused.message)
	require.Contains(t, refused.message, "initial_password")
	role["initial_password"] = "not-the-secret-of-app"
	require.Contains(t, m.write("roles/app", role).message, "initial_password")
	role["initial_password"] = "first-secret-of-app"
	m.must("roles/app", role)
	require.Equal(t, "first-secret-of-app", m.creds("app")["password"])
	require.Equal(t, "app", m.creds("app")["username"])
	require.Equal(t, "swap", m.read("roles/app").data["strategy"])

	before, err := n.Log()
	require.NoError(t, err)
	m.must("rotate/postgresql/app", nil)
	second := m.creds("app")
	require.EqualValues(t, 2, second["version"])
	require.NotContains(t, second, "previous_password", "one password a user")
	require.True(t, entersDatabase(t, n, "app", second["password"]))
	require.False(t, entersDatabase(t, n, "app", "first-secret-of-app"))
	log, err := n.Log()
	require.NoError(t, err)
	require.Contains(t, string(log[len(before):]), `ALTER ROLE "app" PASSWORD 'SCRAM-SHA-256$4096:`)
	require.NotContains(t, string(log[len(before):]), second["password"])

	m.must("rollback/postgresql/app", nil)
	require.EqualValues(t, 3, m.creds("app")["version"])
	require.Equal(t, "first-secret-of-app", m.creds("app")["password"])
	require.True(t, entersDatabase(t, n, "app", "first-secret-of-app"))
	require.False(t, entersDatabase(t, n, "app", second["password"]))

	// The server has applied the change, and the plugin dies before it hears of it.
	p.LoseReplyTo("ALTER ROLE")
	m.b.answerWithin = shortly
	r = m.must("rotate/postgresql/app", nil)
	require.Eventually(t, func() bool {
		ttl, ok := m.creds("app")["ttl"]
		return ok && fmt.Sprint(ttl) == "0"
	}, patience, glance, "what is served may be refused by now")
	require.EqualValues(t, 3, m.creds("app")["version"])
	m.b.Cleanup(context.Background())
	p.Heal()
	m.start()
	require.Equal(t, string(rotation.Completed), m.ended(id(r))["state"])
	fourth := m.creds("app")
	require.EqualValues(t, 4, fourth["version"])
	require.True(t, entersDatabase(t, n, "app", fourth["password"]))

	// What was changed by hand is refused until somebody says what counts.
	require.NoError(t, n.Exec(t.Context(), "ALTER ROLE app PASSWORD 'by-hand-for-app'"))
	r = m.write("rotate/postgresql/app", nil)
	require.Contains(t, r.message, "reconcile/postgresql/app")
	m.must("reconcile/postgresql/app", nil)
	require.True(t, entersDatabase(t, n, "app", fourth["password"]))
	require.False(t, entersDatabase(t, n, "app", "by-hand-for-app"))
}

// A client that reads creds/ again when its login is refused gets in, and it
// takes as long as the engine's own proof and one write.
func postgreSQLClientsReadAgain(t *testing.T, n *servers.PostgresNode) {
	t.Helper()
	m := newMount(t)
	require.Equal(t, http.StatusOK, m.connectDatabase("db", n.Addr, nil).code)
	m.must("roles/web", map[string]any{"kind": "postgresql", "connection": "db", "username": "web", "initial_password": "first-secret-of-web"})
	ctx, stop := context.WithCancel(t.Context())
	var logins, refused int
	var longest time.Duration
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var since time.Time
		for ctx.Err() == nil {
			logins++
			switch in := entersDatabase(t, n, "web", m.creds("web")["password"]); {
			case in && !since.IsZero():
				longest, since = max(longest, time.Since(since)), time.Time{}
			case !in:
				refused++
				if since.IsZero() {
					since = time.Now()
				}
			}
		}
	}()
	const rotations = 5
	for range rotations {
		m.must("rotate/postgresql/web", nil)
	}
	stop()
	<-ended
	require.EqualValues(t, rotations+1, m.creds("web")["version"])
	require.True(t, entersDatabase(t, n, "web", m.creds("web")["password"]))
	require.Less(t, longest, 10*time.Second)
	t.Logf("%d rotations, %d logins, %d refused; who read again got in after at most %s", rotations, logins, refused, longest.Round(time.Millisecond))
}

func TestPostgreSQLThatIsKilled(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	n := database(t, "app")
	require.Equal(t, http.StatusOK, m.connectDatabase("db", n.Addr, nil).code)
	m.must("roles/app", map[string]any{"kind": "postgresql", "connection": "db", "username": "app", "initial_password": "first-secret-of-app"})
	require.NoError(t, n.Kill())
	m.b.answerWithin = shortly
	r := m.must("rotate/postgresql/app", nil)
	require.NoError(t, n.Start(t.Context()))
	require.Equal(t, string(rotation.Completed), m.ended(id(r))["state"])
	require.True(t, entersDatabase(t, n, "app", m.creds("app")["password"]))
}

func postgreSQLConnectionsAreRefused(t *testing.T, n *servers.PostgresNode) {
	t.Helper()
	m := newMount(t)
	for name, c := range map[string]struct {
		more map[string]any
		says string
	}{
		"a password in the URL":  {map[string]any{"connection_url": "postgresql://vault:vault-secret-of-db@db/postgres"}, "holds a user"},
		"a file":                 {map[string]any{"connection_url": "postgresql://db/postgres?sslkey=/etc/passwd"}, "tls_key"},
		"another type's field":   {map[string]any{"addresses": "db:6379"}, "addresses"},
		"a wrong password":       {map[string]any{"password": "wrong-secret-of-db"}, "refuses the login"},
		"no TLS there":           {map[string]any{"connection_url": "postgresql://" + n.Addr + "/postgres"}, "does not speak TLS"},
		"trust in what is plain": {map[string]any{"tls_skip_verify": true}, "sslmode=disable"},
	} {
		r := m.connectDatabase("db", n.Addr, c.more)
		require.Equal(t, http.StatusBadRequest, r.code, name)
		require.Contains(t, r.message, c.says, name)
	}
	require.Equal(t, http.StatusOK, m.connectDatabase("db", n.Addr, nil).code)
	r := m.write("connections/db", map[string]any{"connection_url": "postgresql://elsewhere/postgres"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "give its password in the same request")
	r = m.write("roles/own", map[string]any{"kind": "postgresql", "connection": "db", "username": "vault", "initial_password": "vault-secret-of-db"})
	require.Contains(t, r.message, "admin user")
	// Two connections to one server, and one user.
	require.Equal(t, http.StatusOK, m.connectDatabase("again", proxy(t, n.Addr).Addr(), nil).code)
	require.Equal(t, m.read("connections/db").data["identity"], m.read("connections/again").data["identity"])
	m.must("roles/app", map[string]any{"kind": "postgresql", "connection": "db", "username": "shop", "initial_password": "first-secret-of-shop"})
	r = m.write("roles/other", map[string]any{"kind": "postgresql", "connection": "again", "username": "shop", "initial_password": "first-secret-of-shop"})
	require.Equal(t, http.StatusConflict, r.code, r.message)
}
