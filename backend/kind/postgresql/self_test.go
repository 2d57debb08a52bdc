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

// itself is a change that the user makes, who has one of some passwords.
func itself(username, secret string, has ...string) kind.Change {
	c := only(username, secret)
	for _, h := range has {
		c.Self = append(c.Self, material(username, h))
	}
	return c
}

// An admin that may look and nothing else is enough for users that change their
// own password, whatever their settings make of a session.
func TestUsersChangeTheirOwnPassword(t *testing.T) {
	add(t, "self-owner", "NOLOGIN")
	create(t, "self-user", "its-password", `IN ROLE "self-owner"`)
	create(t, "onlooker", "onlooker-secret")
	require.NoError(t, shared(t).Exec(t.Context(),
		`ALTER ROLE "self-user" SET role TO 'self-owner'`, `ALTER ROLE "self-user" SET default_transaction_read_only TO on`))
	e := sharedEntry(t)
	e.Admin = connection.NewAdmin(material("onlooker", "onlooker-secret"))
	target := targetOf(e)
	u := itself("self-user", "", "not-its-password", "its-password").User
	require.Empty(t, preflightOf(t, target, u).Problems)
	require.Contains(t, preflightOf(t, target, kind.User{Role: "r", Username: "self-user"}).Problems[0], "CREATEROLE")
	u.Self = u.Self[:1]
	require.Contains(t, preflightOf(t, target, u).Problems[0], "accepts none that is known")

	mustChange(t, target, itself("self-user", "new-password", "not-its-password", "its-password"))
	require.Equal(t, []bool{false, true}, probeOne(t, target, "self-user", "its-password", "new-password").Accepts)
	mustChange(t, target, itself("self-user", "new-password", "its-password", "new-password"))
	require.Equal(t, []bool{false, true}, probeOne(t, target, "self-user", "its-password", "new-password").Accepts)

	err := change(within10s(t), t, target, itself("self-user", "third-password", "its-password"))[0].Err
	require.ErrorContains(t, err, "accepts none that is known")
	require.False(t, kind.IsDefinite(err))
	require.False(t, kind.IsUnreachable(err))
	dated := itself("self-user", "third-password", "new-password")
	dated.Accept[0].Expires = time.Now().Add(time.Hour)
	require.True(t, kind.IsDefinite(change(within10s(t), t, target, dated)[0].Err))
	require.Equal(t, []bool{true, false}, probeOne(t, target, "self-user", "new-password", "third-password").Accepts)

	_, err = shared(t).Text(t.Context(), "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, shared(t).Exec(context.Background(), "GRANT CONNECT ON DATABASE postgres TO PUBLIC", "REVOKE CONNECT ON DATABASE postgres FROM onlooker"))
	})
	require.NoError(t, shared(t).Exec(t.Context(), "GRANT CONNECT ON DATABASE postgres TO onlooker"))
	u.Self = []kind.Material{material("self-user", "new-password")}
	require.Contains(t, preflightOf(t, target, u).Problems[0], "GRANT CONNECT")
}

// Both primary and standby follow, the reply is lost, and no plaintext is seen.
func TestOwnPasswordWithALostReply(t *testing.T) {
	r := newRig(t, servers.PostgresReplicated(t, 1))
	r.newUser(t, "app", material("app", "old-password-of-app"))
	require.NoError(t, r.nodes[0].Exec(t.Context(), "ALTER ROLE rotator NOCREATEROLE"))
	r.settle(t)
	target := targetOf(r.entry)
	stop := r.capture(t)
	c := itself("app", "new-password-of-app", "old-password-of-app", "new-password-of-app")
	r.LoseReplyTo("ALTER ROLE")
	for _, n := range change(soon(t, time.Second), t, target, c) {
		require.Error(t, n.Err)
		require.False(t, kind.IsDefinite(n.Err), "%v", n.Err)
	}
	r.Heal()
	for _, n := range probe(t, target, "app", "old-password-of-app", "new-password-of-app") {
		require.Equal(t, []bool{false, true}, n.Accepts, "it has landed")
	}
	mustChange(t, target, c)
	for _, n := range probe(t, target, "app", "old-password-of-app", "new-password-of-app") {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{false, true}, n.Accepts)
	}
	seen := string(stop())
	require.Contains(t, seen, `ALTER ROLE "app" PASSWORD 'SCRAM-SHA-256$`)
	require.NotContains(t, seen, "password-of-app")
}

func TestNoPlaintextCreatesAUser(t *testing.T) {
	r := newRig(t, []*servers.PostgresNode{servers.Postgres(t)})
	r.newUser(t, "app-a", material("app-a", "first-password-of-app"))
	target := targetOf(r.entry)
	stop := r.capture(t)
	c := only("app-b", "second-password-of-app")
	c.Like, c.Profile = "app-a", preflightOf(t, target, like("app-b", "app-a")).Profile
	require.Nil(t, c.Profile)
	c.Profile = preflightOf(t, target, kind.User{Role: "r", Username: "app-a"}).Profile
	c.Accept[0].Expires = time.Now().Add(time.Hour)
	outcomeOf(t, target, c)
	require.Equal(t, []bool{true}, probe(t, target, "app-b", "second-password-of-app")[0].Accepts)
	seen := string(stop())
	require.Contains(t, seen, `CREATE ROLE "app-b" LOGIN; ALTER ROLE "app-b" VALID UNTIL`)
	require.NotContains(t, seen, "password-of-app")
}
