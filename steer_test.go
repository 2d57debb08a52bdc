package harmonyflow

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestAbandon: a server that is decommissioned in the middle of a rotation holds
// neither its role nor its connection for ever.
func TestAbandon(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("idle", "cache", 1, nil)
	running := id(m.must("rotate/redis/app", nil))
	r := m.write("roles/app", map[string]any{"abandon": true})
	require.Equal(t, http.StatusBadRequest, r.code, "only when deleting")
	require.NoError(t, server.Kill())
	require.Less(t, m.write("retire/redis/app", nil).code, 300)
	r = m.delete("roles/app")
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "abandon=true")
	require.Equal(t, http.StatusConflict, m.delete("connections/cache").code)

	remove := func(name string, data map[string]any) reply {
		return m.send(request{op: logical.DeleteOperation, path: "roles/" + name, data: data})
	}
	r = remove("app", map[string]any{"force": "true"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "abandon")
	require.Equal(t, http.StatusConflict, remove("app", map[string]any{"abandon": "false"}).code)
	// A query parameter is a string. The change that was sent last may still land.
	require.Eventually(t, func() bool {
		r = remove("app", map[string]any{"abandon": "true"})
		return r.code == http.StatusNoContent
	}, patience, glance, "%d %s", r.code, r.message)
	require.Equal(t, http.StatusNotFound, m.read("roles/app").code)
	data := m.ended(running)
	require.Equal(t, "cancelled", data["state"])
	require.Contains(t, data["redis/app"], "abandoned: the role was deleted with abandon=true")
	require.Equal(t, http.StatusNoContent, remove("app", map[string]any{"abandon": true}).code, "a repeat")
	require.Equal(t, http.StatusNoContent, remove("idle", map[string]any{"abandon": true}).code, "what does not rotate is deleted as ever")
	require.Equal(t, http.StatusNoContent, m.delete("connections/cache").code)
}

// TestRepeatsAreAnsweredWhateverChanged: not a freeze, and not a connection that
// is gone.
func TestRepeatsAreAnsweredWhateverChanged(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": 0})
	m.ended(id(m.must("rotate/redis/app", nil)))
	var sent []request
	var first []reply
	for _, path := range []string{"rotate/redis/app", "rotate/redis", "rotate/all", "rollback/redis/app", "reconcile/redis/app"} {
		in := request{op: logical.UpdateOperation, path: path, id: "first " + path, data: map[string]any{"idempotency_key": "k"}}
		r := m.send(in)
		require.Equal(t, http.StatusOK, r.code, r.message)
		m.ended(id(r))
		sent, first = append(sent, in), append(first, r)
	}
	m.must("config", map[string]any{"freeze": true})
	require.NoError(t, m.storage.Delete(context.Background(), "connection/cache"))
	for i, in := range sent {
		for _, again := range []request{in, {op: in.op, path: in.path, data: in.data}, {op: in.op, path: in.path, id: in.id}} {
			r := m.send(again)
			require.Equal(t, http.StatusOK, r.code, "%s: %s", in.path, r.message)
			require.Equal(t, id(first[i]), id(r))
		}
		require.GreaterOrEqual(t, m.write(in.path, nil).code, 400, "a new one is refused")
	}
}

// TestRepeatedRollbackThatJoined: it reversed a running rotation, and says so
// again when that has ended.
func TestRepeatedRollbackThatJoined(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key", "previous_field": "OLD"})
	m.must("rotate/api-key/token", nil)
	in := request{op: logical.UpdateOperation, path: "rollback/api-key/token", id: "once"}
	r := m.send(in)
	require.Equal(t, http.StatusOK, r.code, r.message)
	m.ended(id(r))
	again := m.send(in)
	require.Equal(t, http.StatusOK, again.code, again.message)
	require.Equal(t, id(r), id(again))
	require.Equal(t, "rolled_back", again.data["state"])
}

// TestReasonsAreOneShortLine.
func TestReasonsAreOneShortLine(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key", "previous_field": "OLD"})
	running := id(m.must("rotate/api-key/token", map[string]any{"reason": strings.Repeat("x", maxReason)}))
	require.Len(t, m.read("rotations/" + running).data["reason"], maxReason)
	for _, path := range []string{
		"rotate/all", "rotate/api-key", "rotate/api-key/token", "rollback/api-key/token", "reconcile/api-key/token", "cancel/" + running,
	} {
		for _, reason := range []string{strings.Repeat("x", maxReason+1), "two\nlines", "bell\a", "\x7f"} {
			r := m.write(path, map[string]any{"reason": reason})
			require.Equal(t, http.StatusBadRequest, r.code, r.message)
			require.Contains(t, r.message, fmt.Sprintf("give one line of at most %d bytes", maxReason))
			require.Equal(t, "grace", m.read("roles/token").data["state"])
		}
	}
	m.must("cancel/"+running, map[string]any{"reason": "überlegt"})
}

// TestIDsThatAreNone: storage is not asked.
func TestIDsThatAreNone(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, id := range []string{"x", "..", "0192-none", strings.Repeat("a", 400), "{" + uuid.NewString() + "}", strings.ToUpper(uuid.NewString()), "\x00"} {
		require.Eventually(t, func() bool { // the engine has just started, and looks around
			before := m.storage.operations.Load()
			for _, r := range []reply{m.read("rotations/" + id), m.write("cancel/"+id, nil)} {
				require.Equal(t, http.StatusNotFound, r.code, r.message)
				require.Contains(t, r.message, "is no id of a rotation")
			}
			return before == m.storage.operations.Load()
		}, patience, glance, id)
	}
	r := m.read("rotations/" + uuid.NewString())
	require.Equal(t, http.StatusNotFound, r.code)
	require.Contains(t, r.message, "there is no rotation")
}
