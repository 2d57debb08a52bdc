package proof_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// closer is a function that closes.
type closer func() error

func (c closer) Close() error { return c() }

// TestUnused keeps sessions of the previous user open at each server: its password
// stays, and rotations/<id> names who they are of. When they have closed, it goes long
// before its time.
func TestUnused(t *testing.T) {
	v := sharedVault(t)
	for _, make := range []func(*testing.T) bench{redisBench, postgresBench, rabbitBench} {
		b := make(t)
		t.Run(b.kind, func(t *testing.T) {
			t.Parallel()
			untilUnused(t, newMount(t, v, "unused-"+b.kind), b)
		})
	}
}

const unusedGrace = 20 * time.Minute

func untilUnused(t *testing.T, m *mount, b bench) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m.open(t, b, b.address)
	m.mustWrite(t, "roles/app", map[string]any{
		"kind": b.kind, "connection": "server", "usernames": "app,app_b", "initial_password": firstPassword,
		"grace_period": unusedGrace.String(), "grace_until_unused": true, "grace_minimum": "1s",
	})
	first, err := b.hold(ctx, "app", firstPassword, "billing")
	require.NoError(t, err)
	defer func() { _ = first.Close() }()
	data := m.mustWrite(t, "rotate/"+b.kind+"/app", nil)
	require.Equal(t, "grace", data["state"], "%v", data)
	id := data["rotation_id"].(string)
	m.names(t, id, 1, "127.0.0.1 (billing)")

	// Another one logs in that nobody knew of: it was looked at since, twice, and the
	// old password is there.
	second, err := b.hold(ctx, "app", firstPassword, "forgotten")
	require.NoError(t, err)
	defer func() { _ = second.Close() }()
	m.names(t, id, 2, "127.0.0.1 (billing)", "127.0.0.1 (forgotten)")
	require.NoError(t, first.Close())
	gone := m.names(t, id, 1, "127.0.0.1 (forgotten)")
	require.Len(t, gone, 2, "who was there is still named")
	require.NoError(t, b.login(ctx, "app", firstPassword))

	require.NoError(t, second.Close())
	closed := time.Now()
	var end map[string]any
	require.NoError(t, until(ctx, 3*time.Minute, func(ctx context.Context) (err error) {
		if end, err = m.read(ctx, "rotations/"+id); err == nil && end["state"] != "completed" {
			err = fmt.Errorf("the rotation is %v: %v", end["state"], end["timeline"])
		}
		return err
	}))
	took := time.Since(closed)
	require.ErrorIs(t, b.login(ctx, "app", firstPassword), errRefused)
	require.Len(t, end["previous_clients"], 2, "the evidence names them: %v", end)
	require.Contains(t, fmt.Sprint(end["previous_clients"]), "127.0.0.1 (forgotten), gone at ")
	figure(t, "unused %s: in grace while sessions were open, retired %s after the last closed, of a grace of %s", b.kind, took.Round(time.Second), unusedGrace)
	require.Less(t, took, unusedGrace/5)
}

// names waits until rotations/<id> says that so many sessions are of these clients, and
// that it is in grace, and returns all that it names.
func (m *mount) names(t *testing.T, id string, sessions int, clients ...string) (all []any) {
	t.Helper()
	require.NoError(t, until(t.Context(), 2*time.Minute, func(ctx context.Context) error {
		data, err := m.read(ctx, "rotations/"+id)
		if err != nil {
			return err
		}
		require.Equal(t, "grace", data["state"], "%v", data)
		all, _ = data["previous_clients"].([]any)
		word := map[int]string{1: "1 session of"}[sessions]
		if word == "" {
			word = fmt.Sprint(sessions, " sessions of")
		}
		line := fmt.Sprint(data["previous_sessions"])
		for _, part := range append(clients, word) {
			if !strings.Contains(line, part) {
				return fmt.Errorf("previous_sessions is %q, without %q; timeline %v", line, part, data["timeline"])
			}
		}
		return nil
	}))
	return all
}
