package harmonyflow

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestRotateServesBothThenOne(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	require.InDelta(t, 86400, m.creds("app")["ttl"], 60)

	r := m.send(request{
		op: logical.UpdateOperation, path: "rotate/redis/app", data: map[string]any{"reason": "it is time"}, id: "a-request", entity: "an-entity",
	})
	require.Equal(t, "version 2, promoted", r.data["redis/app"])
	require.Equal(t, "1 role: 1 promoted", r.data["summary"])
	require.Equal(t, "vault read harmonyflow/rotations/"+id(r), r.data["follow"])
	creds := m.creds("app")
	require.Equal(t, password(0), creds["previous_password"])
	require.Equal(t, "user-0", creds["previous_username"])
	require.NotEmpty(t, creds["previous_valid_until"])
	require.EqualValues(t, 2, creds["version"])
	require.True(t, canLogIn(t, server, "user-0", creds["password"].(string)))
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])

	detail := m.read("rotations/" + id(r)).data
	require.Equal(t, "it is time", detail["reason"])
	require.Equal(t, "grace", detail["phase"])
	require.Equal(t, map[string]any{"entity_id": "an-entity", "accessor": "accessor", "display_name": "tester", "request_id": "a-request"}, detail["requested_by"])
	require.Equal(t, "vault write -f harmonyflow/retire/redis/app", detail["follow"])

	retired := m.must("retire/redis/app", nil)
	require.Equal(t, id(r), id(retired))
	require.Equal(t, "version 2, completed", retired.data["redis/app"])
	require.False(t, canLogIn(t, server, "user-0", password(0)))
	creds = m.creds("app")
	require.NotContains(t, creds, "previous_password")
	require.NotContains(t, creds, "previous_valid_until")
	met := 0
	for _, line := range m.ended(id(r))["criteria"].([]string) {
		switch {
		case strings.HasPrefix(line, "met: "):
			met++
		default: // it has no consumers
			require.True(t, strings.HasPrefix(line, "not applicable: "), line)
			require.Contains(t, line, "role app has no consumers")
		}
	}
	require.Equal(t, 7, met, "of the runbook three, who asked, and three of its own")
	r = m.must("retire/redis/app", nil)
	require.Contains(t, r.data["summary"], "nothing to retire")
}

// TestTTLIsZeroWhileANewerVersionIsOnItsWay holds up the write that promotes.
func TestTTLIsZeroWhileANewerVersionIsOnItsWay(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	release := m.storage.hang(`"phase":"grace"`)
	m.b.answerWithin = shortly
	r := m.must("rotate/redis/app", nil)
	require.Eventually(t, func() bool { return m.storage.hanging.Load() > 0 }, patience, glance)
	creds := m.creds("app")
	require.EqualValues(t, 0, creds["ttl"])
	require.EqualValues(t, 1, creds["version"])
	require.Equal(t, password(0), creds["password"])
	require.NotContains(t, creds, "previous_password")
	release()
	m.until(id(r), func(s rotation.State) bool { return s == rotation.InGrace })
	creds = m.creds("app")
	require.InDelta(t, 86400, creds["ttl"], 60)
	require.Equal(t, password(0), creds["previous_password"])
}

func TestAPIKeyFields(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/swap", map[string]any{"kind": "api-key", "prefix": "sk_", "initial_value": "sk_initial-value-0000"})
	require.Equal(t, "sk_initial-value-0000", m.creds("swap")["value"])
	m.ended(id(m.must("rotate/api-key/swap", nil)))
	creds := m.creds("swap")
	require.True(t, strings.HasPrefix(creds["value"].(string), "sk_"))
	require.NotContains(t, creds, "username")
	require.NotContains(t, creds, "password")
	require.NotContains(t, creds, "previous_value")

	m.must("roles/overlap", map[string]any{"kind": "api-key", "previous_field": "OLD_KEY", "rotation_schedule": "0 3 * * 6"})
	first := m.creds("overlap")["value"]
	m.must("rotate/api-key/overlap", nil)
	creds = m.creds("overlap")
	require.Equal(t, first, creds["previous_value"])
	require.Equal(t, "0 3 * * 6", creds["rotation_schedule"])
	require.NotContains(t, creds, "rotation_period")
	require.Contains(t, creds, "ttl")
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(3))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("busy", "cache", 1, nil)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	running := id(m.must("rotate/redis/busy", nil))
	stored, there := m.stored(t), aclList(t, server)
	for path, want := range map[string]string{
		"rotate/redis/app": "1 of 1 role could be rotated now; nothing was changed",
		"rotate/redis":     "1 of 2 roles could be rotated now; nothing was changed",
		"rotate/all":       "2 of 3 roles could be rotated now; nothing was changed",
	} {
		r := m.must(path, map[string]any{"dry_run": true})
		require.Equal(t, want, r.data["summary"])
		require.NotContains(t, r.data, "rotation_id")
		require.Equal(t, "vault write -f harmonyflow/"+path, r.data["follow"])
		if line, ok := r.data["redis/busy"].(string); ok {
			require.Contains(t, line, "already in rotation "+running)
		}
	}
	require.Equal(t, stored, m.stored(t))
	require.Equal(t, there, aclList(t, server))
}

func TestRollbackBeforeAndAfterRetire(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	forward := m.must("rotate/redis/app", nil)
	second := m.creds("app")["password"].(string)
	r := m.must("rollback/redis/app", map[string]any{"reason": "it broke"})
	require.Equal(t, id(forward), id(r))
	require.Equal(t, "rolled_back", m.ended(id(r))["state"])
	require.Equal(t, password(0), m.creds("app")["password"])
	require.EqualValues(t, 3, m.creds("app")["version"], "a new number")
	require.False(t, canLogIn(t, server, "user-0", second))
	require.Equal(t, "suspended", m.read("roles/app").data["state"])

	m.must("rotate/redis/app", nil)
	m.must("retire/redis/app", nil)
	require.False(t, canLogIn(t, server, "user-0", password(0)))
	r = m.must("rollback/redis/app", map[string]any{"idempotency_key": "back"})
	require.NotEqual(t, id(forward), id(r))
	require.Equal(t, "rollback", m.read("rotations/" + id(r)).data["trigger"])
	require.Equal(t, password(0), m.creds("app")["password"])
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.Equal(t, "idle", map[bool]string{true: "idle"}[m.must("retire/redis/app", nil).code == 200])
	require.Equal(t, "idle", m.read("roles/app").data["state"])
}

func TestCancel(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	for _, data := range []map[string]any{nil, {"reason": "nobody said when"}} {
		running := id(m.must("rotate/redis/app", nil))
		r := m.must("cancel/"+running, data)
		require.Equal(t, "rolled_back", r.data["state"])
		require.Equal(t, password(0), m.creds("app")["password"])
		r = m.must("cancel/"+running, nil)
		require.Equal(t, "rolled_back", r.data["state"], "a repeat is answered the same")
	}
	m.must("rotate/redis/app", nil)
	r := m.must("retire/redis/app", nil)
	r = m.write("cancel/"+id(r), nil)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "there is nothing to cancel")
}

// TestReconcile heals what somebody changed by hand.
func TestReconcile(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	_, err := server.Do(context.Background(), "ACL", "SETUSER", "user-0", "resetpass", ">by-hand-password")
	require.NoError(t, err)
	r := m.read("verify/redis/app")
	require.Equal(t, false, r.data["ok"])
	require.Equal(t, "vault write -f harmonyflow/reconcile/redis/app", r.data["follow"])
	m.storage.note(map[string]bool{"password": true}, map[string]any{"password": "by-hand-password"})

	r = m.must("reconcile/redis/app", map[string]any{"reason": "somebody changed it"})
	require.Equal(t, "completed", r.data["state"], r.data)
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.False(t, canLogIn(t, server, "user-0", "by-hand-password"))
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])
	require.EqualValues(t, 1, m.creds("app")["version"], "nothing new is made")

	// During grace both are applied again.
	m.must("rotate/redis/app", nil)
	_, err = server.Do(context.Background(), "ACL", "SETUSER", "user-0", "resetpass")
	require.NoError(t, err)
	m.must("reconcile/redis/app", nil)
	require.Eventually(t, func() bool { return m.read("verify/redis/app").data["ok"] == true }, patience, glance)
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.Equal(t, "grace", m.read("roles/app").data["state"])
}

// TestRepeatedRequests: every start of a rotation is answered with the same
// rotation when its request comes again, also by another process.
func TestRepeatedRequests(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": 0})
	m.must("roles/token", map[string]any{"kind": "api-key"})
	m.ended(id(m.must("rotate/redis/app", nil)))
	for i, path := range []string{"rotate/redis/app", "rotate/redis", "rotate/api-key/token", "rotate/all", "rollback/redis/app", "reconcile/redis/app"} {
		t.Run(strings.ReplaceAll(path, "/", " "), func(t *testing.T) {
			byID := request{op: logical.UpdateOperation, path: path, id: fmt.Sprint("request-", i)}
			byKey := request{op: logical.UpdateOperation, path: path, data: map[string]any{"idempotency_key": fmt.Sprint("key-", i)}}
			for _, in := range []request{byID, byKey} {
				first := m.send(in)
				require.Equal(t, http.StatusOK, first.code, first.message)
				m.ended(id(first))
				stored := m.stored(t)
				require.Equal(t, id(first), id(m.send(in)))
				m.restart()
				again := m.send(in)
				require.Equal(t, http.StatusOK, again.code, again.message)
				require.Equal(t, id(first), id(again))
				require.Equal(t, stored, m.stored(t))
				in.entity = "somebody-else"
				if in.id == "" {
					other := m.send(in)
					require.NotEqual(t, id(first), id(other), "a key is its user's own")
					if other.code == http.StatusOK {
						m.ended(id(other))
					}
				}
			}
		})
	}
}

// TestSimultaneousRequests: one rotation a role at a time.
func TestSimultaneousRequests(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	replies := make([]reply, 20)
	var wg sync.WaitGroup
	for i := range replies {
		wg.Go(func() { replies[i] = m.write("rotate/redis/app", nil) })
	}
	wg.Wait()
	started := 0
	for _, r := range replies {
		if r.code == http.StatusOK {
			started++
			continue
		}
		require.Equal(t, http.StatusConflict, r.code, r.message)
	}
	require.Equal(t, 1, started)
	require.EqualValues(t, 2, m.creds("app")["version"])

	// And of one request that is sent many times at once: one answer.
	m.must("retire/redis/app", nil)
	for i := range replies {
		wg.Go(func() {
			replies[i] = m.send(request{op: logical.UpdateOperation, path: "rotate/redis/app", id: "the-same"})
		})
	}
	wg.Wait()
	for _, r := range replies {
		require.Equal(t, http.StatusOK, r.code, r.message)
		require.Equal(t, id(replies[0]), id(r))
	}
}

func TestBatches(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(3))
	m.connect("cache", server.Addr, nil)
	for i, name := range []string{"good", "busy", "gone"} {
		m.adopt(name, "cache", i, nil)
	}
	m.must("rotate/redis/busy", nil)
	_, err := server.Do(context.Background(), "ACL", "DELUSER", "user-2")
	require.NoError(t, err)

	r := m.must("rotate/redis", nil)
	require.Len(t, r.warnings, 1)
	require.Contains(t, r.warnings[0], "redis/gone: failed")
	require.Equal(t, []string{"busy"}, r.data["already_running"])
	require.Equal(t, "version 2, promoted", r.data["redis/good"])
	require.Equal(t, "2 roles: 1 failed, 1 promoted", r.data["summary"])

	r = m.write("rotate/redis", nil) // good and busy are in grace, gone fails
	require.Equal(t, http.StatusBadRequest, r.code, r.data)
	require.Contains(t, r.message, "redis/gone")
	require.Contains(t, r.message, "rotations/")

	m.delete("roles/gone")
	r = m.write("rotate/redis", nil) // all are in grace
	require.Equal(t, http.StatusConflict, r.code, r.data)

	require.Equal(t, http.StatusNotFound, m.write("rotate/api-key", nil).code)
	require.Equal(t, http.StatusNotFound, newMount(t).write("rotate/all", nil).code)
}

func TestLargeBatchShowsTwentyLines(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for i := range 25 {
		m.must(fmt.Sprintf("roles/token-%02d", i), map[string]any{"kind": "api-key"})
	}
	for _, data := range []map[string]any{{"dry_run": true}, nil} {
		r := m.must("rotate/api-key", data)
		lines := 0
		for key := range r.data {
			if strings.HasPrefix(key, "api-key/") {
				lines++
			}
		}
		require.Equal(t, 20, lines)
		require.Len(t, r.data["roles"], 25)
	}
	r := m.must("rotate/all", nil)
	require.Equal(t, "25 roles: 25 completed", m.ended(id(r))["summary"])
}

func TestRotationsArePagedAndFiltered(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	m.must("roles/held", map[string]any{"kind": "api-key", "previous_field": "OLD"})
	for range 5 {
		m.ended(id(m.must("rotate/api-key/token", nil)))
	}
	held := id(m.must("rotate/api-key/held", nil))
	all := m.list("rotations/").data["keys"].([]string)
	require.Len(t, all, 8)
	require.Equal(t, held, all[0], "newest first")
	var paged []string
	after := ""
	for range 4 {
		data := map[string]any{"limit": json.Number("2")}
		if after != "" {
			data["after"] = after
		}
		page := m.send(request{op: logical.ListOperation, path: "rotations/", data: data}).data["keys"].([]string)
		require.Len(t, page, 2)
		paged = append(paged, page...)
		after = page[1]
	}
	require.Equal(t, all, paged)
	r := m.send(request{op: logical.ListOperation, path: "rotations/", data: map[string]any{"after": after}})
	require.Equal(t, http.StatusNotFound, r.code)

	r = m.send(request{op: logical.ReadOperation, path: "rotations", data: map[string]any{"state": "grace"}})
	require.Equal(t, []string{held}, r.data["keys"])
	info := r.data["key_info"].(map[string]any)[held].(map[string]any)
	require.Equal(t, "manual", info["trigger"])
	require.Equal(t, "1 role: 1 promoted", info["summary"])
	r = m.send(request{op: logical.ReadOperation, path: "rotations", data: map[string]any{"state": "failed"}})
	require.Equal(t, http.StatusOK, r.code)
	require.Empty(t, r.data["keys"])
}
