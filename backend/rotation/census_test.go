package rotation

import (
	"context"
	"fmt"
	"math/rand"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// standings are what the engine tells of all roles.
func (w *world) standings() map[string]Standing {
	out := map[string]Standing{}
	_ = w.do("standings", func(ctx context.Context, e *Engine) error {
		clear(out)
		return e.EachStanding(ctx, func(name string, s Standing) { out[name] = s })
	})
	return out
}

// However writes fail, and whenever the engine stops, what is told of all roles at
// once is what is stored.
func TestCensusIsWhatIsStored(t *testing.T) {
	faults := append([]fault{"", replyLost, rejects}, storageWriteFaults...)
	points := 0
	for _, s := range []shape{overlap(2), {name: "document", strategy: kind.Overlap, nodes: 1, document: true}} {
		for _, sc := range s.scenarios() {
			if sc.name != "batch" && sc.name != "delete and create again" && sc.name != "abandon in grace" || sc.not != nil && sc.not(s) {
				continue
			}
			rng := rand.New(rand.NewSource(*pairSeed))
			for range 40 {
				where, what := atStorage, faults[rng.Intn(len(faults))]
				if what == replyLost || what == rejects {
					where = atTarget
				}
				p := plan{name: s.name + "/" + sc.name, points: []point{{where: where, at: 1 + rng.Intn(120), what: what}}}
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, s, p)
					sc.seed(w)
					w.run()
					defer w.close()
					w.keepAsking()
					sc.steps(w)
					w.finish()
					want := map[string]Standing{}
					w.mu.Lock()
					for name, r := range w.roles {
						want[name] = Stands(r)
					}
					w.mu.Unlock()
					if got := w.standings(); fmt.Sprint(got) != fmt.Sprint(want) {
						w.violate("told %v, stored %v", got, want)
					}
				})
				points++
			}
		}
	}
	t.Logf("%d faults", points)
}

// keepAsking asks again and again until the world ends.
func (w *world) keepAsking() {
	w.over.Add(1)
	go func() {
		defer w.over.Done()
		for {
			select {
			case <-w.done:
				return
			case <-time.After(50 * time.Millisecond):
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				_ = w.instance().engine.EachStanding(ctx, func(string, Standing) {})
				cancel()
			}
		}
	}()
}

// slowStorage hands out what it read when it is told to.
type slowStorage struct {
	logical.Storage
	read    chan string
	release chan struct{}
}

func (s *slowStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	e, err := s.Storage.Get(ctx, key)
	if key == storage.Role+"a" {
		s.read <- key
		<-s.release
	}
	return e, err
}

// What is stored while the roles are counted is newer than what was read.
func TestCensusMeetsAWrite(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(c *census, r *Role){
		"stored":  func(c *census, r *Role) { r.Suspended = "why"; c.note("a", r) },
		"deleted": func(c *census, _ *Role) { c.note("a", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &slowStorage{Storage: &logical.InmemStorage{}, read: make(chan string), release: make(chan struct{})}
			r := &Role{Name: "a", Kind: "fake"}
			r.Add(kind.Material{Secret: "x"}, "", time.Now())
			r.Promote(time.Now())
			require.NotNil(t, r.With(version.Current))
			st := NewStore(s)
			require.NoError(t, st.PutRole(t.Context(), nil, r))
			c, told := newCensus(st), map[string]Standing{}
			done := make(chan error)
			go func() {
				done <- c.each(t.Context(), func(name string, s Standing) { told[name] = s })
			}()
			<-s.read
			next := r.clone()
			write(c, next)
			close(s.release)
			require.NoError(t, <-done)
			want := map[string]Standing{}
			if name == "stored" {
				want["a"] = Stands(next)
			}
			require.Equal(t, want, told)
		})
	}
}

// A write that is answered with an error may have been applied: what is told is read
// again.
func TestCensusDoubts(t *testing.T) {
	t.Parallel()
	s := &lyingStorage{Storage: &logical.InmemStorage{}}
	e := New(Options{Storage: s, Active: func() bool { return true }})
	told := func() map[string]Standing {
		out := map[string]Standing{}
		require.NoError(t, e.EachStanding(t.Context(), func(name string, s Standing) { out[name] = s }))
		return out
	}
	r := &Role{Name: "a", Kind: "fake"}
	require.NoError(t, e.putRole(t.Context(), nil, r))
	require.False(t, told()["a"].Suspended)
	s.lies = true
	next := r.clone()
	next.Suspended = "why"
	require.Error(t, e.putRole(t.Context(), r, next))
	require.True(t, told()["a"].Suspended)
	require.Error(t, e.remove(t.Context(), next))
	require.Empty(t, told())
}

// lyingStorage does what it is told, and says that it did not.
type lyingStorage struct {
	logical.Storage
	lies bool
}

func (s *lyingStorage) answer(key string, err error) error {
	if s.lies && strings.HasPrefix(key, storage.Role) {
		return errInjected
	}
	return err
}

func (s *lyingStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	return s.answer(e.Key, s.Storage.Put(ctx, e))
}

func (s *lyingStorage) Delete(ctx context.Context, key string) error {
	return s.answer(key, s.Storage.Delete(ctx, key))
}

// Whoever is cut off leaves what was read: every try comes further.
func TestCensusGoesOn(t *testing.T) {
	t.Parallel()
	inner := &logical.InmemStorage{}
	st := NewStore(inner)
	const roles = 3500
	for i := range roles {
		require.NoError(t, st.PutRole(t.Context(), nil, &Role{Name: fmt.Sprintf("r%04d", i), Kind: "fake"}))
	}
	c, reads := newCensus(NewStore(readsOf(inner, 1200))), 0
	for tries := 1; ; tries++ {
		c.st.s = storage.Fence(readsOf(inner, 1200))
		reads = 0
		err := c.each(t.Context(), func(string, Standing) { reads++ })
		if err == nil {
			require.Equal(t, roles, reads)
			require.Contains(t, []int{3, 4}, tries)
			return
		}
		require.Less(t, tries, 10)
	}
}

// countingStorage fails after so many reads.
type countingStorage struct {
	logical.Storage
	most atomic.Int32
}

func readsOf(inner logical.Storage, most int32) *countingStorage {
	s := &countingStorage{Storage: inner}
	s.most.Store(most)
	return s
}

func (s *countingStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if s.most.Add(-1) < 0 {
		return nil, errInjected
	}
	return s.Storage.Get(ctx, key)
}
