package proof_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRestored deletes roles and restores them, one of them in the middle of a rotation:
// clients that log in all the while with what they had are never refused, what is served
// is what was served, and the numbers go on.
func TestRestored(t *testing.T) {
	v := sharedVault(t)
	for _, make := range []func(*testing.T) bench{redisBench, postgresBench} {
		b := make(t)
		t.Run(b.kind, func(t *testing.T) { deleteAndRestore(t, newMount(t, v, "restored-"+b.kind), b) })
	}
}

func deleteAndRestore(t *testing.T, m *mount, b bench) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m.open(t, b, b.address)
	role := map[string]any{"kind": b.kind, "connection": "server", "username": "app", "initial_password": firstPassword, "grace_period": "10m"}
	if b.kind == "postgresql" { // which knows one password of a user
		delete(role, "username")
		role["usernames"] = "app,app_b"
	}
	m.mustWrite(t, "roles/app", role)
	require.Equal(t, "grace", m.mustWrite(t, "rotate/"+b.kind+"/app", nil)["state"])
	served := m.credentials(t)
	require.NotEmpty(t, served["previous_password"])
	now, before := clientOf(ctx, b, served, ""), clientOf(ctx, b, served, "previous_")

	m.deleteRole(t, "true")
	for _, c := range []*loyal{now, before} {
		require.NoError(t, c.more(ctx))
	}
	again := m.restore(t, 3)
	require.Equal(t, served["previous_password"], again["previous_password"])
	for _, c := range []*loyal{now, before} {
		require.NoError(t, c.more(ctx), "nothing is taken away by a restore")
	}
	moved := before.stop(t) // its client reads creds/ again
	require.Equal(t, "grace", m.mustWrite(t, "rotate/"+b.kind+"/app", nil)["state"])
	next := m.credentials(t)
	last := clientOf(ctx, b, next, "")
	moved += now.stop(t)
	require.Equal(t, "completed", m.mustWrite(t, "retire/"+b.kind+"/app", nil)["state"])
	for _, prefix := range []string{"", "previous_"} { // a user that waits for its turn has no password at all
		require.Error(t, b.login(ctx, served[prefix+"username"].(string), served[prefix+"password"].(string)))
	}

	m.deleteRole(t, "false")
	require.NoError(t, last.more(ctx))
	m.restore(t, 5)
	require.NoError(t, last.more(ctx))
	moved += last.stop(t)
	figure(t, "restored %s: 2 roles deleted and restored, %d logins meanwhile, 0 refused", b.kind, moved)
}

func (m *mount) credentials(t *testing.T) map[string]any {
	t.Helper()
	data, err := m.read(t.Context(), "creds/app")
	require.NoError(t, err)
	return data
}

func (m *mount) deleteRole(t *testing.T, abandon string) {
	t.Helper()
	_, err := m.c.Logical().DeleteWithDataWithContext(t.Context(), m.path+"/roles/app", map[string][]string{"abandon": {abandon}})
	require.NoError(t, err)
	_, err = m.read(t.Context(), "creds/app")
	require.Error(t, err)
}

// restore brings the role back, twice, with what it served.
func (m *mount) restore(t *testing.T, version int64) map[string]any {
	t.Helper()
	kept, err := m.read(t.Context(), "deleted/app")
	require.NoError(t, err)
	require.Equal(t, version-1, number(kept["version"]))
	stored, err := dataOf(m.c.Logical().ReadWithContext(t.Context(), "sys/raw/logical/"+m.uuid+"/deleted/app"))
	require.NoError(t, err)
	done := m.mustWrite(t, "restore/app", nil)
	require.Equal(t, "completed", done["state"])
	require.Equal(t, done["rotation_id"], m.mustWrite(t, "restore/app", nil)["rotation_id"])
	data := m.credentials(t)
	require.Equal(t, version, number(data["version"]))
	require.Contains(t, stored["value"], fmt.Sprintf("%q", data["password"]), "it is what the deleted role had")
	_, err = m.read(t.Context(), "deleted/app")
	require.Error(t, err)
	return data
}

// loyal is a client that keeps the credential that it has.
type loyal struct {
	logins atomic.Int64
	end    context.CancelFunc
	done   sync.WaitGroup
	mu     sync.Mutex
	err    error
}

func clientOf(ctx context.Context, b bench, creds map[string]any, prefix string) *loyal {
	user, password := creds[prefix+"username"].(string), creds[prefix+"password"].(string)
	c := &loyal{}
	ctx, c.end = context.WithCancel(ctx)
	c.done.Go(func() {
		for ctx.Err() == nil {
			if err := b.login(context.WithoutCancel(ctx), user, password); err != nil {
				c.mu.Lock()
				c.err = fmt.Errorf("a login as %s: %w", user, err)
				c.mu.Unlock()
				return
			}
			c.logins.Add(1)
			wait(ctx, turnPause)
		}
	})
	return c
}

// more waits until the client has logged in a few times more.
func (c *loyal) more(ctx context.Context) error {
	enough := c.logins.Load() + 5
	return until(ctx, time.Minute, func(context.Context) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if n := c.logins.Load(); n < enough {
			return fmt.Errorf("%d logins of %d: %w", n, enough, c.err)
		}
		return nil
	})
}

// stop ends the client, which was never refused, and returns how often it logged in.
func (c *loyal) stop(t *testing.T) int64 {
	t.Helper()
	c.end()
	c.done.Wait()
	require.NoError(t, c.err)
	return c.logins.Load()
}
