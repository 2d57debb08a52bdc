package harmonyflow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestScheduledRotations are found from the stored next time, by whichever
// process comes next, with nothing but Vault's periodic call.
func TestScheduledRotations(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for name, schedule := range map[string]map[string]any{
		"period": {"rotation_period": "24h"}, "cron": {"rotation_schedule": fullHour()},
		"window": {"rotation_schedule": fullHour(), "rotation_window": "1h"}, "off": {"rotation_period": "24h", "disable_automated_rotation": true},
		"failed": {"rotation_period": "24h"},
	} {
		schedule["kind"] = "api-key"
		m.must("roles/"+name, schedule)
	}
	m.b.Cleanup(context.Background())
	for name, ago := range map[string]time.Duration{"period": 30 * 24 * time.Hour, "cron": time.Minute, "window": 2 * time.Hour} {
		m.alter(name, func(r *rotation.Role) { r.Next = time.Now().Add(-ago) })
	}
	m.alter("failed", func(r *rotation.Role) { r.Next, r.RetryAt = time.Now().Add(-time.Hour), time.Now().Add(time.Hour) })
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Eventually(t, func() bool {
		return m.creds("period")["version"] == int64(2) && m.creds("cron")["version"] == int64(2) &&
			m.role("window").Next.After(time.Now())
	}, patience, glance)
	for _, name := range []string{"off", "window", "failed"} {
		require.EqualValues(t, 1, m.creds(name)["version"], name)
	}
	require.NotContains(t, m.creds("off"), "ttl")
	require.InDelta(t, 86400, m.creds("period")["ttl"], 60, "missed slots are made up for by one rotation")
	r := m.send(request{op: logical.ReadOperation, path: "rotations"})
	scheduled := 0
	for _, info := range r.data["key_info"].(map[string]any) {
		if info.(map[string]any)["trigger"] == "schedule" {
			scheduled++
		}
	}
	require.Equal(t, 1, scheduled, "what is due together is one rotation")
}

// TestResumes: what was interrupted goes on in the next process.
func TestResumes(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("lost", "cache", 1, nil)
	p.Blackhole(true)
	m.b.answerWithin = shortly
	r := m.must("rotate/redis", nil)
	m.b.Cleanup(context.Background())
	p.Heal()
	m.start()
	m.until(id(r), func(s rotation.State) bool { return s == rotation.InGrace })
	for i, name := range []string{"app", "lost"} {
		require.True(t, canLogIn(t, server, fmt.Sprint("user-", i), m.creds(name)["password"].(string)))
		require.True(t, canLogIn(t, server, fmt.Sprint("user-", i), password(i)))
	}
}

func TestCleanWithAHangingTarget(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), nil)
	m.adopt("app", "cache", 0, nil)
	p.Blackhole(true)
	m.b.answerWithin = shortly
	m.must("rotate/redis/app", nil)
	began := time.Now()
	m.b.Cleanup(context.Background())
	m.b.Cleanup(context.Background())
	require.Less(t, time.Since(began), stopTimeout)
	p.Heal()

	// A backend that was cleaned up writes nothing, whoever asks it to.
	stored, writes := m.storage.dump(t), m.storage.writes.Load()
	m.b.Cleanup(context.Background())
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.NoError(t, m.b.Initialize(context.Background(), &logical.InitializationRequest{Storage: m.storage}))
	r := m.write("roles/token", map[string]any{"kind": "api-key"})
	require.Equal(t, http.StatusInternalServerError, r.code)
	require.Contains(t, r.message, "has been closed")
	require.Equal(t, http.StatusInternalServerError, m.write("config", map[string]any{"workers": 3}).code)
	require.Equal(t, writes, m.storage.writes.Load())
	require.Equal(t, stored, m.storage.dump(t))
}

// TestCleanWithHangingStorage: a storage that does not answer must not keep
// Vault from sealing.
func TestCleanWithHangingStorage(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	release := m.storage.hang("")
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		m.write("rotate/api-key/token", nil)
	}()
	require.Eventually(t, func() bool { return m.storage.hanging.Load() > 0 }, patience, glance)
	began := time.Now()
	m.b.Cleanup(context.Background())
	require.Less(t, time.Since(began), 3*stopTimeout, "it ends before storage answers")
	release()
	<-answered
}

func TestCleanBeforeInitialize(t *testing.T) {
	t.Parallel()
	made, err := Factory(context.Background(), &logical.BackendConfig{System: &logical.StaticSystemView{}})
	require.NoError(t, err, "Vault also makes one without storage, to learn what it is")
	require.NotEmpty(t, made.SpecialPaths().SealWrapStorage)
	require.Equal(t, logical.TypeLogical, made.Type())
	made.Cleanup(context.Background())
	require.NoError(t, made.Initialize(context.Background(), &logical.InitializationRequest{}))
	made.Cleanup(context.Background())
}

// TestNothingIsLeftRunning is not parallel: it counts goroutines.
func TestNothingIsLeftRunning(t *testing.T) {
	server := servers.Redis(t, users(1))
	before := goleak.IgnoreCurrent()
	m := newMount(t)
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	m.must("rotate/redis/app", nil)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	m.must("rotate/all", nil)
	m.b.Cleanup(context.Background())
	require.NoError(t, leaks.Find(before))
}

// TestInitializeAndPeriodicReturnAtOnce: Vault holds locks while it calls them.
func TestInitializeAndPeriodicReturnAtOnce(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key", "rotation_period": "24h"})
	m.b.Cleanup(context.Background())
	m.alter("token", func(r *rotation.Role) { r.Next = time.Now().Add(-time.Hour) })
	release := m.storage.hang("")
	began := time.Now()
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Less(t, time.Since(began), 10*time.Second, "storage does not answer before they do")
	release()
	require.Eventually(t, func() bool { return m.creds("token")["version"] == int64(2) }, patience, glance)
}

// TestOnlyTheActiveNodeWorks: elsewhere nothing is read or written by itself,
// and what changes something is forwarded.
func TestOnlyTheActiveNodeWorks(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		state           consts.ReplicationState
		local, tainted  bool
		works, forwards bool
	}{
		"primary":             {works: true},
		"standby":             {state: consts.ReplicationPerformanceStandby, forwards: true},
		"local on a standby":  {state: consts.ReplicationPerformanceStandby, local: true, forwards: true},
		"secondary":           {state: consts.ReplicationPerformanceSecondary, forwards: true},
		"local on secondary":  {state: consts.ReplicationPerformanceSecondary, local: true, works: true},
		"disaster recovery":   {state: consts.ReplicationDRSecondary},
		"local on a DR":       {state: consts.ReplicationDRSecondary, local: true},
		"tainted":             {tainted: true},
		"tainted local mount": {tainted: true, local: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t)
			m.must("roles/token", map[string]any{"kind": "api-key", "rotation_period": "24h"})
			m.b.Cleanup(context.Background())
			m.alter("token", func(r *rotation.Role) { r.Next = time.Now().Add(-time.Hour) })
			m.system = &logical.StaticSystemView{
				ReplicationStateVal: c.state, LocalMountVal: c.local, TaintedVal: c.tainted,
				PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.0"},
			}
			before := m.storage.operations.Load()
			m.start()
			for range 3 {
				require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
			}
			if c.works {
				require.Eventually(t, func() bool { return m.creds("token")["version"] == int64(2) }, patience, glance)
			} else {
				require.Never(t, func() bool { return m.storage.operations.Load() != before }, 100*time.Millisecond, glance)
				require.EqualValues(t, 1, m.creds("token")["version"], "reads are served")
			}
			if !c.forwards {
				return
			}
			writes := m.storage.writes.Load()
			for _, p := range m.b.Paths {
				for op, handler := range p.Operations {
					if !handler.Properties().ForwardPerformanceStandby {
						continue
					}
					path := example(p, "api-key", "token")
					_, err := m.b.HandleRequest(context.Background(), &logical.Request{Operation: op, Path: path, Storage: m.storage})
					require.Equal(t, logical.ErrReadOnly, err, "%s %s", op, path)
				}
			}
			require.Equal(t, writes, m.storage.writes.Load())
		})
	}
}

// badKind panics where it is told to.
type badKind struct{ in string }

func (badKind) Name() string           { return "bad-kind" }
func (badKind) ConnectionType() string { return "" }
func (badKind) Fields() []string       { return []string{"length"} }
func (k badKind) Complete(*kind.Spec) error {
	if k.in == "complete" {
		panic("complete")
	}
	return nil
}
func (badKind) CheckInitial(kind.Spec, string) error { return nil }
func (k badKind) Generate(context.Context, kind.Spec, kind.Source) (kind.Material, error) {
	if k.in == "generate" {
		panic(errors.New("generate"))
	}
	return kind.Material{Secret: "made-by-a-bad-kind"}, nil
}

// TestPanicsEndNothing: one process serves every mount of the plugin.
func TestPanicsEndNothing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	add := func(in string) { m.b.kinds = append(kinds(), kindEntry{Kind: badKind{in}}) }
	add("complete")
	r := m.write("roles/bad", map[string]any{"kind": "bad-kind"})
	require.Equal(t, http.StatusInternalServerError, r.code)
	require.Contains(t, r.message, "a defect of the engine")
	left := m.storage.dump(t)
	delete(left, storage.Format) // which is stored when the mount begins to work
	require.Empty(t, left)
	require.Contains(t, m.log.String(), "badKind.Complete", "the log says where")

	m.b.Cleanup(context.Background())
	m.change = func(b *backend) { b.kinds = append(kinds(), kindEntry{Kind: badKind{"generate"}}) }
	m.start()
	m.b.answerWithin = shortly
	r = m.write("roles/bad", map[string]any{"kind": "bad-kind"})
	require.Equal(t, http.StatusOK, r.code, r.message)
	require.Eventually(t, func() bool { return strings.Contains(m.log.String(), "panicked") }, patience, glance)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	m.ended(id(m.must("rotate/api-key/token", nil)))
	require.Equal(t, http.StatusConflict, m.read("creds/bad").code)
}

// silent accepts connections and says nothing.
func silent(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var held []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			held = append(held, c)
		}
		for _, c := range held {
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

// TestConnectionStaysWhileARoleComesAbout: of a role's create and its
// connection's delete at the same time one is refused.
func TestConnectionStaysWhileARoleComesAbout(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(10))
	for i := range 10 {
		m.connect("cache", server.Addr, nil)
		name := fmt.Sprint("app-", i)
		var created, deleted reply
		var wg sync.WaitGroup
		wg.Go(func() {
			created = m.write("roles/"+name, map[string]any{
				"kind": "redis", "connection": "cache", "username": fmt.Sprint("user-", i), "initial_password": password(i),
			})
		})
		wg.Go(func() { deleted = m.delete("connections/cache") })
		wg.Wait()
		if deleted.code == http.StatusNoContent {
			require.Equal(t, http.StatusBadRequest, created.code, created.message)
			require.Nil(t, m.role(name))
			continue
		}
		require.Equal(t, http.StatusConflict, deleted.code, deleted.message)
		require.Equal(t, http.StatusOK, created.code, created.message)
		require.Equal(t, http.StatusNoContent, m.delete("roles/"+name).code)
	}
}

// TestWritesOfAConnectionThatHangs hold up no other, and end in time.
func TestWritesOfAConnectionThatHangs(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(20))
	address := silent(t)
	var answered atomic.Int32
	var waited bool
	// The hanging ones are given up after a while, in which a machine that is
	// busy may not get to the others: it has more tries. Where the others wait,
	// they do so at each.
	for try := 0; try == 0 || waited && try < 20; try++ {
		answered.Store(0)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				r := m.write("connections/hanging", map[string]any{"type": "redis", "addresses": address, "password": "a-password-for-nobody"})
				answered.Add(1)
				assert.Contains(t, []int{http.StatusBadRequest, http.StatusConflict}, r.code, r.message)
				assert.Less(t, r.took, answerWithin)
			})
		}
		m.connect("cache", server.Addr, nil)
		m.adopt(fmt.Sprint("app-", try), "cache", try, nil)
		waited = answered.Load() > 0
		wg.Wait()
	}
	require.False(t, waited, "the others wait for those that hang")
	require.NotContains(t, m.storage.dump(t), "connection/hanging")
}

// A tick with nothing due reads nothing, however many roles and connections there are;
// what is written later is seen all the same.
func TestATickWithNothingDueReadsNothing(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	m.idle("app")
	m.stored(t)
	// A tick leaves to others what takes long, so that nothing has been read when it
	// returns.
	reads := func() bool {
		before := m.storage.operations.Load()
		until := time.After(50 * time.Millisecond)
		for {
			require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
			if m.storage.operations.Load() != before {
				return true
			}
			select {
			case <-until:
				return false
			case <-time.After(time.Millisecond):
			}
		}
	}
	calm := func() bool { return !reads() }
	require.Eventually(t, calm, patience, glance, "when the first has seen that no token has to be kept alive")

	m.must("connections/other", map[string]any{
		"type": "vault", "address": "https://127.0.0.1:1", "auth": "token", "token": "a-token-that-nobody-knows", "verify_connection": false,
	})
	for range 3 {
		require.Eventually(t, reads, patience, glance, "its token has to be kept alive")
	}
	require.Less(t, m.delete("connections/other").code, 300)
	require.Eventually(t, calm, patience, glance)
}
