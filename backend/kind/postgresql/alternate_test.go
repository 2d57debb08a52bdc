package postgresql

import (
	"context"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// enter opens a session in one database of the shared server, until the test
// ends.
func enter(t testing.TB, database, username, password string) *pgx.Conn {
	t.Helper()
	u := url.URL{Scheme: "postgres", User: url.UserPassword(username, password), Host: shared(t).Addr, Path: "/" + database, RawQuery: "sslmode=disable"}
	c, err := pgx.Connect(t.Context(), u.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func do(t testing.TB, c *pgx.Conn, statements ...string) {
	t.Helper()
	_, err := c.Exec(t.Context(), strings.Join(statements, "; "), pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
}

func text(t testing.TB, c *pgx.Conn, sql string) string {
	t.Helper()
	var out string
	require.NoError(t, c.QueryRow(t.Context(), sql, pgx.QueryExecModeSimpleProtocol).Scan(&out))
	return out
}

// addDatabase makes a database for the length of a test, and returns a session
// of the superuser in it.
func addDatabase(t testing.TB, name string) *pgx.Conn {
	t.Helper()
	quoted := pgx.Identifier{name}.Sanitize()
	_, err := shared(t).Text(t.Context(), "CREATE DATABASE "+quoted)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := shared(t).Text(context.Background(), "DROP DATABASE "+quoted+" WITH (FORCE)")
		require.NoError(t, err)
	})
	return enter(t, name, servers.PostgresAdmin, servers.PostgresAdminPassword)
}

func like(username, other string) kind.User {
	return kind.User{Role: "r", Username: username, Like: other}
}

func preflightOf(t testing.TB, target kind.Target, u kind.User) kind.Finding {
	t.Helper()
	f := target.Preflight(within10s(t), []kind.User{u})[0]
	require.NoError(t, f.Err)
	return f
}

// outcomeOf is what a change that succeeds has to tell.
func outcomeOf(t testing.TB, target kind.Target, c kind.Change) []string {
	t.Helper()
	out := target.Change(within10s(t), []kind.Change{c})[0]
	require.NoError(t, out.Err)
	for _, n := range out.Nodes {
		require.NoError(t, n.Err)
	}
	return out.Notes
}

// What two users may do with objects is compared in every database.
func TestObjectsOfAnotherDatabase(t *testing.T) {
	create(t, "objects-a", "its-password")
	create(t, "objects-b", "its-password")
	shop := addDatabase(t, `Shop "é"`)
	do(t, shop, `CREATE TABLE "Or ders" (id int, note text)`, `GRANT SELECT ON "Or ders" TO "objects-a", "objects-b"`)
	target := targetOf(sharedEntry(t))
	differ := func() string {
		return strings.Join(preflightOf(t, target, like("objects-b", "objects-a")).Problems, "\n")
	}
	require.Empty(t, differ())

	do(t, shop, `GRANT INSERT ON "Or ders" TO "objects-a"`)
	require.Contains(t, differ(), `lacks INSERT, SELECT on table public."Or ders" in database "Shop \"é\""`)
	require.Contains(t, differ(), "has SELECT on table")
	require.Contains(t, differ(), "a role that both are members of")
	do(t, shop, `REVOKE INSERT ON "Or ders" FROM "objects-a"`, `GRANT UPDATE (note) ON "Or ders" TO "objects-b"`)
	require.Contains(t, differ(), `has UPDATE on table column public."Or ders".note`)
	do(t, shop, `REVOKE UPDATE (note) ON "Or ders" FROM "objects-b"`, `CREATE POLICY p ON "Or ders" TO "objects-a"`)
	require.Contains(t, differ(), `a place in policy p on public."Or ders"`)
	do(t, shop, "DROP POLICY p ON \"Or ders\"", "CREATE TABLE mine (id int)", `ALTER TABLE mine OWNER TO "objects-a"`)
	require.Contains(t, differ(), "lacks ownership of table public.mine")

	missing := preflightOf(t, target, like("objects-c", "objects-a"))
	require.Len(t, missing.Problems, 1)
	require.Contains(t, missing.Problems[0], "ownership of table public.mine")
	c := only("objects-b", "its-password")
	c.Like, c.Profile, c.Align = "objects-a", preflightOf(t, target, like("objects-a", "objects-b")).Profile, true
	require.Contains(t, strings.Join(outcomeOf(t, target, c), "\n"), "lacks ownership of table public.mine")
	do(t, shop, "DROP TABLE mine")

	// Temporary tables come and go.
	own := enter(t, `Shop "é"`, "objects-a", "its-password")
	do(t, own, "CREATE TEMPORARY TABLE passing (id int)")
	require.Empty(t, differ())
}

// Where the admin may not look, objects are told apart, and rights to one are
// not.
func TestObjectsOfAClosedDatabase(t *testing.T) {
	create(t, "closed-a", "its-password")
	create(t, "closed-b", "its-password")
	closed := addDatabase(t, "closed")
	do(t, closed, "REVOKE CONNECT ON DATABASE closed FROM PUBLIC", "CREATE TABLE one (id int)", "CREATE TABLE two (id int)",
		`GRANT SELECT ON one TO "closed-a", "closed-b"`, `GRANT INSERT ON one TO "closed-a"`)
	target := targetOf(sharedEntry(t))
	f := preflightOf(t, target, like("closed-b", "closed-a"))
	require.Empty(t, f.Problems)
	require.Len(t, f.Notes, 1)
	require.Contains(t, f.Notes[0], "compared by which objects")
	do(t, closed, `GRANT SELECT ON two TO "closed-a"`)
	f = preflightOf(t, target, like("closed-b", "closed-a"))
	require.Contains(t, f.Problems[0], `lacks privileges on 2 entries of pg_class in database "closed"`)
}

// What is too much to be looked at is counted, and its digest compared.
func TestManyObjects(t *testing.T) {
	create(t, "many-a", "its-password")
	create(t, "many-b", "its-password")
	many := addDatabase(t, "many")
	do(t, many, `DO $$ BEGIN FOR i IN 1..201 LOOP
		EXECUTE 'CREATE TABLE t' || i || ' (id int)';
		EXECUTE 'GRANT SELECT ON t' || i || ' TO "many-a", "many-b"';
	END LOOP; END $$`)
	target := targetOf(sharedEntry(t))
	f := preflightOf(t, target, like("many-b", "many-a"))
	require.Empty(t, f.Problems)
	require.Len(t, f.Notes, 1)
	do(t, many, `REVOKE SELECT ON t7 FROM "many-b"`, `CREATE TABLE other (id int)`, `GRANT SELECT ON other TO "many-b"`)
	f = preflightOf(t, target, like("many-b", "many-a"))
	require.Contains(t, f.Problems[0], `lacks privileges on 201 entries of pg_class in database "many" (#`)
}

// The way that the documentation recommends: whatever one of two users makes
// belongs to a role that both are members of.
func TestTwoUsersOfAnOwner(t *testing.T) {
	node := shared(t)
	add(t, `The "owner" é`, "NOLOGIN")
	create(t, `Ops "x" é a`, "its-password", `IN ROLE "The ""owner"" é"`)
	require.NoError(t, node.Exec(t.Context(), `ALTER ROLE "Ops ""x"" é a" SET role TO 'The "owner" é'`))
	shop := addDatabase(t, "owned")
	do(t, shop, `GRANT CREATE ON SCHEMA public TO "The ""owner"" é"`)
	do(t, enter(t, "owned", `Ops "x" é a`, "its-password"), "CREATE TABLE made_by_a (id int)")

	target := targetOf(sharedEntry(t))
	b := like(`Ops "x" é b`, `Ops "x" é a`)
	f := preflightOf(t, target, b)
	require.Empty(t, f.Problems)
	require.Len(t, f.Notes, 1)
	require.Contains(t, f.Notes[0], "will be created like")
	left, err := node.Text(t.Context(), "SELECT count(*) FROM pg_roles WHERE rolname = $1", b.Username)
	require.NoError(t, err)
	require.Equal(t, "0", left, "what was tried is taken back")

	a := preflightOf(t, target, kind.User{Role: "r", Username: b.Like})
	require.Equal(t, []string{"LOGIN", `member of "The \"owner\" é"`, `setting role = "The \"owner\" é"`}, a.Profile)
	c := only(b.Username, "first-of-b")
	c.Like, c.Profile = b.Like, a.Profile
	t.Cleanup(func() { require.NoError(t, node.Exec(context.Background(), `DROP ROLE "Ops ""x"" é b"`)) })
	require.Equal(t, []string{`user Ops "x" é b was created at node ` + node.Addr}, outcomeOf(t, target, c))
	require.Empty(t, outcomeOf(t, target, c))
	own := enter(t, "owned", b.Username, "first-of-b")
	require.Equal(t, `The "owner" é`, text(t, own, "SELECT current_user"))
	do(t, own, "ALTER TABLE made_by_a ADD COLUMN more text", "DROP TABLE made_by_a")
	require.Empty(t, preflightOf(t, target, b).Problems)
}

func TestWhatCannotBeCreated(t *testing.T) {
	node := shared(t)
	create(t, "root-a", "its-password", "SUPERUSER")
	create(t, "word-a", "its-password")
	require.NoError(t, node.Exec(t.Context(), `ALTER ROLE "word-a" SET app.word TO 'it''s \ a secret'`))
	e := sharedEntry(t)
	target := targetOf(e)
	f := preflightOf(t, target, like("root-b", "root-a"))
	require.Len(t, f.Problems, 1)
	require.Contains(t, f.Problems[0], "rotator may not create user root-b")
	f = preflightOf(t, target, like("word-b", "word-a"))
	require.Len(t, f.Problems, 1)
	require.Contains(t, f.Problems[0], "rotator may not set app.word")
	f = preflightOf(t, target, like("nobody-b", "nobody-a"))
	require.Len(t, f.Problems, 1)
	require.Contains(t, f.Problems[0], "nobody-a")
	gone := kind.User{Role: "r", Username: "gone-b", Profile: []string{"LOGIN", `member of "no such role"`}}
	require.Contains(t, preflightOf(t, target, gone).Problems[0], `make user gone-b a member of "no such role"`)

	// A value that may be a secret is taken from the other user, and is nowhere else.
	e.Admin = connection.NewAdmin(material(servers.PostgresAdmin, servers.PostgresAdminPassword))
	profile := preflightOf(t, target, kind.User{Role: "r", Username: "word-a"}).Profile
	require.NotContains(t, strings.Join(profile, "\n"), "it's")
	c := only("word-b", "first-of-b")
	c.Profile = profile
	err := change(within10s(t), t, target, c)[0].Err
	require.ErrorContains(t, err, "app.word")
	require.True(t, kind.IsDefinite(err))
	c.Like = "word-a"
	t.Cleanup(func() { require.NoError(t, node.Exec(context.Background(), `DROP ROLE "word-b"`)) })
	outcomeOf(t, target, c)
	require.Equal(t, `it's \ a secret`, text(t, enter(t, "postgres", "word-b", "first-of-b"), "SELECT current_setting('app.word')"))
	require.Equal(t, profile, preflightOf(t, target, like("word-b", "word-a")).Profile)
}

// A user that cannot be made what it is to be keeps its password, too.
func TestAnAlignmentThatIsNotPermittedChangesNothing(t *testing.T) {
	create(t, "aligned", "its-password", "CREATEDB")
	target := targetOf(sharedEntry(t))
	c := only("aligned", "new-password")
	c.Profile, c.Align = []string{"LOGIN", "SUPERUSER"}, true
	err := change(within10s(t), t, target, c)[0].Err
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.Equal(t, []bool{true, false}, probeOne(t, target, "aligned", "its-password", "new-password").Accepts)
	require.Equal(t, []string{"CREATEDB", "LOGIN"}, preflight(t, target, "aligned").Profile)
}

// Whose turn is over may be gone already.
func TestNobodyLogsInAsAUserThatIsGone(t *testing.T) {
	c := kind.Change{User: kind.User{Role: "r", Username: "gone", Profile: []string{"LOGIN"}}, Exclusive: true}
	require.Empty(t, outcomeOf(t, targetOf(sharedEntry(t)), c))
	require.NotEmpty(t, preflight(t, targetOf(sharedEntry(t)), "gone").Problems, "it was not created")
}

func TestPasswordsEndAtTheServer(t *testing.T) {
	node := shared(t)
	create(t, "dated", "its-password", "VALID UNTIL '2020-01-01'")
	target := targetOf(sharedEntry(t))
	u := kind.User{Role: "r", Username: "dated"}
	require.Contains(t, preflightOf(t, target, u).Problems[0], "expired")
	u.Dated = true
	f := preflightOf(t, target, u)
	require.Empty(t, f.Problems, "a new password has a new end")
	require.Empty(t, f.Notes)
	require.Equal(t, []string{"LOGIN"}, f.Profile, "the end belongs to the password")

	c := only("dated", "new-password")
	c.User = u
	c.Accept[0].Expires = time.Now().Add(time.Hour).Truncate(time.Second)
	mustChange(t, target, c)
	ends := func() string {
		until, err := node.Text(t.Context(), "SELECT extract(epoch FROM rolvaliduntil)::int8 FROM pg_roles WHERE rolname = 'dated'")
		require.NoError(t, err)
		return until
	}
	require.Equal(t, strconv.FormatInt(c.Accept[0].Expires.Unix(), 10), ends())
	require.Equal(t, []bool{false, true}, probeOne(t, target, "dated", "its-password", "new-password").Accepts)
	until := ends()
	c.Accept[0] = material("dated", "another-password")
	mustChange(t, target, c)
	require.Equal(t, until, ends(), "a password without an end leaves it alone")
	c.Accept[0].Expires = time.Now().Add(-time.Hour)
	mustChange(t, target, c)
	a := probeOne(t, target, "dated", "another-password")
	require.Equal(t, []bool{false}, a.Accepts)
	require.Contains(t, a.Problem, "expired")
}
