package rotation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// The admin credential of a connection is a role of the machine like any other,
// under a name that no user can give to one. From the moment it is adopted its
// entry is the only place where that credential is kept, and drivers log in with
// whatever of it their server may accept (docs/adr/0007).

// rootPrefix is in no name that a role can have.
const rootPrefix = "root:"

// RootName is the name of the role that a connection's admin credential is.
func RootName(connection string) string { return rootPrefix + connection }

// Root reports whether the role is the admin credential of its connection.
func (r *Role) Root() bool { return IsRoot(r.Name) }

// IsRoot reports whether a role is what the engine itself logs in with at a connection.
func IsRoot(name string) bool { return strings.HasPrefix(name, rootPrefix) }

// Label is how people know a role.
func Label(kindName, name string) string {
	if connection, ok := strings.CutPrefix(name, rootPrefix); ok {
		return "rotate-root/" + connection
	}
	return kindName + "/" + name
}

// Label is that of the role, for answers.
func (p Part) Label() string { return Label(p.Kind, p.Role) }

// Key is what the role is called where its kind is not.
func (p Part) Key() string {
	if IsRoot(p.Role) {
		return p.Label()
	}
	return p.Role
}

// OwnerLabel names a role in a sentence.
func OwnerLabel(name string) string {
	if IsRoot(name) {
		return Label("", name)
	}
	return fmt.Sprintf("role %q", name)
}

// Root reads the admin credential of a connection; nil where the connection holds
// it itself, because nobody has asked for its rotation yet.
func (st *Store) Root(ctx context.Context, connection string) (*Role, error) {
	return st.Role(ctx, RootName(connection))
}

// EachRoot calls f with the admin credential of every connection that has one.
func (st *Store) EachRoot(ctx context.Context, f func(*Role)) error {
	names, err := st.s.List(ctx, storage.Role)
	if err != nil {
		return err
	}
	roles, _, err := st.readable(ctx, slices.DeleteFunc(names, func(n string) bool { return !IsRoot(n) }))
	for _, r := range roles {
		if r != nil {
			f(r)
		}
	}
	return err
}

// AdoptRoot takes over the admin credential of a connection: m is its first
// version. r says the rest. check may refuse once nobody else can claim the user.
// Where it was adopted before nothing happens.
func (e *Engine) AdoptRoot(ctx context.Context, r *Role, m kind.Material, check func(context.Context) error) error {
	if err := e.lockRole(ctx, r.Name); err != nil {
		return err
	}
	defer e.locks.unlock(r.Name)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	if known, err := e.st.Role(ctx, r.Name); err != nil || known != nil {
		return err
	}
	release, err := e.claim(ctx, r)
	if err != nil {
		return err
	}
	defer release()
	if err := check(ctx); err != nil {
		return err
	}
	now, none := time.Now().UTC(), time.Duration(0)
	r.Created, r.GracePeriod = now, &none // nobody but the engine uses it
	if t, err := e.st.Tombstone(ctx, r.Name); err != nil {
		return err
	} else if t != nil {
		r.Set.Last = t.Role.Set.Last
	}
	r.AdoptAs(m, now)
	if r.Next.IsZero() {
		r.Next = schedule.Next(r.Schedule, r.Name, now)
	}
	return e.putRole(ctx, nil, r)
}

// AdoptAs makes m the current version of an admin credential.
func (r *Role) AdoptAs(m kind.Material, now time.Time) {
	r.Add(m, "", now)
	r.Set.Promote(now)
}

// ReplaceRoot is for an admin credential that somebody has changed at its server,
// or that is one of another server, target: only m is tried from now on. What there
// was is kept as it is of a role that was deleted.
func (e *Engine) ReplaceRoot(ctx context.Context, connection, target string, m kind.Material) error {
	name := RootName(connection)
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	r, err := e.idleRoot(ctx, name)
	if err != nil || r == nil || r.Served(m) {
		return err
	}
	if err := e.entomb(ctx, r); err != nil {
		return err
	}
	now := time.Now().UTC()
	next := r.clone()
	next.Set = version.Set{Last: r.Set.Last}
	next.AdoptAs(m, now)
	next.Drift, next.Suspended, next.Failures = nil, "", 0
	next.Target = target
	return e.putMoved(ctx, r, next)
}

// MoveRoot has the admin credential of a connection own its user at the server that
// the connection leads to from now on.
func (e *Engine) MoveRoot(ctx context.Context, connection, target string) error {
	name := RootName(connection)
	if r, err := e.st.Role(ctx, name); err != nil || r == nil || r.Target == target {
		return err // nothing else changes it while the connection is locked
	}
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	r, err := e.st.Role(ctx, name)
	if err != nil || r == nil || r.Target == target {
		return err
	}
	next := r.clone()
	next.Target = target
	return e.putMoved(ctx, r, next)
}

// putMoved is putRole for a role whose server may be another one now.
func (e *Engine) putMoved(ctx context.Context, r, next *Role) error {
	if next.Target == r.Target {
		return e.putRole(ctx, r, next)
	}
	release, err := e.claim(ctx, next)
	if err != nil {
		return err
	}
	defer release()
	if err := e.putRole(ctx, r, next); err != nil {
		return err
	}
	for _, c := range r.claims() {
		if !next.holds(c.key()) {
			_ = e.dropClaim(ctx, c) // one that stays is not confirmed by its role
		}
	}
	return nil
}

// DropRoot forgets the admin credential of a connection that is deleted.
func (e *Engine) DropRoot(ctx context.Context, connection string) error {
	name := RootName(connection)
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	r, err := e.idleRoot(ctx, name)
	if err != nil || r == nil {
		return err
	}
	return e.bury(ctx, r)
}

// idleRoot reads an admin credential that is not being rotated; nil where there
// is none.
func (e *Engine) idleRoot(ctx context.Context, name string) (*Role, error) {
	if err := e.st.settle(ctx); err != nil {
		return nil, err
	}
	r, err := e.st.Role(ctx, name)
	if err == nil && r != nil && r.Run != nil {
		err = busy(r)
	}
	return r, err
}
