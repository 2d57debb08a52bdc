package redis

import (
	"context"
	"fmt"
	"slices"
	"strings"

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

// Change implements kind.Target. Hashes alone travel, except to masterauth
// and to sentinels.
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
		if f.inHalves(c.Username) {
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
		j.switchSentinels(ctx)
		j.refuseAfterLinks(ctx)
	}
	j.closeSessions(ctx)
	for i := range outcomes {
		outcomes[i].Nodes, outcomes[i].Notes = f.results(j.works, i), j.notes(i)
		if j.watched != nil {
			outcomes[i].Nodes = append(outcomes[i].Nodes, j.watched[i]...)
		}
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
	watched [][]kind.NodeError // what came of each change at the sentinels
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
	orders := j.orders(w, which)
	var commands []command
	var sent []order
	for _, o := range orders {
		if len(o.modifiers) > 0 {
			commands = append(commands, append(command{"ACL", "SETUSER", j.changes[o.user].Username}, o.modifiers...))
			sent = append(sent, o)
		}
	}
	if len(orders) == 0 {
		return
	}
	if save != nil {
		commands = append(commands, save)
	}
	replies := w.s.run(ctx, commands)
	for at, o := range sent {
		if err := replies[at].err; err != nil {
			w.errs[o.user] = w.s.explainChange(err, j.changes[o.user], o.modifiers)
		} else if o.effect != none {
			w.effects[o.user] = o.effect
		}
	}
	if save == nil {
		return
	}
	if err := replies[len(replies)-1].err; err != nil {
		for _, o := range orders {
			if w.errs[o.user] == nil {
				w.errs[o.user] = w.s.explainPersist(err, save)
			}
		}
	}
}

// effect is what a change does to a user beside its passwords.
type effect int

const (
	none effect = iota
	created
	aligned
)

// order is one ACL SETUSER, whose modifiers are applied all or none.
type order struct {
	user      int
	modifiers []any // none where nothing has to change
	effect    effect
}

// orders are what w has to do for those users.
func (j *job) orders(w *work, which []int) []order {
	var out []order
	for _, i := range which {
		if w.errs[i] != nil {
			continue
		}
		o, err := w.order(j.changes[i], w.users[i], j.steps[i])
		if w.errs[i] = err; err == nil {
			o.user = i
			out = append(out, o)
		}
	}
	return out
}

// order makes c true of u, its rules included.
func (w *work) order(c kind.Change, u user, s step) (order, error) {
	switch {
	case u.exists || c.User.Exists():
	case len(c.Accept) == 0:
		return order{}, nil // who is not there is refused
	case len(c.Profile) > 0:
		accept, err := hashes(c.Accept)
		return order{modifiers: append(w.facts.create(c.Profile), only(accept)...), effect: created}, err
	}
	modifiers, err := plan(c, u, w.name, s)
	if err != nil || !c.Align || len(c.Profile) == 0 || slices.Equal(u.profile(), c.Profile) {
		return order{modifiers: modifiers}, err
	}
	return order{modifiers: append(w.facts.align(c.Profile), modifiers...), effect: aligned}, nil
}

// notes tell what became of change number i beside passwords.
func (j *job) notes(i int) []string {
	at := map[effect][]string{}
	var open []error
	closed := 0
	for _, n := range j.nodes {
		w := j.works[n]
		at[w.effects[i]] = append(at[w.effects[i]], n.name)
		closed += w.closed[i]
		if w.unclosed[i] != nil {
			open = append(open, w.unclosed[i])
		}
	}
	var out []string
	name := j.changes[i].Username
	if nodes := at[created]; len(nodes) > 0 {
		out = append(out, fmt.Sprintf("user %s was created at %s", name, strings.Join(nodes, ", ")))
	}
	if nodes := at[aligned]; len(nodes) > 0 {
		out = append(out, fmt.Sprintf("user %s was given the rules that it is to have at %s", name, strings.Join(nodes, ", ")))
	}
	if closed > 0 {
		out = append(out, fmt.Sprintf("connections of user %s that were closed: %d", name, closed))
	}
	if len(open) > 0 { // one is enough to act on
		out = append(out, fmt.Sprintf("connections of user %s may still be open at %d nodes: %s", name, len(open), open[0]))
	}
	return out
}

// plan returns the modifiers of ACL SETUSER that make c true of the passwords of u,
// none where it is true already.
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
