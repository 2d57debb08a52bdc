package postgresql

import (
	"context"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestContract(t *testing.T) {
	for name, start := range map[string]func(*testing.T) []*servers.PostgresNode{
		"standalone": func(t *testing.T) []*servers.PostgresNode { return []*servers.PostgresNode{servers.Postgres(t)} },
		"standby":    func(t *testing.T) []*servers.PostgresNode { return servers.PostgresReplicated(t, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of the time is spent waiting for nodes that hang
			r := newRig(t, start(t))
			kindtest.Run(t, r.harness())
		})
	}
}

// rig is running servers, each behind a proxy, and a connection to them.
type rig struct {
	nodes   []*servers.PostgresNode
	proxies []*servers.Proxy
	entry   *connection.Entry
}

// newRig makes a connection whose admin is no superuser, as it should be.
func newRig(t testing.TB, nodes []*servers.PostgresNode) *rig {
	t.Helper()
	require.NoError(t, nodes[0].Exec(t.Context(),
		"CREATE ROLE rotator LOGIN CREATEROLE PASSWORD 'rotator-secret'",
		"GRANT pg_read_all_stats, pg_signal_backend TO rotator",
		"GRANT SELECT (rolname, rolpassword) ON pg_authid TO rotator",
		"CREATE ROLE rotator2 LOGIN CREATEROLE PASSWORD 'rotator2-secret'",
		`CREATE ROLE "Group ""x"" é"`,
	))
	require.NoError(t, servers.WaitPostgresReplicating(t.Context(), nodes))
	r := &rig{nodes: nodes}
	hosts := ""
	for _, n := range nodes {
		p, err := servers.NewProxy(n.Addr)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, p.Close()) })
		r.proxies = append(r.proxies, p)
		hosts += "," + p.Addr()
	}
	r.entry = entryOf(t, "postgresql://{{username}}:{{password}}@"+hosts[1:]+"/postgres?sslmode=disable", "rotator", "rotator-secret")
	return r
}

func entryOf(t testing.TB, url, username, password string) *connection.Entry {
	t.Helper()
	e := &connection.Entry{
		Name: "test", Type: connection.TypePostgreSQL, PostgreSQL: &connection.PostgreSQL{URL: url},
		Admin: connection.NewAdmin(kind.Material{Username: username, Secret: password}),
	}
	require.NoError(t, ValidateConfig(e.PostgreSQL, e.TLS))
	return e
}

func targetOf(e *connection.Entry) kind.Target {
	return kindtest.Watch(Open(func(context.Context) (*connection.Entry, error) { return e, nil }))
}

func (r *rig) harness() kindtest.Harness {
	wrong := *r.entry
	wrong.Admin = connection.NewAdmin(kind.Material{Username: "rotator", Secret: "not-the-password"})
	h := kindtest.Harness{
		Target:        targetOf(r.entry),
		Network:       r,
		NewUser:       r.newUser,
		WrongAdmin:    targetOf(&wrong),
		ChangeRequest: "ALTER ROLE",
		Capture:       r.capture,
		Settle:        r.settle,
		Single:        true,
		Grant:         r.grant,
		Drop:          r.drop,
		Hold:          r.hold,
		Admin:         material("rotator2", "rotator2-secret"),
		AdminTarget:   r.adminTarget,
	}
	for _, n := range r.nodes {
		h.Nodes = append(h.Nodes, n)
	}
	return h
}

// newUser uses verifiers, so that the logs hold no password that a test looks
// for.
func (r *rig) newUser(t testing.TB, name string, accepted ...kind.Material) {
	t.Helper()
	role := pgx.Identifier{name}.Sanitize()
	exists, err := r.nodes[0].Text(context.Background(), "SELECT count(*) FROM pg_roles WHERE rolname = $1", name)
	require.NoError(t, err)
	if exists == "0" {
		require.NoError(t, r.nodes[0].Exec(context.Background(), "CREATE ROLE "+role+" LOGIN"))
	}
	password := "NULL"
	if len(accepted) > 0 {
		verifier, err := verifierOf(accepted[0].Secret)
		require.NoError(t, err)
		password = "'" + verifier + "'"
	}
	require.NoError(t, r.nodes[0].Exec(context.Background(), "ALTER ROLE "+role+" PASSWORD "+password))
	r.settle(t)
}

// grant gives one of each that users can be created with.
func (r *rig) grant(t testing.TB, name string) {
	t.Helper()
	role := pgx.Identifier{name}.Sanitize()
	require.NoError(t, r.nodes[0].Exec(context.Background(),
		"ALTER ROLE "+role+" CREATEDB CONNECTION LIMIT 9",
		`GRANT "Group ""x"" é" TO `+role+" WITH ADMIN OPTION",
		"ALTER ROLE "+role+` SET search_path TO public, "Sch ""ema, é"`,
		"ALTER ROLE "+role+" IN DATABASE postgres SET work_mem TO '5MB'",
	))
	r.settle(t)
}

func (r *rig) drop(t testing.TB, name string) {
	t.Helper()
	require.NoError(t, r.nodes[0].Exec(context.Background(), "DROP ROLE "+pgx.Identifier{name}.Sanitize()))
	r.settle(t)
}

// hold keeps a session open at the last node.
func (r *rig) hold(t testing.TB, m kind.Material) func() bool {
	t.Helper()
	c, err := r.nodes[len(r.nodes)-1].Login(context.Background(), m.Username, m.Secret)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return func() bool { return c.Ping(context.Background()) == nil }
}

func (r *rig) adminTarget(candidates ...kind.Material) kind.Target {
	e := *r.entry
	e.Admin = connection.NewAdmin(candidates[0])
	for i, m := range candidates[1:] {
		e.Admin.Versions = append(e.Admin.Versions, version.Version{Number: i + 2, Stage: version.Pending, Material: m})
	}
	return targetOf(&e)
}

func (r *rig) settle(t testing.TB) {
	t.Helper()
	require.NoError(t, servers.WaitPostgresReplicating(context.Background(), r.nodes))
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

// capture records what goes over the wire and what the servers log, which is
// every statement.
func (r *rig) capture(t testing.TB) func() []byte {
	t.Helper()
	var stops []func() []byte
	for i, n := range r.nodes {
		before, err := n.Log()
		require.NoError(t, err)
		stops = append(stops, r.proxies[i].Capture(), func() []byte {
			after, err := n.Log()
			require.NoError(t, err)
			return after[len(before):]
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
