package rotation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Limits of stored entries, well below what Vault's storage takes (1 MiB for
// integrated storage).
const (
	maxRoleEntry   = 256 << 10
	maxHeaderEntry = 64 << 10
	maxSmallEntry  = 64 << 10
)

// parallelStorage is how many storage requests of one batch are under way at
// once: from a plugin each is a round trip, and Vault answers many in the time
// of one.
const parallelStorage = 32

// Store reads and writes what the engine keeps.
type Store struct{ s *storage.Fenced }

// NewStore returns a Store over s.
func NewStore(s logical.Storage) *Store {
	f, ok := s.(*storage.Fenced)
	if !ok {
		f = storage.Fence(s)
	}
	return &Store{s: f}
}

// settle is called between taking a lock and reading what it guards, wherever
// something is decided from what is read; see storage.Fenced.Settle.
func (st *Store) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	return st.s.Settle(ctx)
}

// Role reads a role; nil when there is none.
func (st *Store) Role(ctx context.Context, name string) (*Role, error) {
	r, err := storage.Get[Role](ctx, st.s, storage.Role+name)
	if r != nil {
		r.Name, r.Spec.Role = name, name
	}
	return r, err
}

// Roles reads many roles, in order; nil for those that do not exist.
func (st *Store) Roles(ctx context.Context, names []string) ([]*Role, error) {
	out, bad := st.roles(ctx, names)
	for _, name := range names {
		if err := bad[name]; err != nil {
			return nil, err
		}
	}
	return out, nil
}

// roles reads what can be read of many roles, in order, and says by name why the
// others cannot: one bad entry is the problem of one role.
func (st *Store) roles(ctx context.Context, names []string) (out []*Role, bad map[string]error) {
	out, bad = make([]*Role, len(names)), map[string]error{}
	var mu sync.Mutex
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for i, name := range names {
		g.Go(func() error {
			r, err := st.Role(ctx, name)
			if err != nil {
				mu.Lock()
				bad[name] = err
				mu.Unlock()
				return nil //nolint:nilerr // it costs its own role alone
			}
			out[i] = r
			return nil
		})
	}
	_ = g.Wait()
	return out, bad
}

// readable are the roles of names that can be decoded, nil for the others, whose
// names it returns. It fails where storage does.
func (st *Store) readable(ctx context.Context, names []string) (out []*Role, unreadable []string, err error) {
	out, bad := st.roles(ctx, names)
	for _, name := range names {
		switch err := bad[name]; {
		case err == nil:
		case storage.IsUndecodable(err):
			unreadable = append(unreadable, name)
		default:
			return nil, nil, err
		}
	}
	return out, unreadable, nil
}

// RoleNames lists every role that people have made.
func (st *Store) RoleNames(ctx context.Context) ([]string, error) {
	names, err := st.s.List(ctx, storage.Role)
	return slices.DeleteFunc(names, IsRoot), err
}

// PutRole writes next over old (nil when new). The due entry is stored first
// and the stale one removed last, so that a crash in between leaves an entry too
// many, never one too few; entries are checked against the role when read.
func (st *Store) PutRole(ctx context.Context, old, next *Role) error {
	var was time.Time
	if old != nil {
		was = old.dueAt()
	}
	will := next.dueAt()
	moved := !was.Equal(will)
	if moved && !will.IsZero() {
		if err := st.putDue(ctx, will, next.Name); err != nil {
			return err
		}
	}
	if err := storage.Put(ctx, st.s, storage.Role+next.Name, next, maxRoleEntry); err != nil {
		return err
	}
	if moved && !was.IsZero() && dueKey(was, next.Name) != dueKey(will, next.Name) {
		// The role is stored: a leftover here is found and removed when its hour
		// comes.
		_ = st.s.Delete(ctx, dueKey(was, next.Name))
	}
	return nil
}

// DeleteRole removes a role's entry and its due entry.
func (st *Store) DeleteRole(ctx context.Context, r *Role) error {
	if err := st.s.Delete(ctx, storage.Role+r.Name); err != nil {
		return fmt.Errorf("deleting role %q: %w", r.Name, err)
	}
	if at := r.dueAt(); !at.IsZero() {
		_ = st.s.Delete(ctx, dueKey(at, r.Name))
	}
	return nil
}

// hourFormat sorts by time.
const hourFormat = "2006010215"

func dueKey(t time.Time, role string) string {
	return storage.Due + t.UTC().Format(hourFormat) + "/" + role
}

type dueEntry struct {
	At time.Time `json:"at"`
}

func (st *Store) putDue(ctx context.Context, at time.Time, role string) error {
	return storage.Put(ctx, st.s, dueKey(at, role), dueEntry{At: at.UTC()}, maxSmallEntry)
}

// DueHours lists the hours that have due entries, earliest first.
func (st *Store) DueHours(ctx context.Context) ([]time.Time, error) {
	keys, err := st.s.List(ctx, storage.Due)
	if err != nil {
		return nil, fmt.Errorf("listing due rotations: %w", err)
	}
	hours := make([]time.Time, 0, len(keys))
	for _, k := range keys {
		if t, err := time.Parse(hourFormat, strings.TrimSuffix(k, "/")); err == nil {
			hours = append(hours, t.UTC())
		}
	}
	return hours, nil
}

// DueIn reads the due entries of an hour. One that cannot be decoded counts from
// the beginning of its hour: what is due is checked against the role.
func (st *Store) DueIn(ctx context.Context, hour time.Time) (map[string]time.Time, error) {
	prefix := storage.Due + hour.UTC().Format(hourFormat) + "/"
	names, err := st.s.List(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("listing due rotations: %w", err)
	}
	times := make([]time.Time, len(names))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for i, name := range names {
		g.Go(func() error {
			e, err := storage.Get[dueEntry](ctx, st.s, prefix+name)
			switch {
			case storage.IsUndecodable(err):
				times[i] = hour.UTC()
				return nil
			case err == nil && e != nil:
				times[i] = e.At
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out := make(map[string]time.Time, len(names))
	for i, name := range names {
		if !times[i].IsZero() {
			out[name] = times[i]
		}
	}
	return out, nil
}

// DropDue removes a due entry that its role does not confirm.
func (st *Store) DropDue(ctx context.Context, at time.Time, role string) error {
	return st.s.Delete(ctx, dueKey(at, role))
}

// Tombstone is what is kept of a deleted role: its credential still works at
// its target, so it is not forgotten at once.
type Tombstone struct {
	Role    *Role     `json:"role"`
	Deleted time.Time `json:"deleted"`
	// Earlier is what an earlier role of the name left behind, where that was
	// about another user: its material must not be forgotten with it.
	Earlier *Tombstone `json:"earlier,omitempty"`
}

// tombstoneAge is how long a deleted role can be brought back.
const tombstoneAge = 30 * 24 * time.Hour

// Tombstone reads what is left of a deleted role; nil when nothing is.
func (st *Store) Tombstone(ctx context.Context, name string) (*Tombstone, error) {
	return storage.Get[Tombstone](ctx, st.s, storage.Deleted+name)
}

func (st *Store) putTombstone(ctx context.Context, t *Tombstone) error {
	return storage.Put(ctx, st.s, storage.Deleted+t.Role.Name, t, maxRoleEntry)
}

// Claim says that one role owns a user of a target.
type Claim struct {
	Role     string `json:"role"`
	Target   string `json:"target"`
	Username string `json:"username"`
}

func (c Claim) key() string { return ClaimKey(c.Target, c.Username) }

// taken says that owner has what c asks for.
func (c Claim) taken(owner string) string {
	if document, ok := strings.CutPrefix(c.Target, documentTarget); ok {
		return fmt.Sprintf("field %q of document %q belongs to role %q; one role owns a field", c.Username, document, owner)
	}
	if strings.HasPrefix(c.Target, placeTarget) {
		return fmt.Sprintf("field %q of the secret that the role would be published to belongs to role %q; one role owns a field", c.Username, owner)
	}
	return fmt.Sprintf("user %q of this target belongs to %s; one role owns a user", c.Username, OwnerLabel(owner))
}

// ClaimKey is where the claim of a user of a target is stored.
func ClaimKey(target, username string) string {
	sum := sha256.Sum256([]byte(target + "\x00" + username))
	return storage.Claim + hex.EncodeToString(sum[:])
}

// ConfigOf reads the mount's configuration, with defaults where it was not
// written.
func (st *Store) ConfigOf(ctx context.Context) (Config, error) {
	c, err := storage.Get[Config](ctx, st.s, storage.Config)
	if err != nil || c == nil {
		return DefaultConfig(), err
	}
	return *c, nil
}

// PutConfig writes the mount's configuration.
func (st *Store) PutConfig(ctx context.Context, c Config) error {
	return storage.Put(ctx, st.s, storage.Config, c, maxSmallEntry)
}
