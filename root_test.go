package harmonyflow

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const engineUser = "engine on >engine-secret ~* &* +@all"

// engine is a user of its own for the engine to log in as: the servers of tests are
// asked as another.
func engine() map[string]any {
	return map[string]any{"username": "engine", "password": "engine-secret"}
}

// adminOf is what the engine logs in with.
func (m *mount) adminOf(connection string) kind.Material {
	m.Helper()
	e, err := m.b.connections.Must(context.Background(), connection)
	require.NoError(m, err)
	return e.Admin.Logins()[0]
}

func (m *mount) deleteWith(path string, data map[string]any) reply {
	m.Helper()
	return m.send(request{op: logical.DeleteOperation, path: path, data: data})
}

// TestRotateRoot: the engine changes what it logs in with, and goes on.
func TestRotateRoot(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, engine())
	m.adopt("app", "cache", 0, nil)
	before := m.adminOf("cache")
	require.Equal(t, false, m.read("connections/cache").data["managed"])

	r := m.must("rotate-root/cache", map[string]any{"dry_run": true})
	require.Equal(t, "would make version 2 and retire 1 (overlap)", r.data["rotate-root/cache"])
	require.True(t, canLogIn(t, server, before.Username, before.Secret), "nothing was changed")

	r = m.must("rotate-root/cache", map[string]any{"reason": "yearly"})
	data := m.ended(id(r))
	require.Equal(t, "completed", data["state"])
	require.Equal(t, "rotate-root", data["trigger"])
	require.Equal(t, "version 2, completed", data["rotate-root/cache"])
	after := m.adminOf("cache")
	require.NotEqual(t, before.Secret, after.Secret)
	require.False(t, canLogIn(t, server, before.Username, before.Secret))
	require.True(t, canLogIn(t, server, after.Username, after.Secret))
	shown := m.read("connections/cache").data
	require.Equal(t, true, shown["managed"])
	require.EqualValues(t, 2, shown["admin_version"])
	require.Equal(t, "idle", shown["admin_state"])
	require.NotContains(t, m.storage.dump(t)["connection/cache"], after.Secret, "it is kept in one place")

	// It is nobody's role, and nothing but rotate-root reaches it.
	require.Equal(t, []string{"app"}, m.list("roles/").data["keys"])
	require.EqualValues(t, 1, m.read("status").data["roles"])
	for _, path := range []string{"creds/root:cache", "roles/root:cache", "verify/redis/root:cache"} {
		require.GreaterOrEqual(t, m.read(path).code, 400, path)
	}
	for _, path := range []string{"rotate/redis/root:cache", "retire/redis/root:cache", "rollback/redis/root:cache", "reconcile/redis/root:cache"} {
		require.GreaterOrEqual(t, m.write(path, nil).code, 400, path)
	}
	require.Equal(t, "redis/app", soleKey(m.must("rotate/all", nil).data, "redis/", "rotate-root/"))
	require.Equal(t, after, m.adminOf("cache"))

	// The next process goes on with it, and a role of its user is refused.
	m.restart()
	m.must("reconcile/redis/app", nil)
	refused := m.write("roles/mine", map[string]any{"kind": "redis", "connection": "cache", "username": after.Username, "overwrite_existing": true})
	require.Equal(t, http.StatusBadRequest, refused.code)
	require.Contains(t, refused.message, "rotate-root/cache is for that")
}

// soleKey is the one key of data that begins with one of prefixes.
func soleKey(data map[string]any, prefixes ...string) (found string) {
	for key := range data {
		for _, p := range prefixes {
			if len(key) > len(p) && key[:len(p)] == p {
				found += key
			}
		}
	}
	return found
}

// TestManagedRootIsNotOverwritten: whoever writes a connection again from a file of
// his own would lock the engine out.
func TestManagedRootIsNotOverwritten(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, engine())
	m.must("rotate-root/cache", nil)
	managed := m.adminOf("cache")

	r := m.write("connections/cache", map[string]any{"password": "engine-secret"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "force=true")
	r = m.write("connections/cache", map[string]any{"password": "engine-secret", "force": true})
	require.Equal(t, http.StatusBadRequest, r.code, "it is tried first")
	require.Contains(t, r.message, "nothing was stored")
	r = m.write("connections/cache", map[string]any{"username": "other", "password": "x", "force": true})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "write another connection")
	require.Equal(t, managed, m.adminOf("cache"))
	m.must("connections/cache", map[string]any{"allowed_roles": "*"}) // what is not given stays
	m.must("connections/cache", map[string]any{"password": managed.Secret})
	require.Equal(t, managed, m.adminOf("cache"))

	_, err := server.Do(context.Background(), "ACL", "SETUSER", managed.Username, "resetpass", ">by-hand-and-long-enough")
	require.NoError(t, err)
	m.must("connections/cache", map[string]any{"password": "by-hand-and-long-enough", "force": true})
	require.Equal(t, "by-hand-and-long-enough", m.adminOf("cache").Secret)
	m.must("rotate-root/cache", nil)
	require.EqualValues(t, 4, m.read("connections/cache").data["admin_version"], "numbers are not used again")
	require.False(t, canLogIn(t, server, managed.Username, "by-hand-and-long-enough"))

	r = m.delete("connections/cache")
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "nobody else knows it")
	last := m.adminOf("cache")
	require.Equal(t, http.StatusNoContent, m.deleteWith("connections/cache", map[string]any{"force": "true"}).code)
	require.Contains(t, m.storage.dump(t)["deleted/root:cache"], last.Secret, "nothing is lost")
	require.Equal(t, http.StatusNotFound, m.write("rotate-root/cache", nil).code)
}

// TestRootsOfOneServer: a user that two connections log in as is not rotated under
// one of them.
func TestRootsOfOneServer(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("one", server.Addr, engine())
	m.connect("two", proxy(t, server.Addr).Addr(), engine())
	r := m.write("rotate-root/one", nil)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `connection "two"`)
	require.Equal(t, http.StatusNoContent, m.delete("connections/two").code)
	m.must("rotate-root/one", nil)
	admin := m.adminOf("one")
	r = m.write("connections/two", map[string]any{
		"type": "redis", "addresses": proxy(t, server.Addr).Addr(), "username": admin.Username, "password": admin.Secret,
	})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "is rotated by rotate-root/one")
}

// TestScheduledRoot: connections take the fields of a schedule.
func TestScheduledRoot(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, map[string]any{
		"username": "engine", "password": "engine-secret", "rotation_period": "24h", "password_policy": "words",
	})
	shown := m.read("connections/cache").data
	require.EqualValues(t, 86400, shown["rotation_period"])
	require.Len(t, shown["next_rotations"], 3)
	require.Equal(t, "words", shown["password_policy"])
	r := m.write("connections/cache", map[string]any{"rotation_period": "1s"})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "rotation_period")
	before := m.adminOf("cache")
	m.b.Cleanup(context.Background())
	m.alter(rotation.RootName("cache"), func(r *rotation.Role) { r.Next = time.Now().Add(-time.Minute) })
	m.start()
	require.Eventually(t, func() bool {
		r := m.role(rotation.RootName("cache"))
		return r.LastRun != nil && r.LastRun.State == rotation.Completed
	}, patience, glance)
	after := m.adminOf("cache")
	require.Contains(t, after.Secret, "policy-")
	require.False(t, canLogIn(t, server, before.Username, before.Secret))
	require.True(t, m.role(rotation.RootName("cache")).Next.After(time.Now().Add(23*time.Hour)))
	m.must("connections/cache", map[string]any{"disable_automated_rotation": true})
	require.True(t, m.role(rotation.RootName("cache")).Next.IsZero())

	m.must("connections/other", map[string]any{
		"type": "redis", "addresses": servers.Redis(t).Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword,
	})
	r = m.write("connections/third", map[string]any{
		"type": "redis", "addresses": "127.0.0.1:1", "password": "x", "verify_connection": false, "rotation_period": "24h",
	})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "verify_connection")
}

// TestRolesRotateWhileTheRootDoes: neither notices the other.
func TestRolesRotateWhileTheRootDoes(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, engine())
	m.adopt("app", "cache", 0, map[string]any{"grace_period": "0s"})
	var both sync.WaitGroup
	for path, name := range map[string]string{"rotate-root/cache": rotation.RootName("cache"), "rotate/redis/app": "app"} {
		both.Go(func() {
			for range 5 {
				r := m.write(path, nil)
				if r.code != http.StatusOK {
					t.Errorf("%s: %d %s", path, r.code, r.message)
					return
				}
				m.ended(id(r))
			}
			if last := m.role(name).LastRun; last.State != rotation.Completed {
				t.Errorf("%s: %s", name, last.State)
			}
		})
	}
	both.Wait()
	require.EqualValues(t, 6, m.creds("app")["version"])
	require.EqualValues(t, 6, m.read("connections/cache").data["admin_version"])
}

// TestRootSurvivesALostReply: the server has changed the password, and nobody was
// told. What Vault's database engine does then is in the documentation of
// rotate-root.
func TestRootSurvivesALostReply(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), engine())
	m.adopt("app", "cache", 0, nil)
	p.LoseReplyTo("SETUSER")
	m.b.answerWithin = shortly
	r := m.write("rotate-root/cache", nil)
	m.restart()
	p.Heal()
	require.Eventually(t, func() bool {
		root := m.role(rotation.RootName("cache"))
		return root != nil && root.Run == nil && root.LastRun != nil
	}, patience, glance, r.message)
	require.Equal(t, rotation.Completed, m.role(rotation.RootName("cache")).LastRun.State)
	admin := m.adminOf("cache")
	require.True(t, canLogIn(t, server, admin.Username, admin.Secret))
	require.Equal(t, "completed", m.ended(id(m.must("reconcile/redis/app", nil)))["state"])
}

// TestRotateRootOfAppRole: the secret id of a connection to a Vault, under the same
// machine.
func TestRotateRootOfAppRole(t *testing.T) {
	t.Parallel()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	roleID, secretID, err := v.AppRole(t.Context(), "engine", `
path "auth/approle/role/engine/custom-secret-id" { capabilities = ["create", "update"] }
path "auth/approle/role/engine/secret-id/lookup" { capabilities = ["create", "update"] }
path "auth/approle/role/engine/secret-id/destroy" { capabilities = ["create", "update"] }
path "auth/approle/role/engine" { capabilities = ["read"] }
path "auth/approle/role/engine/role-id" { capabilities = ["read"] }`, "1h")
	require.NoError(t, err)
	m := newMount(t)
	connect := map[string]any{
		"type": "vault", "address": v.Address, "auth": "approle", "role_id": roleID, "secret_id": secretID,
	}
	m.must("connections/other", connect)
	r := m.write("rotate-root/other", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "role", "which AppRole it is nobody has said")
	m.must("connections/other", map[string]any{"role": "engine"})
	for range 2 {
		require.Equal(t, "completed", m.ended(id(m.must("rotate-root/other", nil)))["state"])
	}
	now := m.adminOf("other")
	require.NotEqual(t, secretID, now.Secret)
	for secret, accepted := range map[string]bool{secretID: false, now.Secret: true} {
		answer, err := v.Client().Logical().WriteWithContext(t.Context(), "auth/approle/role/engine/secret-id/lookup", map[string]any{"secret_id": secret})
		require.NoError(t, err)
		require.Equal(t, accepted, answer != nil)
	}
	r = m.write("connections/other", connect)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "force=true")
	m.must("connections/other", map[string]any{"verify_connection": true})

	m.must("connections/token", map[string]any{"type": "vault", "address": v.Address, "auth": "token", "token": v.Client().Token()})
	r = m.write("rotate-root/token", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "auth=token")
	require.Equal(t, http.StatusBadRequest, m.write("roles/mine", map[string]any{"kind": "approle"}).code)
}

// TestDryRunOfRoot: a look at an admin credential does not take it over.
func TestDryRunOfRoot(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, engine())
	before := m.storage.dump(t)
	m.must("rotate-root/cache", map[string]any{"dry_run": true})
	require.Equal(t, false, m.read("connections/cache").data["managed"])
	require.Equal(t, before, m.storage.dump(t))
	require.Equal(t, http.StatusNoContent, m.delete("connections/cache").code)
}

// TestRootThatNeverRotated: what was given with a connection is known to whoever gave
// it.
func TestRootThatNeverRotated(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", server.Addr, map[string]any{"username": "engine", "password": "engine-secret", "rotation_period": "24h"})
	r := m.delete("connections/cache")
	require.Equal(t, http.StatusNoContent, r.code, r.message)
}

// TestRefusedReplacementOfRoot: a connection that is refused leaves the engine what it
// logs in with.
func TestRefusedReplacementOfRoot(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	two := servers.Redis(t, users(1), servers.WithUsers("engine on >engine-on-two-long ~* &* +@all"))
	m.connect("cache", one.Addr, engine())
	m.must("rotate-root/cache", nil)
	managed := m.adminOf("cache")
	m.connect("other", two.Addr, nil)
	m.must("roles/app", map[string]any{"kind": "redis", "connection": "other", "username": "engine", "initial_password": "engine-on-two-long"})
	r := m.write("connections/cache", map[string]any{"addresses": two.Addr, "password": "engine-on-two-long", "force": true})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, `is rotated by role "app"`)
	require.Equal(t, managed, m.adminOf("cache"))
}

// TestRootOfMovedConnection: an admin credential owns its user where its connection
// leads to.
func TestRootOfMovedConnection(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	two := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", one.Addr, engine())
	m.must("rotate-root/cache", nil)
	m.must("connections/cache", map[string]any{"addresses": two.Addr, "password": "engine-secret", "force": true})
	require.Equal(t, m.read("connections/cache").data["identity"], m.role(rotation.RootName("cache")).Target)
	r := m.write("connections/second", map[string]any{
		"type": "redis", "addresses": proxy(t, two.Addr).Addr(), "username": "engine", "password": "engine-secret",
	})
	require.Equal(t, http.StatusBadRequest, r.code)
	require.Contains(t, r.message, "is rotated by rotate-root/cache")
	m.must("rotate-root/cache", nil)
}

// TestRootOfMovedConnectionLeaves: and nowhere else.
func TestRootOfMovedConnectionLeaves(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	two := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", one.Addr, engine())
	m.must("rotate-root/cache", nil)
	managed := m.adminOf("cache")
	m.must("connections/cache", map[string]any{"addresses": two.Addr, "password": "engine-secret", "force": true})
	r := m.write("connections/second", map[string]any{
		"type": "redis", "addresses": one.Addr, "username": "engine", "password": managed.Secret,
	})
	require.Equal(t, http.StatusOK, r.code, r.message)
}

// TestUntriedSecondConnection: one that came after the adoption, and was not looked
// at, is not locked out either.
func TestUntriedSecondConnection(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", one.Addr, engine())
	m.must("rotate-root/cache", nil)
	managed := m.adminOf("cache")
	r := m.write("connections/second", map[string]any{
		"type": "redis", "addresses": one.Addr, "username": "engine", "password": managed.Secret, "verify_connection": false,
	})
	require.Equal(t, http.StatusOK, r.code, r.message)
	r = m.write("rotate-root/cache", nil)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `connection "second"`)

	// By its schedule neither.
	m.b.Cleanup(context.Background())
	m.alter(rotation.RootName("cache"), func(r *rotation.Role) {
		r.Schedule.Period, r.Next = 24*time.Hour, time.Now().Add(-time.Minute)
	})
	m.start()
	require.Eventually(t, func() bool {
		r := m.role(rotation.RootName("cache"))
		return r.Run == nil && r.LastRun.State == rotation.Failed
	}, patience, glance)
	require.Contains(t, m.role(rotation.RootName("cache")).LastRun.Error, `connection "second"`)
	require.Equal(t, managed, m.adminOf("cache"))
}

// TestPartialScheduleOfRoot: what is not given of a schedule stays.
func TestPartialScheduleOfRoot(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", one.Addr, map[string]any{"username": "engine", "password": "engine-secret", "rotation_schedule": "0 3 * * *"})
	r := m.write("connections/cache", map[string]any{"rotation_window": "1h"})
	require.Equal(t, http.StatusOK, r.code, r.message)
	r = m.write("connections/cache", map[string]any{"rotation_timezone": "Europe/Berlin"})
	require.Equal(t, http.StatusOK, r.code, r.message)
	// What the stored rest does not go with is refused before anything is stored.
	before := m.storage.dump(t)
	r = m.write("connections/cache", map[string]any{"rotation_schedule": "", "allowed_roles": "x"})
	require.Equal(t, http.StatusBadRequest, r.code, r.message)
	require.Equal(t, before, m.storage.dump(t))
}

// TestRootAdvice: sentences name nothing that nobody can type.
func TestRootAdvice(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	m.connect("cache", one.Addr, engine())
	m.must("rotate-root/cache", nil)
	_, err := one.Do(context.Background(), "ACL", "SETUSER", "engine", ">somebody-elses-one")
	require.NoError(t, err)
	r := m.write("rotate-root/cache", nil)
	require.Equal(t, http.StatusBadRequest, r.code)
	require.NotContains(t, r.message, "root:")
	for k := range m.must("rotate-root/cache", map[string]any{"dry_run": true}).data["roles"].(map[string]any) {
		require.NotContains(t, k, "root:")
	}
}
