package harmonyflow

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// readOnly takes away the directory that the node saves its users in, as a full
// disk or a read-only mount would; root's permissions make no difference to it.
func readOnly(t *testing.T, n *servers.RedisNode) (restore func()) {
	t.Helper()
	require.NoError(t, os.Rename(n.Dir, n.Dir+".gone"))
	t.Cleanup(func() { _ = os.Rename(n.Dir+".gone", n.Dir) })
	return func() { _ = os.Rename(n.Dir+".gone", n.Dir) }
}

// servesAfterRestart requires that the password that is served outlives the node.
func (m *mount) servesAfterRestart(n *servers.RedisNode, role string, version int64) {
	m.Helper()
	require.NoError(m, n.Restart(m.t.Context()))
	c := m.creds(role)
	require.Equal(m, version, c["version"])
	require.True(m, canLogIn(m.t, n, "user-0", c["password"].(string)))
}

// A node that takes a password and cannot save it would refuse it after its next
// restart: the password is never served, and the reason is said.
func TestPasswordThatCannotBeSaved(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithACLFile())
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	restore := readOnly(t, server)
	m.write("rotate/redis/app", nil)
	id := m.role("app").Run.Rotation
	require.EqualValues(t, 1, m.read("creds/app").data["version"])
	d := m.until(id, func(s rotation.State) bool { return s == rotation.RollingBack || s == rotation.RollbackFailed })
	require.Contains(t, strings.Join(m.lines(d), "\n"), "cannot save its users with ACL SAVE")
	restore()
	require.Equal(t, string(rotation.RolledBack), m.ended(id)["state"])
	m.servesAfterRestart(server, "app", 1)

	m.must("rotate/redis/app", nil)
	m.servesAfterRestart(server, "app", 3)
}

// Only the reply is lost, and the plugin is restarted before it learns that the
// change was not saved: it asks for the change again, and learns it then.
func TestUnsavedPasswordIsNoticedAfterARestart(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithACLFile())
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), nil)
	m.adopt("app", "cache", 0, nil)
	restore := readOnly(t, server)
	p.LoseReplyTo("SETUSER")
	m.write("rotate/redis/app", nil)
	id := m.role("app").Run.Rotation
	p.Heal()
	m.restart()
	d := m.until(id, func(s rotation.State) bool { return s == rotation.RollingBack || s == rotation.RollbackFailed })
	require.Contains(t, strings.Join(m.lines(d), "\n"), "cannot save its users with ACL SAVE")
	require.EqualValues(t, 1, m.read("creds/app").data["version"])
	restore()
	require.Equal(t, string(rotation.RolledBack), m.ended(id)["state"])
	m.servesAfterRestart(server, "app", 1)
}

// The previous password is refused for good only when that is saved.
func TestRefusalThatCannotBeSaved(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithACLFile())
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	r := m.must("rotate/redis/app", nil)
	restore := readOnly(t, server)
	m.b.answerWithin = shortly
	m.write("retire/redis/app", nil)
	m.until(id(r), func(rotation.State) bool {
		return strings.Contains(fmt.Sprint(m.read("rotations/"+id(r)).data), "cannot save its users with ACL SAVE")
	})
	restore()
	d := m.ended(id(r))
	require.Equal(t, string(rotation.Completed), d["state"])
	require.Contains(t, fmt.Sprint(d), "cannot save its users with ACL SAVE", "it was tried again")
	m.servesAfterRestart(server, "app", 2)
	require.False(t, canLogIn(t, server, "user-0", password(0)))
}

// allow_partial does not pass over a node that clients reach and that refuses
// the admin alone.
func TestNodeThatRefusesTheAdminIsNotPassedOver(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	set := servers.RedisReplicated(t, 1, users(1), servers.WithReplicationUser("replica", "replica-secret-1"))
	m.connect("cache", set.Nodes[0].Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"allow_partial": true})
	_, err := set.Nodes[1].Do(t.Context(), "ACL", "SETUSER", servers.RedisAdmin, "resetpass", ">other-admin")
	require.NoError(t, err)
	r := m.write("rotate/redis/app", map[string]any{"dry_run": true})
	require.Contains(t, m.text(r), "refuses the login of \"admin\"")
	r = m.write("rotate/redis/app", nil)
	require.Contains(t, m.text(r), "refuses the login of \"admin\"")
	require.Eventually(t, func() bool { return m.role("app").Run == nil }, 2*patience, glance)
	require.Equal(t, rotation.Failed, m.role("app").LastRun.State)
	require.EqualValues(t, 1, m.read("creds/app").data["version"])

	require.NoError(t, set.Nodes[1].Kill())
	m.must("rotate/redis/app", nil)
	require.EqualValues(t, 2, m.read("creds/app").data["version"], "a node that is down is passed over")
}

func (m *mount) text(r reply) string { return r.message + " " + strings.Join(m.lines(r.data), " ") }

// lines are the lines that a terminal shows of data.
func (m *mount) lines(data map[string]any) []string {
	var out []string
	for _, v := range data {
		if s, ok := v.(string); ok {
			out = append(out, s)
		}
	}
	return out
}
