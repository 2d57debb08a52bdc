package harmonyflow

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestFiveHundredRoles measures what a batch saves.
func TestFiveHundredRoles(t *testing.T) {
	t.Parallel()
	const roles, sample = 500, 10
	m := newMount(t)
	server := servers.Redis(t, users(roles))
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), nil)
	m.must("config", map[string]any{"grace_period": "1h"})
	m.adoptMany("app", "cache", roles)
	m.b.answerWithin = patience // how fast a batch is compared with single ones is not how fast the machine is
	p.SetLatency(10*time.Millisecond, 10*time.Millisecond)

	began := time.Now()
	for i := range sample {
		m.must(fmt.Sprintf("rotate/redis/app-%03d", i), nil)
	}
	oneByOne := time.Since(began) / sample * roles
	p.Heal()
	for i := range sample {
		m.must(fmt.Sprintf("retire/redis/app-%03d", i), nil)
	}

	p.SetLatency(10*time.Millisecond, 10*time.Millisecond)
	began = time.Now()
	r := m.must("rotate/redis", nil)
	batch := time.Since(began)
	require.Equal(t, "500 roles: 500 promoted", r.data["summary"])
	times := float64(oneByOne) / float64(batch)
	t.Logf("%d roles behind 20 ms: batch %.1f s, one after another %.1f s (%.0f times)", roles, batch.Seconds(), oneByOne.Seconds(), times)
	require.Greater(t, times, 10.0)

	p.Heal()
	for _, i := range []int{0, 250, 499} {
		creds := m.creds(fmt.Sprintf("app-%03d", i))
		require.True(t, canLogIn(t, server, fmt.Sprint("user-", i), creds["password"].(string)))
		require.True(t, canLogIn(t, server, fmt.Sprint("user-", i), creds["previous_password"].(string)))
	}
}

// TestOneHangingTargetHarmsOnlyItself measures, too: a hundred roles hang on a listener that accepts and says nothing; the roles of another
// connection do not notice.
func TestOneHangingTargetHarmsOnlyItself(t *testing.T) {
	t.Parallel()
	const hanging = 100
	m := newMount(t)
	server, other := servers.Redis(t, users(1)), servers.Redis(t, users(hanging))
	m.connect("healthy", server.Addr, nil)
	m.adopt("app", "healthy", 0, nil)
	m.connect("hanging", other.Addr, nil)
	m.adoptMany("stuck", "hanging", hanging)
	m.must("connections/hanging", map[string]any{
		"addresses": silent(t), "password": servers.RedisAdminPassword, "verify_connection": false,
	})
	rotate := func() time.Duration {
		began := time.Now()
		r := m.must("rotate/redis/app", nil)
		took := time.Since(began)
		require.Equal(t, "version", r.data["redis/app"].(string)[:7])
		m.must("retire/redis/app", nil)
		return took
	}
	alone := rotate()
	var wg sync.WaitGroup
	answered := m.b.answerWithin
	m.b.answerWithin = 300 * time.Millisecond
	for i := range hanging / 2 { // each a rotation of its own
		wg.Go(func() { m.write(fmt.Sprintf("rotate/redis/stuck-%03d", i), nil) })
	}
	wg.Wait()
	m.b.answerWithin = 8 * time.Second
	r := m.write("rotate/redis", map[string]any{"reason": "the other half, and app with them"})
	m.b.answerWithin = answered
	require.Equal(t, "version 3, promoted", r.data["redis/app"], "a batch answers with what there is")
	m.must("retire/redis/app", nil)
	beside := rotate()
	// On a slow machine the first of them have been given up by now.
	counts := m.read("status").data["counts"].(map[string]any)
	require.EqualValues(t, hanging, counts["running"].(int64)+counts["failed"].(int64))
	require.NotZero(t, counts["running"])
	t.Logf("a role rotates in %d ms, and in %d ms while %d roles of another connection hang", alone.Milliseconds(), beside.Milliseconds(), hanging)
	require.Less(t, beside, max(2*time.Second, 10*alone))
}

// TestMoreRolesThanOneRotationHolds: a large request becomes several rotations
// under one, and is answered as one.
func TestMoreRolesThanOneRotationHolds(t *testing.T) {
	t.Parallel()
	const roles = 501
	m := newMount(t)
	m.b.answerWithin = 2 * patience
	m.must("roles/token-000", map[string]any{"kind": "api-key", "previous_field": "OLD"})
	m.idle("token-000")
	store := rotation.NewStore(m.storage)
	for i := 1; i < roles; i++ {
		r := *m.role("token-000")
		r.Name = fmt.Sprintf("token-%03d", i)
		require.NoError(t, store.PutRole(context.Background(), nil, &r))
	}
	all := request{op: logical.UpdateOperation, path: "rotate/all", id: "all-of-them"}
	r := m.send(all)
	require.Equal(t, "501 roles: 501 promoted", r.data["summary"])
	require.Equal(t, "grace", r.data["state"])
	require.Equal(t, id(r), id(m.send(all)))
	parent := m.read("rotations/" + id(r)).data
	require.Len(t, parent["children"], 2)
	require.Equal(t, id(r), m.read("rotations/" + parent["children"].([]string)[0]).data["parent"])
	r = m.must("retire/api-key/token-500", nil)
	require.Equal(t, "version 2, completed", r.data["api-key/token-500"])
	r = m.must("cancel/"+id(m.send(all)), nil)
	require.Equal(t, "501 roles: 1 completed, 500 rolled back", r.data["summary"])
	require.EqualValues(t, 3, m.creds("token-000")["version"])
	require.EqualValues(t, 2, m.creds("token-500")["version"])
}

// idle waits until a role's entry names no rotation: its copies must not either.
func (m *mount) idle(role string) {
	m.Helper()
	require.Eventually(m, func() bool { return m.role(role).Run == nil }, patience, glance)
}

// adoptMany makes roles <name>-000, … of user-0, …: one the way users do, the
// others as its copies in storage.
func (m *mount) adoptMany(name, connection string, n int) {
	m.Helper()
	m.adopt(name+"-000", connection, 0, nil)
	m.idle(name + "-000")
	store := rotation.NewStore(m.storage)
	for i := 1; i < n; i++ {
		r := *m.role(name + "-000")
		r.Name, r.Spec.Username, r.Given.Username = fmt.Sprintf("%s-%03d", name, i), fmt.Sprintf("user-%d", i), fmt.Sprintf("user-%d", i)
		r.Versions = slices.Clone(r.Versions)
		r.Versions[0].Material = kind.Material{Username: r.Spec.Username, Secret: password(i)}
		require.NoError(m, store.PutRole(context.Background(), nil, &r))
	}
}
