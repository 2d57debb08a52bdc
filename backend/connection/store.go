package connection

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// maxEntry bounds a stored connection.
const maxEntry = 64 << 10

// Root reads the admin credential of a connection that is rotated by itself; nil
// where the connection's entry holds it.
type Root func(ctx context.Context, name string) (*version.Set, error)

// Store reads and writes connections.
type Store struct {
	s     logical.Storage
	root  Root
	locks locks
	// changes counts writes that have ended, whatever came of them; unsure is set by
	// one that may still be applied.
	changes atomic.Uint64
	unsure  atomic.Bool
}

// NewStore returns a Store over s.
func NewStore(s logical.Storage, root Root) *Store {
	return &Store{s: s, root: root, locks: locks{held: map[string]*nameLock{}}}
}

// Get reads a connection; nil when there is none.
func (st *Store) Get(ctx context.Context, name string) (*Entry, error) {
	e, err := storage.Get[Entry](ctx, st.s, storage.Connection+name)
	if err != nil || e == nil {
		return nil, err
	}
	if err := e.whole(); err != nil {
		return nil, storage.Undecodable(storage.Connection+name, err)
	}
	e.Name = name
	set, err := st.root(ctx, name)
	if err != nil {
		return nil, err
	}
	if set != nil {
		e.Admin, e.Managed = Admin{Set: *set}, true
	}
	return e, nil
}

// Must reads a connection that a role needs; that there is none is definite.
func (st *Store) Must(ctx context.Context, name string) (*Entry, error) {
	e, err := st.Get(ctx, name)
	if err == nil && e == nil {
		err = Missing(name)
	}
	return e, err
}

// Missing says that a connection does not exist, and what to do.
func Missing(name string) error {
	return kind.Definitely("connection %q does not exist; write connections/%s first", name, name)
}

// Generation returns how often a connection was written; 0 when it does not
// exist.
func (st *Store) Generation(ctx context.Context, name string) (int, error) {
	e, err := st.Get(ctx, name)
	if err != nil || e == nil {
		return 0, err
	}
	return e.Generation, nil
}

// Put writes a connection. A credential that is kept elsewhere does not go into
// its entry.
func (st *Store) Put(ctx context.Context, e *Entry) error {
	stored := *e
	if e.Managed {
		stored.Admin = Admin{}
	}
	return st.changed(storage.Put(ctx, st.s, storage.Connection+e.Name, &stored, maxEntry))
}

// changed counts a write.
func (st *Store) changed(err error) error {
	if err != nil {
		st.unsure.Store(true)
	}
	st.changes.Add(1)
	return err
}

// Changes is how often a connection was written through this store. As long as it
// stays the same, what was read of connections since is what they are. ok is false
// once a write was answered with an error: it may be applied at any time.
func (st *Store) Changes() (n uint64, ok bool) { return st.changes.Load(), !st.unsure.Load() }

// Delete removes a connection.
func (st *Store) Delete(ctx context.Context, name string) error {
	if err := st.changed(st.s.Delete(ctx, storage.Connection+name)); err != nil {
		return fmt.Errorf("deleting connection %q: %w", name, err)
	}
	return nil
}

// List names all connections.
func (st *Store) List(ctx context.Context) ([]string, error) {
	return st.s.List(ctx, storage.Connection)
}

// All reads every connection.
func (st *Store) All(ctx context.Context) ([]*Entry, error) {
	names, err := st.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []*Entry
	for _, name := range names {
		e, err := st.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		if e != nil {
			out = append(out, e)
		}
	}
	return out, nil
}
