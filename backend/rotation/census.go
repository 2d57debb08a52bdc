package rotation

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Standing is what lists and metrics tell of a role. It holds no material.
type Standing struct {
	Kind    string
	Since   time.Time // when what it serves was made
	Next    time.Time // its next scheduled rotation
	Running bool
	Failed  bool // its last rotation did not complete
	Drifted bool
	// Suspended: its scheduled rotations have stopped.
	Suspended  bool
	Unreadable bool // its entry cannot be decoded; nothing else is known of it
}

// Stands is where r stands.
func Stands(r *Role) Standing {
	s := Standing{
		Kind: r.Kind, Next: r.Next, Running: r.Run != nil, Drifted: r.Drift != nil, Suspended: r.Suspended != "",
		Failed: r.Run == nil && r.LastRun != nil && r.LastRun.State != Completed,
	}
	if current := r.With(version.Current); current != nil {
		s.Since = current.Created
	}
	return s
}

// In names the lists that the role belongs in: running, due or overdue, failed,
// drifted, suspended, unreadable.
func (s Standing) In(now time.Time) (in []string) {
	if late := now.Sub(s.Next); !s.Next.IsZero() && !s.Running && late >= 0 {
		if late > OverdueAfter {
			in = append(in, "overdue")
		} else {
			in = append(in, "due")
		}
	}
	for _, is := range []struct {
		so   bool
		name string
	}{
		{s.Running, "running"}, {s.Failed, "failed"}, {s.Drifted, "drifted"}, {s.Suspended, "suspended"}, {s.Unreadable, "unreadable"},
	} {
		if is.so {
			in = append(in, is.name)
		}
	}
	return in
}

// OverdueAfter is how late a slot may be served before it is called overdue.
const OverdueAfter = time.Hour

// census is a cache of where every role stands, so that a look at all of them costs
// no storage. It is counted when somebody first asks; from then on whoever stores a
// role keeps it right. Only the node that rotates has one: nobody tells the others
// what is stored.
type census struct {
	st *Store
	// turn is held by who reads.
	turn chan struct{}

	mu sync.Mutex
	// counting: what is stored is noted; counted: every role is in it.
	counting, counted bool

	roles map[string]Standing
	// reading is what a reader asks storage for; what is stored meanwhile is newer.
	// doubted was last answered with an error, and may have been stored.
	reading, doubted map[string]bool
}

func newCensus(st *Store) *census {
	return &census{st: st, turn: make(chan struct{}, 1), roles: map[string]Standing{}, reading: map[string]bool{}, doubted: map[string]bool{}}
}

// note keeps what was stored; nil: the role is gone.
func (c *census) note(name string, r *Role) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.counting {
		return
	}
	delete(c.reading, name)
	delete(c.doubted, name)
	if r == nil {
		delete(c.roles, name)
		return
	}
	c.roles[name] = Stands(r)
}

// doubt has a role read before anybody is told of it.
func (c *census) doubt(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counting {
		delete(c.reading, name)
		c.doubted[name] = true
	}
}

// each calls f with where every role stands. Whoever is cut off while the roles are
// counted leaves the rest to the next.
func (c *census) each(ctx context.Context, f func(name string, s Standing)) error {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := c.complete(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, s := range c.roles {
		f(name, s)
	}
	return nil
}

func (c *census) complete(ctx context.Context) error {
	if err := c.count(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	doubted := slices.Collect(maps.Keys(c.doubted))
	c.mu.Unlock()
	if len(doubted) == 0 {
		return nil
	}
	if err := c.st.settle(ctx); err != nil { // what may still be applied is, or never will be
		return err
	}
	return c.read(ctx, doubted)
}

func (c *census) count(ctx context.Context) error {
	c.mu.Lock()
	counted := c.counted
	c.counting = true // before the names are listed: a role that comes later is noted
	c.mu.Unlock()
	if counted {
		return nil
	}
	names, err := c.st.s.List(ctx, storage.Role)
	if err != nil {
		return err
	}
	for page := range slices.Chunk(c.unknown(names), 1000) {
		if err := c.read(ctx, page); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counted = true
	return nil
}

func (c *census) unknown(names []string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(names, func(name string) bool {
		_, known := c.roles[name]
		return known
	})
}

// read reads roles. One that is stored meanwhile is left to who stored it.
func (c *census) read(ctx context.Context, names []string) error {
	c.mu.Lock()
	for _, name := range names {
		c.reading[name] = true
	}
	c.mu.Unlock()
	roles, bad := c.st.roles(ctx, names)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer clear(c.reading)
	for i, name := range names {
		err := bad[name]
		if err != nil && !storage.IsUndecodable(err) {
			return err
		}
		if !c.reading[name] {
			continue
		}
		delete(c.doubted, name)
		switch {
		case err != nil:
			c.roles[name] = Standing{Kind: "unknown", Unreadable: true}
		case roles[i] == nil:
			delete(c.roles, name)
		default:
			c.roles[name] = Stands(roles[i])
		}
	}
	return nil
}

// EachStanding calls f with where every role stands, the admins of connections
// included, in no order. The first who asks after a start waits until all were read.
func (e *Engine) EachStanding(ctx context.Context, f func(name string, s Standing)) error {
	if !e.o.Active() { // nobody tells this node what is stored
		return newCensus(e.st).each(ctx, f)
	}
	return e.census.each(ctx, f)
}
