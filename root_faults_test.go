package harmonyflow

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// nthFails is storage that fails the n-th write, applied or not.
type nthFails struct {
	logical.Storage
	left    atomic.Int64
	applied bool
}

var errFails = errors.New("storage fails")

func (s *nthFails) Put(ctx context.Context, e *logical.StorageEntry) error {
	if s.left.Add(-1) == 0 {
		if s.applied {
			_ = s.Storage.Put(ctx, e)
		}
		return errFails
	}
	return s.Storage.Put(ctx, e)
}

func (s *nthFails) Delete(ctx context.Context, key string) error {
	if s.left.Add(-1) == 0 {
		if s.applied {
			_ = s.Storage.Delete(ctx, key)
		}
		return errFails
	}
	return s.Storage.Delete(ctx, key)
}

// TestRootWritesThatFail: whichever write of a request fails, the same request comes to
// its end when it is sent again, and the engine is never without a login.
func TestRootWritesThatFail(t *testing.T) {
	t.Parallel()
	one := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	two := servers.Redis(t, users(1), servers.WithUsers(engineUser))
	reset := func(t *testing.T) {
		t.Helper()
		for _, s := range []*servers.RedisNode{one, two} {
			_, err := s.Do(context.Background(), "ACL", "SETUSER", "engine", "on", "resetpass", ">engine-secret", "~*", "&*", "+@all")
			require.NoError(t, err)
		}
	}
	managed := func(m *mount) { m.ended(id(m.must("rotate-root/cache", nil))) }
	for name, c := range map[string]struct {
		before  func(*mount)
		request request
		after   func(*mount)
		most    int
	}{
		"adopted by a schedule": {request: request{op: logical.UpdateOperation, path: "connections/cache", data: map[string]any{"rotation_period": "24h"}}, after: func(m *mount) {
			require.Equal(m, true, m.read("connections/cache").data["managed"])
			require.NotContains(m, m.storage.dump(m.t)["connection/cache"], "engine-secret")
		}, most: 6},
		"moved": {before: managed, request: request{op: logical.UpdateOperation, path: "connections/cache", data: map[string]any{"addresses": two.Addr, "password": "engine-secret", "force": true}}, after: func(m *mount) {
			require.Equal(m, "engine-secret", m.adminOf("cache").Secret)
			require.Equal(m, m.read("connections/cache").data["identity"], m.role(rotation.RootName("cache")).Target)
			managed(m)
		}, most: 6},
		"deleted": {before: managed, request: request{op: logical.DeleteOperation, path: "connections/cache", data: map[string]any{"force": "true"}}, after: func(m *mount) {
			for key := range m.storage.dump(m.t) {
				require.False(m, strings.HasPrefix(key, "connection/") || strings.HasPrefix(key, "role/"), key)
			}
		}, most: 5},
	} {
		for _, applied := range []bool{false, true} {
			for n := 1; n <= c.most; n++ {
				t.Run(fmt.Sprint(name, " ", n, " ", applied), func(t *testing.T) {
					reset(t)
					m := newMount(t)
					m.connect("cache", one.Addr, engine())
					if c.before != nil {
						c.before(m)
					}
					f := &nthFails{Storage: m.storage.Storage, applied: applied}
					f.left.Store(int64(n))
					m.storage.Storage = f
					r := m.send(c.request)
					failed := f.left.Load() <= 0
					f.left.Store(0)
					if failed && r.code >= 300 { // what is cleaned up may be left
						require.Equal(t, http.StatusInternalServerError, r.code, r.message)
						r = m.send(c.request)
					}
					require.Less(t, r.code, 300, r.message)
					m.restart()
					c.after(m)
				})
			}
		}
	}
}
