package harmonyflow

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// remove deletes a role, in the middle of a rotation, too.
func (m *mount) remove(role string) {
	m.Helper()
	r := m.send(request{op: logical.DeleteOperation, path: "roles/" + role, data: map[string]any{"abandon": true}})
	require.Equal(m, http.StatusNoContent, r.code, r.message)
}

// bury changes what is kept of a deleted role behind the engine's back.
func (m *mount) bury(role string, change func(*rotation.Tombstone)) {
	m.Helper()
	t, err := rotation.NewStore(m.storage).Tombstone(context.Background(), role)
	require.NoError(m, err)
	require.NotNil(m, t)
	change(t)
	require.NoError(m, storage.Put(context.Background(), m.storage, storage.Deleted+role, t, 1<<20))
}

// TestRestore: a deleted role comes back as it was, and what it served with it.
func TestRestore(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{
		"description": "the cache", "grace_period": "0s", "keep_versions": 2, "rotation_schedule": fullHour(), "rotation_window": "1h",
		"document": "web", "field": "password", "username_field": "username", "previous_field": "old",
	})
	m.ended(id(m.must("rotate/redis/app", nil)))
	before, served := m.read("roles/app").data, m.creds("app")
	shown, _ := m.document("web")
	require.Equal(t, http.StatusNotFound, m.read("deleted/app").code)
	require.Empty(t, m.list("deleted").data["keys"])
	r := m.write("restore/app", nil)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `role "app" exists`)
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	m.must("config", map[string]any{"freeze": true}) // which is about rotations, not about what roles there are

	for _, r := range []reply{m.list("deleted"), m.read("deleted")} {
		require.Equal(t, []string{"app"}, r.data["keys"])
		info := r.data["key_info"].(map[string]any)["app"].(map[string]any)
		require.Equal(t, "redis", info["kind"])
		require.Equal(t, "user-0", info["username"])
		require.Equal(t, int64(2), info["version"])
	}
	d := m.read("deleted/app").data
	for field, want := range map[string]any{
		"kind": "redis", "connection": "cache", "username": "user-0", "version": int64(2), "document": "web", "accepted": []any{int64(2)},
		"follow": "vault write -f harmonyflow/restore/app", "earlier": []any{}, "description": "the cache", "versions": before["versions"],
	} {
		require.Equal(t, want, d[field], field)
	}
	deleted, err := time.Parse(time.RFC3339Nano, d["deleted"].(string))
	require.NoError(t, err)
	require.Equal(t, formatTime(deleted.Add(30*24*time.Hour)), d["restorable_until"])

	r = m.must("restore/app", nil)
	require.Equal(t, "version 3, completed", r.data["redis/app"])
	require.Equal(t, before["next_rotations"], r.data["next_rotations"])
	after := m.read("roles/app").data
	for field, was := range before {
		switch field {
		case "version", "versions", "last_run":
		default:
			require.Equal(t, was, after[field], field)
		}
	}
	now := m.creds("app")
	require.Equal(t, served["password"], now["password"])
	require.Equal(t, int64(3), now["version"])
	require.Equal(t, served["last_vault_rotation"], now["last_vault_rotation"], "the password is as old as it was")
	require.True(t, canLogIn(t, server, "user-0", served["password"].(string)))
	again, _ := m.document("web")
	require.Equal(t, shown, again)
	versions := after["versions"].(map[string]any)
	require.Equal(t, int64(2), versions["3"].(map[string]any)["copy_of"])
	require.Equal(t, "retired", versions["1"].(map[string]any)["stage"])
	data := m.ended(id(r))
	require.Equal(t, "create", data["trigger"])
	require.Contains(t, data["reason"], "restored: it was deleted at "+deleted.UTC().Format(time.RFC3339))

	require.Equal(t, http.StatusNotFound, m.read("deleted/app").code)
	require.Empty(t, m.list("deleted").data["keys"])
	for _, data := range []map[string]any{nil, {"overwrite_existing": true}, {"deleted": d["deleted"]}} {
		repeat := m.must("restore/app", data)
		require.Equal(t, id(r), id(repeat), "a repeat is told of the first")
		require.Equal(t, "version 3, completed", repeat.data["redis/app"])
	}
	m.must("config", map[string]any{"freeze": false})
	m.ended(id(m.must("rotate/redis/app", nil)))
	require.Equal(t, id(r), id(m.must("restore/app", nil)), "also when it has rotated since")
	require.Equal(t, int64(4), m.creds("app")["version"])
	require.False(t, canLogIn(t, server, "user-0", served["password"].(string)))
	m.ended(id(m.must("rollback/redis/app", nil)))
	require.Equal(t, served["password"], m.creds("app")["password"], "its versions are still there")
}

// TestRestoreRefused: what stands against it is one sentence, and nothing is changed by
// it.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(3))
	connection := map[string]any{"allowed_usernames": "user-*", "allowed_roles": "app,thief,other"}
	m.connect("cache", server.Addr, connection)
	m.adopt("app", "cache", 0, map[string]any{"document": "web", "field": "password", "rotation_period": "24h"})
	m.must("roles/key", map[string]any{"kind": "api-key", "document": "web", "field": "key"})
	m.must("roles/token", map[string]any{"kind": "api-key"})
	for _, role := range []string{"app", "key"} {
		require.Equal(t, http.StatusNoContent, m.delete("roles/"+role).code)
	}
	refused := func(code int, path string, data map[string]any, says string) {
		t.Helper()
		before, there := m.stored(t), aclList(t, server)
		r := m.write(path, data)
		require.Equal(t, code, r.code, r.message)
		require.Contains(t, r.message, says)
		require.Equal(t, there, aclList(t, server))
		after := m.stored(t)
		maps.DeleteFunc(after, func(key, _ string) bool { return key == storage.Barrier })
		maps.DeleteFunc(before, func(key, _ string) bool { return key == storage.Barrier })
		require.Equal(t, before, after)
	}
	refused(404, "restore/none", nil, `no deleted role "none"`)
	refused(400, "restore/all", nil, "reserved")
	refused(400, "restore/a..b", nil, "not allowed")
	refused(400, "restore/app", map[string]any{"initial_password": "x"}, "unknown field")
	refused(400, "restore/app", map[string]any{"deleted": "yesterday"}, "deleted is")
	refused(404, "restore/app", map[string]any{"deleted": "2001-01-01T00:00:00Z"}, "read deleted/app")
	refused(409, "restore/token", nil, "there is no deleted one")
	require.Equal(t, http.StatusBadRequest, m.send(request{op: logical.ReadOperation, path: "deleted", data: map[string]any{"limit": 0}}).code)

	m.connect("cache", server.Addr, map[string]any{"allowed_usernames": "user-1", "allowed_roles": "*"})
	refused(400, "restore/app", nil, "add it to its allowed_usernames")
	m.connect("cache", server.Addr, map[string]any{"allowed_usernames": "user-*", "allowed_roles": "thief"})
	refused(400, "restore/app", nil, "add it to its allowed_roles")
	m.connect("cache", server.Addr, connection)
	m.bury("key", func(t *rotation.Tombstone) { t.Role.Consumers = []string{"gone"} })
	refused(400, "restore/key", nil, `"gone"`)
	m.bury("key", func(t *rotation.Tombstone) { t.Role.Consumers = nil })
	m.must("documents/web", map[string]any{"allowed_roles": "app"})
	refused(400, "restore/key", nil, `document "web" does not allow role "key"`)
	require.Equal(t, http.StatusNoContent, m.delete("documents/web").code)

	// Others have what was the role's.
	m.adopt("thief", "cache", 0, map[string]any{"document": "other", "field": "password", "grace_period": "0s"})
	refused(409, "restore/app", nil, `belongs to role "thief"`)
	m.ended(id(m.must("rotate/redis/thief", nil)))
	refused(409, "restore/app", map[string]any{"overwrite_existing": true}, `belongs to role "thief"`)
	m.remove("thief")
	value, _ := m.document("web")
	m.must("roles/heir", map[string]any{"kind": "api-key", "document": "web", "field": "key", "initial_value": value["key"]})
	refused(409, "restore/key", nil, `belongs to role "heir"`)
	m.remove("heir")
	m.must("restore/key", nil)

	// Its password is another by now: thief has changed it.
	refused(409, "restore/app", nil, "refuses version 1 of user \"user-0\"")
	refused(409, "restore/app", nil, "overwrite_existing=true")
	m.must("restore/app", map[string]any{"overwrite_existing": true})
	require.Equal(t, password(0), m.creds("app")["password"])
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.Equal(t, int64(2), m.creds("app")["version"])

	// Somebody has given the user another password beside.
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	_, err := server.Do(t.Context(), "ACL", "SETUSER", "user-0", ">a-password-of-somebody")
	require.NoError(t, err)
	refused(409, "restore/app", nil, "did not have when it was deleted")
	m.must("restore/app", map[string]any{"overwrite_existing": true})
	require.False(t, canLogIn(t, server, "user-0", "a-password-of-somebody"))
	require.True(t, canLogIn(t, server, "user-0", password(0)))

	// Thirty days have passed, or the connection is gone.
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	m.bury("app", func(t *rotation.Tombstone) { t.Deleted = time.Now().Add(-30*24*time.Hour - time.Second) })
	refused(404, "restore/app", nil, "kept for 30 days")
	require.Equal(t, http.StatusNotFound, m.read("deleted/app").code)
	require.NotContains(t, m.list("deleted").data["keys"], "app")
	m.bury("app", func(t *rotation.Tombstone) { t.Deleted = time.Now().Add(-29 * 24 * time.Hour) })
	require.Equal(t, http.StatusNoContent, m.delete("connections/cache").code)
	refused(400, "restore/app", nil, "write connections/cache first")
	other := servers.Redis(t, users(1))
	m.connect("cache", other.Addr, connection)
	refused(409, "restore/app", nil, "leads to another server")
	require.Equal(t, http.StatusNoContent, m.delete("connections/cache").code)

	// A time that has passed is not made up for.
	m.connect("cache", server.Addr, connection)
	m.bury("app", func(t *rotation.Tombstone) { t.Role.Next = time.Now().Add(-10 * 24 * time.Hour) })
	r := m.must("restore/app", nil)
	next, err := time.Parse(time.RFC3339Nano, r.data["next_rotations"].([]string)[0])
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(24*time.Hour), next, time.Hour)
}

// TestRestoreAbandoned: clients that have what a rotation left beside the current version
// keep it until one has moved them.
func TestRestoreAbandoned(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": "1h", "document": "web", "field": "password", "previous_field": "old"})
	m.must("rotate/redis/app", nil)
	served := m.creds("app")
	m.remove("app")
	require.Equal(t, []any{int64(1), int64(2)}, m.read("deleted/app").data["accepted"])

	r := m.must("restore/app", nil)
	require.Len(t, r.warnings, 1)
	require.Contains(t, r.warnings[0], "version 1 stays accepted")
	m.ended(id(r))
	now := m.creds("app")
	require.Equal(t, served["password"], now["password"])
	require.Equal(t, password(0), now["previous_password"])
	shown, _ := m.document("web")
	require.Equal(t, map[string]any{"password": served["password"], "old": ""}, shown, "it may end at the server at once")
	for _, p := range []any{served["password"], password(0)} {
		require.True(t, canLogIn(t, server, "user-0", p.(string)))
	}
	data := m.read("roles/app").data
	require.Equal(t, "drifted", data["state"])
	require.Contains(t, data["drift"], "version 1 is accepted beside the current one")

	r = m.must("rotate/redis/app", nil)
	require.True(t, canLogIn(t, server, "user-0", password(0)), "until consumers have moved")
	m.must("retire/redis/app", nil)
	m.ended(id(r))
	require.Equal(t, "idle", m.read("roles/app").data["state"])
	for _, p := range []any{served["password"], password(0)} {
		require.False(t, canLogIn(t, server, "user-0", p.(string)))
	}
	require.NotContains(t, m.creds("app"), "previous_password")
	require.Equal(t, int64(4), m.creds("app")["version"])
}

// TestRestoreEarlier: of several roles of a name each can be restored, and none is lost
// by restoring another.
func TestRestoreEarlier(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	for i := range 2 {
		m.adopt("app", "cache", i, nil)
		require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	}
	d := m.read("deleted/app").data
	require.Equal(t, "user-1", d["username"])
	require.Len(t, d["earlier"], 1)
	first := d["earlier"].([]any)[0].(map[string]any)
	require.Equal(t, "user-0", first["username"])
	require.Equal(t, fmt.Sprintf("vault write -f harmonyflow/restore/app deleted=%s", first["deleted"]), first["follow"])

	r := m.must("restore/app", map[string]any{"deleted": first["deleted"]})
	require.Equal(t, password(0), m.creds("app")["password"])
	require.Equal(t, int64(3), m.creds("app")["version"], "no number is used again")
	left := m.read("deleted/app").data
	require.Equal(t, "user-1", left["username"])
	require.Empty(t, left["earlier"])
	require.Equal(t, "vault read harmonyflow/roles/app", left["follow"])
	require.Equal(t, id(r), id(m.must("restore/app", map[string]any{"deleted": first["deleted"]})), "a repeat")
	again := m.write("restore/app", map[string]any{"deleted": d["deleted"]})
	require.Equal(t, http.StatusConflict, again.code, "the other one is not what was restored")
	require.Contains(t, again.message, "delete roles/app first")
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	m.must("restore/app", map[string]any{"deleted": d["deleted"]})
	require.Equal(t, password(1), m.creds("app")["password"])
	require.Equal(t, "user-0", m.read("deleted/app").data["username"])
}

// TestRestoreRing: keys come back with their ids, and those that were shown stay.
func TestRestoreRing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.ended(id(m.must("roles/pair", jwtRole("ES256", map[string]any{
		"public_jwks": true, "propagation_delay": "1s", "document": "app", "field": "key", "keys_field": "keys",
	}))))
	rotated := id(m.must("rotate/jwt/pair", nil))
	m.until(rotated, func(s rotation.State) bool { return s == rotation.InGrace })
	before, set := m.creds("pair"), m.keySet("pair")
	m.remove("pair")
	require.Empty(t, m.read("deleted/pair").data["accepted"], "there is no server")
	m.must("restore/pair", nil)
	after := m.creds("pair")
	for _, field := range []string{"kid", "private_key", "keys", "previous_kid"} {
		require.Equal(t, before[field], after[field], field)
	}
	require.ElementsMatch(t, set.Keys, m.keySet("pair").Keys)
}

// TestDeletedPages: the list is read page by page.
func TestDeletedPages(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range 5 {
		name := fmt.Sprintf("key-%d", i)
		m.must("roles/"+name, map[string]any{"kind": "api-key"})
		require.Equal(t, http.StatusNoContent, m.delete("roles/"+name).code)
	}
	m.bury("key-1", func(t *rotation.Tombstone) { t.Deleted = time.Time{} })
	var seen []string
	after := ""
	for range 3 {
		r := m.send(request{op: logical.ReadOperation, path: "deleted", data: map[string]any{"after": after, "limit": "2"}})
		require.Equal(t, http.StatusOK, r.code, r.message)
		keys, _ := r.data["keys"].([]string)
		seen = append(seen, keys...)
		if len(keys) > 0 {
			after = keys[len(keys)-1]
		}
	}
	require.Equal(t, []string{"key-0", "key-2", "key-3", "key-4"}, seen)
}
