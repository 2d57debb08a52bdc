// Package storage names every key of the mount in one place, and gives the rest
// of the engine the only handle it may write through.
package storage

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// The prefixes of the mount's storage.
const (
	Config           = "config"
	Connection       = "connection/"        // holds admin credentials
	Role             = "role/"              // holds material; the authority about a role
	Deleted          = "deleted/"           // tombstones; hold material
	Document         = "document/"          // what consumers read; holds material
	DocumentSettings = "document-settings/" // who may fill a document
	Rotation         = "rotation/"          // headers
	Evidence         = "evidence/"          // <rotation>/<role>
	Proof            = "proof/"             // <rotation>/<delivery>: what was seen at consumers
	Plan             = "plan/"              // <rotation>/<child>: roles of children that are to begin
	Open             = "open/"              // markers of rotations that have not ended
	Request          = "request/"           // hashed request ids and idempotency keys
	Due              = "due/"               // <hour>/<role>
	Claim            = "claim/"             // <hash>
	Reservation      = "reservation/"       // <consumer>: the unit whose it is
	Consumer         = "consumer/"          // what must pick secrets up; holds none
	Notification     = "notification/"      // where events are sent; holds signing keys and URLs
	Outbox           = "outbox/"            // <rotation>: what was told of it, and what is still to be sent
	Telling          = "telling"            // since when rotations are told, and of which roles
	Barrier          = "barrier"            // see Fenced.Settle
	Format           = "format"             // that of everything else; see All
)

// All lists every prefix. A change of what stands below one of them that an older version
// of the engine would make worse raises the format.
func All() []string {
	return []string{
		Config, Connection, Role, Deleted, Document, DocumentSettings, Rotation, Evidence, Proof, Plan, Open, Request, Due, Claim, Reservation,
		Consumer, Notification, Outbox, Telling, Barrier, Format,
	}
}

// SealWrapped lists the prefixes that hold secrets.
func SealWrapped() []string { return []string{Connection, Role, Deleted, Document, Notification} }

// ErrClosed is returned once the backend instance that owns the handle has been
// cleaned up. A worker that decided something before its node lost leadership
// must not write it after the node has regained it.
var ErrClosed = errors.New("this backend instance has been closed; nothing is written any more")

// Fenced is a storage handle that can be closed for good.
type Fenced struct {
	inner  logical.Storage
	mu     sync.Mutex
	closed bool
	writes sync.WaitGroup // under way
	// unsure counts writes that were answered with an error, settled how many of
	// them can no longer be applied. The instance before this one may have left
	// one behind, so there is one from the start.
	unsure, settled uint64
}

var _ logical.Storage = (*Fenced)(nil)

// Fence wraps s.
func Fence(s logical.Storage) *Fenced { return &Fenced{inner: s, unsure: 1} }

// Exists reports whether there is anything to write to: Vault makes backends without
// storage, to learn what they are.
func (f *Fenced) Exists() bool { return f.inner != nil }

// Close refuses every later write, and waits for those under way until ctx
// ends.
func (f *Fenced) Close(ctx context.Context) {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	idle := make(chan struct{})
	go func() { f.writes.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// begin reserves a place for a write; the caller gives it back with
// writes.Done.
func (f *Fenced) begin() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	f.writes.Add(1)
	return nil
}

// List implements logical.Storage.
func (f *Fenced) List(ctx context.Context, prefix string) ([]string, error) {
	return f.inner.List(ctx, prefix)
}

// Get implements logical.Storage.
func (f *Fenced) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	return f.inner.Get(ctx, key)
}

// Put implements logical.Storage.
func (f *Fenced) Put(ctx context.Context, e *logical.StorageEntry) error {
	return f.write(func() error { return f.inner.Put(context.WithoutCancel(ctx), e) })
}

// Delete implements logical.Storage.
func (f *Fenced) Delete(ctx context.Context, key string) error {
	return f.write(func() error { return f.inner.Delete(context.WithoutCancel(ctx), key) })
}

// write is not given up when its request is: a write that could be applied
// after a later one would bring back what that one replaced (docs/model,
// REORDER).
func (f *Fenced) write(do func() error) error {
	if err := f.begin(); err != nil {
		return err
	}
	defer f.writes.Done()
	err := do()
	if err != nil {
		f.mu.Lock()
		f.unsure++
		f.mu.Unlock()
	}
	return err
}

// Settle makes sure that what is read from now on stays true until somebody
// writes: a write that was answered with an error may still be applied, but not
// after a later write. So where there was one, something is written first, until
// that succeeds. Reading alone is not enough: the write could be applied between
// the reading and what is decided from it.
func (f *Fenced) Settle(ctx context.Context) error {
	f.mu.Lock()
	unsure := f.unsure
	calm := f.settled == unsure
	f.mu.Unlock()
	if calm {
		return nil
	}
	if err := f.Put(ctx, &logical.StorageEntry{Key: Barrier, Value: []byte("{}")}); err != nil {
		return fmt.Errorf("storage takes no writes now: %w", err)
	}
	f.mu.Lock()
	f.settled = max(f.settled, unsure)
	f.mu.Unlock()
	return nil
}

// Get reads the JSON entry at key; nil when there is none.
func Get[T any](ctx context.Context, s logical.Storage, key string) (*T, error) {
	e, err := s.Get(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", key, err)
	}
	if e == nil {
		return nil, nil
	}
	v := new(T)
	if err := jsonutil.DecodeJSON(e.Value, v); err != nil {
		return nil, Undecodable(key, err)
	}
	return v, nil
}

// undecodable is an entry that is there and cannot be understood. Reading it
// again does not help.
type undecodable struct {
	key string
	err error
}

func (u *undecodable) Error() string {
	return fmt.Sprintf("the entry %s cannot be decoded; it may have been written by a newer version: %v", u.key, u.err)
}

func (u *undecodable) Unwrap() error { return u.err }

// Undecodable says that the entry at key is no entry of its prefix, and why.
func Undecodable(key string, err error) error { return &undecodable{key: key, err: err} }

// IsUndecodable reports whether err is about an entry's content, and not about a
// failure to read it.
func IsUndecodable(err error) bool {
	var u *undecodable
	return errors.As(err, &u)
}

// Put writes v as JSON at key. Entries over limit bytes are refused before
// anything is written.
func Put(ctx context.Context, s logical.Storage, key string, v any, limit int) error {
	raw, err := jsonutil.EncodeJSON(v)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", key, err)
	}
	if len(raw) > limit {
		return fmt.Errorf("the entry %s would have %d bytes and may have %d; use shorter values or fewer versions", key, len(raw), limit)
	}
	if err := s.Put(ctx, &logical.StorageEntry{Key: key, Value: raw}); err != nil {
		return fmt.Errorf("writing %s: %w", key, err)
	}
	return nil
}
