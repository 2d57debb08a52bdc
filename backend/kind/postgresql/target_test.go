package postgresql

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// create makes a user of the shared server with a password.
func create(t testing.TB, username, secret string, options ...string) {
	t.Helper()
	verifier, err := verifierOf(secret)
	require.NoError(t, err)
	add(t, username, "LOGIN PASSWORD '"+verifier+"' "+strings.Join(options, " "))
}

// add makes a user of the shared server, for the length of a test.
func add(t testing.TB, username, options string, before ...string) {
	t.Helper()
	name := pgx.Identifier{username}.Sanitize()
	require.NoError(t, shared(t).Exec(t.Context(), append(before, "CREATE ROLE "+name+" "+options)...))
	t.Cleanup(func() { require.NoError(t, shared(t).Exec(context.Background(), "DROP ROLE "+name)) })
}

func TestNamesThatNeedQuoting(t *testing.T) {
	names := []string{
		"we ird", `"quo"te`, `'single'`, `back\slash`, "UPPER", "Größe-東京", "user", "current_user", "all", "select", "$1", "a;b--c",
		`x" PASSWORD 'y`, "%s%I", "$hf$", "app@example.org", "-dash", strings.Repeat("n", maxUsername),
	}
	const before, after = "old-of-this-name", "new-of-this-name"
	var users []kind.User
	var questions []kind.Question
	var changes []kind.Change
	for _, name := range names {
		spec := kind.Spec{Username: name}
		require.NoError(t, Kind{}.Complete(&spec))
		create(t, name, before)
		u := kind.User{Role: "r", Username: name}
		users = append(users, u)
		questions = append(questions, kind.Question{User: u, Materials: []kind.Material{material(name, before), material(name, after)}})
		changes = append(changes, only(name, after))
	}
	target := targetOf(sharedEntry(t))
	accept := func(old, new bool) {
		for i, a := range target.Probe(within10s(t), questions) {
			require.NoError(t, a.Err)
			require.Len(t, a.Nodes, 1)
			require.NoError(t, a.Nodes[0].Err, names[i])
			require.Equal(t, []bool{old, new}, a.Nodes[0].Accepts, names[i])
		}
	}
	for i, f := range target.Preflight(within10s(t), users) {
		require.NoError(t, f.Err)
		require.Empty(t, f.Problems, names[i])
		require.True(t, f.HasCredential, names[i])
	}
	log, err := shared(t).Log()
	require.NoError(t, err)
	accept(true, false)
	for i, o := range target.Change(within10s(t), changes) {
		require.NoError(t, o.Err)
		require.Len(t, o.Nodes, 1)
		require.NoError(t, o.Nodes[0].Err, names[i])
	}
	accept(false, true)
	logged, err := shared(t).Log()
	require.NoError(t, err)
	require.Contains(t, string(logged[len(log):]), `ALTER ROLE "we ird" PASSWORD 'SCRAM-SHA-256$4096:`)
	require.NotContains(t, string(logged[len(log):]), "-of-this-name")
}

func TestWhatALoginDoesNotProve(t *testing.T) {
	target := targetOf(sharedEntry(t))
	for name, c := range map[string]struct {
		options string
		accepts bool
		extra   int
		problem string // "" where a proof is one
	}{
		"trusted":     {"", true, -1, "any password, or with none"},
		"plain":       {"", false, 0, "the password itself"},
		"ruled-out":   {"", false, 0, "pg_hba.conf"},
		"no-login":    {"NOLOGIN", false, 0, "LOGIN"},
		"expired":     {"VALID UNTIL '2020-01-01'", false, 0, "expired"},
		"limited":     {"CONNECTION LIMIT 0", true, 0, ""}, // the password was right
		"unlimited":   {"VALID UNTIL 'infinity'", true, 0, ""},
		"ends-later":  {"VALID UNTIL '2999-01-01'", true, 0, ""},
		"in-this-one": {"", true, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			create(t, name, "its-password")
			if c.options != "" {
				require.NoError(t, shared(t).Exec(t.Context(), "ALTER ROLE \""+name+"\" "+c.options))
			}
			a := probeOne(t, target, name, "its-password")
			require.NoError(t, a.Err)
			require.Equal(t, []bool{c.accepts}, a.Accepts)
			require.Equal(t, c.extra, a.Extra)
			f := preflight(t, target, name)
			require.NoError(t, f.Err)
			if c.problem == "" {
				require.Empty(t, a.Problem)
				require.Empty(t, f.Problems)
				refused := probeOne(t, target, name, "not-its-password")
				require.Equal(t, []bool{false}, refused.Accepts)
			} else {
				require.Contains(t, a.Problem, c.problem)
				require.Len(t, f.Problems, 1)
				require.Contains(t, f.Problems[0], c.problem)
			}
			require.Equal(t, name == "ends-later", len(f.Notes) == 1, "%v", f.Notes)
		})
	}
}

func TestADatabaseThatIsNotForTheUser(t *testing.T) {
	node := shared(t)
	create(t, "outsider", "its-password")
	_, err := node.Text(t.Context(), "CREATE DATABASE private")
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := node.Text(context.Background(), "DROP DATABASE private WITH (FORCE)")
		require.NoError(t, err)
	})
	require.NoError(t, node.Exec(t.Context(), "REVOKE CONNECT ON DATABASE private FROM PUBLIC", "GRANT CONNECT ON DATABASE private TO rotator"))
	e := sharedEntry(t)
	e.PostgreSQL.URL = strings.Replace(e.PostgreSQL.URL, "/postgres?", "/private?", 1)
	require.Equal(t, []bool{true, false}, probeOne(t, targetOf(e), "outsider", "its-password", "another").Accepts)

	e.PostgreSQL.URL = strings.Replace(e.PostgreSQL.URL, "/private?", "/missing?", 1)
	_, err = Verify(within10s(t), e)
	require.ErrorContains(t, err, `no database "missing"`)
	require.True(t, kind.IsDefinite(err))
}

// A password that was stored as MD5 is adopted, and is one of SCRAM afterwards.
func TestMD5IsReplaced(t *testing.T) {
	node := shared(t)
	add(t, "stored-md5", "LOGIN PASSWORD 'its-password'", "SET password_encryption = 'md5'")
	target := targetOf(sharedEntry(t))
	a := probeOne(t, target, "stored-md5", "its-password", "another-password")
	require.Equal(t, []bool{true, false}, a.Accepts)
	require.Empty(t, a.Problem)
	require.Zero(t, a.Extra)
	mustChange(t, target, only("stored-md5", "new-password-of-md5"))
	require.Equal(t, []bool{false, true}, probeOne(t, target, "stored-md5", "its-password", "new-password-of-md5").Accepts)
	stored, err := node.Text(t.Context(), "SELECT rolpassword FROM pg_authid WHERE rolname = 'stored-md5'")
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(stored, "SCRAM-SHA-256$4096:"))
}

func TestWhatTheAdminMayNotChange(t *testing.T) {
	create(t, "is-super", "its-password", "SUPERUSER")
	create(t, "is-replicating", "its-password", "REPLICATION")
	create(t, "powerless", "powerless-secret")
	e := sharedEntry(t)
	target := targetOf(e)
	for _, name := range []string{"is-super", "is-replicating"} {
		f := preflight(t, target, name)
		require.Len(t, f.Problems, 1)
		require.Contains(t, f.Problems[0], "superuser")
		for _, n := range change(within10s(t), t, target, only(name, "a-new-password")) {
			require.True(t, kind.IsDefinite(n.Err), "%v", n.Err)
		}
		require.Equal(t, []bool{true}, probeOne(t, target, name, "its-password").Accepts)
	}
	require.NotEmpty(t, preflight(t, target, "rotator").Problems)

	e.Admin = connection.NewAdmin(material("powerless", "powerless-secret"))
	info, err := Verify(within10s(t), e)
	require.NoError(t, err, "users may change themselves")
	require.Len(t, info.Warnings, 1)
	require.Contains(t, info.Warnings[0], "CREATEROLE")

	e.Admin = connection.NewAdmin(material(servers.PostgresAdmin, servers.PostgresAdminPassword))
	f := preflight(t, target, "is-super")
	require.Empty(t, f.Problems)
	mustChange(t, target, only("is-super", "a-new-password"))
}

func TestRightsByVersion(t *testing.T) {
	rotator := facts{admin: "rotator", createRole: true, number: 160003}
	plain := row{exists: true, canLogin: true}
	with := func(r row, change func(*row)) row { change(&r); return r }
	for name, c := range map[string]struct {
		facts facts
		row   row
		says  string
	}{
		"16 without admin option": {rotator, plain, "ADMIN OPTION"},
		"16 with it":              {rotator, with(plain, func(r *row) { r.adminOption = true }), ""},
		"16 replication":          {rotator, with(plain, func(r *row) { r.adminOption, r.replication = true, true }), "REPLICATION"},
		"16 bypassrls":            {rotator, with(plain, func(r *row) { r.adminOption, r.bypass = true, true }), "BYPASSRLS"},
		"15 without admin option": {facts{admin: "rotator", createRole: true, number: 150018}, plain, ""},
		"15 bypassrls":            {facts{admin: "rotator", createRole: true, number: 150018}, with(plain, func(r *row) { r.bypass = true }), ""},
		"superuser":               {facts{admin: "root", super: true, number: 160003}, with(plain, func(r *row) { r.super = true }), ""},
		"nothing":                 {facts{admin: "rotator", number: 160003}, plain, "CREATEROLE"},
	} {
		t.Run(name, func(t *testing.T) {
			n := &node{door: door{node: "db:5432"}, facts: c.facts}
			if c.says == "" {
				require.Empty(t, n.forbids(kind.User{Username: "app"}, c.row))
			} else {
				require.Contains(t, n.forbids(kind.User{Username: "app"}, c.row), c.says)
			}
		})
	}
}

func TestARefusalAloneLeavesOtherPasswords(t *testing.T) {
	create(t, "undone", "first-password")
	target := targetOf(sharedEntry(t))
	c := kind.Change{User: kind.User{Role: "r", Username: "undone"}, Refuse: []kind.Material{material("undone", "failed-password")}}
	mustChange(t, target, c)
	require.Equal(t, []bool{true}, probeOne(t, target, "undone", "first-password").Accepts)
	mustChange(t, target, only("undone", "failed-password"))
	mustChange(t, target, c)
	require.Equal(t, []bool{false, false}, probeOne(t, target, "undone", "first-password", "failed-password").Accepts)
	has, err := shared(t).Text(t.Context(), "SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'undone'")
	require.NoError(t, err)
	require.Equal(t, "true", has)

	two := only("undone", "one-password")
	two.Accept = append(two.Accept, material("undone", "another-password"))
	for _, n := range change(within10s(t), t, target, two) {
		require.True(t, kind.IsDefinite(n.Err))
	}
	for _, n := range change(within10s(t), t, target, only("undone", "")) {
		require.True(t, kind.IsDefinite(n.Err))
	}
}

// What an admin sees who may read verifiers.
func TestAnUnknownPasswordIsCounted(t *testing.T) {
	create(t, "drifted", "its-password")
	add(t, "without", "LOGIN")
	e := sharedEntry(t)
	require.Zero(t, probeOne(t, targetOf(e), "drifted", "another").Extra, "it may have none")
	require.True(t, preflight(t, targetOf(e), "without").HasCredential, "nobody can tell")
	e.Admin = connection.NewAdmin(material(servers.PostgresAdmin, servers.PostgresAdminPassword))
	require.Equal(t, 1, probeOne(t, targetOf(e), "drifted", "another").Extra)
	require.Zero(t, probeOne(t, targetOf(e), "drifted", "another", "its-password").Extra)
	require.Zero(t, probeOne(t, targetOf(e), "without", "another").Extra)
	require.False(t, preflight(t, targetOf(e), "without").HasCredential)
	require.True(t, preflight(t, targetOf(e), "drifted").HasCredential)
}

// TestConcludedRefusals: a user has one password, so that the login that shows it answers
// for others. Of what is not to be concluded a refusal is told only where there was one.
func TestConcludedRefusals(t *testing.T) {
	const name = "kept-many"
	create(t, name, "the-third-of-them")
	all := []string{"the-first-of-them", "the-second-of-them", "the-third-of-them", "the-fourth-of-them", "the-fifth-of-them"}
	target := targetOf(sharedEntry(t))
	ask := func(concluded, secrets []string) (kind.NodeAnswer, int) {
		t.Helper()
		q := kind.Question{User: kind.User{Role: "r", Username: name}}
		for _, s := range secrets {
			q.Materials = append(q.Materials, material(name, s))
		}
		for _, s := range concluded {
			q.Concluded = append(q.Concluded, material(name, s))
		}
		before, err := shared(t).Log()
		require.NoError(t, err)
		answers := target.Probe(within10s(t), []kind.Question{q})
		require.NoError(t, answers[0].Err)
		require.Len(t, answers[0].Nodes, 1)
		require.NoError(t, answers[0].Nodes[0].Err)
		after, err := shared(t).Log()
		require.NoError(t, err)
		return answers[0].Nodes[0], strings.Count(string(after[len(before):]), `password authentication failed for user "`+name+`"`)
	}
	for _, c := range []struct {
		concluded, secrets []string
		accepts            []bool
		refused            int
	}{
		{nil, all, []bool{false, false, true, false, false}, 4},
		{all, all, []bool{false, false, true, false, false}, 2},
		{all[4:], all, []bool{false, false, true, false, false}, 3},
		{all, []string{all[2], all[0], all[2]}, []bool{true, false, true}, 0},
		{all[3:], []string{all[2], all[0], all[3]}, []bool{true, false, false}, 1},
		{all, []string{all[0], all[1]}, []bool{false, false}, 2},
	} {
		a, refused := ask(c.concluded, c.secrets)
		require.Equal(t, c.accepts, a.Accepts)
		require.Equal(t, c.refused, refused, "logins that were refused")
		require.Zero(t, a.Extra)
	}
}

// A request that arrives when nobody waits for it any more does nothing.
func TestALateChangeDoesNotLand(t *testing.T) {
	create(t, "late", "its-password")
	e := sharedEntry(t)
	ctx := within10s(t)
	f, err := open(ctx, e)
	require.NoError(t, err)
	defer f.close(ctx)
	n := f.nodes[0]
	verifier, err := verifierOf("late-password")
	require.NoError(t, err)
	now, err := n.s.one(ctx, 1, "SELECT (extract(epoch from clock_timestamp()) - 0.001)::text")
	require.NoError(t, err)
	late := request{what: "change user late", statements: []string{"ALTER ROLE late PASSWORD '" + verifier + "'"}}
	err = n.alter(ctx, n.s, late, now[0])
	require.ErrorContains(t, err, "too late")
	require.False(t, kind.IsDefinite(err))
	require.False(t, kind.IsUnreachable(err))
	require.Equal(t, []bool{true, false}, probeOne(t, targetOf(e), "late", "its-password", "late-password").Accepts)
	created := request{what: "create user later", statements: []string{"CREATE ROLE later LOGIN", "ALTER ROLE later PASSWORD '" + verifier + "'"}}
	require.ErrorContains(t, n.alter(ctx, n.s, created, now[0]), "too late")
	require.Contains(t, preflight(t, targetOf(e), "later").Problems[0], "does not exist")
	limit, err := n.limit(ctx)
	require.NoError(t, err)
	require.NoError(t, n.alter(ctx, n.s, late, limit), "the session goes on")
	require.Equal(t, []bool{false, true}, probeOne(t, targetOf(e), "late", "its-password", "late-password").Accepts)
}

// Another session holds the user; its commit comes after the call has ended.
func TestAChangeThatWaitsForALockEndsInTime(t *testing.T) {
	create(t, "locked", "its-password")
	target := targetOf(sharedEntry(t))
	c, err := shared(t).Login(t.Context(), servers.PostgresAdmin, servers.PostgresAdminPassword)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close(context.WithoutCancel(t.Context()))) }()
	tx, err := c.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "ALTER ROLE locked CONNECTION LIMIT 5")
	require.NoError(t, err)

	began := time.Now()
	nodes := change(soon(t, time.Second), t, target, only("locked", "new-password"))
	require.Less(t, time.Since(began), 5*time.Second)
	require.Len(t, nodes, 1)
	require.Error(t, nodes[0].Err)
	require.False(t, kind.IsDefinite(nodes[0].Err), "%v", nodes[0].Err)
	require.False(t, kind.IsUnreachable(nodes[0].Err), "clients get in: %v", nodes[0].Err)
	// Whatever is left of the call gives up before it gets the lock.
	require.Eventually(t, func() bool {
		waiting, err := shared(t).Text(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
		return err == nil && waiting == "0"
	}, 10*time.Second, 20*time.Millisecond)
	require.NoError(t, tx.Commit(t.Context()))
	require.Equal(t, []bool{true, false}, probeOne(t, target, "locked", "its-password", "new-password").Accepts)
	mustChange(t, target, only("locked", "new-password"))
}

// A synchronous standby that is gone makes a commit wait without end. Nothing
// of that may happen after the call.
func TestASynchronousStandbyThatIsGone(t *testing.T) {
	node := other.get(t)
	require.NoError(t, node.Exec(t.Context(), "SET synchronous_commit = local", "CREATE ROLE app LOGIN PASSWORD 'its-password'"))
	t.Cleanup(func() {
		require.NoError(t, node.Exec(context.Background(), "SET synchronous_commit = local", "DROP ROLE app"))
	})
	e := entryOf(t, "postgresql://{{username}}:{{password}}@"+node.Addr+"/postgres?sslmode=disable", "rotator", "rotator-secret")
	nodes := change(soon(t, time.Second), t, targetOf(e), only("app", "new-password"))
	require.ErrorContains(t, nodes[0].Err, "synchronous_standby_names")
	require.False(t, kind.IsDefinite(nodes[0].Err))
	require.Equal(t, []bool{false, true}, probeOne(t, targetOf(e), "app", "its-password", "new-password").Accepts, "it has landed already")
}

func TestAStandbyThatIsBehind(t *testing.T) {
	nodes := servers.PostgresReplicated(t, 1)
	r := newRig(t, nodes)
	r.newUser(t, "app", material("app", "its-password"))
	target := targetOf(r.entry)
	_, err := nodes[1].Text(t.Context(), "SELECT pg_wal_replay_pause()")
	require.NoError(t, err)
	out := change(soon(t, time.Second), t, target, only("app", "new-password"))
	require.Len(t, out, 2)
	require.NoError(t, out[0].Err)
	require.ErrorContains(t, out[1].Err, "behind its primary")
	require.False(t, kind.IsDefinite(out[1].Err))
	require.False(t, kind.IsUnreachable(out[1].Err), "clients get in there, with the old password")
	a := probe(t, target, "app", "its-password", "new-password")
	require.Equal(t, []bool{false, true}, a[0].Accepts)
	require.ErrorContains(t, a[1].Err, "behind its primary")
	_, err = nodes[1].Text(t.Context(), "SELECT pg_wal_replay_resume()")
	require.NoError(t, err)
	for _, n := range probe(t, target, "app", "its-password", "new-password") {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{false, true}, n.Accepts)
	}

	info, err := Verify(within10s(t), r.entry)
	require.NoError(t, err)
	require.Equal(t, "a primary with 1 of its standbys", info.Summary)
	require.True(t, strings.HasPrefix(info.Identity, "postgresql:"))

	// Without the primary nothing is changed, and nothing is passed over.
	require.NoError(t, nodes[0].Abort())
	out = change(within10s(t), t, target, only("app", "third-password"))
	require.True(t, kind.IsUnreachable(out[0].Err))
	require.ErrorContains(t, out[1].Err, "primary")
	require.False(t, kind.IsUnreachable(out[1].Err))
	_, err = Verify(within10s(t), r.entry)
	require.ErrorContains(t, err, "primary")

	// The standby takes over.
	_, err = nodes[1].Text(t.Context(), "SELECT pg_promote()")
	require.NoError(t, err)
	out = change(within10s(t), t, target, only("app", "third-password"))
	require.True(t, kind.IsUnreachable(out[0].Err))
	require.NoError(t, out[1].Err)
	require.Equal(t, []bool{true}, probe(t, target, "app", "third-password")[1].Accepts)

	// The old primary comes back as one: nobody knows which of them counts.
	require.NoError(t, nodes[0].Start(t.Context()))
	out = change(within10s(t), t, target, only("app", "fourth-password"))
	for _, n := range out {
		require.ErrorContains(t, n.Err, "all take writes")
	}
}

func TestDifferentServersAreNoTarget(t *testing.T) {
	e := entryOf(t, "postgresql://{{username}}:{{password}}@"+shared(t).Addr+","+other.get(t).Addr+"/postgres?sslmode=disable", "rotator", "rotator-secret")
	_, err := Verify(within10s(t), e)
	require.True(t, kind.IsDefinite(err))
	require.ErrorContains(t, err, "different servers")
}

func TestTwoHostsOfOneServer(t *testing.T) {
	port := shared(t).Addr[strings.LastIndexByte(shared(t).Addr, ':'):]
	e := entryOf(t, "postgresql://{{username}}:{{password}}@127.0.0.1"+port+",localhost"+port+"/postgres?sslmode=disable", "rotator", "rotator-secret")
	info, err := Verify(within10s(t), e)
	require.NoError(t, err)
	require.Len(t, info.Nodes, 1)
	require.Equal(t, []string{"localhost" + port}, info.Nodes[0].Aliases)
}

// Without the right to see the identifier a server is known by its hosts, and
// for now by when it was started.
func TestAServerThatDoesNotSayWhoItIs(t *testing.T) {
	e := sharedEntry(t)
	known, err := Verify(within10s(t), e)
	require.NoError(t, err)
	require.NoError(t, shared(t).Exec(t.Context(), "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"))
	t.Cleanup(func() {
		require.NoError(t, shared(t).Exec(context.Background(), "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC"))
	})
	info, err := Verify(within10s(t), e)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(info.Identity, "postgresql-hosts:"))
	require.Len(t, info.Warnings, 1)
	require.Contains(t, info.Warnings[0], "pg_control_system")
	require.Equal(t, known.RunIDs, info.RunIDs)
	require.Subset(t, known.Members, info.Members)
}

func TestTLS(t *testing.T) {
	node := shared(t)
	port := node.Addr[strings.LastIndexByte(node.Addr, ':'):]
	create(t, "shows-cert", "its-password")
	e := entryOf(t, "postgresql://{{username}}:{{password}}@127.0.0.1"+port+"/postgres", "rotator", "rotator-secret")
	_, err := Verify(within10s(t), e)
	require.ErrorContains(t, err, "tls_ca", "nobody knows its authority")
	e.TLS.CA = authority().PEM
	_, err = Verify(within10s(t), e)
	require.ErrorContains(t, err, "tls_server_name")
	e.TLS.ServerName = "db.example.org"
	_, err = Verify(within10s(t), e)
	require.NoError(t, err)
	require.False(t, kind.IsUnreachable(err))

	require.Contains(t, probeOne(t, targetOf(e), "shows-cert", "its-password").Problem, "pg_hba.conf")
	e.TLS.Cert, e.TLS.Key, err = authority().Issue("engine")
	require.NoError(t, err)
	a := probeOne(t, targetOf(e), "shows-cert", "its-password", "another")
	require.Equal(t, []bool{true, false}, a.Accepts)
	require.Empty(t, a.Problem)

	e.TLS = connection.TLS{SkipVerify: true}
	_, err = Verify(within10s(t), e)
	require.NoError(t, err)

	e.PostgreSQL.URL = "postgresql://{{username}}:{{password}}@" + other.get(t).Addr + "/postgres"
	_, err = Verify(within10s(t), e)
	require.ErrorContains(t, err, "does not speak TLS")
}

// What the environment of the process says about logins is not for this one.
func TestTheEnvironmentIsNotRead(t *testing.T) {
	e := sharedEntry(t)
	for name, value := range map[string]string{
		"PGHOST": "nowhere.example.org", "PGPORT": "1", "PGUSER": "somebody", "PGPASSWORD": "something", "PGDATABASE": "somewhere",
		"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "/nonexistent", "PGSSLCERT": "/nonexistent", "PGSSLKEY": "/nonexistent",
		"PGOPTIONS": "-c nonsense=1", "PGAPPNAME": "somebody", "PGTARGETSESSIONATTRS": "standby", "PGREQUIREAUTH": "gss",
		"PGCHANNELBINDING": "require", "PGCONNECT_TIMEOUT": "x", "PGTZ": "Nowhere", "PGSSLNEGOTIATION": "direct",
		"PGMINPROTOCOLVERSION": "9", "PGSSLCERTMODE": "require", "PGPASSFILE": "/nonexistent", "PGSERVICEFILE": "/nonexistent",
	} {
		t.Setenv(name, value)
	}
	_, err := Verify(within10s(t), e)
	require.NoError(t, err)
	t.Setenv("PGSERVICE", "somewhere")
	_, err = Verify(within10s(t), e)
	require.ErrorContains(t, err, "PGSERVICE")
}

func TestAdminThatNeedsNoPassword(t *testing.T) {
	create(t, "trusted-admin", "its-password", "CREATEROLE")
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material("trusted-admin", "anything"))
	_, err := Verify(within10s(t), e)
	require.ErrorContains(t, err, "any password, or with none")
}

// During a rotation of the admin credential either may be the one that works.
func TestTheAdminsOwnRotation(t *testing.T) {
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material("rotator", "not-yet"))
	second := e.Admin.Versions[0]
	second.Number, second.Stage, second.Material = 2, "pending", material("rotator", "rotator-secret")
	e.Admin.Versions = append(e.Admin.Versions, second)
	_, err := Verify(within10s(t), e)
	require.NoError(t, err)
}
