package redis

import (
	"context"
	"slices"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// step is which half of a change is due.
type step int

const (
	whole step = iota
	// A user that nodes log in to each other with is changed in two halves,
	// with the switch of masterauth between them.
	acceptOnly
	refuseToo
)

// Change implements kind.Target. Hashes alone travel, except to masterauth.
func (t *target) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	outcomes := make([]kind.Outcome, len(changes))
	users := make([]kind.User, len(changes))
	for i, c := range changes {
		users[i] = c.User
	}
	f, err := t.discover(ctx, users)
	if err != nil {
		for i := range outcomes {
			outcomes[i].Err = err
		}
		return outcomes
	}
	defer f.close()

	j := &job{fleet: f, changes: changes, users: users, works: f.share(users)}
	j.steps = make([]step, len(changes))
	links := false
	for i, c := range changes {
		if f.isLinkUser(c.Username) {
			j.steps[i], links = acceptOnly, true
		}
	}
	first := ctx
	if links { // a node that hangs leaves time for what follows
		var cancel context.CancelFunc
		first, cancel = within(ctx, 2, kind.CallTimeout)
		defer cancel()
	}
	j.round(first, func(step) bool { return true })
	if links {
		j.switchLinks(ctx)
		j.refuseAfterLinks(ctx)
	}
	for i := range outcomes {
		outcomes[i].Nodes = f.results(j.works, i)
	}
	return outcomes
}

// job is one call of Change.
type job struct {
	*fleet
	changes []kind.Change
	users   []kind.User
	works   map[*node]*work
	steps   []step
}

// round makes every node do what is due, in parallel.
func (j *job) round(ctx context.Context, due func(step) bool) {
	j.each(func(n *node) {
		w := j.works[n]
		which := slices.DeleteFunc(w.todo(), func(i int) bool { return !due(j.steps[i]) })
		if len(which) > 0 {
			j.apply(ctx, w, which)
		}
	})
}

// apply changes those users at one node and saves once. The users are read
// first, on the same connection: a node that hangs already never gets to see
// the change, and ACL SETUSER would create a user that does not exist.
//
// It saves even when nothing had to change: whether an earlier call that did
// the change got as far as saving it cannot be known.
func (j *job) apply(ctx context.Context, w *work, which []int) {
	save, err := w.persistence(j.entry.Redis.Persistence)
	if err != nil {
		for _, i := range which {
			w.errs[i] = err
		}
		return
	}
	w.read(ctx, j.users, which)
	var commands []command
	var owners, good []int
	for _, i := range which {
		if w.errs[i] != nil {
			continue
		}
		modifiers, err := plan(j.changes[i], w.users[i], w.name, j.steps[i])
		if w.errs[i] = err; err != nil {
			continue
		}
		good = append(good, i)
		if len(modifiers) > 0 {
			commands = append(commands, append(command{"ACL", "SETUSER", j.changes[i].Username}, modifiers...))
			owners = append(owners, i)
		}
	}
	if len(good) == 0 {
		return
	}
	if save != nil {
		commands = append(commands, save)
	}
	replies := w.s.run(ctx, commands)
	for at, i := range owners {
		if err := replies[at].err; err != nil {
			w.errs[i] = w.s.explain(err, "change user "+j.changes[i].Username+" with ACL SETUSER", j.changes[i].Username)
		}
	}
	if save == nil {
		return
	}
	if err := replies[len(replies)-1].err; err != nil {
		for _, i := range good {
			if w.errs[i] == nil {
				w.errs[i] = w.s.explainPersist(err, save)
			}
		}
	}
}

// plan returns the modifiers of ACL SETUSER that make c true of u, none where
// it is true already. They are applied all or none.
func plan(c kind.Change, u user, node string, s step) ([]any, error) {
	if !u.exists {
		return nil, kind.Definitely("user %s does not exist at node %s: create it there with ACL SETUSER and its rules", c.Username, node)
	}
	accept, err := hashes(c.Accept)
	if err != nil {
		return nil, err
	}
	if c.Exclusive {
		return planExclusive(accept, u, s), nil
	}
	refuse, err := hashes(c.Refuse)
	if err != nil {
		return nil, err
	}
	if u.nopass && len(accept)+len(refuse) > 0 {
		return nil, kind.Definitely("user %s needs no password at node %s (nopass), and a password would lock out clients that send none: give it a password with ACL SETUSER first", c.Username, node)
	}
	var out []any
	for _, h := range accept {
		if !u.has(h) {
			out = append(out, "#"+h)
		}
	}
	for _, h := range refuse {
		// Removing a hash that is not there would fail the whole command.
		if s != acceptOnly && u.has(h) && !slices.Contains(accept, h) {
			out = append(out, "!"+h)
		}
	}
	return out, nil
}

func planExclusive(accept []string, u user, s step) []any {
	if s == acceptOnly {
		var out []any
		for _, h := range accept {
			if !u.nopass && !u.has(h) {
				out = append(out, "#"+h)
			}
		}
		return out
	}
	same := len(u.hashes) == len(accept) && !slices.ContainsFunc(accept, func(h string) bool { return !u.has(h) })
	if same && !u.nopass {
		return nil
	}
	return only(accept)
}

// only takes every password away that is none of accept.
func only(accept []string) []any {
	out := []any{"resetpass"}
	for _, h := range accept {
		out = append(out, "#"+h)
	}
	return out
}

// hashes returns the distinct hashes of materials.
func hashes(materials []kind.Material) ([]string, error) {
	var out []string
	for _, m := range materials {
		if m.Secret == "" {
			return nil, kind.Definitely("a password of user %s is empty: nothing was changed", m.Username)
		}
		if h := hashOf(m.Secret); !slices.Contains(out, h) {
			out = append(out, h)
		}
	}
	return out, nil
}
