package proof_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestSnapshots restores snapshots of Vault that hold a rotation in the middle. One from
// before two more rotations is not believed: whoever runs with what was served since is
// not refused until somebody says so. One from just now goes on by itself.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true, RawStorage: true, Raft: true})
	for _, c := range []struct {
		bench func(*testing.T) bench
		phase rotation.Phase
		users string
	}{
		{redisBench, rotation.Apply, "username"},
		{redisBench, rotation.Grace, "username"},
		{postgresBench, rotation.Apply, "username"},
		{postgresBench, rotation.Grace, "usernames"},
	} {
		b := c.bench(t)
		name := fmt.Sprintf("%s, %s", b.kind, c.phase)
		t.Run(name, func(t *testing.T) {
			s := newSnapshots(t, v, b, c.phase, c.users)
			s.old(t, name)
			s.fresh(t, name)
		})
	}
}

// snapshots is a role that rotates while snapshots are taken.
type snapshots struct {
	*mount
	server bench
	proxy  *servers.Proxy
	phase  rotation.Phase
	ctx    context.Context
}

func newSnapshots(t *testing.T, v *servers.Vault, b bench, phase rotation.Phase, users string) *snapshots {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	p, err := servers.NewProxy(b.address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	s := &snapshots{mount: newMount(t, v, fmt.Sprintf("snapshots-%s-%s", b.kind, phase)), server: b, proxy: p, phase: phase, ctx: ctx}
	s.open(t, b, p.Addr())
	s.mustWrite(t, "roles/app", map[string]any{
		"kind": b.kind, "connection": "server", users: map[string]string{"username": "app", "usernames": "app,app_b"}[users],
		"initial_password": firstPassword, "grace_period": "10m",
	})
	return s
}

// taken is a snapshot that holds a rotation in the phase, which has gone on since.
func (s *snapshots) taken(t *testing.T) (snapshot []byte, id string) {
	t.Helper()
	if s.phase == rotation.Apply {
		s.proxy.LoseReplyTo(s.server.change)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := s.write(s.ctx, "rotate/"+s.server.kind+"/app", nil)
		answered <- err
	}()
	require.NoError(t, until(s.ctx, time.Minute, func(ctx context.Context) error {
		r, err := s.stored(ctx, "app")
		if err == nil && (r.Run == nil || r.Run.Phase != s.phase || s.phase == rotation.Apply && r.Run.Attempt == nil) {
			err = errors.New("the rotation is not there yet")
		}
		if err == nil {
			id = r.Run.Rotation
		}
		return err
	}))
	var out bytes.Buffer
	require.NoError(t, s.c.Sys().RaftSnapshotWithContext(s.ctx, &out))
	s.proxy.Heal()
	require.NoError(t, <-answered)
	return out.Bytes(), id
}

// restored puts a snapshot back, and returns when the engine answers again.
func (s *snapshots) restored(t *testing.T, snapshot []byte, id string) {
	t.Helper()
	require.NoError(t, s.c.Sys().RaftSnapshotRestoreWithContext(s.ctx, bytes.NewReader(snapshot), false))
	require.NoError(t, until(s.ctx, 2*time.Minute, func(ctx context.Context) error {
		data, err := s.read(ctx, "rotations/"+id)
		if err == nil && data["state"] == "" {
			err = errors.New("no state")
		}
		return err
	}))
}

func (s *snapshots) awaitState(t *testing.T, id string, states ...string) (data map[string]any) {
	t.Helper()
	require.NoError(t, until(s.ctx, 2*time.Minute, func(ctx context.Context) (err error) {
		if data, err = s.read(ctx, "rotations/"+id); err != nil {
			return err
		}
		for _, state := range states {
			if data["state"] == state {
				return nil
			}
		}
		return fmt.Errorf("the rotation is %v: %v", data["state"], data["summary"])
	}))
	return data
}

// retired ends what is in grace.
func (s *snapshots) retired(t *testing.T) {
	t.Helper()
	// Of a user with one password there is nothing left to retire.
	require.Contains(t, []any{"completed", "idle"}, s.mustWrite(t, "retire/"+s.server.kind+"/app", nil)["state"])
}

// old restores a snapshot that two rotations came after.
func (s *snapshots) old(t *testing.T, name string) {
	t.Helper()
	snapshot, id := s.taken(t)
	s.awaitState(t, id, "grace", "completed")
	s.retired(t)
	s.mustWrite(t, "rotate/"+s.server.kind+"/app", nil)
	s.retired(t)
	since := s.credentials(t)
	client := clientOf(s.ctx, s.server, since, "")
	keeps, err := s.server.stored(s.ctx, since["username"].(string))
	require.NoError(t, err)

	s.restored(t, snapshot, id)
	if s.phase == rotation.Grace { // whose end is asked for, or nothing would be done for ten minutes
		asked, cancel := context.WithTimeout(s.ctx, time.Second)
		_, _ = s.write(asked, "retire/"+s.server.kind+"/app", nil) // the answer would wait for the end
		cancel()
	}
	data := s.awaitState(t, id, "waiting", "rollback_failed")
	require.NotEmpty(t, data["summary"])
	for range 10 {
		require.NoError(t, client.more(s.ctx), "what was served since is refused: %v", data)
	}
	still, err := s.server.stored(s.ctx, since["username"].(string))
	require.NoError(t, err)
	require.Equal(t, keeps, still, "nothing was changed at the server")
	logins := client.stop(t)

	// Somebody says that what Vault serves is to be so.
	s.mustWrite(t, "reconcile/"+s.server.kind+"/app", nil)
	s.works(t)
	figure(t, "snapshot of %s restored after two more rotations: it waited, %d logins with what was served since, 0 refused; what is served works after reconcile/", name, logins)
}

// works ends whatever is under way, and requires that what is served is accepted.
func (s *snapshots) works(t *testing.T) {
	t.Helper()
	require.NoError(t, until(s.ctx, 2*time.Minute, func(ctx context.Context) error {
		r, err := s.stored(ctx, "app")
		if err == nil && r.Run != nil {
			if r.Run.Phase == rotation.Grace {
				_, _ = s.write(ctx, "retire/"+s.server.kind+"/app", nil)
			}
			err = fmt.Errorf("a rotation is in %s: %s", r.Run.Phase, r.Run.Error)
		}
		return err
	}))
	creds := s.credentials(t)
	require.NoError(t, s.server.login(s.ctx, creds["username"].(string), creds["password"].(string)))
	data, err := s.read(s.ctx, "verify/"+s.server.kind+"/app")
	require.NoError(t, err)
	require.Equal(t, true, data["ok"], "%v", data)
}

// fresh restores a snapshot after which nothing was begun: the rotation that it holds
// ends by itself, and whoever has what it served is not refused.
func (s *snapshots) fresh(t *testing.T, name string) {
	t.Helper()
	snapshot, id := s.taken(t)
	s.awaitState(t, id, "grace", "completed")
	served := s.credentials(t)
	client := clientOf(s.ctx, s.server, served, "")
	s.restored(t, snapshot, id)
	s.awaitState(t, id, "grace", "completed")
	require.NoError(t, client.more(s.ctx))
	s.works(t)
	require.Equal(t, served["password"], s.credentials(t)["password"], "the same rotation, and what it had made")
	logins := client.stop(t)
	figure(t, "snapshot of %s restored at once: the rotation ended by itself, %d logins, 0 refused", name, logins)
}
