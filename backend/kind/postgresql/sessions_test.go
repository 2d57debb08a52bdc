package postgresql

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// What is needed to see sessions, and to end them, is said when it is missing.
func TestRightsOverSessions(t *testing.T) {
	node := shared(t)
	create(t, "held", "its-password")
	create(t, "closer", "closer-secret", "CREATEROLE")
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material("closer", "closer-secret"))
	target := targetOf(e)
	held := enter(t, "postgres", "held", "its-password")
	question := kind.SessionsQuestion{User: kind.User{Role: "r", Username: "held"}, Before: time.Now().Add(time.Hour)}
	sessions := func() kind.SessionsAnswer {
		return target.(kind.Observer).Sessions(within10s(t), []kind.SessionsQuestion{question})[0]
	}
	c := only("held", "its-password")
	c.CloseBefore = question.Before

	require.ErrorContains(t, sessions().Err, "1 session of user held")
	require.ErrorContains(t, sessions().Err, "GRANT pg_read_all_stats TO closer")
	notes := outcomeOf(t, target, c)
	require.Len(t, notes, 1)
	require.Contains(t, notes[0], "GRANT pg_read_all_stats, pg_signal_backend")

	require.NoError(t, node.Exec(t.Context(), "GRANT pg_read_all_stats TO closer"))
	found := sessions()
	require.NoError(t, found.Err)
	require.Len(t, found.Sessions, 1)
	require.Equal(t, node.Addr, found.Sessions[0].Node)
	require.Equal(t, "127.0.0.1", found.Sessions[0].Client)
	notes = outcomeOf(t, target, c)
	require.Len(t, notes, 1)
	require.Contains(t, notes[0], "GRANT pg_signal_backend TO closer")
	require.NoError(t, held.Ping(t.Context()))

	require.NoError(t, node.Exec(t.Context(), "GRANT pg_signal_backend TO closer"))
	require.Equal(t, []string{"1 session of user held closed at node " + node.Addr}, outcomeOf(t, target, c))
	require.Error(t, held.Ping(t.Context()))
	require.Eventually(t, func() bool { return len(sessions().Sessions) == 0 }, 10*time.Second, 20*time.Millisecond)
	require.Empty(t, outcomeOf(t, target, c))
}

// The engine does not end its own sessions, and knows a session by its name.
func TestTheAdminClosesItsOtherSessions(t *testing.T) {
	create(t, "chief", "chief-secret", "CREATEROLE")
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material("chief", "chief-secret"))
	other := enter(t, "postgres", "chief", "chief-secret")
	do(t, other, "SET application_name = 'a forgotten shell'")
	target := targetOf(e)
	u := kind.User{Role: "r", Username: "chief", Admin: true}
	found := target.(kind.Observer).Sessions(within10s(t), []kind.SessionsQuestion{{User: u, Before: time.Now().Add(time.Hour)}})[0]
	require.NoError(t, found.Err)
	require.Len(t, found.Sessions, 1)
	require.Equal(t, "a forgotten shell", found.Sessions[0].Name)
	c := only("chief", "chief-secret")
	c.User, c.CloseBefore = u, time.Now().Add(time.Hour)
	require.Len(t, outcomeOf(t, target, c), 1)
	require.Error(t, other.Ping(t.Context()))
}

// The session that a password was changed in is not one to be closed.
func TestAUserClosesItsOtherSessions(t *testing.T) {
	create(t, "self-closer", "its-password")
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material(servers.PostgresAdmin, servers.PostgresAdminPassword))
	other := enter(t, "postgres", "self-closer", "its-password")
	c := itself("self-closer", "new-password", "its-password")
	c.CloseBefore = time.Now().Add(time.Hour)
	require.Equal(t, []string{"1 session of user self-closer closed at node " + shared(t).Addr}, outcomeOf(t, targetOf(e), c))
	require.Error(t, other.Ping(t.Context()))
}

// A node that does not answer is named, and the others are counted.
func TestSessionsOfANodeThatIsDown(t *testing.T) {
	nodes := servers.PostgresReplicated(t, 1)
	r := newRig(t, nodes)
	r.newUser(t, "app", material("app", "its-password"))
	c, err := nodes[0].Login(t.Context(), "app", "its-password")
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	require.NoError(t, nodes[1].Abort())
	found := targetOf(r.entry).(kind.Observer).Sessions(within10s(t), []kind.SessionsQuestion{{
		User: kind.User{Role: "r", Username: "app"}, Before: time.Now().Add(time.Hour),
	}})[0]
	require.ErrorContains(t, found.Err, r.proxies[1].Addr())
	require.Len(t, found.Sessions, 1)
}
