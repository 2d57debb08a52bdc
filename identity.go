package harmonyflow

import (
	"context"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// One user of one server has one owner, by whatever connection and address the
// server is reached: a role that rotates it, or a connection that logs in as it.

// Bounds on looking at other connections when one is written or used for a new
// role: those that do not answer must not hold it up again and again.
const (
	refreshTimeout  = 2 * time.Second
	refreshParallel = 16
	refreshAgain    = time.Second
	refreshDead     = time.Minute
)

// glimpses is when other connections are to be looked at again.
type glimpses struct {
	mu    sync.Mutex
	until map[string]time.Time
}

func (g *glimpses) due(name string, now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !now.Before(g.until[name])
}

func (g *glimpses) put(name string, until time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.until == nil {
		g.until = map[string]time.Time{}
	}
	g.until[name] = until
}

// refreshOthers reads the run ids of the servers behind other connections anew,
// so that one that has restarted meanwhile is known again when e leads to it by
// another address. Those that do not answer at once are left as they are.
func (b *backend) refreshOthers(ctx context.Context, e *connection.Entry) {
	t, err := b.connectionType(e.Type)
	if err != nil || !t.nodes {
		return // there are no run ids
	}
	others, err := b.connections.All(ctx)
	if err != nil {
		return // what is decided from them reads them again
	}
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	g := errgroup.Group{}
	g.SetLimit(refreshParallel)
	for _, k := range others {
		if k.Name == e.Name || k.Type != e.Type || !b.glimpses.due(k.Name, time.Now()) {
			continue
		}
		g.Go(func() error {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // its turn did not come
			}
			info, err := t.verify(ctx, k)
			if err != nil {
				b.glimpses.put(k.Name, time.Now().Add(refreshDead))
				return nil //nolint:nilerr // a server that is down tells nothing
			}
			b.glimpses.put(k.Name, time.Now().Add(refreshAgain))
			b.noteRunIDs(ctx, k, info.RunIDs)
			return nil
		})
	}
	_ = g.Wait()
}

// noteRunIDs stores which servers a connection was seen to lead to.
func (b *backend) noteRunIDs(ctx context.Context, seen *connection.Entry, ids []string) {
	if slices.Equal(seen.RunIDs, ids) {
		return
	}
	unlock, err := b.connections.Lock(ctx, seen.Name)
	if err != nil {
		return // who holds it looks for itself
	}
	defer unlock()
	now, err := b.connections.Get(ctx, seen.Name)
	if err != nil || now == nil || !reflect.DeepEqual(now, seen) {
		return
	}
	now.RunIDs = ids
	if err := b.connections.Put(ctx, now); err != nil {
		b.Logger().Warn("a connection cannot be stored", "connection", now.Name, "error", err)
	}
}

// identify makes sure that the target behind a connection is known by its own
// identity, also where the connection was stored without being tried, and where
// the server has restarted since.
func (b *backend) identify(ctx context.Context, name string) error {
	seen, err := b.connections.Must(ctx, name)
	if err != nil {
		return err
	}
	info, err := b.tryConnection(ctx, seen)
	if err != nil && len(seen.Members) > 0 {
		return conflict("connection %q cannot be used: %v", name, err)
	}
	if err != nil {
		return badRequest("connection %q cannot be used: %w", name, err)
	}
	b.refreshOthers(ctx, seen)
	if known, err := b.known(ctx, seen, info); err != nil || known {
		return err
	}
	unlock, err := b.holdConnection(ctx, name, b.connections.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	before, err := b.connections.Must(ctx, name)
	if err != nil {
		return err
	}
	t, err := b.connectionType(before.Type)
	if err != nil {
		return err
	}
	if before.Type != seen.Type || !t.sameEndpoint(before, seen) || !reflect.DeepEqual(before.Admin, seen.Admin) {
		return conflict("connection %q was written by another request; try again", name)
	}
	e := *before
	if err := b.moveRoot(ctx, before, &e, info, false); err != nil {
		return err
	}
	return b.putIdentified(ctx, before, &e, info)
}

// known reports whether there is nothing to learn from what was found behind a
// connection.
func (b *backend) known(ctx context.Context, e *connection.Entry, info *connection.Info) (bool, error) {
	if e.Identity == "" || !slices.Equal(e.RunIDs, info.RunIDs) ||
		slices.ContainsFunc(info.Members, func(m string) bool { return !slices.Contains(e.Members, m) }) {
		return false, nil
	}
	others, err := b.others(ctx, e)
	return !slices.ContainsFunc(others, func(k *connection.Entry) bool { return e.Overlaps(k) && k.Identity != e.Identity }), err
}

// others are all connections but e.
func (b *backend) others(ctx context.Context, e *connection.Entry) ([]*connection.Entry, error) {
	all, err := b.connections.All(ctx)
	return slices.DeleteFunc(all, func(k *connection.Entry) bool { return k.Name == e.Name }), err
}

// putIdentified stores a connection with the identity of its target; info is nil
// where that was not looked at.
func (b *backend) putIdentified(ctx context.Context, before, e *connection.Entry, info *connection.Info) error {
	return b.identified(ctx, before, e, info, func() error { return b.connections.Put(ctx, e) })
}

// identified gives a connection the identity of its target, and calls put unless
// that refuses it.
func (b *backend) identified(ctx context.Context, before, e *connection.Entry, info *connection.Info, put func() error) error {
	// One at a time: of two new connections to one target the second has to see
	// the first.
	b.identities.Lock()
	defer b.identities.Unlock()
	others, err := b.others(ctx, e)
	if err != nil {
		return err
	}
	if info != nil {
		if err := b.recognize(ctx, before, e, others, info); err != nil {
			return err
		}
	}
	if e.Identity == "" {
		return put()
	}
	for _, k := range others {
		if k.Identity != "" && k.Identity != e.Identity && e.Overlaps(k) {
			owner, err := b.engine.Owner(ctx, k.Identity, e.Username())
			if err == nil {
				err = rotatedAdmin(e, owner)
			}
			if err != nil {
				return err
			}
		}
	}
	return b.engine.WithClaim(ctx, e.Identity, e.Username(), func(owner string) error {
		if err := rotatedAdmin(e, owner); err != nil {
			return err
		}
		return put()
	})
}

// rotatedAdmin: a role, or another connection, would change the admin password
// under the connection, and retire it.
func rotatedAdmin(e *connection.Entry, owner string) error {
	if owner == "" || owner == rotation.RootName(e.Name) {
		return nil
	}
	return badRequest("username %q of connection %q is rotated by %s, which would lock the engine out; give the connection an admin user of its own",
		e.Username(), e.Name, rotation.OwnerLabel(owner))
}

// recognize gives a connection the identity of its target, which may be known
// already: from before a node came or went, or under another connection's name.
// Roles hold their claims under it, so as long as there are any it stays what it
// was, wherever the target has moved to.
func (b *backend) recognize(ctx context.Context, before, e *connection.Entry, others []*connection.Entry, info *connection.Info) error {
	e.Identity, e.Members, e.RunIDs = info.Identity, info.Members, info.RunIDs
	if before == nil || before.Identity == "" {
		e.Recognize(others)
		return nil
	}
	e.Recognize([]*connection.Entry{before})
	stays := e.Identity == before.Identity
	if !stays {
		e.Recognize(others)
	} else if i := slices.IndexFunc(others, func(k *connection.Entry) bool {
		return k.Identity != "" && k.Identity != e.Identity && e.Overlaps(k)
	}); i >= 0 {
		// Two connections that were taken for two servers turn out to lead to one.
		e.Identity = others[i].Identity
	}
	if e.Identity == before.Identity {
		return nil
	}
	role, err := b.userOf(ctx, e.Name)
	if err != nil || role == "" {
		return err
	}
	if !stays && slices.ContainsFunc(others, func(k *connection.Entry) bool { return k.Identity == e.Identity }) {
		return conflict("connection %q would lead to a server that another connection leads to already, and role %q uses it; delete its roles first", e.Name, role)
	}
	e.Identity = before.Identity
	return nil
}

// soleOwner refuses a role of a user that somebody else has, by whatever
// connection that leads to the same server.
func (b *backend) soleOwner(ctx context.Context, e *connection.Entry, r *rotation.Role) error {
	all, err := b.connections.All(ctx)
	if err != nil {
		return err
	}
	for _, k := range all {
		if k.Name != e.Name && !k.Same(e) {
			continue
		}
		for _, user := range r.Spec.Owns() {
			if err := b.soleUser(ctx, e, k, r, user); err != nil {
				return err
			}
		}
	}
	return nil
}

// soleUser is soleOwner for one user, and one connection k to the server of e.
func (b *backend) soleUser(ctx context.Context, e, k *connection.Entry, r *rotation.Role, user string) error {
	if k.Administers(user) {
		return badRequest("username %q is the admin user of connection %q, which leads to the same server, and a role must not rotate it; use another admin user for the connection, or another role", user, k.Name)
	}
	if k.Identity == "" || k.Identity == e.Identity {
		return nil
	}
	owner, err := b.engine.Owner(ctx, k.Identity, user)
	if err == nil && owner != "" && owner != r.Name {
		err = conflict("user %q of this target belongs to %s by way of connection %q; one role owns a user", user, rotation.OwnerLabel(owner), k.Name)
	}
	return err
}
