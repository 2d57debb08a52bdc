package proof_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// lostReplies is how often each login is changed with nobody hearing of it.
const lostReplies = 3

// TestLostReplies: a proxy lets the server change the login that it is changed
// with, and loses the reply; then the plugin is killed. Vault's database engine
// loses such a password for good: of self-managed roles because it discards it when
// the retry is refused, of root because it stores the new one as the old
// (hashicorp/vault 1.21.4).
func TestLostReplies(t *testing.T) {
	for name, c := range map[string]struct {
		make func(*testing.T) bench
		self bool
	}{
		"redis": {redisBench, false}, "postgresql": {postgresBench, false}, "rabbitmq": {rabbitBench, false},
		"postgresql, by itself": {postgresBench, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := servers.NewVault(t, servers.VaultOptions{NoMount: true, RawStorage: true})
			loseReplies(t, newMount(t, v, "roots"), c.make(t), name, c.self)
		})
	}
}

// ownLogin is one that is changed through itself.
type ownLogin struct {
	path, role, user string
	first            string
}

func loseReplies(t *testing.T, m *mount, b bench, name string, self bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	p, err := servers.NewProxy(b.address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	m.open(t, b, p.Addr())
	role := map[string]any{"kind": b.kind, "connection": "server", "username": "app", "initial_password": firstPassword, "grace_period": "0s"}
	own := ownLogin{path: "rotate-root/server", role: rotation.RootName("server"), user: "engine", first: enginePassword}
	if self {
		role["allow_self_rotation"] = true
		own = ownLogin{path: "rotate/" + b.kind + "/app", role: "app", user: "app", first: firstPassword}
	}
	m.mustWrite(t, "roles/app", role)
	before := own.first
	lost := 0
	for range lostReplies {
		served, err := m.loseReply(ctx, b, p, own, before)
		if errors.Is(err, errLost) {
			lost++
		}
		require.NoError(t, err)
		before = served
	}
	// What everything else is done with goes on.
	data := m.mustWrite(t, "rotate/"+b.kind+"/app", nil)
	require.Equal(t, "completed", data["state"])
	figure(t, "%s: %d replies lost while it changed its own login, and the plugin killed, %d lost", name, lostReplies, lost)
}

// errLost: the server accepts nothing that is stored.
var errLost = errors.New("the server accepts no password that is stored")

// loseReply rotates a login and loses the reply of the server, and what had asked
// for it. It returns what is served in the end.
func (m *mount) loseReply(ctx context.Context, b bench, p *servers.Proxy, own ownLogin, before string) (string, error) {
	was, err := b.stored(ctx, own.user)
	if err != nil {
		return "", err
	}
	p.LoseReplyTo(b.change)
	asked, cancel := context.WithCancel(ctx)
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = m.write(asked, own.path, nil)
	}()
	err = until(ctx, 30*time.Second, func(ctx context.Context) error {
		now, err := b.stored(ctx, own.user)
		if err == nil && now == was {
			err = errors.New("the server has not changed it")
		}
		return err
	})
	cancel()
	<-answered
	if err != nil {
		return "", err
	}
	if _, err := m.vault.KillPlugin(); err != nil {
		return "", err
	}
	p.Heal()
	var r *rotation.Role
	err = until(ctx, 2*time.Minute, func(ctx context.Context) error {
		// Any request revives the plugin.
		if _, err := m.read(ctx, "config"); err != nil {
			return err
		}
		if r, err = m.stored(ctx, own.role); err == nil && r.Run != nil {
			err = fmt.Errorf("still in phase %s: %s", r.Run.Phase, r.Run.Error)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if r.LastRun == nil || r.LastRun.State != rotation.Completed {
		return "", fmt.Errorf("it ended as %+v", r.LastRun)
	}
	served := r.With(version.Current).Material.Secret
	if err := b.login(ctx, own.user, served); err != nil {
		for _, v := range r.Versions {
			if b.login(ctx, own.user, v.Material.Secret) == nil {
				return "", fmt.Errorf("version %d is accepted, and not what is served: %w", v.Number, err)
			}
		}
		return "", errLost
	}
	if err := b.login(ctx, own.user, before); !errors.Is(err, errRefused) {
		return "", fmt.Errorf("the password from before is not refused: %w", err)
	}
	return served, nil
}
